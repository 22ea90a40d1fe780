"""Images of one tissue, of which training images are composed: joined from tiles, or cut out of images with masks.

Shape suffixes: H and W an image, C color channels, Y and X the places of windows on a grid.
"""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DatasetFileError, LabelError
from pipeline.training.dataset import (
    Dataset,
    Sample,
    image_size,
    load_dataset,
    read_mask,
    read_rgb,
    samples,
    shipped_names,
)
from pipeline.training.dataset_sections import Cut, CutTissue, Split, Whole
from pipeline.training.resample import resampled
from pipeline.training.splits import rows_of

logger = logging.getLogger(__name__)

BRIGHT = 205
"""A pixel is bright if its darkest channel is above this value, as glass and the lumen of a gland are."""


class Piece(NamedTuple):
    """An image of one tissue: its slide and its pixels at the composed images' pixel size."""

    slide: str
    rgb_HWC: NDArray[np.uint8]


Kind = tuple[str, ...]
"""The names of the classes that a tissue contains."""

Pieces = dict[Kind, list[Piece]]


def kinds_of(dataset: Dataset) -> tuple[Kind, ...]:
    """Return the tissues of all splits: every class alone, and then each group of classes that an image has."""
    single = tuple((name,) for name in dataset.class_names)
    listed = {_kind(dataset, sample) for split in dataset.card.splits for sample in samples(dataset, split)}
    assert dataset.card.compose is not None
    listed |= {_kind_of_cut(dataset, tissue) for rule in dataset.card.compose.cut for tissue in rule.tissues}
    return (*single, *sorted(kind for kind in listed if len(kind) > 1))


def _kind(dataset: Dataset, sample: Sample) -> Kind:
    assert sample.labels_K is not None
    return tuple(name for name, there in zip(dataset.class_names, sample.labels_K, strict=True) if there)


def _kind_of_cut(dataset: Dataset, tissue: CutTissue) -> Kind:
    return tuple(name for name in dataset.class_names if name in tissue.classes)


def pieces_of(dataset: Dataset, split: Split) -> Pieces:
    """Return all images of one tissue of a split: joined from the data set's tiles, and cut by the rules of its card.

    Raises what `samples`, `read_rgb`, `read_mask` and `joined_pieces` raise, and DatasetFileError for a data set in
    `compose.cut` that is missing or does not fit.
    """
    pieces = defaultdict(list, joined_pieces(dataset, split))
    assert dataset.card.compose is not None
    for rule in dataset.card.compose.cut:
        counts = dict.fromkeys((_kind_of_cut(dataset, tissue) for tissue in rule.tissues), 0)
        for kind, piece in _cut_pieces(dataset, rule, split):
            pieces[kind].append(piece)
            counts[kind] += 1
        summary = ", ".join(f"{count} of {' and '.join(kind)}" for kind, count in counts.items())
        logger.info("windows of %s in split %s: %s", rule.dataset, split, summary)
        if split == "train" and not all(counts.values()):
            raise DatasetFileError(
                f"{dataset.card.name}: compose.cut finds no training window for each tissue in {rule.dataset} "
                f"({summary}); check values, share, bright and sides"
            )
    return dict(pieces)


def joined_pieces(dataset: Dataset, split: Split) -> Pieces:
    """Return the images of a split by tissue, neighbors of one larger image and tissue joined to rectangles.

    Of two images at one position, the first is left out, with a warning. An image without a `source` is alone. Raises
    LabelError for a column that is missing, an image without a class, or a position that is not a number, and
    DatasetFileError for tiles of one larger image and tissue that differ in size.
    """
    card = dataset.card
    rule = card.compose
    assert rule is not None
    assert card.table is not None
    chosen = samples(dataset, split)
    rows = rows_of({sample.name: sample.image for sample in chosen}, dataset.root, card.table)
    grids: dict[tuple[str, str, Kind], dict[tuple[int, int], Sample]] = defaultdict(dict)
    replaced: list[str] = []
    for sample in chosen:
        row, kind = rows[sample.name], _kind(dataset, sample)
        if missing := [name for name in (rule.source, rule.x, rule.y) if name not in row]:
            raise LabelError(
                f"{sample.image}: the table has no column {', '.join(missing)} (source, x or y of [compose]); the "
                f"columns are {', '.join(row)}"
            )
        if not kind:
            raise LabelError(f"{sample.image}: has no class, so compose cannot use it; label it, or remove it")
        place = (_position(sample, row[rule.x]), _position(sample, row[rule.y]))
        grid = grids[sample.group, row[rule.source] or sample.name, kind]
        if place in grid:
            replaced.append(f"{grid[place].image} by {sample.image}")
        grid[place] = sample
    if replaced:  # the collection of textures has a few, so they are not an error
        logger.warning(
            "%s: %d images are not used, because a later image has the same position (replaced: %s); correct "
            "the positions in the table",
            card.name,
            len(replaced),
            replaced[0],
        )
    pieces: Pieces = defaultdict(list)
    for (slide, _, kind), grid in sorted(grids.items()):
        width, height = _tile_size(grid.values())
        for rectangle in rectangles(grid, width, height):
            rgb_HWC = np.concatenate(
                [np.concatenate([read_rgb(grid[place]) for place in line], axis=1) for line in rectangle]
            )
            pieces[kind].append(Piece(slide, resampled(rgb_HWC, card.mpp / rule.mpp)))
    return dict(pieces)


def _tile_size(tiles: Iterable[Sample]) -> tuple[int, int]:
    """Return the width and height of all these tiles. Raises DatasetFileError if they differ."""
    first, *others = tiles
    size = image_size(first)
    for other in others:
        if (found := image_size(other)) != size:
            raise DatasetFileError(
                f"{other.image}: is {found[0]}x{found[1]} px, but {first.image}, of the same image, is "
                f"{size[0]}x{size[1]} px; make all tiles the same size, or remove this one"
            )
    return size


