"""The sections of a dataset.toml. docs/datasets.md describes every key."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from models.tissue_class import Byte, ClassName, Color, Role, TissueClass

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Share = Annotated[float, Field(ge=0, lt=1)]

PixelSize = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
"""Pixel size in µm/px, with the same limits as in a model card."""


def _below_root(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{path!r} must be a path below root without '..', such as train/*.png")
    return path


BelowRoot = Annotated[str, AfterValidator(_below_root)]
"""A path or a glob pattern below the root of a data set."""


class Section(BaseModel):
    """A table of a dataset.toml: no unknown keys, and no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClassSpec(Section):
    """A tissue class. Its position in the list is its index in labels and maps."""

    name: ClassName
    color: Color
    """Red, green, blue. If no class has a color, `pipeline.training.palettes` assigns them."""
    mask_values: tuple[Byte, ...] = ()
    """Palette indices (or gray values) of the class in mask files."""
    role: Role = "tissue"
    """"background" for a class that is not tissue, such as glass."""

    @property
    def tissue_class(self) -> TissueClass:
        """Return the class without its mask values, as models and maps use it."""
        return TissueClass(self.name, self.color, self.role)


class Location(Section):
    """Where images are, as a glob pattern below the root, and where the mask of an image is."""

    image: BelowRoot
    mask: BelowRoot | None = None
    """Path of the mask below the root; `{name}` stands for the image name without extension."""

    @field_validator("mask")
    @classmethod
    def _names_its_image(cls, value: str | None) -> str | None:
        if value is not None and "{name}" not in value:
            raise ValueError(f"{value!r} must contain {{name}}, which stands for the image name")
        return value


class Table(Section):
    """CSV files with a header and one row per image, joined into one table."""

    files: tuple[BelowRoot, ...] = Field(min_length=1)
    name_column: str = "name"
    """Column of the image file name, with or without extension."""


class Group(Section):
    """Images that must stay in one split, such as those of a patient, by a table column or a part of the name."""

    column: str | None = None
    pattern: str | None = None
    """Regular expression with one group, searched in the image name."""

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        return value if value is None else _checked_pattern(value)

    @model_validator(mode="after")
    def _one_of_both(self) -> Group:
        if (self.column is None) == (self.pattern is None):
            raise ValueError("set either column or pattern")
        return self


class TableSplit(Section):
    """A column of the table contains the split of each image."""

    by: Literal["table"]
    column: str = "split"
    train: tuple[str, ...] = ("train",)
    val: tuple[str, ...] = ("val",)
    test: tuple[str, ...] = ("test",)
    val_groups: tuple[str, ...] = ()
    """Groups of the training split to use for validation instead."""

    @model_validator(mode="after")
    def _splits_apart(self) -> TableSplit:
        check_unique("split value", [*self.train, *self.val, *self.test])
        return self


class HashSplit(Section):
    """A hash of the group name decides the split, so that other groups do not affect it."""

    by: Literal["hash"]
    train: Share = 0.70
    val: Share = 0.15
    """The remaining groups form the test split."""

    @model_validator(mode="after")
    def _at_most_all(self) -> HashSplit:
        if self.train + self.val > 1:
            raise ValueError(f"the sum of train {self.train} and val {self.val} exceeds 1")
        return self


class _WholeImageLabels(Section):
    splits: tuple[Split, ...] = SPLITS
    """Splits that have these labels. In other splits, presence is read from the mask of the whole image."""
    mask_minimum: Share = 0.0
    """A class is present in such a mask if it covers more than this share of the image."""


class FileNameLabels(_WholeImageLabels):
    """One digit per class in the file name, in the order of the classes, such as `[1 0 0 1]` or `[1001]`."""

    source: Literal["file-name"]
    pattern: str = r"\[\s*([01](?:[\s,]*[01])*)\s*\]"
    """Regular expression whose only group matches the digits. The last match in the name counts."""

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, value: str) -> str:
        return _checked_pattern(value)


class CsvLabels(_WholeImageLabels):
    """Labels in the table: one 0/1 column per class, or one column that lists the present classes."""

    source: Literal["csv"]
    columns: tuple[str, ...] | None = None
    """The 0/1 columns in the order of the classes. The default is the class names, unless `list_column` is set."""
    list_column: str | None = None
    separator: str = Field(default=";", min_length=1)
    """Separator of the names in `list_column`."""

    @model_validator(mode="after")
    def _not_both(self) -> CsvLabels:
        if self.columns is not None and self.list_column is not None:
            raise ValueError("set columns or list_column, not both")
        return self


