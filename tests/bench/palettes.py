"""Measure, search and compare colors for tissue classes: docs/decisions/0006-colors.md has the figures.

    python -m tests.bench.palettes measure PATH...   colors of glass, tissue and nuclei in slides or folders of images
    python -m tests.bench.palettes search            finds the colors of pipeline/training/palettes.py anew
    python -m tests.bench.palettes compare           they beside well-known palettes, as a table

Distances are CIEDE2000, the least of normal vision and three simulated kinds of color blindness.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2hed, rgb2lab
from skimage.filters import threshold_otsu

from models.bundle import load_bundle
from models.tissue_class import Color
from pipeline.formats.preview import BLEND, OUTLINE
from pipeline.training.dataset import SHIPPED
from pipeline.training.dataset_card import read_card
from pipeline.training.palettes import CLASS_COLORS

COUNT = 10
LEAST_TO_HE = 8.0
LEAST_BLENDED = 7.0
"""Between tissue with a class color blended over it and the same tissue without."""
LEAST_TO_BLACK = 15.0
LEAST_CHROMA = 40.0
"""Gray and pastel read as unstained, however far they are from it."""
LIGHTNESS = (15.0, 93.0)

VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
"""Of linear RGB: Machado, Oliveira, Fernandes, A physiologically-based model for simulation of color vision deficiency,
IEEE TVCG 15(6), 2009, severity 1.0.
"""

GLASS = (245, 240, 244)
HE_COLORS = {
    "skin": ((226, 176, 208), (187, 124, 162), (154, 80, 121), (96, 58, 102)),
    "head and neck": ((231, 168, 202), (208, 106, 157), (185, 68, 122), (167, 75, 125)),
    "colon": ((239, 191, 231), (212, 129, 206), (181, 72, 169), (135, 60, 157)),
}
"""Light, middle and dark tissue and nuclei, as `measure` finds them on CMU-1.svs, on TCGA-CR-7395 and in GlaS."""
BACKGROUNDS = np.array([GLASS, *itertools.chain(*HE_COLORS.values())])
TISSUES = np.array([tissue[1] for tissue in HE_COLORS.values()])

KNOWN = {
    "Okabe-Ito": [
        (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
        (0, 0, 0),
    ],
    "Tol bright": [
        (68, 119, 170), (238, 102, 119), (34, 136, 51), (204, 187, 68), (102, 204, 238), (170, 51, 119),
        (187, 187, 187),
    ],
    "Tol muted": [
        (204, 102, 119), (51, 34, 136), (221, 204, 119), (17, 119, 51), (136, 204, 238), (136, 34, 85), (68, 170, 153),
        (153, 153, 51), (170, 68, 153),
    ],
}  # fmt: skip


def seen_VN3(rgb_N3: NDArray[np.number]) -> NDArray[np.float64]:
    """Lab of colors (0-255) as each of `VISIONS` sees them."""
    share = np.asarray(rgb_N3, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = (np.clip(linear @ matrix.T, 0, 1) for matrix in VISIONS.values())
    encoded = (np.where(part <= 0.0031308, part * 12.92, 1.055 * part ** (1 / 2.4) - 0.055) for part in seen)
    return np.stack([rgb2lab(part[None])[0] for part in encoded])


def distances_NM(first_VN3: NDArray[np.float64], second_VM3: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least CIEDE2000 over the kinds of vision, of every color to every other."""
    by_vision = [deltaE_ciede2000(a[:, None], b[None]) for a, b in zip(first_VN3, second_VM3, strict=True)]
    return np.asarray(np.min(by_vision, axis=0))


def least_pair(seen: NDArray[np.float64]) -> float:
    """The distance of the two colors that are most alike."""
    distances = distances_NM(seen, seen)
    return float(distances[np.triu_indices(len(distances), 1)].min())


def blended(rgb_N3: NDArray[np.number]) -> NDArray[np.float64]:
    """As `seen_VN3`, of colors blended over each of `TISSUES` as the preview does: (vision and tissue, color, 3)."""
    return np.concatenate([seen_VN3(BLEND * rgb_N3 + (1 - BLEND) * tissue) for tissue in TISSUES])


def search() -> list[Color]:
    """The `COUNT` colors whose least distance is largest, of those that keep the limits above; the same every time.

    The distance of two colors is that over tissue, but no more than half that of the plain colors. Farthest-first
    from every start, each improved by exchange; then sorted so that the first ones differ most.
    """
    steps = range(0, 256, 17)
    rgb_N3 = np.array(list(itertools.product(steps, steps, steps)))
    seen, over_tissue = seen_VN3(rgb_N3), blended(rgb_N3)
    bare = np.concatenate([seen_VN3(tissue[None]) for tissue in TISSUES])
    lightness, chroma = seen[0, :, 0], np.hypot(seen[0, :, 1], seen[0, :, 2])
    allowed = (chroma >= LEAST_CHROMA) & (lightness >= LIGHTNESS[0]) & (lightness <= LIGHTNESS[1])
    allowed &= distances_NM(seen, seen_VN3(BACKGROUNDS)).min(axis=1) >= LEAST_TO_HE
    allowed &= distances_NM(over_tissue, bare)[:, 0] >= LEAST_BLENDED
    allowed &= distances_NM(seen, seen_VN3(np.zeros((1, 3))))[:, 0] >= LEAST_TO_BLACK
    rgb_N3, seen, over_tissue = rgb_N3[allowed], seen[:, allowed], over_tissue[:, allowed]
    distances = np.minimum(distances_NM(over_tissue, over_tissue), distances_NM(seen, seen) / 2)
    tried = (_exchanged(distances, _farthest_first(distances, [i], COUNT)) for i in range(len(rgb_N3)))
    best = max(tried, key=lambda chosen: _least(distances, chosen))
    within = distances[np.ix_(best, best)]
    first = [int(i) for i in np.unravel_index(within.argmax(), within.shape)]
    chosen_N3 = rgb_N3[[best[i] for i in _farthest_first(within, first, COUNT)]]
    return [(int(red), int(green), int(blue)) for red, green, blue in chosen_N3]


