"""Patch data sets that a dataset.toml describes: which images are in which split, their pixels, masks and labels.

Shape suffixes: K classes, B boxes (x, y, width, height in pixels of the image), H and W the image, C colour channels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import (
    DatasetFileError,
    EmptyClassError,
    MaskError,
    MissingImagesError,
    UnreadableImageError,
)
from pipeline.training.dataset_card import (
    BackgroundRule,
    CropLabels,
    CsvLabels,
    DatasetCard,
    FileNameLabels,
    HashSplit,
    Location,
    Split,
    TableSplit,
    read_card,
)
from pipeline.training.labels import crop_boxes, labels_of_folder, labels_of_name, labels_of_row, presence
from pipeline.training.splits import Row, group_of, hash_split, rows_of, table_splits

logger = logging.getLogger(__name__)

IGNORED = 255
"""Label of a pixel that no loss and no score counts."""

SHIPPED = Path(__file__).parent / "datasets"
"""Folder of the dataset.toml files that come with the package."""

_UNKNOWN = 254


@dataclass(frozen=True)
class Dataset:
    """A patch data set: what its dataset.toml says, and the folder its paths lie below."""

    card: DatasetCard
    root: Path

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.card.classes)

    @property
    def colors(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(spec.color for spec in self.card.classes)

    @property
    def mpp(self) -> float:
        return self.card.mpp


@dataclass(frozen=True)
class Sample:
    """An image of a data set."""

    name: str
    """The file name without its extension."""
    image: Path
    mask: Path | None
    group: str
    """Patient or case; "" where the data set names none."""
    labels_K: tuple[bool, ...] | None
    """Classes present in the whole image; None where labels are read from the mask."""


@dataclass(frozen=True)
class Labelled:
    """The labelled boxes of an image: (x, y, width, height) in its pixels, and the classes present in each."""

    boxes_B4: NDArray[np.int64]
    present_BK: NDArray[np.bool_]


def shipped_names() -> tuple[str, ...]:
    """Names of the data sets whose dataset.toml comes with the package, sorted."""
    return tuple(sorted(file.stem for file in SHIPPED.glob("*.toml")))


def load_dataset(name_or_file: str | Path, root: Path | None = None) -> Dataset:
    """Return the data set of a shipped name ("glas") or of a dataset.toml.

    `root` is the folder of the data; else it is the one that the file names, relative to the file, or the file's own.
    Raises DatasetFileError for an unknown name, a file with wrong keys, or a root that is not there.
    """
    shipped = str(name_or_file) in shipped_names()
    file = SHIPPED / f"{name_or_file}.toml" if shipped else Path(name_or_file)
    if not file.is_file():
        raise DatasetFileError(
            f"{name_or_file}: no such file, and no data set of that name comes with the program; "
            f"there are {', '.join(shipped_names())}"
        )
    card = read_card(file)
    if root is None:
        if shipped:
            raise DatasetFileError(f"{name_or_file}: say in which folder this data set lies (root)")
        root = file.parent / (card.root or ".")
    if not root.is_dir():
        raise DatasetFileError(f"{card.name}: the folder {root} does not exist; it should hold the data set's images")
    return Dataset(card, root)


def samples(dataset: Dataset, split: Split) -> tuple[Sample, ...]:
    """Return the images of a split, sorted by name: the same on every machine. Labels are read, pixels are not.

    Raises MissingImagesError where there are none, LabelError for a label or a row that is missing or does not parse,
    MaskError for a missing mask file, and DatasetFileError for two images of one name.
    """
    card = dataset.card
    images, place = _images(dataset, split)
    rows: Mapping[str, Row] = rows_of(images, dataset.root, card.table) if card.table else {name: {} for name in images}
    groups = {name: group_of(image, rows[name], card.group) if card.group else "" for name, image in images.items()}
    names = _names(card, split, images, rows, groups)
    return tuple(
        Sample(
            name,
            images[name],
            _mask(dataset, name, place),
            groups[name],
            _labels(dataset, split, images[name], rows[name]),
        )
        for name in names
    )


def read_rgb(sample: Sample) -> NDArray[np.uint8]:
    """Return an image's pixels, (H, W, 3). Raises UnreadableImageError, naming the file."""
    return _decoded(sample.image, "RGB")


