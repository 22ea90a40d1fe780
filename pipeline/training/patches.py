"""Labeled patches for training: images at the model's pixel size, labeled boxes, and the views of a training step.

Shape suffixes: N views, B boxes (x, y, width, height in pixels at the model's mpp), K classes, H and W an image, L the
layers of pseudo masks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.training.augment import Augmentation, Move
from pipeline.training.dataset import Dataset, Labeled, Sample, image_size, labeled_boxes, read_mask, read_rgb
from pipeline.training.resample import resampled
from wsi.levels import MPP_TOLERANCE
from wsi.mirror import mirrored

CACHE_BYTES = 2 * 1024**3
"""Bytes of decoded images that `PatchImages` keeps in memory by default."""


@dataclass(frozen=True)
class View:
    """A square part of the plane that an image fills with its mirror images, with the labeled patches inside it."""

    rgb_HWC: NDArray[np.uint8]
    boxes_B4: NDArray[np.int64]
    present_BK: NDArray[np.bool_]


class Place(NamedTuple):
    """The position of a view: the index of the image, and the corner (x, y) and side of the square.

    The square may reach beyond the image, which is mirrored at its edges.
    """

    image: int
    x: int
    y: int
    side: int


class PatchImages:
    """The images of one split at `mpp`, with labeled boxes. Decoded images are cached up to `cache_bytes`."""

    def __init__(
        self,
        dataset: Dataset,
        chosen: Sequence[Sample],
        mpp: float,
        *,
        cache_bytes: int = CACHE_BYTES,
        labels: Sequence[Labeled] | None = None,
        unreadable: int = 0,
    ) -> None:
        """Read the labels of all samples, unless they are given. Images are read on first use.

        `unreadable` is the number of images of the split that `chosen` lacks because they cannot be read. Raises what
        `labeled_boxes` raises.
        """
        self.dataset = dataset
        self.samples = tuple(chosen)
        self.labels = [labeled_boxes(dataset, sample) for sample in self.samples] if labels is None else labels
        """The labels of each sample, with boxes in pixels of the data set."""
        self.unreadable = unreadable
        scale = dataset.mpp / mpp
        # `resampled` leaves such images unchanged.
        self.scale = 1.0 if abs(scale - 1) <= MPP_TOLERANCE else scale
        self.boxes: list[NDArray[np.int64]] = []
        self.present: list[NDArray[np.bool_]] = []
        sizes: list[NDArray[np.int64]] = []
        for sample, labeled in zip(self.samples, self.labels, strict=True):
            # Corner and side are rounded, not both corners, so that boxes of one size stay equal in size.
            boxes_B4 = np.rint(labeled.boxes_B4 * self.scale).astype(np.int64)
            # If both are rounded up, the box ends a pixel beyond the image.
            size_2 = np.rint(np.array(image_size(sample)) * self.scale).astype(np.int64)
            boxes_B4[:, :2] = np.minimum(boxes_B4[:, :2], size_2 - boxes_B4[:, 2:])
            self.boxes.append(boxes_B4)
            self.present.append(labeled.present_BK)
            sizes.append(size_2)
        self.sizes_N2 = np.array(sizes)
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

    def truth(self, index: int) -> NDArray[np.uint8]:
        """Return the mask of one image at the model's mpp, (H, W): class indices, or `IGNORED`.

        Raises what `read_mask` raises.
        """
        width, height = self.sizes_N2[index].tolist()
        mask = Image.fromarray(read_mask(self.dataset, self.samples[index]))
        return np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))

    def pixels(self) -> int:
        """Return the number of pixels of all images at the model's mpp."""
        return int(self.sizes_N2.prod(axis=1).sum())

    def class_frequency(self) -> NDArray[np.float64]:
        """Return the share of labeled patches that contain each class, (K,)."""
        share_K: NDArray[np.float64] = np.concatenate(self.present).mean(axis=0)
        return share_K


def at_pixel_sizes(images: PatchImages, sizes: Sequence[float]) -> list[PatchImages]:
    """Return the same images at each of these pixel sizes in µm, or `[images]` if `sizes` is empty.

    The default cache is divided in proportion to their pixels.
    """
    whole = sum(1 / mpp**2 for mpp in sizes)
    return [
        PatchImages(
            images.dataset,
            images.samples,
            mpp,
            cache_bytes=int(CACHE_BYTES / mpp**2 / whole),
            labels=images.labels,
        )
        for mpp in sizes
    ] or [images]


def view_side(images: PatchImages, region: int | None) -> int:
    """Return the side of the training views: `region`, or the side of the labeled patches if it is None."""
    return region or int(images.boxes[0][0, 2])


