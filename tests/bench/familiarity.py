"""Measures how well a model tells colon from other images: windows beyond its limit, AUROC, and false alarms.

    python -m tests.bench.familiarity MODEL OWN --data FOLDER       # OWN: the data set that the model was trained with
    python -m tests.bench.familiarity --folds FOLDS --data FOLDER   # FOLDS: the folder of tests.bench.colorectal

FOLDER holds ebhi-seg, glas, kather2016 and slides. Familiar are the left-out images of OWN (the test split or, if
there is none, the validation split) and colon of other laboratories. Unfamiliar are slides of other organs, and the
left-out images of OWN after a change: other colors, blur, other pixel sizes. An
image or slide is flagged if a larger share of its windows than the model's `share_limit` lies beyond the limit. The
segmenter does not run.

With --folds, the bundle of each finished fold is measured on the composed images of the slide that the fold left out,
and on CMU-1. FOLDER then needs kather2016 and slides.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from skimage.color import hed2rgb, rgb2hed
from torch import Tensor

from models.bundle import Bundle, load_bundle, load_networks, load_statistics
from models.classifier import Classifier
from models.familiarity import WINDOW, textures, window_features
from pipeline.training.compose import composed
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, load_dataset, read_rgb, samples
from pipeline.training.dataset_sections import Split
from pipeline.training.familiarity import SHARE_LIMIT
from pipeline.training.inputs import as_input, padded
from pipeline.training.resample import resampled
from tests.bench.colorectal import fold, of_tiles_alone
from wsi.box import Box
from wsi.levels import pick_level
from wsi.slide import Slide, open_slide
from wsi.tissue import find_tissue

RGB = NDArray[np.uint8]

FOLDERS = {"ebhi-seg": "ebhi-seg", "glas": "glas", "kather-2016": "kather2016", "colorectal": "kather2016"}
"""The folder of each data set of colon. One folder is measured once."""

SKIN = "CMU-1 (skin)"
"""The slide of skin on which each fold is measured."""

SLIDES = {
    SKIN: ("CMU-1.svs", None),
    "CMU-1-Small-Region (skin)": ("CMU-1-Small-Region.svs", None),
    "TCGA-CR-7395 (head and neck)": ("TCGA-CR-7395-01A-01-TS1.svs", 0.25),
    "camelyon-multiframe.dcm, read as 1 µm/px": ("camelyon-multiframe.dcm", 1.0),
}
"""Slides and the pixel size to pass, if the slide does not state a usable one."""

MOST_WINDOWS = 300
"""Windows of a slide: if there are more, every n-th."""


@dataclass(frozen=True)
class Measured:
    """The distances of one set, in units of the model's limit."""

    name: str
    distances: tuple[NDArray[np.float32], ...]
    """Of the windows of each image or slide."""

    @property
    def all(self) -> NDArray[np.float32]:
        """Return the distances of all windows."""
        return np.concatenate(self.distances)

    def flagged(self, share_limit: float) -> float:
        """Return the share of images that are flagged."""
        return float(np.mean([(one > 1).mean() > share_limit for one in self.distances]))


def gray(rgb_HWC: RGB) -> RGB:
    """Return the image without colors."""
    return np.asarray(Image.fromarray(rgb_HWC).convert("L").convert("RGB"))


def inverted(rgb_HWC: RGB) -> RGB:
    """Return the negative."""
    return 255 - rgb_HWC


def swapped(rgb_HWC: RGB) -> RGB:
    """Return the image with red and blue exchanged, as a reader with the wrong order of channels gives it."""
    return np.ascontiguousarray(rgb_HWC[..., ::-1])


def brown(rgb_HWC: RGB) -> RGB:
    """Return the image with DAB in place of eosin, as immunohistochemistry looks."""
    hed_HWC = rgb2hed(rgb_HWC)
    stained_HWC = np.stack([hed_HWC[..., 0], np.zeros_like(hed_HWC[..., 0]), hed_HWC[..., 1]], axis=2)
    return np.asarray(np.clip(255 * hed2rgb(stained_HWC), 0, 255).astype(np.uint8))


def turned_hue(rgb_HWC: RGB) -> RGB:
    """Return the image with the hue turned by 90 degrees."""
    hsv_HWC = np.array(Image.fromarray(rgb_HWC).convert("HSV"))
    hsv_HWC[..., 0] += 64  # of 256, wraps around
    return np.asarray(Image.fromarray(hsv_HWC, "HSV").convert("RGB"))


def blurred(radius: float) -> Callable[[RGB], RGB]:
    """Return a function that blurs by a Gaussian with this standard deviation in pixels."""
    return lambda rgb_HWC: np.asarray(Image.fromarray(rgb_HWC).filter(ImageFilter.GaussianBlur(radius)))


