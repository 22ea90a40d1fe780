"""Composed training images: mosaics of images that show one tissue each.

A data set of single-tissue images teaches no border and no neighborhood. This module joins neighboring images, fills
irregular cells with them, and blends the cells along soft or hard borders. The idea is that of HisynSeg (2024). As for
any data set, presence labels of windows are the supervision; the known map of tissues serves to label these windows and
to measure. Images of other data sets can stand beside the composed ones as they are, see `compose.whole`.

Composed images depend only on the data set and their number, so every run and every machine has the same ones (but for
the bytes of JPEG compression).

Shape suffixes: S cells, V tissues, K classes, H and W an image, C color channels.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DatasetFileError, OutputError, UnreadableImageError
from pipeline.results.digests import file_facts
from pipeline.training.augment import Move, restain
from pipeline.training.dataset import IGNORED, Dataset, Sample, read_mask, read_rgb, samples
from pipeline.training.dataset_card import DatasetCard
from pipeline.training.dataset_sections import Compose, Location, Split, Whole
from pipeline.training.pieces import Kind, Piece, Pieces, kinds_of, other_dataset, other_datasets, pieces_of
from pipeline.training.resample import resampled
from wsi.mirror import mirrored

logger = logging.getLogger(__name__)

MIXED_STAIN = 0.25
"""Strength of the stain change of each area of an image whose areas come from several slides. Without it, the stain of
a slide would tell its most frequent class."""

JPEG_QUALITY = 95

GROUP = r"^([^+]+)"
"""The group of an image in its name. The name of a whole image is its group, a plus sign, and its own name."""

SMALLEST_WEIGHT = 0.01
"""Cells with a smaller weight than this, before weights are scaled to a sum of 1, do not show in a pixel."""


class Cells(NamedTuple):
    """The layout of a composed image."""

    weights_SHW: NDArray[np.float32]
    """Share of each cell in each pixel; the shares of a pixel sum to 1."""
    areas_S: NDArray[np.int64]
    """The area that each cell belongs to. All cells of an area have one tissue and come from one slide."""


def composed(dataset: Dataset, folder: Path, splits: Iterable[Split] | None = None) -> Dataset:
    """Return the data set of composed images, or `dataset` itself if its card does not ask for them.

    The images and masks are written below `folder`, unless images of the same cards, files and labels are already
    there. `splits` None stands for all. Raises what `samples`, `read_rgb`, `read_mask` and `pieces_of` raise,
    DatasetFileError for another data set that is missing or does not fit, and OutputError if the images cannot be
    written.
    """
    rule = dataset.card.compose
    if rule is None:
        return dataset
    check_whole(dataset)
    kinds = kinds_of(dataset)
    splits = tuple(splits or dataset.card.splits)
    root = folder / f"composed-{_digest(dataset, kinds, splits)[:12]}"
    try:
        for split in splits:
            if not (root / split).is_dir():
                _write_split(dataset, rule, kinds, split, root)
    except OSError as error:
        raise OutputError(
            f"{root}: the composed images cannot be written ({error.strerror or error}); check the free space and the "
            "permissions, or choose another folder"
        ) from error
    return Dataset(_composed_card(dataset.card, rule, kinds), root)


def without_whole(dataset: Dataset, made: Dataset) -> Dataset:
    """Return the data set `made` that `composed` returned for `dataset`, without the images of `compose.whole`.

    Only the names of composed images begin with that of the split.
    """
    rule = dataset.card.compose
    if rule is None or not rule.whole:
        return made
    images = {
        split: tuple(place.model_copy(update={"image": f"{split}/img/{split}-*"}) for place in places)
        for split, places in made.card.images.items()
    }
    return Dataset(made.card.model_copy(update={"images": images}), made.root)


def check_whole(dataset: Dataset) -> None:
    """Raise DatasetFileError if a data set of `compose.whole` is missing or does not fit."""
    assert dataset.card.compose is not None
    for whole in dataset.card.compose.whole:
        card = other_dataset(dataset, whole).card
        names = f"{dataset.card.name}: compose.whole names {whole.dataset}, "
        if not all(place.mask for places in card.images.values() for place in places):
            raise DatasetFileError(f"{names}which has images without masks; name a data set with masks")
        if "val" not in card.splits:
            raise DatasetFileError(f"{names}which has no validation split; name a data set with one")
        if unknown := sorted({spec.name for spec in card.classes} - set(dataset.class_names)):
            raise DatasetFileError(
                f"{names}which has classes that this data set lacks: {', '.join(unknown)}; the classes of this data "
                f"set are {', '.join(dataset.class_names)}"
            )


def _digest(dataset: Dataset, kinds: Sequence[Kind], splits: Sequence[Split]) -> str:
    """Return a SHA-256 over what determines the composed images of these splits: cards, tables, images and labels.

    Raises the errors of `samples`, and UnreadableImageError for a file that cannot be read.
    """
    whole = hashlib.sha256(f"{kinds}\n".encode())
    for one in (dataset, *other_datasets(dataset)):
        whole.update(one.card.model_dump_json(exclude={"settings"}).encode())
        chosen = [(split, sample) for split in splits if split in one.card.splits for sample in samples(one, split)]
        files = [one.root / name for name in one.card.table.files] if one.card.table is not None else []
        files += [file for _, sample in chosen for file in (sample.image, sample.mask) if file is not None]
        facts = [(split, sample.name, sample.group, sample.labels_K) for split, sample in chosen]
        with ThreadPoolExecutor(8) as pool:
            whole.update(f"{facts}\n{list(pool.map(_file_digest, files))}\n".encode())
    return whole.hexdigest()


def _file_digest(file: Path) -> str:
    try:
        return file_facts(file).sha256
    except OSError as error:
        raise UnreadableImageError(f"{file}: cannot be read: {error.strerror}") from error


def _composed_card(card: DatasetCard, rule: Compose, kinds: Sequence[Kind]) -> DatasetCard:
    several = {value: names for value, names in enumerate(kinds) if len(names) > 1}
    files, used = ("*", "these images and on ") if rule.whole else ("*.jpg", "")
    values = card.model_dump(mode="json") | {
        "attribution": f"{card.attribution} Networks were trained on {used}images composed of these.".strip(),
        "mpp": rule.mpp,
        "classes": [spec.model_dump() | {"mask_values": [k]} for k, spec in enumerate(card.classes)],
        "mask_excluded": [IGNORED],
        "images": {
            split: [Location(image=f"{split}/img/{files}", mask=f"{split}/mask/{{name}}.png").model_dump()]
            for split in card.splits
        },
        "labels": rule.labels.model_dump() | {"several": several},
        **dict.fromkeys(("root", "table", "split", "background", "compose")),
        "group": {"pattern": GROUP} if rule.whole else None,
    }
    return DatasetCard.model_validate(values)


def _write_split(dataset: Dataset, rule: Compose, kinds: Sequence[Kind], split: Split, root: Path) -> None:
    """Write the images and masks of a split under another name, and then rename the folder."""
    pieces = pieces_of(dataset, split)
    count: int = getattr(rule, split)
    logger.info("composing %d images of split %s", count, split)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{split}-", dir=root) as temporary:
        work = Path(temporary) / split
        for part in ("img", "mask"):
            (work / part).mkdir(parents=True)

        def write(index: int) -> None:
            rng = np.random.default_rng([zlib.crc32(split.encode()), index])
            rgb_HWC, values_HW = compose_image(pieces, kinds, rule, rng)
            name = composed_name(split, index)
            Image.fromarray(rgb_HWC).save(work / "img" / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
            Image.fromarray(values_HW).save(work / "mask" / f"{name}.png")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(count)))
        for whole in rule.whole:
            _write_whole(dataset, whole, split, work)
        try:
            work.rename(root / split)
        except OSError:  # another process of this run was faster and wrote the same images
            if not (root / split).is_dir():
                raise


def _write_whole(dataset: Dataset, rule: Whole, split: Split, work: Path) -> None:
    """Write the images of a split of another data set at the pixel size of the composed images, with their masks."""
    source = other_dataset(dataset, rule)
    compose = dataset.card.compose
    assert compose is not None
    if split not in source.card.splits:
        return
    values = np.full(256, IGNORED, dtype=np.uint8)
    values[: len(source.class_names)] = [dataset.class_names.index(name) for name in source.class_names]
    chosen = samples(source, split)
    logger.info("adding %d images of %s to split %s", len(chosen), rule.dataset, split)

    def write(sample: Sample) -> None:
        rgb_HWC = resampled(read_rgb(sample), source.mpp / compose.mpp)
        mask = Image.fromarray(values[read_mask(source, sample)])
        group = re.sub(r"[^\w.-]", "_", sample.group or sample.name)
        name = f"{rule.dataset}-{group}+{sample.name}"
        Image.fromarray(rgb_HWC).save(work / "img" / f"{name}.png")
        mask.resize(rgb_HWC.shape[1::-1], Image.Resampling.NEAREST).save(work / "mask" / f"{name}.png")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, chosen))


def composed_name(split: Split, index: int) -> str:
    """Return the name of a composed image of a split, without extension."""
    return f"{split}-{index:04d}"


def compose_image(
    pieces: Pieces, kinds: Sequence[Kind], rule: Compose, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a composed image (H, W, 3) and its tissues (H, W) as indices of `kinds`."""
    cells = draw_cells(rule.side, rng)
    available = [kind for kind in kinds if kind in pieces or kind == (rule.blank,)]
    slides = sorted({piece.slide for own in pieces.values() for piece in own})
    # Half of the images show one slide, as a real image does. The others bring tissues together that no slide has.
    slide = str(rng.choice(slides)) if rng.uniform() < 0.5 else None
    if slide is not None:
        available = [kind for kind in available if kind == (rule.blank,) or any(p.slide == slide for p in pieces[kind])]
    rgb_HWC = np.zeros((rule.side, rule.side, 3), dtype=np.float32)
    shares_VHW = np.zeros((len(kinds), rule.side, rule.side), dtype=np.float32)
    for area in np.unique(cells.areas_S):
        kind = available[rng.integers(len(available))]
        own = _pieces_of_one_slide(pieces.get(kind, []), slide, rng)
        blank = kind == (rule.blank,) and (not own or rng.uniform() < 0.5)
        seed = int(rng.integers(2**32))
        for cell in np.flatnonzero(cells.areas_S == area):
            shares_VHW[kinds.index(kind)] += cells.weights_SHW[cell]
            rows, columns = (_extent(cells.weights_SHW[cell].any(axis=axis)) for axis in (1, 0))
            size_HW = (rows.stop - rows.start, columns.stop - columns.start)
            filled_HWC = (
                blank_image(*size_HW, np.random.default_rng(seed))
                if blank
                else cover(own[rng.integers(len(own))].rgb_HWC, *size_HW, rng)
            )
            if slide is None:  # one seed, so that all cells of an area have one stain
                filled_HWC = restain(filled_HWC, MIXED_STAIN, np.random.default_rng(seed))
            rgb_HWC[rows, columns] += cells.weights_SHW[cell, rows, columns, None] * filled_HWC
    values_HW: NDArray[np.uint8] = shares_VHW.argmax(axis=0).astype(np.uint8)
    return np.clip(np.rint(rgb_HWC), 0, 255).astype(np.uint8), values_HW


