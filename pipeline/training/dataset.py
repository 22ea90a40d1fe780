"""Patch data sets described by a dataset.toml: the images of each split, with their pixels, masks and labels.

Shape suffixes: K classes, B boxes (x, y, width, height in pixels of the image), H and W the image, C color channels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.errors import (
    DatasetFileError,
    MaskError,
    MissingImagesError,
    UnreadableImageError,
)
from pipeline.training.dataset_card import DatasetCard, read_card
from pipeline.training.dataset_sections import (
    BackgroundRule,
    CropLabels,
    CsvLabels,
    FileNameLabels,
    HashSplit,
    Location,
    Split,
    TableSplit,
)
from pipeline.training.image_files import decoded, matching_files, size_of, spellings
from pipeline.training.labels import crop_boxes, labels_of_folder, labels_of_name, labels_of_row, presence
from pipeline.training.missed_images import files_in_any_case, missed_images
from pipeline.training.splits import Row, group_of, hash_split, log_once, rows_of, shared_groups, table_splits

logger = logging.getLogger(__name__)

IGNORED = 255
"""Label of pixels that losses and scores ignore."""

SHIPPED = Path(__file__).parent / "datasets"
"""Folder of the dataset.toml files shipped with the package."""

_UNKNOWN = 254


@dataclass(frozen=True)
class Dataset:
    """A patch data set: the content of its dataset.toml, and the folder that its paths are relative to."""

    card: DatasetCard
    root: Path

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of their indices."""
        return tuple(spec.name for spec in self.card.classes)

    @property
    def classes(self) -> tuple[TissueClass, ...]:
        """Return the classes, in the order of their indices."""
        return tuple(spec.tissue_class for spec in self.card.classes)

    @property
    def mpp(self) -> float:
        """Return the pixel size of the images in µm."""
        return self.card.mpp


@dataclass(frozen=True)
class Sample:
    """An image of a data set."""

    name: str
    """File name without extension."""
    image: Path
    mask: Path | None
    group: str
    """Patient or case; "" if the data set does not define groups."""
    labels_K: tuple[bool, ...] | None
    """Classes present in the whole image; None if labels are read from the mask."""


@dataclass(frozen=True)
class Labeled:
    """The labeled boxes of an image, as (x, y, width, height) in its pixels, and the classes present in each box."""

    boxes_B4: NDArray[np.int64]
    present_BK: NDArray[np.bool_]


def shipped_names() -> tuple[str, ...]:
    """Return the names of the shipped data sets, sorted."""
    return tuple(sorted(file.stem for file in SHIPPED.glob("*.toml")))


def load_dataset(name_or_file: str | Path, root: Path | None = None) -> Dataset:
    """Return the shipped data set of this name ("glas"), or the data set that a dataset.toml describes.

    A folder stands for the dataset.toml in it.
    `root` is the folder of the data. If it is None, the folder is the root in the file, relative to the file, or else
    the folder of the file. Raises DatasetFileError for an unknown name, a file with wrong keys, or a missing folder.
    """
    shipped = str(name_or_file) in shipped_names()
    file = SHIPPED / f"{name_or_file}.toml" if shipped else Path(name_or_file)
    if file.is_dir():
        file /= "dataset.toml"
    if not file.is_file():
        raise DatasetFileError(
            f"{name_or_file}: there is no such file, no dataset.toml in it, and no shipped data set of this name; "
            f"the shipped data sets are {', '.join(shipped_names())}"
        )
    card = read_card(file)
    if root is None:
        if shipped:
            raise DatasetFileError(f"{name_or_file}: pass the folder of this data set (--data, root)")
        root = file.parent / (card.root or ".")
    if not root.is_dir():
        raise DatasetFileError(
            f"{card.name}: the folder {root} does not exist; pass the folder that contains the images"
        )
    return Dataset(card, root)


def samples(dataset: Dataset, split: Split) -> tuple[Sample, ...]:
    """Return the images of a split, sorted by name, so that the order is the same on every machine.

    Labels are read, pixels are not. Raises MissingImagesError for an empty split, LabelError for a label or row that is
    missing or cannot be parsed, MaskError for a missing mask file, and DatasetFileError for two images of one name.
    """
    card = dataset.card
    images, place = _images(dataset, split)
    rows: Mapping[str, Row] = {name: {} for name in images}
    if card.table:
        rows = rows_of(images, dataset.root, card.table, all_images="all" in card.images)
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
    """Return the pixels of an image, (H, W, 3). Transparent pixels are white, as in slides.

    Raises UnreadableImageError.
    """
    return decoded(sample.image, "RGB")