def _farthest_first(distances: NDArray[np.float64], chosen: list[int], count: int) -> list[int]:
    chosen = list(chosen)
    while len(chosen) < count:
        chosen.append(int(distances[chosen].min(axis=0).argmax()))
    return chosen


def _least(distances: NDArray[np.float64], chosen: list[int]) -> float:
    within = distances[np.ix_(chosen, chosen)]
    return float(within[np.triu_indices(len(chosen), 1)].min())


def _exchanged(distances: NDArray[np.float64], chosen: list[int]) -> list[int]:
    """Replace one of the two most alike for as long as that helps."""
    while True:
        within = distances[np.ix_(chosen, chosen)] + np.diag([np.inf] * len(chosen))
        for place in np.unravel_index(within.argmin(), within.shape):
            rest = [index for i, index in enumerate(chosen) if i != place]
            changed = _farthest_first(distances, rest, len(chosen))
            if _least(distances, changed) > within.min() + 1e-6:
                chosen = changed
                break
        else:
            return chosen


def compare() -> Iterator[str]:
    """Rows of a table: each palette's least distances."""
    luad, bcss = (read_card(SHIPPED / f"{name}.toml") for name in ("luad-histoseg", "bcss-wsss"))
    palettes: dict[str, Sequence[Color]] = {
        **{f"ours, first {count}": CLASS_COLORS[:count] for count in (2, 3, 4, 5, 6, 8, 10)},
        **KNOWN,
        "LUAD-HistoSeg": [spec.color for spec in luad.classes],
        "BCSS-WSSS": [spec.color for spec in bcss.classes],
        "colon-gland": [spec.color for spec in load_bundle("colon-gland").card.classes],
    }
    columns = ["palette", "normal vision", "any vision", "over tissue", "to H&E", "over tissue, to bare tissue"]
    columns += ["outline to H&E", "outline to its fill"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    he, bare = seen_VN3(BACKGROUNDS), np.concatenate([seen_VN3(tissue[None]) for tissue in TISSUES])
    for name, colors in palettes.items():
        seen, over_tissue = seen_VN3(np.array(colors)), blended(np.array(colors))
        to_he, to_tissue = distances_NM(seen, he).min(), distances_NM(over_tissue, bare).min()
        line = seen_VN3(OUTLINE * np.array(colors))
        to_fill = np.diag(distances_NM(np.concatenate([line] * len(TISSUES)), over_tissue)).min()
        pairs = least_pair(seen[:1]), least_pair(seen), least_pair(over_tissue)
        values = (*pairs, to_he, to_tissue, distances_NM(line, he).min(), to_fill)
        yield f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |"


def patches_of(path: Path, count: int = 60, side: int = 512) -> Iterator[NDArray[np.uint8]]:
    """Images with tissue in them: those of a folder, or boxes of a slide at level 0, the same every time."""
    if path.is_dir():
        files = sorted(path.iterdir())
        for file in files[:: max(1, len(files) // count)]:
            yield np.asarray(Image.open(file).convert("RGB"))
        return
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
        rng = np.random.default_rng(0)
        found = 0
        while found < count:
            at = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            rgb_HWC = np.asarray(slide.read_region(at, 0, (side, side)).convert("RGB"))
            if (rgb_HWC.min(axis=2) < 215).mean() > 0.3 and rgb_HWC.mean() > 100:  # no glass, no ink
                found += 1
                yield rgb_HWC


def measure(path: Path) -> dict[str, list[int]]:
    """Mean colors of glass and of light, middle and dark tissue and nuclei.

    Nuclei have more haematoxylin than Otsu's threshold; light and dark are the outer fifths of the rest in brightness.
    """
    rgb_N3 = np.concatenate([patch.reshape(-1, 3)[::7] for patch in patches_of(path)])
    stained_N = rgb_N3.min(axis=1) < 215
    haematoxylin_N = rgb2hed(rgb_N3[None])[0, :, 0]
    nuclei_N = stained_N & (haematoxylin_N > threshold_otsu(haematoxylin_N[stained_N]))
    tissue_N3 = rgb_N3[stained_N & ~nuclei_N]
    brightness_N = tissue_N3.mean(axis=1)
    low, high = np.percentile(brightness_N, (20, 80))
    parts = {
        "glass": rgb_N3[rgb_N3.min(axis=1) >= 225],
        "light": tissue_N3[brightness_N >= high],
        "middle": tissue_N3[(brightness_N > low) & (brightness_N < high)],
        "dark": tissue_N3[brightness_N <= low],
        "nuclei": rgb_N3[nuclei_N],
    }
    return {name: np.round(part.mean(axis=0)).astype(int).tolist() for name, part in parts.items()}


def main() -> None:
    """Run the command of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "search", "compare"])
    parser.add_argument("paths", type=Path, nargs="*")
    given = parser.parse_args()
    if given.command == "measure":
        for path in given.paths:
            print(path.name, measure(path))
    else:
        print(*(search() if given.command == "search" else compare()), sep="\n")


if __name__ == "__main__":
    main()