def read_mask(dataset: Dataset, sample: Sample) -> NDArray[np.uint8]:
    """Return an image's mask as class indices, (H, W), `IGNORED` where the data set excludes pixels.

    The values are palette indices (or the grey values of a mask without palette), as the file holds them. Raises
    MaskError for a sample without mask, a mask of another size than its image, or a value of no class.
    """
    if sample.mask is None:
        raise MaskError(f"{sample.image}: has no mask; name it in images of the dataset.toml")
    values_HW = _decoded(sample.mask, None)
    width, height = image_size(sample)
    if values_HW.shape != (height, width):
        raise MaskError(
            f"{sample.mask}: is {values_HW.shape[1]}x{values_HW.shape[0]}, its image {sample.image} is {width}x{height}"
        )
    index = np.full(256, _UNKNOWN, dtype=np.uint8)
    for k, spec in enumerate(dataset.card.classes):
        index[list(spec.mask_values)] = k
    index[list(dataset.card.mask_excluded)] = IGNORED
    labels_HW: NDArray[np.uint8] = index[values_HW]
    if (labels_HW == _UNKNOWN).any():
        strange = ", ".join(str(value) for value in np.unique(values_HW[labels_HW == _UNKNOWN]))
        known = ", ".join(f"{spec.name} {list(spec.mask_values)}" for spec in dataset.card.classes)
        raise MaskError(
            f"{sample.mask}: holds the value(s) {strange} that no class has (classes: {known}; "
            f"mask_excluded {list(dataset.card.mask_excluded)}); add them to a class or to mask_excluded"
        )
    return labels_HW


def labelled_boxes(dataset: Dataset, sample: Sample) -> Labelled:
    """Return the labelled boxes of an image: one over the whole image where it is labelled as a whole, else the crops
    of its mask (`pipeline.training.labels.crop_boxes`).

    Raises what `read_mask` raises where labels are read from the mask, and UnreadableImageError.
    """
    width, height = image_size(sample)
    rule = dataset.card.labels
    whole_14 = np.array([[0, 0, width, height]], dtype=np.int64)
    if sample.labels_K is not None:
        return Labelled(whole_14, np.array([sample.labels_K], dtype=bool))
    labels_HW = read_mask(dataset, sample)
    classes = len(dataset.card.classes)
    if isinstance(rule, CropLabels):
        boxes_B4 = crop_boxes(width, height, rule.side, rule.stride)
        return Labelled(boxes_B4, presence(labels_HW, boxes_B4, classes, rule.minimum))
    return Labelled(whole_14, presence(labels_HW, whole_14, classes, rule.mask_minimum))


def check_classes(dataset: Dataset, labelled: Iterable[Labelled]) -> None:
    """Raise EmptyClassError where a class is in none of the boxes: no classifier can learn it."""
    count_K = np.zeros(len(dataset.class_names), dtype=np.int64)
    boxes = 0
    for one in labelled:
        count_K += one.present_BK.sum(axis=0)
        boxes += len(one.boxes_B4)
    empty = [name for name, count in zip(dataset.class_names, count_K, strict=True) if count == 0]
    if empty:
        raise EmptyClassError(
            f"{dataset.card.name}: no training patch of {boxes} has class {', '.join(empty)}; check the order of the "
            "classes and their mask values, or take the class out of the dataset.toml"
        )


def background_HW(rgb_HWC: NDArray[np.uint8], rule: BackgroundRule) -> NDArray[np.bool_]:
    """Return what is glass, (H, W): luma above the rule's, in 4-connected pieces of at least its size.

    The rule of Han et al.'s release (2022); luma is ITU-R 601-2, as in Pillow and OpenCV.
    """
    bright_HW = np.asarray(Image.fromarray(rgb_HWC).convert("L")) > rule.gray_above
    pieces_HW, _ = scipy.ndimage.label(bright_HW)
    large = np.bincount(pieces_HW.ravel()) >= rule.smallest_px
    large[0] = False
    kept_HW: NDArray[np.bool_] = large[pieces_HW]
    return kept_HW


def check_images(chosen: Sequence[Sample], limit: float, workers: int = 8) -> tuple[Sample, ...]:
    """Decode every image and return the samples whose image can be read; the others are logged, each by its name.

    Raises UnreadableImageError where more than the share `limit` cannot be read.
    """
    with ThreadPoolExecutor(workers) as pool:
        problems = list(pool.map(_problem, chosen))
    bad = [problem for problem in problems if problem is not None]
    for problem in bad:
        logger.warning("left out: %s", problem)
    if len(bad) > limit * len(chosen):
        shown = "; ".join(bad[:5]) + ("; …" if len(bad) > 5 else "")
        raise UnreadableImageError(f"{len(bad)} of {len(chosen)} images cannot be read, {limit:.1%} may: {shown}")
    if bad:
        logger.warning("%d of %d images cannot be read and are left out", len(bad), len(chosen))
    return tuple(sample for sample, problem in zip(chosen, problems, strict=True) if problem is None)