def read_mask(dataset: Dataset, sample: Sample) -> NDArray[np.uint8]:
    """Return the mask of an image as class indices, (H, W), with `IGNORED` for pixels that the data set excludes.

    The file contains palette indices, or gray values if the mask has no palette. Raises MaskError for a sample without
    a mask, a mask whose size differs from the image, or an unknown value.
    """
    if sample.mask is None:
        raise MaskError(f"{sample.image}: has no mask; add a mask pattern to images in the dataset.toml")
    values_HW = decoded(sample.mask, None)
    width, height = image_size(sample)
    if values_HW.shape != (height, width):
        raise MaskError(
            f"{sample.mask}: is {values_HW.shape[1]}x{values_HW.shape[0]} px, but its image {sample.image} is "
            f"{width}x{height} px"
        )
    index = np.full(256, _UNKNOWN, dtype=np.uint8)
    for k, spec in enumerate(dataset.card.classes):
        index[list(spec.mask_values)] = k
    rule = dataset.card.labels
    several = rule.several if isinstance(rule, CropLabels) else {}
    index[[*dataset.card.mask_excluded, *several]] = IGNORED
    labels_HW: NDArray[np.uint8] = index[values_HW]
    if (labels_HW == _UNKNOWN).any():
        strange = ", ".join(str(value) for value in np.unique(values_HW[labels_HW == _UNKNOWN]))
        known = ", ".join(f"{spec.name} {list(spec.mask_values)}" for spec in dataset.card.classes)
        raise MaskError(
            f"{sample.mask}: contains the value(s) {strange}, which no class has (classes: {known}; "
            f"mask_excluded {list(dataset.card.mask_excluded)}); add them to a class or to mask_excluded"
        )
    return labels_HW


def labeled_boxes(dataset: Dataset, sample: Sample) -> Labeled:
    """Return the labeled boxes of an image: one box if the whole image has a label, otherwise the crops of its mask.

    `pipeline.training.labels.crop_boxes` lists the crops. Raises UnreadableImageError, and what `read_mask` raises if
    labels are read from the mask.
    """
    width, height = image_size(sample)
    rule = dataset.card.labels
    whole_14 = np.array([[0, 0, width, height]], dtype=np.int64)
    if sample.labels_K is not None:
        return Labeled(whole_14, np.array([sample.labels_K], dtype=bool))
    labels_HW = read_mask(dataset, sample)
    classes = len(dataset.card.classes)
    if isinstance(rule, CropLabels):
        boxes_B4 = crop_boxes(width, height, rule.side, rule.stride)
        labeled = Labeled(boxes_B4, presence(labels_HW, boxes_B4, classes, rule.minimum))
        return _with_several(dataset, sample, labeled, rule) if rule.several else labeled
    return Labeled(whole_14, presence(labels_HW, whole_14, classes, rule.mask_minimum))


def _with_several(dataset: Dataset, sample: Sample, labeled: Labeled, rule: CropLabels) -> Labeled:
    """Add the classes of areas with several classes to the crops that they cover, and drop crops of unknown classes.

    If no crop would be left, all crops are kept.
    """
    assert sample.mask is not None
    values_HW = decoded(sample.mask, None)
    boxes_B4, present_BK = labeled.boxes_B4, labeled.present_BK.copy()
    known_B = np.ones(len(boxes_B4), dtype=bool)
    for value, names in rule.several.items():
        area_HW = np.where(values_HW == value, np.uint8(0), np.uint8(IGNORED))
        some_B, most_B = (presence(area_HW, boxes_B4, 1, share)[:, 0] for share in (rule.minimum, 0.5))
        columns = [dataset.class_names.index(name) for name in names]
        known_B &= ~some_B | most_B | present_BK[:, columns].all(axis=1)
        present_BK[:, columns] |= most_B[:, None]
    if not known_B.any():
        return Labeled(boxes_B4, present_BK)
    return Labeled(boxes_B4[known_B], present_BK[known_B])


def background_HW(rgb_HWC: NDArray[np.uint8], rule: BackgroundRule) -> NDArray[np.bool_]:
    """Return which pixels are glass, (H, W): those in large 4-connected pieces of bright pixels.

    A pixel is bright if its luma (ITU-R 601-2, as in Pillow and OpenCV) exceeds the limit of the rule. This is the rule
    in the code of Han et al. 2022.
    """
    bright_HW = np.asarray(Image.fromarray(rgb_HWC).convert("L")) > rule.gray_above
    pieces_HW, _ = scipy.ndimage.label(bright_HW)
    large = np.bincount(pieces_HW.ravel()) >= rule.smallest_px
    large[0] = False
    kept_HW: NDArray[np.bool_] = large[pieces_HW]
    return kept_HW


def check_images(chosen: Sequence[Sample], limit: float, workers: int = 8) -> tuple[Sample, ...]:
    """Decode every image and return the samples whose image can be read. Log each image that cannot.

    Raises UnreadableImageError if the share of unreadable images exceeds `limit`.
    """
    with ThreadPoolExecutor(workers) as pool:
        problems = list(pool.map(_problem, chosen))
    bad = [problem for problem in problems if problem is not None]
    for problem in bad:
        logger.warning("skipped: %s", problem)
    if len(bad) > limit * len(chosen):
        shown = "; ".join(bad[:5]) + ("; …" if len(bad) > 5 else "")
        raise UnreadableImageError(
            f"{len(bad)} of {len(chosen)} images cannot be read, at most {limit:.1%} may fail; repair or "
            f"remove them: {shown}"
        )
    if bad:
        logger.warning("%d of %d images cannot be read and are skipped", len(bad), len(chosen))
    return tuple(sample for sample, problem in zip(chosen, problems, strict=True) if problem is None)