def scaled(factor: float) -> Callable[[RGB], RGB]:
    """Return a function that enlarges by this factor, as a wrong pixel size does.

    An image smaller than a window is padded to the size of a window with mirrored tissue. Means over a partial window
    vary more, and a slide has only whole windows.
    """

    def change(rgb_HWC: RGB) -> RGB:
        width, height = (round(side * factor) for side in rgb_HWC.shape[1::-1])
        sized_HWC = np.asarray(Image.fromarray(rgb_HWC).resize((width, height), Image.Resampling.LANCZOS))
        missing = ((0, max(0, WINDOW - height)), (0, max(0, WINDOW - width)), (0, 0))
        return np.pad(sized_HWC, missing, mode="symmetric")

    return change


CHANGES: dict[str, Callable[[RGB], RGB]] = {
    "gray": gray,
    "inverted": inverted,
    "red and blue exchanged": swapped,
    "hue turned by 90°": turned_hue,
    "DAB in place of eosin": brown,
    "blurred by 2 px": blurred(2),
    "blurred by 4 px": blurred(4),
    "half the size": scaled(0.5),
    "twice the size": scaled(2),
}


def auroc(familiar: NDArray[np.floating], unfamiliar: NDArray[np.floating]) -> float:
    """Return the probability that an unfamiliar window is farther away than a familiar one; ties count one half."""
    ranked = np.sort(familiar)
    below = np.searchsorted(ranked, unfamiliar, side="left") + np.searchsorted(ranked, unfamiliar, side="right")
    return float(below.mean() / (2 * len(familiar)))