def _position(sample: Sample, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise LabelError(
            f"{sample.image}: its position in the table is {value!r}; it must be a whole number"
        ) from error


def rectangles(places: Iterable[tuple[int, int]], width: int, height: int) -> list[list[list[tuple[int, int]]]]:
    """Return places (x, y) of tiles grouped into rectangles of neighbors, each a list of rows of places.

    A rectangle starts at the first place that is left, in the order of y and x, grows to the right while there are
    neighbors, and then down by whole rows. Each place is in one rectangle.
    """
    left = set(places)
    found = []
    for x, y in sorted(left, key=lambda place: place[::-1]):
        if (x, y) not in left:
            continue
        columns = [x]
        while (columns[-1] + width, y) in left:
            columns.append(columns[-1] + width)
        rectangle = [[(column, y) for column in columns]]
        while all((column, rectangle[-1][0][1] + height) in left for column in columns):
            rectangle.append([(column, rectangle[-1][0][1] + height) for column in columns])
        left -= {place for line in rectangle for place in line}
        found.append(rectangle)
    return found


def other_datasets(dataset: Dataset) -> list[Dataset]:
    """Return the data sets that a data set of composed images also uses: those of `compose.cut` and `compose.whole`.

    Raises DatasetFileError if one is missing.
    """
    compose = dataset.card.compose
    if compose is None:
        return []
    cut = {(rule.dataset, rule.folder) for rule in compose.cut}
    rules: list[Cut | Whole] = [*compose.cut]
    rules += [rule for rule in compose.whole if (rule.dataset, rule.folder) not in cut]
    return [other_dataset(dataset, rule) for rule in rules]


def other_dataset(dataset: Dataset, rule: Cut | Whole) -> Dataset:
    """Return the data set of a rule of `compose`. Raises DatasetFileError if it is missing."""
    folder = dataset.root / rule.folder
    if rule.dataset not in shipped_names() or not folder.is_dir():
        raise DatasetFileError(
            f"{dataset.card.name}: compose.{type(rule).__name__.lower()} needs the data set {rule.dataset} in "
            f"{folder}; the folder must exist, and the shipped data sets are {', '.join(shipped_names())}"
        )
    return load_dataset(rule.dataset, folder)


def _cut_pieces(dataset: Dataset, rule: Cut, split: Split) -> Iterator[tuple[Kind, Piece]]:
    """Yield the windows of the rule's data set that show one tissue, at the pixel size of the composed images."""
    source = other_dataset(dataset, rule)
    compose, table = dataset.card.compose, source.card.table
    assert compose is not None
    if table is None:
        raise DatasetFileError(f"{source.card.name}: compose.cut needs a data set with a [table]")
    if unknown := {tissue.mask for tissue in rule.tissues} - set(source.class_names):
        raise DatasetFileError(
            f"{dataset.card.name}: compose.cut names the masks {', '.join(sorted(unknown))}; the classes of "
            f"{source.card.name} are {', '.join(source.class_names)}"
        )
    if split not in source.card.splits:
        return
    chosen = samples(source, split)
    rows = rows_of({sample.name: sample.image for sample in chosen}, source.root, table)
    for sample in chosen:
        value = rows[sample.name].get(rule.column)
        if not value:
            raise LabelError(f"{sample.image}: the table has no {rule.column} for this image; add it")
        rgb_HWC, mask_HW = read_rgb(sample), read_mask(source, sample)
        bright_HW = rgb_HWC.min(axis=2) > BRIGHT
        slide = f"{source.card.name} {zlib.crc32(sample.group.encode()) % rule.slides}"
        used_HW = np.zeros(mask_HW.shape, bool)
        for tissue in rule.tissues:
            if tissue.values and value not in tissue.values:
                continue
            inside_HW = mask_HW == source.class_names.index(tissue.mask)
            for rows_px, columns_px in cut_windows(inside_HW, bright_HW, used_HW, tissue, rule):
                window_HWC = resampled(rgb_HWC[rows_px, columns_px], source.mpp / compose.mpp)
                yield _kind_of_cut(dataset, tissue), Piece(slide, window_HWC)


def cut_windows(
    inside_HW: NDArray[np.bool_], bright_HW: NDArray[np.bool_], used_HW: NDArray[np.bool_], tissue: CutTissue, rule: Cut
) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of windows that show a tissue, and mark them in `used_HW`.

    No window contains a used pixel. The largest windows come first, and those of one size in the order of y and x.
    """
    inside_sums, bright_sums = _sums(inside_HW), _sums(bright_HW)
    for side in sorted(tissue.sides, reverse=True):
        if side > min(inside_HW.shape):
            continue
        share_YX, bright_YX = (_share_of_windows(sums, side, rule.step) for sums in (inside_sums, bright_sums))
        fits_YX = (tissue.share[0] <= share_YX) & (share_YX <= tissue.share[1]) & (bright_YX <= tissue.bright)
        for y, x in np.argwhere(fits_YX) * rule.step:
            window = slice(int(y), int(y) + side), slice(int(x), int(x) + side)
            if not used_HW[window].any():
                used_HW[window] = True
                yield window


def _sums(of_HW: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of true pixels above and left of each corner of a pixel, (H + 1, W + 1)."""
    sums: NDArray[np.int64] = np.pad(of_HW.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    return sums


def _share_of_windows(sums: NDArray[np.int64], side: int, step: int) -> NDArray[np.float64]:
    """Return the share of true pixels in each square window, every `step` pixels, from their `_sums`."""
    counts = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    shares_YX: NDArray[np.float64] = counts[::step, ::step] / side**2
    return shares_YX