def image_size(sample: Sample) -> tuple[int, int]:
    """Return (width, height) from the header of an image. Raises UnreadableImageError."""
    return size_of(sample.image)


def _problem(sample: Sample) -> str | None:
    try:
        read_rgb(sample)
    except UnreadableImageError as error:
        return str(error)
    return None


def _images(dataset: Dataset, split: Split) -> tuple[dict[str, Path], Location]:
    """Return the images by name, sorted, of the first location whose pattern matches a file, and that location."""
    card = dataset.card
    if split not in card.splits:
        raise MissingImagesError(
            f"{card.name}: the dataset.toml does not describe split {split}, only {', '.join(card.splits)}; name one "
            f"of these (wsi-evaluate --split), or add split {split} to the dataset.toml"
        )
    locations = card.images.get("all") or card.images[split]
    for place in locations:
        if files := matching_files(dataset.root, place.image):
            break
    else:
        if others := files_in_any_case(dataset.root, locations):
            raise MissingImagesError(
                f"{card.name}: no images for split {split} in {dataset.root}; {len(others)} image(s), such as "
                f"{others[0].name}, match a pattern except for the case of the extension; write the extension in the "
                "pattern as in the file names"
            )
        raise MissingImagesError(
            f"{card.name}: no images for split {split} in {dataset.root}; "
            f"tried {', '.join(place.image for place in locations)}; pass another root or add a pattern to images"
        )
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise DatasetFileError(
                f"{card.name}: two images have the name {file.stem}: {found[file.stem]} and {file}; rename one"
            )
        found[file.stem] = file
    missed, pattern = missed_images(dataset.root, locations, card.images.values(), found)
    if missed:
        log_once(
            logging.WARNING,
            f"{card.name}: {len(missed)} image(s) are not used, such as {missed[0]}; only {place.image!r} counts, the "
            "first pattern in [images] that finds a file, and patterns distinguish .jpg from .JPG; to use all images, "
            f"replace it with {f'the pattern {pattern!r}' if pattern else 'one pattern that finds all of them'}",
        )
    return dict(sorted(found.items())), place


def _names(
    card: DatasetCard,
    split: Split,
    images: Mapping[str, Path],
    rows: Mapping[str, Row],
    groups: Mapping[str, str],
) -> list[str]:
    """Return the names of the images in a split."""
    match card.split:
        case None:
            return list(images)
        case HashSplit() as rule:
            split_of = {name: hash_split(groups[name], rule.train, rule.val) for name in images}
        case TableSplit() as rule:
            split_of = table_splits(images, rows, groups, rule)
            if shared := shared_groups(split_of, groups, split):
                # Not an error: the published test split of GlaS does it, and wsi-label with a single patient.
                shown = ", ".join(shared[:5]) + (", …" if len(shared) > 5 else "")
                log_once(
                    logging.WARNING,
                    f"{card.name}: {len(shared)} group(s) of split {split} ({shown}) also have images in another "
                    f"split, so scores of split {split} may be too high for new groups; if you can, move all images of "
                    "a group to one split",
                )
    names = [name for name in images if split_of[name] == split]
    if not names:
        sizes = ", ".join(f"{count} in {key}" for key, count in sorted(Counter(split_of.values()).items()))
        advice = "change [split]"
        if isinstance(card.split, HashSplit):
            count = len(set(groups.values()))
            advice = (
                f"a hash assigns each of the {count} group(s) to a split, so with few groups a split can stay empty; "
                'name images.train without [split], or use [split] by = "table"'
            )
        raise MissingImagesError(f"{card.name}: split {split} has no images ({sizes}); {advice}")
    return names


def _mask(dataset: Dataset, name: str, place: Location) -> Path | None:
    if place.mask is None:
        return None
    masks = [dataset.root / form for form in spellings(place.mask.replace("{name}", name))]
    found = next((mask for mask in masks if mask.is_file()), None)
    if found is None:
        raise MaskError(f"{masks[0]}: the mask of {name} is missing")
    return found


def _labels(dataset: Dataset, split: Split, image: Path, row: Row) -> tuple[bool, ...] | None:
    rule = dataset.card.labels
    if isinstance(rule, CropLabels) or split not in rule.splits:
        return None
    if isinstance(rule, FileNameLabels):
        return labels_of_name(image, rule, len(dataset.class_names))
    if isinstance(rule, CsvLabels):
        return labels_of_row(image, row, rule, dataset.class_names)
    return labels_of_folder(image, rule, dataset.class_names)