@torch.inference_mode()
def features(classifier: Classifier, rgb_HWC: RGB) -> Tensor:
    """Return the features (N, C) of the windows of an image at the model's pixel size."""
    x_NCHW = as_input(padded(rgb_HWC[None]), torch.device("cpu"), TrainConfig())
    textures_NEhw = textures(classifier.stages(x_NCHW))
    return window_features(textures_NEhw, x_NCHW.shape[2] // textures_NEhw.shape[2]).flatten(0, 2)


class Meter:
    """Measures images with the classifier and the statistics of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        statistics, classifier = load_statistics(bundle), load_networks(bundle)[0]
        if statistics is None or bundle.card.familiarity is None:
            raise SystemExit(f"{bundle.card.name} has no statistics; add them with wsi-familiarity")
        assert isinstance(classifier, Classifier)
        self.card, self.share_limit = bundle.card, bundle.card.familiarity.share_limit
        self._limit = bundle.card.familiarity.window_limit
        self._classifier, self._statistics = classifier, statistics

    def distances(self, rgb_HWC: RGB) -> NDArray[np.float32]:
        """Return the distances of the windows of an image at the model's pixel size, in units of the limit."""
        distance_N = self._statistics.distances(features(self._classifier, rgb_HWC)) / self._limit
        distances: NDArray[np.float32] = distance_N.numpy()
        return distances

    def measured(self, name: str, images: Iterable[RGB]) -> Measured:
        """Return the distances of these images."""
        found = Measured(name, tuple(self.distances(rgb_HWC) for rgb_HWC in images))
        print(f"{name}: {len(found.distances)} images, {len(found.all)} windows", flush=True)
        return found


def left_out(dataset: Dataset) -> Split:
    """Return the split that no network was trained with."""
    return dataset.card.splits[-1]


def images_of(dataset: Dataset, mpp: float, every: int = 1) -> Iterator[RGB]:
    """Yield the left-out images at a pixel size."""
    for sample in samples(dataset, left_out(dataset))[::every]:
        yield resampled(read_rgb(sample), dataset.mpp / mpp)


def slide_windows(slide: Slide, mpp: float) -> list[RGB]:
    """Return windows of a slide, side by side, that are at least half tissue, at a pixel size."""
    info, tissue = slide.info, find_tissue(slide)
    level = pick_level(info.level_downsamples, mpp / info.mpp)
    l0_per_lv = info.level_downsamples[level]
    side_l0 = WINDOW * mpp / info.mpp
    columns, rows = (int(length // side_l0) for length in (info.bounds_l0.width, info.bounds_l0.height))
    share_rc = tissue.sample(Box(0, 0, columns * 8, rows * 8), side_l0 / 8).reshape(rows, 8, columns, 8).mean((1, 3))
    places = np.argwhere(share_rc >= 0.5)
    windows = []
    for row, column in places[:: -(-len(places) // MOST_WINDOWS)]:
        x, y = (
            round((corner + index * side_l0) / l0_per_lv)
            for corner, index in ((info.bounds_l0.x, column), (info.bounds_l0.y, row))
        )
        side_lv = round(side_l0 / l0_per_lv)
        pixels = slide.read(level, Box(x, y, side_lv, side_lv)).rgb_HWC
        windows.append(np.asarray(Image.fromarray(pixels).resize((WINDOW, WINDOW), Image.Resampling.BOX)))
    return windows


def windows_of(name: str, data: Path, mpp: float) -> list[RGB]:
    """Return the windows of one of the slides."""
    file, slide_mpp = SLIDES[name]
    with open_slide(data / "slides" / file, slide_mpp) as slide:
        return slide_windows(slide, mpp)


def measure(model: str, own: str, data: Path, work: Path) -> tuple[Meter, list[Measured], list[Measured]]:
    """Return the familiar sets, of which the first is that of `own`, and the unfamiliar ones."""
    meter = Meter(load_bundle(model))
    mpp = meter.card.mpp
    sets = {own: load_dataset(own, data / FOLDERS[own])}
    for name, folder in FOLDERS.items():
        if folder not in {FOLDERS[other] for other in sets}:
            sets[name] = load_dataset(name, data / folder)
    sets = {name: composed(dataset, work, (left_out(dataset),)) for name, dataset in sets.items()}
    familiar = [
        meter.measured(f"{name}, {left_out(dataset)} split", images_of(dataset, mpp)) for name, dataset in sets.items()
    ]
    unfamiliar = []
    for name in SLIDES:
        windows = windows_of(name, data, mpp)
        found = Measured(name, (np.concatenate([meter.distances(rgb_HWC) for rgb_HWC in windows]),))
        print(f"{name}: {len(found.all)} windows", flush=True)
        unfamiliar.append(found)
    for name, change in CHANGES.items():
        unfamiliar.append(meter.measured(name, map(change, images_of(sets[own], mpp, every=3))))
    return meter, familiar, unfamiliar


def table(meter: Meter, familiar: Sequence[Measured], unfamiliar: Sequence[Measured]) -> str:
    """Return the rows of a Markdown table."""
    own, every = familiar[0].all, np.concatenate([one.all for one in familiar])
    rows = ["| set | windows | beyond the limit | flagged | AUROC: own images | AUROC: all familiar |"]
    rows.append("|---|---|---|---|---|---|")
    for one in [*familiar, *unfamiliar]:
        is_familiar = any(one is other for other in familiar)
        scores = "| |" if is_familiar else f"| {auroc(own, one.all):.3f} | {auroc(every, one.all):.3f} |"
        flagged = f"{100 * one.flagged(meter.share_limit):.0f} % of {len(one.distances)}"
        rows.append(f"| {one.name} | {len(one.all)} | {100 * (one.all > 1).mean():.0f} % | {flagged} {scores}")
    means = [np.mean([auroc(reference, one.all) for one in unfamiliar]) for reference in (own, every)]
    return "\n".join([*rows, f"| mean of the unfamiliar sets | | | | {means[0]:.3f} | {means[1]:.3f} |"])


def measure_folds(folds: Path, data: Path) -> list[tuple[Measured, Measured]]:
    """Measure the left-out slide and skin with the bundle of each finished fold.

    Raises SystemExit if no fold is finished.
    """
    recipe = json.loads((folds / "recipe.json").read_text(encoding="utf-8"))
    dataset = load_dataset(recipe["dataset"], data / FOLDERS[recipe["dataset"]])
    skin = cache(partial(windows_of, SKIN, data))
    found: list[tuple[Measured, Measured]] = []
    for run in sorted(file.parent for file in folds.glob("*/maps.npz")):
        meter = Meter(load_bundle(run / "bundle"))
        mosaics = composed(of_tiles_alone(fold(dataset, run.name, recipe["images"])), run, ("test",))
        own = meter.measured(run.name, images_of(mosaics, meter.card.mpp))
        found.append((own, meter.measured(SKIN, skin(meter.card.mpp))))
    if not found:
        raise SystemExit(f"{folds}: no finished fold of tests.bench.colorectal")
    return found


def folds_table(found: Sequence[tuple[Measured, Measured]]) -> str:
    """Return the rows of a Markdown table: each left-out slide beside skin, and all images of left-out slides."""
    rows = ["| slide | images | flagged | windows beyond the limit | skin beyond the limit | AUROC: skin |"]
    rows.append("|---|---|---|---|---|---|")
    for own, skin in found:
        rows.append(f"| {_familiar(own)} | {100 * (skin.all > 1).mean():.0f} % | {auroc(own.all, skin.all):.3f} |")
    every = Measured("all", tuple(one for own, _ in found for one in own.distances))
    mean = np.mean([auroc(own.all, skin.all) for own, skin in found])
    return "\n".join([*rows, f"| {_familiar(every)} | | mean {mean:.3f} |"])


def _familiar(own: Measured) -> str:
    """Return the name, the number of images, and the shares of flagged images and of windows beyond the limit.

    Bundles of training runs have `SHARE_LIMIT` as their limit.
    """
    flagged, beyond = own.flagged(SHARE_LIMIT), (own.all > 1).mean()
    return f"{own.name} | {len(own.distances)} | {100 * flagged:.0f} % | {100 * beyond:.0f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("own", nargs="?", choices=sorted(FOLDERS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folds", type=Path, help="measure the finished folds in this folder instead")
    options = parser.parse_args(arguments)
    if options.folds is not None:
        if options.model is not None:
            parser.error("with --folds, the models are those of the folds; omit MODEL and OWN")
        print(folds_table(measure_folds(options.folds, options.data)))
        return
    if options.own is None:
        parser.error("MODEL and OWN are required without --folds")
    with tempfile.TemporaryDirectory() as work:
        print(table(*measure(options.model, options.own, options.data, Path(work))))


if __name__ == "__main__":
    main()