def _pieces_of_one_slide(own: Sequence[Piece], slide: str | None, rng: np.random.Generator) -> list[Piece]:
    """Return the pieces of `slide`, or of a slide drawn in proportion to the square root of its pixels."""
    pixels: dict[str, int] = defaultdict(int)
    for piece in own:
        pixels[piece.slide] += piece.rgb_HWC.size
    if slide is None and pixels:
        share = np.sqrt(list(pixels.values()))
        slide = str(rng.choice(list(pixels), p=share / share.sum()))
    return [piece for piece in own if piece.slide == slide]


def _extent(used: NDArray[np.bool_]) -> slice:
    """Return the part of an axis from the first to the last used position; empty if none is used."""
    places = np.flatnonzero(used)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def cover(rgb_HWC: NDArray[np.uint8], height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image of this size: the image randomly moved, shifted, and repeated by reflection."""
    moved_HWC = Move.draw(rng).image(rgb_HWC)
    rows, columns = (
        mirrored(int(rng.integers(2 * length)), count, length)
        for count, length in zip((height, width), moved_HWC.shape[:2], strict=True)
    )
    return moved_HWC[rows[:, None], columns]


def blank_image(height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image of empty glass: one bright, nearly gray color with weak noise, a weak gradient and dust."""
    color_3 = rng.uniform(222, 252) + rng.uniform(-6, 6, 3)
    slope_y, slope_x = rng.uniform(-4, 4, 2)
    gradient_HW = np.linspace(-slope_y, slope_y, height)[:, None] + np.linspace(-slope_x, slope_x, width)
    noise_HWC = rng.normal(0, rng.uniform(0.3, 2.5), (height, width, 3))
    glass_HWC: NDArray[np.float64] = color_3 + gradient_HW[:, :, None] + noise_HWC
    return np.clip(np.rint(glass_HWC - _dust(height, width, rng)), 0, 255).astype(np.uint8)


def _dust(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return how much darker (H, W, 3) dust makes glass.

    The mean is up to 25 specks per 100 x 100 px, and most have a radius below 2 px. The empty cells of fat have the
    same specks, so a network trained on clean glass predicts dusty glass as fat.
    """
    count = rng.poisson(rng.uniform(0, 25) * height * width / 100**2)
    radii_px = 0.4 + rng.exponential(0.6, count)
    darkness_S3 = rng.uniform(20, 160, (count, 1)) * rng.uniform(0.7, 1.3, (count, 3))
    dust_HWC = np.zeros((height, width, 3))
    for radius_px, darkness_3 in zip(radii_px, darkness_S3, strict=True):
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        rows, columns = (slice(max(0, int(at - 3 * radius_px)), int(at + 3 * radius_px) + 2) for at in (y, x))
        yy, xx = np.ogrid[rows, columns]
        spot_HW = np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / (2 * radius_px**2))
        part_HWC = dust_HWC[rows, columns]
        part_HWC += spot_HW[: part_HWC.shape[0], : part_HWC.shape[1], None] * darkness_3
    return dust_HWC


def draw_cells(side: int, rng: np.random.Generator) -> Cells:
    """Return a random layout of a square image: irregular cells about 100 px wide, grouped into areas.

    Cells are the Voronoi cells of random points in coordinates that two smooth random fields distort. In four of ten
    images borders are hard; in the others they are softmax-blended over a few pixels. One cell in eight is an island
    of its own tissue.
    """
    scale = max(1.0, side / 320)
    count = int(rng.integers(math.ceil(6 * scale**2), math.ceil(18 * scale**2)))
    points_S2 = rng.uniform(-0.05, 1.05, (count, 2)) * side
    scale_px, amplitude_px = rng.uniform(5, 25), rng.uniform(2, 14)
    distorted = [axis + amplitude_px * _smooth_noise(side, scale_px, rng) for axis in np.mgrid[:side, :side]]
    distance_SHW = np.stack([np.hypot(distorted[1] - x, distorted[0] - y) for x, y in points_S2]).astype(np.float32)
    blend_px = 0.0 if rng.uniform() < 0.4 else rng.uniform(0.5, 4)
    nearest_HW = distance_SHW.min(axis=0)
    if blend_px:
        weights_SHW = np.exp((nearest_HW - distance_SHW) / blend_px)
        weights_SHW[weights_SHW < SMALLEST_WEIGHT] = 0
        weights_SHW /= weights_SHW.sum(axis=0)
    else:
        weights_SHW = (distance_SHW.argmin(axis=0) == np.arange(count)[:, None, None]).astype(float)
    centers_A2 = rng.uniform(0, 1, (int(rng.integers(1, round(6 * scale))), 2)) * side
    areas_S = np.hypot(*(points_S2[:, None] - centers_A2).transpose(2, 0, 1)).argmin(axis=1)
    islands = rng.uniform(size=count) < 1 / 8
    areas_S[islands] = len(centers_A2) + np.flatnonzero(islands)
    return Cells(weights_SHW.astype(np.float32), areas_S)


def _smooth_noise(side: int, scale_px: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return Gaussian noise (H, W) smoothed by a Gaussian of `scale_px`, with a standard deviation of 1."""
    smooth_HW = scipy.ndimage.gaussian_filter(rng.normal(size=(side, side)), scale_px, mode="wrap")
    noise_HW: NDArray[np.float64] = smooth_HW / smooth_HW.std()
    return noise_HW
