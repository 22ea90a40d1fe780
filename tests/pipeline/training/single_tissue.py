"""A data set of images that show one tissue each: tiles of one color per tissue, with the positions of neighbors."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.training.dataset import Dataset, load_dataset
from pipeline.training.pieces import BRIGHT

COLORS = {"A": (200, 0, 0), "B": (0, 200, 0), "AB": (0, 0, 200)}
TILE = 16
TOML = """
name = "tiles"
description = "Tiles of one color."
licence = "CC0"
mpp = 0.5
classes = [{ name = "a" }, { name = "b" }, { name = "glass", role = "background" }]

[images]
all = [{ image = "*/*.png" }]

[table]
files = ["meta.csv"]

[group]
column = "slide"

[split]
by = "table"
column = "slide"
train = ["1", "2"]
val = ["3"]
test = []

[labels]
source = "folders"
folders = { A = "a", B = "b", AB = ["a", "b"] }

[compose]
source = "source"
mpp = 0.5
side = 64
train = 3
val = 2
test = 1
blank = "glass"

[compose.labels]
source = "mask-crops"
side = 16
stride = 16
minimum = 0.05
"""


def write_tiles(folder: Path, *, position: str = "{}") -> Dataset:
    """Write 2x3 neighboring tiles of each tissue and slide; return the data set."""
    rows = []
    for kind, color in COLORS.items():
        (folder / kind).mkdir(parents=True)
        for slide in ("1", "2", "3"):
            for n in range(6):
                name = f"{kind}/{kind}-{slide}-{n}.png"
                Image.new("RGB", (TILE, TILE), color).save(folder / name)
                x, y = position.format(1 + TILE * (n % 3)), 1 + TILE * (n // 3)
                rows.append({"name": name, "slide": slide, "source": f"s{slide}", "x": x, "y": y})
    with (folder / "meta.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "dataset.toml").write_text(TOML)
    return load_dataset(folder / "dataset.toml")


def write_other(folder: Path, values: dict[str, str], cases: dict[str, str] | None = None) -> None:
    """Write images as EBHI-Seg has them: the left half is a red gland, the right half other tissue; glass below.

    Each image is of a case of its own, unless `cases` are given.
    """
    (folder / "img").mkdir(parents=True)
    (folder / "mask").mkdir()
    rgb_HWC = np.zeros((96, 128, 3), np.uint8)
    rgb_HWC[:, :64], rgb_HWC[:, 64:], rgb_HWC[64:] = (200, 0, 0), (0, 0, 200), BRIGHT + 1
    mask_HW = np.zeros((96, 128), np.uint8)
    mask_HW[:, :64] = 1
    for name in values:
        Image.fromarray(rgb_HWC).save(folder / "img" / f"{name}.png")
        Image.fromarray(mask_HW).save(folder / "mask" / f"{name}.png")
    with (folder / "meta.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["name", "case", "gland_class"])
        writer.writerows([name, (cases or {}).get(name, name), value] for name, value in values.items())


def with_whole_images(folder: Path, first: str = "gland", second: str = "other", *, other: str = "ebhi-seg") -> Dataset:
    """Write tiles of these classes and images of EBHI-Seg; return the data set of tiles with the whole images.

    Two images at a time are of one case, whose name cannot be part of a file name.
    """
    write_tiles(folder / "tiles")
    names = [f"case-{n}" for n in range(20)]
    write_other(
        folder / "other", dict.fromkeys(names, "normal"), {name: f"p+{n // 2}/a" for n, name in enumerate(names)}
    )
    text = TOML.replace('{ name = "a" }, { name = "b" }', f'{{ name = "{first}" }}, {{ name = "{second}" }}')
    text = text.replace(
        'A = "a", B = "b", AB = ["a", "b"]', f'A = "{first}", B = "{second}", AB = ["{first}", "{second}"]'
    )
    text += f'\n[[compose.whole]]\ndataset = "{other}"\nfolder = "../other"\n'
    (folder / "tiles" / "dataset.toml").write_text(text)
    return load_dataset(folder / "tiles")