def draw_places(images: PatchImages, region: int | None, count: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random places of `view_side`: regions that contain a labeled patch, or labeled patches."""
    if region is None:
        return draw_patches(images, count, rng)
    return draw_regions(images, count, region, rng)


def draw_regions(images: PatchImages, count: int, side: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random squares inside random images, each moved to the nearest place that contains a whole patch.

    Along an image side that is shorter than the square, only the center of the square lies inside the image. `side`
    must be at least the side of a patch.
    """
    places = draw_squares(images, count, side, rng, inside=True)
    return [_holding_a_patch(images.boxes[place.image], place) for place in places]


def draw_squares(
    images: PatchImages, count: int, side: int, rng: np.random.Generator, *, inside: bool = False
) -> list[Place]:
    """Return `count` random squares whose centers lie in random images.

    Images are drawn in proportion to their area; a side that is shorter than the square counts as one of its length.
    With random flips, a pixel is equally likely at every place of a square. In images at least as large as the square,
    every pixel is drawn about equally often. In smaller images, which the square repeats, pixels are drawn more often.
    With `inside`, whole squares lie inside images that are large enough: pixels near the edges are then drawn less
    often, and rarely lie in the middle of a square.
    """
    area = np.maximum(images.sizes_N2, side).prod(axis=1).astype(float)
    places = []
    for index in rng.choice(len(images), size=count, p=area / area.sum()):
        # A center lies on a pixel or on its far edge: on pixels alone, flipped squares would repeat one position.
        x, y = (
            int(rng.integers(length - side + 1))
            if inside and length >= side
            else int(rng.integers(length) + rng.integers(2)) - side // 2
            for length in images.sizes_N2[index]
        )
        places.append(Place(int(index), x, y, side))
    return places


def draw_patches(images: PatchImages, count: int, rng: np.random.Generator) -> list[Place]:
    """Return `count` random labeled patches, which must be square."""
    places = []
    for drawn in rng.integers(images.ends_N[-1], size=count):
        index = int(np.searchsorted(images.ends_N, drawn, side="right"))
        x, y, width, _ = (int(v) for v in images.boxes[index][drawn - images.ends_N[index]])
        places.append(Place(index, x, y, width))
    return places


def make_view(images: PatchImages, place: Place, augmentation: Augmentation, rng: np.random.Generator) -> View:
    """Return the view at a place, randomly moved and recolored."""
    move = Move.draw(rng, augmentation.moves)
    rgb_HWC = augmentation.colors(cut(images.rgb(place.image), place), rng)
    boxes_B4, index_B = boxes_of_view(images.boxes[place.image], images.sizes_N2[place.image], place)
    return View(move.image(rgb_HWC), move.boxes(boxes_B4, place.side, place.side), images.present[place.image][index_B])


def make_labeled_view(
    images: PatchImages,
    labels_LHW: NDArray[np.uint8],
    place: Place,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return (rgb_HWC, labels_LHW) of a place, changed as in `make_view`."""
    move = Move.draw(rng, augmentation.moves)
    rgb_HWC = augmentation.colors(cut(images.rgb(place.image), place), rng)
    moved = [move.image(cut(labels_HW, place)) for labels_HW in labels_LHW]
    return move.image(rgb_HWC), np.stack(moved)


def cut(array: NDArray[np.uint8], place: Place) -> NDArray[np.uint8]:
    """Return the part of an image or label map (H, W, ...) at a place. The array is mirrored at its edges."""
    rows, columns = (
        mirrored(start, place.side, length) for start, length in zip((place.y, place.x), array.shape, strict=False)
    )
    return array[rows[:, None], columns]


def boxes_of_view(
    boxes_B4: NDArray[np.int64], size_2: NDArray[np.int64], place: Place
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the boxes wholly inside a place, relative to its corner, and the index in `boxes_B4` of each.

    `size_2` is the width and height of the image. Boxes of its mirror images count too.
    """
    found, indices = [], []
    for column, row in product(*(_copies(place[1 + axis], place.side, int(size_2[axis])) for axis in (0, 1))):
        moved_B4 = boxes_B4.copy()
        for axis, copy in enumerate((column, row)):
            start_B, side_B, length = boxes_B4[:, axis], boxes_B4[:, 2 + axis], int(size_2[axis])
            moved_B4[:, axis] = copy * length + (length - start_B - side_B if copy % 2 else start_B)
        inside_B4, inside_B = boxes_inside(moved_B4, place)
        found.append(inside_B4)
        indices.append(np.flatnonzero(inside_B))
    return np.concatenate(found), np.concatenate(indices)


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


def _copies(start: int, side: int, length: int) -> range:
    """Return the numbers of the mirror images in [start, start + side); even ones are not reversed, 0 is the image."""
    return range(start // length, (start + side - 1) // length + 1)
