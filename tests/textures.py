"""A synthetic patch data set of three textures, in the published layout of LUAD-HistoSeg, that tests train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("dots", "stripes", "plain")
COLORS = ((205, 51, 51), (65, 105, 225), (255, 165, 0))

DATASET_TOML = """
name = "textures"
description = "Three textures in stain-like colors."
licence = "CC0"
attribution = "Made by a program."
mpp = 1.0
mask_excluded = [3]
classes = [
    { name = "dots", color = [205, 51, 51], mask_values = [0] },
    { name = "stripes", color = [65, 105, 225], mask_values = [1] },
    { name = "plain", color = [255, 165, 0], mask_values = [2] },
]

[images]
train = [{ image = "train/*.png" }]
val = [{ image = "val/img/*.png", mask = "val/mask/{name}.png" }]
test = [{ image = "test/img/*.png", mask = "test/mask/{name}.png" }]

[labels]
source = "file-name"
splits = ["train"]
"""


def texture(kind: int, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One texture over a whole patch: all three have the same mean color, so that only structure tells them apart."""
    y, x = np.mgrid[:size, :size]
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave = np.zeros((size, size))
    if kind == 0:
        wave = np.sin(along * 0.9 + phase[0]) * np.sin(across * 0.9 + phase[1])
    elif kind == 1:
        wave = np.sin(along * 0.7 + phase[0])
    gray_HW = 150 + 55 * wave + rng.normal(0, 8, (size, size))
    tint_3 = np.array([1.15, 0.8, 1.05]) * rng.uniform(0.95, 1.05, 3)
    return np.clip(gray_HW[..., None] * tint_3, 0, 255).astype(np.uint8)


def patch(size: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A patch of one texture, or of two with a straight border, and its mask."""
    first, second = rng.choice(3, size=2, replace=False)
    y, x = np.mgrid[:size, :size] - size / 2
    angle = rng.uniform(0, 2 * np.pi)
    side_HW = x * np.cos(angle) + y * np.sin(angle) > rng.uniform(-0.25, 0.25) * size
    if rng.random() < 0.4:
        side_HW[:] = False
    mask_HW = np.where(side_HW, second, first).astype(np.uint8)
    rgb_HWC = np.where(side_HW[..., None], texture(second, size, rng), texture(first, size, rng))
    return rgb_HWC.astype(np.uint8), mask_HW


def write_textures(folder: Path, *, train: int, val: int, test: int, size: int = 96, seed: int = 0) -> Path:
    """Write the data set and return its dataset.toml."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val), ("test", test)):
        images = folder / "train" if split == "train" else folder / split / "img"
        images.mkdir(parents=True)
        if split != "train":
            (folder / split / "mask").mkdir()
        for n in range(count):
            rgb_HWC, mask_HW = patch(size, rng)
            present = " ".join(str(int((mask_HW == k).any())) for k in range(3))
            name = f"{n:04d}-[{present}].png" if split == "train" else f"{n:04d}.png"
            Image.fromarray(rgb_HWC).save(images / name)
            if split != "train":
                mask = Image.fromarray(mask_HW)
                mask.putpalette([channel for color in COLORS for channel in color] + [255] * 759)
                mask.save(folder / split / "mask" / name)
    (folder / "dataset.toml").write_text(DATASET_TOML, encoding="utf-8")
    return folder / "dataset.toml"


CROPS_TOML = """
name = "crops"
description = "Made by a test."
licence = "CC0"
mpp = {mpp}
mask_excluded = [3]
classes = [
    {{ name = "red", color = [205, 51, 51], mask_values = [0] }},
    {{ name = "blue", color = [65, 105, 225], mask_values = [1] }},
    {{ name = "orange", color = [255, 165, 0], mask_values = [2] }},
]

[images]
train = [{{ image = "img/*.png", mask = "mask/{{name}}.png" }}]
val = [{{ image = "img/*.png", mask = "mask/{{name}}.png" }}]

[labels]
source = "mask-crops"
side = {side}
stride = {stride}
minimum = 0.05
"""


def write_crops(
    folder: Path,
    sizes: dict[str, tuple[int, int]],
    *,
    side: int,
    stride: int,
    mpp: float = 1.0,
    extra: str = "",
    seed: int = 0,
) -> Path:
    """Write images of noise, each of (width, height), with masks of three vertical bands, labeled in crops; return the
    dataset.toml.
    """
    rng = np.random.default_rng(seed)
    for name in ("img", "mask"):
        (folder / name).mkdir(parents=True)
    for name, (width, height) in sizes.items():
        rgb_HWC = rng.integers(0, 180, (height, width, 3)).astype(np.uint8)
        mask_HW = np.broadcast_to((np.arange(width) * 3 // width).astype(np.uint8), (height, width))
        Image.fromarray(rgb_HWC).save(folder / "img" / f"{name}.png")
        Image.fromarray(np.ascontiguousarray(mask_HW)).save(folder / "mask" / f"{name}.png")
    (folder / "dataset.toml").write_text(CROPS_TOML.format(mpp=mpp, side=side, stride=stride) + extra, encoding="utf-8")
    return folder / "dataset.toml"
