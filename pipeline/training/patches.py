"""Labeled patches for training: images at the model's pixel size, labeled boxes, and the views of a training step.

Shape suffixes: N views, B boxes (x, y, width, height in pixels at the model's mpp), K classes, H and W an image, L the
layers of pseudo masks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.training.augment import Move, restain
from pipeline.training.dataset import IGNORED, Dataset, Sample, labeled_boxes, read_rgb
from pipeline.training.resample import resampled
from wsi.levels import MPP_TOLERANCE

GLASS = 255
"""Pixel value of a view outside its image."""


@dataclass(frozen=True)
class View:
    """A square part of an image, with the labeled patches inside it."""

    rgb_HWC: NDArray[np.uint8]
    boxes_B4: NDArray[np.int64]
    present_BK: NDArray[np.bool_]


class Place(NamedTuple):
    """The position of a view: the index of the image, and the corner (x, y) and side of the square."""

    image: int
    x: int
    y: int
    side: int


class PatchImages:
    """The images of one split at `mpp`, with labeled boxes. Decoded images are cached up to `cache_bytes`."""

    def __init__(
        self, dataset: Dataset, chosen: Sequence[Sample], mpp: float, *, cache_bytes: int = 2 * 1024**3
    ) -> None:
        """Read the labels of all samples. Images are read on first use.

        Raises what `labeled_boxes` raises.
        """
        self.dataset = dataset
        self.samples = tuple(chosen)
        scale = dataset.mpp / mpp
        # `resampled` leaves such images unchanged.
        self.scale = 1.0 if abs(scale - 1) <= MPP_TOLERANCE else scale
        self.boxes: list[NDArray[np.int64]] = []
        self.present: list[NDArray[np.bool_]] = []
        for sample in self.samples:
            labeled = labeled_boxes(dataset, sample)
            # Corner and side are rounded, not both corners, so that boxes of one size stay equal in size.
            boxes_B4 = np.rint(labeled.boxes_B4 * self.scale).astype(np.int64)
            # If both are rounded up, the box ends a pixel beyond the image.
            size_2 = np.rint(np.array(_extent(labeled.boxes_B4)) * self.scale).astype(np.int64)
            boxes_B4[:, :2] = np.minimum(boxes_B4[:, :2], size_2 - boxes_B4[:, 2:])
            self.boxes.append(boxes_B4)
            self.present.append(labeled.present_BK)
        self.sizes_N2 = np.array([_extent(boxes_B4) for boxes_B4 in self.boxes])
        """Width and height of each image."""
        self.ends_N = np.cumsum([len(boxes_B4) for boxes_B4 in self.boxes])
        """Cumulative number of labeled patches, including each image."""
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._room = cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.samples)

    def rgb(self, index: int) -> NDArray[np.uint8]:
        """Return one image at the model's mpp, (H, W, 3)."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        rgb_HWC = resampled(read_rgb(self.samples[index]), self.scale)
        with self._lock:
            if rgb_HWC.nbytes <= self._room and index not in self._cache:
                self._room -= rgb_HWC.nbytes
                self._cache[index] = rgb_HWC
        return rgb_HWC

    def pixels(self) -> int:
        """Return the number of pixels of all images at the model's mpp."""
        return int(self.sizes_N2.prod(axis=1).sum())

    def class_frequency(self) -> NDArray[np.float64]:
        """Return the share of labeled patches that contain each class, (K,)."""
        share_K: NDArray[np.float64] = np.concatenate(self.present).mean(axis=0)
        return share_K


def view_side(images: PatchImages, region: int | None) -> int:
    """Return the side of the training views: `region`, or the side of the labeled patches if it is None."""
    return region or int(images.boxes[0][0, 2])


