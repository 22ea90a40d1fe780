"""How well the tissue mask agrees with the truth, on composed slides.

    python -m tests.bench.tissue DATA [--pictures FOLDER]

DATA has the folders `glas`, `ebhi-seg` and `kather2016`. They have no ground truth of whole slides, so slides are
composed from real tissue: 165 images of GlaS, 100 of EBHI-Seg, and 36 mosaics of kather-2016 tiles (28 of tissue, 8 of
fat). One slide shows 3.2 mm × 2.4 mm at 8 µm per pixel. It has one to three pieces of one image, repeated by mirroring,
at 0.35 to 1.8 times the stain density, and some fragments of 80 to 150 µm. The glass has a random color, a brightness
gradient and noise; the JPEG quality is random. Half of the slides have pen, dust, hair, mountant or a black border. The
truth is the outline of the pieces: lumina and fat inside count as tissue. The seed is fixed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.specimens import MPP, PENS, Floats, Specimen, od_of
from wsi.box import Box
from wsi.left_out import LeftOut
from wsi.resample import area_mean
from wsi.tissue import Found, detect_tissue

SIZE = (400, 300)
EBHI_IMAGES, TISSUE_MOSAICS, FAT_MOSAICS = 100, 28, 8
GLAS_MPP, EBHI_MPP, KATHER_MPP = 0.62, 1.0, 0.495
"""Micrometers per pixel, as in the descriptions of the data sets."""
GLASS = 245.0
"""Value of glass in the images, from which densities are computed."""


class Source(NamedTuple):
    """Real tissue at 8 µm per pixel."""

    kind: str
    name: str
    od_HWC: Floats


class Counts(NamedTuple):
    """Pixels that are tissue in truth and mask, in the mask, and in truth."""

    both: int
    mask: int
    truth: int

    def line(self) -> str:
        """Return recall, precision and intersection over union."""
        union = self.mask + self.truth - self.both
        return f"{self.both / self.truth:.3f} | {self.both / self.mask:.3f} | {self.both / union:.3f}"


def sources(data: Path) -> Iterator[Source]:
    """Yield the 301 sources in a fixed order."""
    for path in sorted((data / "glas" / "img").iterdir()):
        yield Source("GlaS", path.stem, _reduced(_rgb(path), GLAS_MPP))
    ebhi = sorted((data / "ebhi-seg" / "img").iterdir())
    for path in ebhi[:: len(ebhi) // EBHI_IMAGES][:EBHI_IMAGES]:
        yield Source("EBHI-Seg", path.stem, _reduced(_rgb(path), EBHI_MPP))
    classes = sorted(path for path in (data / "kather2016").iterdir() if path.is_dir())
    for number in range(TISSUE_MOSAICS):
        yield _mosaic("kather-2016", classes[number % 6], number)
    for number in range(FAT_MOSAICS):
        yield _mosaic("kather-2016, fat", classes[6], number)


def _mosaic(kind: str, folder: Path, seed: int) -> Source:
    """Return 8 × 8 random tiles of one class as one image."""
    rng = np.random.default_rng(seed)
    paths = rng.choice(sorted(folder.iterdir()), 64)
    rows = [np.hstack([_rgb(path) for path in paths[start : start + 8]]) for start in range(0, 64, 8)]
    return Source(kind, f"{folder.name}-{seed}", _reduced(np.vstack(rows), KATHER_MPP))


def _rgb(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def _reduced(rgb_HWC: NDArray[np.uint8], mpp: float) -> Floats:
    """Return the densities of an image at 8 µm per pixel."""
    factor = MPP / mpp
    height, width = (int(length / factor) for length in rgb_HWC.shape[:2])
    small_HWC = area_mean(rgb_HWC, (0, 0), Box(0, 0, width, height), factor)
    return np.asarray(np.log((GLASS + 1) / (np.minimum(small_HWC, GLASS) + 1)))


def compose(source: Source, seed: int) -> tuple[Specimen, NDArray[np.uint8]]:
    """Return a slide with pieces of this tissue, and its thumbnail."""
    slide = Specimen(SIZE, seed)
    rng = slide.rng
    od_HWC = rng.uniform(0.35, 1.8) * _tiled(source.od_HWC, SIZE)
    for place in range(int(rng.integers(1, 4))):
        radius = rng.uniform(25, 60)
        slide.add(slide.blob(70 + 110 * place, rng.uniform(80, 200), radius) & ~slide.truth_HW, od_HWC, tissue=True)
    for _ in range(int(rng.integers(0, 12))):
        side = int(rng.integers(10, 19))
        box_HW = slide.box(int(rng.integers(20, 370)), int(rng.integers(262, 280)), side, side)
        slide.add(box_HW & ~slide.truth_HW, od_HWC, tissue=True)
    if rng.random() < 0.5:
        DISTURBANCES[int(rng.integers(len(DISTURBANCES)))](slide)
    slide.od_HWC += (rng.uniform(0, 0.06) * np.linspace(0, 1, SIZE[0]) ** 2)[None, :, None]
    base = rng.uniform(228, 252)
    red, green, blue = (float(min(255, base + shift)) for shift in (rng.uniform(-2, 3), 0, rng.uniform(-14, 4)))
    return slide, slide.image((red, green, blue), noise=rng.uniform(0.5, 3), jpeg=int(rng.integers(40, 95)))


def _tiled(od_HWC: Floats, size: tuple[int, int]) -> Floats:
    """Return an image repeated by mirroring to (width, height)."""
    missing = [(0, max(0, length - have)) for length, have in zip(size[::-1], od_HWC.shape, strict=False)]
    return np.pad(od_HWC, (*missing, (0, 0)), mode="symmetric")[: size[1], : size[0]]


def _pen(slide: Specimen) -> None:
    rng = slide.rng
    color = list(PENS.values())[int(rng.integers(len(PENS)))]
    start, end = (rng.uniform(20, 380), rng.uniform(5, 20)), (rng.uniform(20, 380), rng.uniform(30, 60))
    od = np.asarray(od_of(color)) * rng.uniform(0.6, 1.2)
    slide.add(
        slide.stroke(start, end, rng.uniform(10, 35)) & ~slide.truth_HW, (float(od[0]), float(od[1]), float(od[2]))
    )


def _dust(slide: Specimen) -> None:
    rng = slide.rng
    for _ in range(40):
        gray = rng.uniform(0.2, 1.2)
        spot_HW = slide.blob(rng.uniform(0, 400), rng.uniform(0, 300), rng.uniform(1, 4))
        slide.add(spot_HW & ~slide.truth_HW, (gray, gray, 0.97 * gray))
    hair_HW = slide.stroke((10, 30), (380, 50), 3) & ~slide.truth_HW
    slide.add(hair_HW, (0.5, 0.5, 0.48))


def _mountant(slide: Specimen) -> None:
    left = int(slide.rng.integers(100, 300))
    slide.add(slide.box(left, 0, 400 - left, 300), (0.004, 0.03, 0.105))


def _border(slide: Specimen) -> None:
    border_HW = slide.box(0, 0, 400, 12) | slide.box(0, 0, 9, 300)
    slide.add(border_HW & ~slide.truth_HW, (3.0, 3.0, 3.0))


DISTURBANCES: tuple[Callable[[Specimen], None], ...] = (_pen, _pen, _dust, _mountant, _border)


def overlay(rgb_HWC: NDArray[np.uint8], found: Found, truth_HW: NDArray[np.bool_]) -> Image.Image:
    """Return the thumbnail with missed tissue in red, wrong tissue in blue, and left-out areas in their colors."""
    picture_HWC = rgb_HWC.astype(float)
    picture_HWC[~found.mask_HW] = 0.6 * picture_HWC[~found.mask_HW] + 0.4 * 160
    for kind in LeftOut:
        picture_HWC[found.left_out_HW == kind] = kind.color
    picture_HWC[truth_HW & ~found.mask_HW] = (230, 0, 0)
    picture_HWC[found.mask_HW & ~truth_HW] = (0, 0, 255)
    return Image.fromarray(np.hstack([rgb_HWC, np.round(picture_HWC).astype(np.uint8)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print recall, precision and intersection over union, by source and in all."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tissue")
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of every twentieth slide")
    options = parser.parse_args(arguments)
    counts: dict[str, list[Counts]] = defaultdict(list)
    for seed, source in enumerate(sources(options.data)):
        slide, rgb_HWC = compose(source, seed)
        found = detect_tissue(rgb_HWC, MPP)
        both = int((found.mask_HW & slide.truth_HW).sum())
        one = Counts(both, int(found.mask_HW.sum()), int(slide.truth_HW.sum()))
        counts[source.kind].append(one)
        counts["all"].append(one)
        if options.pictures and seed % 20 == 0:
            options.pictures.mkdir(parents=True, exist_ok=True)
            overlay(rgb_HWC, found, slide.truth_HW).save(options.pictures / f"{seed:03d}-{source.name}.png")
    print("| source | slides | recall | precision | IoU |\n|---|---|---|---|---|")
    for kind, several in counts.items():
        total = Counts(*(sum(values) for values in zip(*several, strict=True)))
        print(f"| {kind} | {len(several)} | {total.line()} |")
    recalls = sorted(one.both / one.truth for one in counts["all"])
    print(f"lowest recall of a slide {recalls[0]:.3f}, fifth lowest {recalls[4]:.3f}, median {recalls[150]:.3f}")


if __name__ == "__main__":
    main()
