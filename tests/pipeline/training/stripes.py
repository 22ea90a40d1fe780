"""Images and data sets in the colors of two classes, and predictors that recognize those colors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from models.card import NO_DIGEST
from models.predictor import Predictor
from tests.models.networks import (
    ColorClassifier,
    ColorSegmenter,
    ConstantSegmenter,
    PixelClassifier,
    make_card,
)

COLORS = ((230, 159, 0), (0, 158, 115))


SHARP = 400.0


def predictor(
    classifier: nn.Module | None = None, segmenter: nn.Module | None = None, *, mpp: float = 1.0, **options: Any
) -> Predictor:
    """Return a predictor with gate windows of 64 px. By default it predicts which of `COLORS` each pixel has."""
    networks = classifier or ColorClassifier(COLORS), segmenter or ColorSegmenter(COLORS, SHARP)
    return Predictor(make_card(COLORS, mpp=mpp), NO_DIGEST, *networks, device="cpu", **options)


def image_of(labels_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image in the colors of the labels; pixels without a class are white."""
    palette = np.array([*COLORS, *[(255, 255, 255)] * 254], np.uint8)
    return palette[labels_HW]


def stripes(height: int, width: int) -> NDArray[np.uint8]:
    """Return vertical stripes of both classes, 24 and 40 px wide, with edges between cells of 4 px."""
    return np.broadcast_to((np.arange(width) % 64 < 24).astype(np.uint8), (height, width)).copy()


class CornerClassifier(PixelClassifier):
    """Predicts class 0 in every window, and class 1 in windows with a bright upper left corner."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return torch.stack([torch.full((len(x_NCHW),), 8.0), x_NCHW[:, 0, 0, 0] * 16 - 8], dim=1)


def bright_corner() -> NDArray[np.uint8]:
    """Return a tile of class 1 with one pixel of class 0, the brighter class in red, in the upper left corner."""
    labels_HW = np.ones((64, 64), np.uint8)
    labels_HW[0, 0] = 0
    return labels_HW


def write_dataset(
    folder: Path, masks: dict[str, NDArray[np.uint8]], *, mpp: float = 1.0, background: bool = False, extra: str = ""
) -> Path:
    """Write a data set with one test image in `COLORS` per mask (255: white, no class); return its TOML file."""
    for name, mask_HW in masks.items():
        for kind, pixels in (("img", image_of(mask_HW)), ("mask", mask_HW)):
            (folder / "test" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "test" / kind / f"{name}.png")
    (folder / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "train" / "a" / "only.png")
    (folder / "dataset.toml").write_text(
        f"""
        name = "tiny"
        description = "Two colors."
        licence = "CC0"
        mpp = {mpp}
        mask_excluded = [255]
        classes = [
            {{ name = "class-0", color = [230, 159, 0], mask_values = [0] }},
            {{ name = "class-1", color = [0, 158, 115], mask_values = [1] }},
        ]
        {extra}
        [images]
        train = [{{ image = "train/*/*.png" }}]
        test = [{{ image = "test/img/*.png", mask = "test/mask/{{name}}.png" }}]
        [labels]
        source = "folders"
        folders = {{ a = "class-0" }}
        splits = ["train"]
        {"[background]" if background else ""}
        """,
        encoding="utf-8",
    )
    return folder / "dataset.toml"


def without_masks(file: Path) -> Path:
    """Let the test images of a data set have labels in their names, as in "a[10]", and no masks."""
    text = file.read_text(encoding="utf-8").replace(', mask = "test/mask/{name}.png"', "")
    start, end = text.index("[labels]"), text.index('splits = ["train"]')
    file.write_text(f'{text[:start]}[labels]\nsource = "file-name"\n{text[end + 18 :]}', encoding="utf-8")
    return file


def gated_by_hand() -> tuple[Predictor, NDArray[np.uint8]]:
    """Return a predictor and an image of class 0 on the left and class 1 from column 64 on.

    Windows of 64 px start at every 16th column of the mirrored image, and those beyond the canvas are moved inside. Up
    to column 0 they contain class 0 only, from column 64 on class 1 only. The segmenter always predicts class 1, with
    sigmoid(1).
    """
    truth_HW = np.zeros((64, 96), np.uint8)
    truth_HW[:, 64:] = 1
    return predictor(segmenter=ConstantSegmenter([0.0, 1.0])), image_of(truth_HW)