class FolderLabels(_WholeImageLabels):
    """The folder of an image names its class or classes."""

    source: Literal["folders"]
    folders: dict[str, str | tuple[str, ...]] = {}
    """Class or classes of each folder, if folders and classes have different names."""

    def classes_of(self, folder: str) -> tuple[str, ...]:
        """Return the class names of a folder; empty if `folders` does not list the folder."""
        listed = self.folders.get(folder, ()) if self.folders else folder
        return (listed,) if isinstance(listed, str) else listed


class CropLabels(Section):
    """Presence of the classes in crops of the mask. Training uses nothing else of the mask."""

    source: Literal["mask-crops"]
    side: int = Field(gt=0)
    """Side of a crop in image pixels."""
    stride: int = Field(gt=0)
    """Distance between crops. An extra crop at the end of each row and column reaches the image edge."""
    minimum: Share
    """A class is present if it covers more than this share of the crop."""
    several: dict[Byte, tuple[str, ...]] = {}
    """Mask values of areas that contain several classes, without a known class of each pixel. All classes of such an
    area are present in a crop if the area covers more than half of the crop. A crop of which the area covers less, but
    more than `minimum`, is left out. Scores ignore the pixels of such areas.
    """

    @model_validator(mode="after")
    def _no_gaps(self) -> CropLabels:
        if self.stride > self.side:
            raise ValueError(
                f"stride {self.stride} is larger than side {self.side}, which leaves gaps between crops; lower stride"
            )
        return self


WHITE = "white"
"""Name of the additional class of the scores that count the pixels of a `BackgroundRule`."""


class BackgroundRule(Section):
    """Which pixels of an image are glass (methods.md section 2)."""

    gray_above: Byte = 200
    smallest_px: int = Field(default=50, ge=0)
    """Smaller pieces are not background."""


class CutTissue(Section):
    """Which windows of another data set's images show one tissue."""

    classes: tuple[str, ...] = Field(min_length=1)
    """The classes of this data set that the tissue contains."""
    values: tuple[str, ...] = ()
    """Values of the column in `Cut`; other images do not have the tissue. Empty: every image can have it."""
    mask: str
    """A class of the other data set."""
    share: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]]
    """Least and greatest share of a window that this class covers."""
    bright: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Greatest share of bright pixels, such as those of glass, in a window."""
    sides: tuple[Annotated[int, Field(ge=16)], ...] = Field(min_length=1)
    """Sides of the windows in pixels of the other data set."""

    @model_validator(mode="after")
    def _in_order(self) -> CutTissue:
        if self.share[0] > self.share[1]:
            raise ValueError(f"share {list(self.share)} must be in ascending order")
        return self


class Cut(Section):
    """Windows of another data set's images that show one tissue each, see pipeline/training/pieces.py."""

    dataset: str
    """Name of a shipped data set with masks and a table."""
    folder: str
    """Its folder, relative to the folder of this data set. Each of its splits belongs to the split of the same name."""
    column: str
    """Column of its table with what an image shows."""
    slides: int = Field(default=1, ge=1)
    """Its patients or cases are distributed over this many groups, each of which counts as one slide."""
    step: int = Field(default=10, ge=1)
    """Distance between possible windows in pixels."""
    tissues: tuple[CutTissue, ...] = Field(min_length=1)
    """Windows of a later tissue do not overlap those of an earlier one."""


class Whole(Section):
    """A data set whose images are used as they are, beside the composed ones, with their masks.

    Each of its splits belongs to the split of the same name.
    """

    dataset: str
    """Name of a shipped data set with masks, whose classes are among those of this data set."""
    folder: str
    """Its folder, relative to the folder of this data set."""


class Compose(Section):
    """How to compose training images from images that show one tissue each, see pipeline/training/compose.py."""

    source: str
    """Column of the table: the larger image that an image was cut from."""
    x: str = "x"
    y: str = "y"
    """Columns of the image's position in that larger image, in pixels."""
    mpp: PixelSize
    """Pixel size of the composed images in µm."""
    side: int = Field(ge=64)
    """Side of a composed image in its pixels."""
    train: int = Field(ge=1)
    val: int = Field(ge=1)
    test: int = Field(ge=1)
    """Number of composed images of each split."""
    blank: str | None = None
    """A class whose areas are also filled with plain bright colors, because glass looks the same on every slide."""
    labels: CropLabels
    """Labeled windows of the composed images, in their pixels."""
    cut: tuple[Cut, ...] = ()
    """Other data sets. Windows that are cut from their images are used in composed images."""
    whole: tuple[Whole, ...] = ()
    """Other data sets, whose whole images are added to the composed ones."""


def _checked_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"{pattern!r} has {groups} groups; it must have one")
    return pattern


def check_unique(what: str, values: list[str] | list[int]) -> None:
    """Raise ValueError if a value is there twice."""
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{what} {', '.join(twice)} is given twice")