def draw_places(images: PatchImages, region: int | None, count: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random places of `view_side`: regions that contain a labeled patch, or labeled patches."""
    if region is None:
        return draw_patches(images, count, rng)
    return draw_regions(images, count, region, rng)


def draw_regions(images: PatchImages, count: int, side: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random squares of random images. If an image is shorter than `side`, the square starts at 0.

    Images are drawn in proportion to their area, so that every pixel is drawn about equally often. A square without a
    whole labeled patch is moved to the nearest patch. `side` must be at least the side of a patch.
    """
    area = np.maximum(images.sizes_N2, side).prod(axis=1).astype(float)
    places = []
    for index in rng.choice(len(images), size=count, p=area / area.sum()):
        x, y = (int(rng.integers(max(1, int(length) - side + 1))) for length in images.sizes_N2[index])
        places.append(_holding_a_patch(images.boxes[index], Place(int(index), x, y, side)))
    return places


def draw_patches(images: PatchImages, count: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random labeled patches, which must be square."""
    places = []
    for drawn in rng.integers(images.ends_N[-1], size=count):
        index = int(np.searchsorted(images.ends_N, drawn, side="right"))
        x, y, width, _ = (int(v) for v in images.boxes[index][drawn - images.ends_N[index]])
        places.append(Place(index, x, y, width))
    return places


def make_view(images: PatchImages, place: Place, strength: float, rng: np.random.Generator) -> View:
    """Return the view at a place, randomly flipped, turned and restained."""
    move = Move.draw(rng)
    rgb_HWC = restain(_cut(images.rgb(place.image), place, GLASS), strength, rng)
    boxes_B4, inside_B = boxes_inside(images.boxes[place.image], place)
    return View(
        move.image(rgb_HWC), move.boxes(boxes_B4, place.side, place.side), images.present[place.image][inside_B]
    )


def make_labeled_view(
    images: PatchImages, labels_LHW: NDArray[np.uint8], place: Place, strength: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return (rgb_HWC, labels_LHW) of a place, randomly flipped, turned and restained; `IGNORED` outside the image."""
    move = Move.draw(rng)
    rgb_HWC = restain(_cut(images.rgb(place.image), place, GLASS), strength, rng)
    moved = [move.image(_cut(labels_HW, place, IGNORED)) for labels_HW in labels_LHW]
    return move.image(rgb_HWC), np.stack(moved)


def boxes_inside(boxes_B4: NDArray[np.int64], place: Place) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the boxes that are wholly inside a place, relative to its corner, and a mask of these boxes."""
    moved_B4 = boxes_B4 - np.array([place.x, place.y, 0, 0])
    inside_B = (moved_B4[:, :2] >= 0).all(axis=1) & (moved_B4[:, :2] + moved_B4[:, 2:] <= place.side).all(axis=1)
    return moved_B4[inside_B], inside_B


def _holding_a_patch(boxes_B4: NDArray[np.int64], place: Place) -> Place:
    corner_2 = np.array([place.x, place.y])
    corners_B2 = np.clip(corner_2, boxes_B4[:, :2] + boxes_B4[:, 2:] - place.side, boxes_B4[:, :2])
    x, y = corners_B2[np.abs(corners_B2 - corner_2).sum(axis=1).argmin()].tolist()
    return place._replace(x=x, y=y)


def _extent(boxes_B4: NDArray[np.int64]) -> tuple[int, int]:
    """Return the extent of the boxes, which is the image size because the last row and column are labeled."""
    return int((boxes_B4[:, 0] + boxes_B4[:, 2]).max()), int((boxes_B4[:, 1] + boxes_B4[:, 3]).max())


def _cut(array: NDArray[np.uint8], place: Place, fill: int) -> NDArray[np.uint8]:
    part = array[place.y : place.y + place.side, place.x : place.x + place.side]
    missing = (place.side - part.shape[0], place.side - part.shape[1])
    if missing == (0, 0):
        return part
    pad = [(0, missing[0]), (0, missing[1]), *([(0, 0)] * (array.ndim - 2))]
    return np.pad(part, pad, constant_values=fill)
