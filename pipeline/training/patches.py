"""Labelled patches as the networks see them: images at the model's pixel size, boxes in them with presence labels, and
the views that a training step draws.

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
from pipeline.training.dataset import IGNORED, Dataset, Sample, labelled_boxes, read_rgb
from pipeline.training.resample import resampled
from wsi.levels import MPP_TOLERANCE

GLASS = 255
"""What fills a view beyond its image."""


@dataclass(frozen=True)
class View:
    """A square part of an image with the labelled patches that lie inside it."""

    rgb_HWC: NDArray[np.uint8]
    boxes_B4: NDArray[np.int64]
    present_BK: NDArray[np.bool_]


class Place(NamedTuple):
    """Where a view lies: the image's index, the corner (x, y) of its square and the side of it."""

    image: int
    x: int
    y: int
    side: int


class PatchImages:
    """The images of one split at `mpp`, with their labelled boxes. Decoded images are kept up to `cache_bytes`."""

    def __init__(
        self, dataset: Dataset, chosen: Sequence[Sample], mpp: float, *, cache_bytes: int = 2 * 1024**3
    ) -> None:
        """Read the labels of all samples; the images are read when they are asked for.

        Raises what `labelled_boxes` raises.
        """
        self.dataset = dataset
        self.samples = tuple(chosen)
        scale = dataset.mpp / mpp
        # As `resampled` leaves images.
        self.scale = 1.0 if abs(scale - 1) <= MPP_TOLERANCE else scale
        self.boxes: list[NDArray[np.int64]] = []
        self.present: list[NDArray[np.bool_]] = []
        for sample in self.samples:
            labelled = labelled_boxes(dataset, sample)
            # Rounding the corner and the side, not both corners, keeps boxes of one size equal in size.
            boxes_B4 = np.rint(labelled.boxes_B4 * self.scale).astype(np.int64)
            # Rounded up both, they would end a pixel beyond the image.
            size_2 = np.rint(np.array(_extent(labelled.boxes_B4)) * self.scale).astype(np.int64)
            boxes_B4[:, :2] = np.minimum(boxes_B4[:, :2], size_2 - boxes_B4[:, 2:])
            self.boxes.append(boxes_B4)
            self.present.append(labelled.present_BK)
        self.sizes_N2 = np.array([_extent(boxes_B4) for boxes_B4 in self.boxes])
        """Width and height of each image."""
        self.ends_N = np.cumsum([len(boxes_B4) for boxes_B4 in self.boxes])
        """Labelled patches up to and with each image."""
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._room = cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.samples)

    def rgb(self, index: int) -> NDArray[np.uint8]:
        """One image at the model's mpp, (H, W, 3); area-averaged where that is coarser than the data set's."""
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
        """Pixels of all images at the model's mpp."""
        return int(self.sizes_N2.prod(axis=1).sum())

    def class_frequency(self) -> NDArray[np.float64]:
        """The share of labelled patches that hold each class, (K,)."""
        share_K: NDArray[np.float64] = np.concatenate(self.present).mean(axis=0)
        return share_K


def view_side(images: PatchImages, region: int | None) -> int:
    """Return the side of the views that training draws: of the regions, or without them of the labelled patches."""
    return region or int(images.boxes[0][0, 2])


def draw_places(images: PatchImages, region: int | None, count: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random places of `view_side`: regions with a labelled patch in them, or labelled patches."""
    if region is None:
        return draw_patches(images, count, rng)
    return draw_regions(images, count, region, rng)


def draw_regions(images: PatchImages, count: int, side: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random squares of random images; along an edge shorter than `side` they begin at 0.

    Images are drawn in proportion to their area, so every pixel is seen about equally often. A square that holds no
    whole labelled patch, for which it must be large enough, is moved to the nearest one.
    """
    area = np.maximum(images.sizes_N2, side).prod(axis=1).astype(float)
    places = []
    for index in rng.choice(len(images), size=count, p=area / area.sum()):
        x, y = (int(rng.integers(max(1, int(length) - side + 1))) for length in images.sizes_N2[index])
        places.append(_holding_a_patch(images.boxes[index], Place(int(index), x, y, side)))
    return places


def draw_patches(images: PatchImages, count: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random labelled patches, which must be square."""
    places = []
    for drawn in rng.integers(images.ends_N[-1], size=count):
        index = int(np.searchsorted(images.ends_N, drawn, side="right"))
        x, y, width, _ = (int(v) for v in images.boxes[index][drawn - images.ends_N[index]])
        places.append(Place(index, x, y, width))
    return places


def make_view(images: PatchImages, place: Place, strength: float, rng: np.random.Generator) -> View:
    """Return the view at a place, moved and restained at random."""
    move = Move.draw(rng)
    rgb_HWC = restain(_cut(images.rgb(place.image), place, GLASS), strength, rng)
    boxes_B4, inside_B = boxes_inside(images.boxes[place.image], place)
    return View(
        move.image(rgb_HWC), move.boxes(boxes_B4, place.side, place.side), images.present[place.image][inside_B]
    )


def make_labelled_view(
    images: PatchImages, labels_LHW: NDArray[np.uint8], place: Place, strength: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return (rgb_HWC, labels_LHW) of a place, moved and restained at random; beyond the image labels are `IGNORED`."""
    move = Move.draw(rng)
    rgb_HWC = restain(_cut(images.rgb(place.image), place, GLASS), strength, rng)
    moved = [move.image(_cut(labels_HW, place, IGNORED)) for labels_HW in labels_LHW]
    return move.image(rgb_HWC), np.stack(moved)


def boxes_inside(boxes_B4: NDArray[np.int64], place: Place) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the boxes that lie wholly inside a place, relative to its corner, and which of all boxes these are."""
    moved_B4 = boxes_B4 - np.array([place.x, place.y, 0, 0])
    inside_B = (moved_B4[:, :2] >= 0).all(axis=1) & (moved_B4[:, :2] + moved_B4[:, 2:] <= place.side).all(axis=1)
    return moved_B4[inside_B], inside_B


def _holding_a_patch(boxes_B4: NDArray[np.int64], place: Place) -> Place:
    corner_2 = np.array([place.x, place.y])
    corners_B2 = np.clip(corner_2, boxes_B4[:, :2] + boxes_B4[:, 2:] - place.side, boxes_B4[:, :2])
    x, y = corners_B2[np.abs(corners_B2 - corner_2).sum(axis=1).argmin()].tolist()
    return place._replace(x=x, y=y)


def _extent(boxes_B4: NDArray[np.int64]) -> tuple[int, int]:
    """Width and height that the boxes reach, which is the image's: the last row and column of patches is labelled."""
    return int((boxes_B4[:, 0] + boxes_B4[:, 2]).max()), int((boxes_B4[:, 1] + boxes_B4[:, 3]).max())


def _cut(array: NDArray[np.uint8], place: Place, fill: int) -> NDArray[np.uint8]:
    part = array[place.y : place.y + place.side, place.x : place.x + place.side]
    missing = (place.side - part.shape[0], place.side - part.shape[1])
    if missing == (0, 0):
        return part
    pad = [(0, missing[0]), (0, missing[1]), *([(0, 0)] * (array.ndim - 2))]
    return np.pad(part, pad, constant_values=fill)