def image_size(sample: Sample) -> tuple[int, int]:
    """Return an image's (width, height) from its header. Raises UnreadableImageError."""
    try:
        with Image.open(sample.image) as image:
            return image.size
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(f"{sample.image}: cannot be read: {error}") from error


# What Pillow's decoders raise for damaged files.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def _decoded(file: Path, mode: str | None) -> NDArray[np.uint8]:
    """Pixels of a file, converted to `mode`; None: the values of a mask as they are."""
    failed = UnreadableImageError if mode else MaskError
    try:
        with Image.open(file) as image:
            if mode is None and image.mode not in {"P", "L", "1"}:
                raise MaskError(
                    f"{file}: is {image.mode}; a mask must be a palette or 8-bit grey image of class values"
                )
            if image.mode.startswith(("I", "F")):
                raise UnreadableImageError(f"{file}: has mode {image.mode}; an image must have 8 bits per channel")
            return np.asarray(image.convert(mode) if mode else image, dtype=np.uint8)
    except _DECODER_ERRORS as error:
        raise failed(f"{file}: cannot be read: {error}") from error


def _problem(sample: Sample) -> str | None:
    try:
        read_rgb(sample)
    except UnreadableImageError as error:
        return str(error)
    return None


def _images(dataset: Dataset, split: Split) -> tuple[dict[str, Path], Location]:
    """Images by name, sorted, of the first location whose pattern matches any, and that location."""
    card = dataset.card
    if split not in card.splits:
        raise MissingImagesError(f"{card.name}: describes no split {split}, only {', '.join(card.splits)}")
    locations = card.images.get("all") or card.images[split]
    for place in locations:
        # Names that begin with a dot are what other systems leave beside the files.
        try:
            files = sorted(
                file for file in dataset.root.glob(place.image) if file.is_file() and not file.name.startswith(".")
            )
        except (ValueError, NotImplementedError) as error:
            raise DatasetFileError(f"{card.name}: images cannot be {place.image!r}: {error}") from error
        if files:
            break
    else:
        raise MissingImagesError(
            f"{card.name}: no images for split {split} in {dataset.root}; "
            f"tried {', '.join(place.image for place in locations)}; pass another root or add a pattern to images"
        )
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise DatasetFileError(
                f"{card.name}: two images are named {file.stem}: {found[file.stem]} and {file}; rename one"
            )
        found[file.stem] = file
    return dict(sorted(found.items())), place


def _names(
    card: DatasetCard,
    split: Split,
    images: Mapping[str, Path],
    rows: Mapping[str, Row],
    groups: Mapping[str, str],
) -> list[str]:
    """Names of the images that are in a split."""
    match card.split:
        case None:
            return list(images)
        case HashSplit() as rule:
            split_of = {name: hash_split(groups[name], rule.train, rule.val) for name in images}
        case TableSplit() as rule:
            split_of = table_splits(images, rows, groups, rule)
    names = [name for name in images if split_of[name] == split]
    if not names:
        sizes = ", ".join(f"{count} in {key}" for key, count in sorted(Counter(split_of.values()).items()))
        raise MissingImagesError(f"{card.name}: no image falls into split {split} ({sizes}); change [split]")
    return names


def _mask(dataset: Dataset, name: str, place: Location) -> Path | None:
    if place.mask is None:
        return None
    mask = dataset.root / place.mask.replace("{name}", name)
    if not mask.is_file():
        raise MaskError(f"{mask}: the mask of {name} is missing")
    return mask


def _labels(dataset: Dataset, split: Split, image: Path, row: Row) -> tuple[bool, ...] | None:
    rule = dataset.card.labels
    if isinstance(rule, CropLabels) or split not in rule.splits:
        return None
    if isinstance(rule, FileNameLabels):
        return labels_of_name(image, rule, len(dataset.class_names))
    if isinstance(rule, CsvLabels):
        return labels_of_row(image, row, rule, dataset.class_names)
    return labels_of_folder(image, rule, dataset.class_names)
