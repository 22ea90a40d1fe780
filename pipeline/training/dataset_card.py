"""The schema of a dataset.toml, and the function that reads and checks one. docs/datasets.md describes every key."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.tissue_class import Byte, ClassName, Color, Role, TissueClass
from pipeline.errors import DatasetFileError
from pipeline.training.palettes import class_colors

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Share = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClassSpec(_Section):
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


class Location(_Section):
    """Where images are, as a glob pattern below the root, and where the mask of an image is."""

    image: str
    mask: str | None = None
    """Path of the mask below the root; `{name}` stands for the image name without extension."""

    @field_validator("image", "mask")
    @classmethod
    def _below_root(cls, value: str | None) -> str | None:
        if value is not None and (not value or PurePosixPath(value).is_absolute()):
            raise ValueError(f"{value!r} must be a path below root, such as train/*.png")
        return value

    @field_validator("mask")
    @classmethod
    def _names_its_image(cls, value: str | None) -> str | None:
        if value is not None and "{name}" not in value:
            raise ValueError(f"{value!r} must contain {{name}}, which stands for the image name")
        return value


class Table(_Section):
    """CSV files with a header and one row per image, joined into one table."""

    files: tuple[str, ...] = Field(min_length=1)
    name_column: str = "name"
    """Column of the image file name, with or without extension."""


class Group(_Section):
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


class TableSplit(_Section):
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
        _unique("split value", [*self.train, *self.val, *self.test])
        return self


class HashSplit(_Section):
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


class _WholeImageLabels(_Section):
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


class CropLabels(_Section):
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


class BackgroundRule(_Section):
    """Which pixels of an image are glass (methods.md section 2)."""

    gray_above: Byte = 200
    smallest_px: int = Field(default=50, ge=0)
    """Smaller pieces are not background."""


class CutTissue(_Section):
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


class Cut(_Section):
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


class Whole(_Section):
    """A data set whose images are used as they are, beside the composed ones, with their masks.

    Each of its splits belongs to the split of the same name.
    """

    dataset: str
    """Name of a shipped data set with masks, whose classes are among those of this data set."""
    folder: str
    """Its folder, relative to the folder of this data set."""


class Compose(_Section):
    """How to compose training images from images that show one tissue each, see pipeline/training/compose.py."""

    source: str
    """Column of the table: the larger image that an image was cut from."""
    x: str = "x"
    y: str = "y"
    """Columns of the image's position in that larger image, in pixels."""
    mpp: float = Field(gt=0)
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


class DatasetCard(_Section):
    """The content of a dataset.toml."""

    name: str = Field(min_length=1)
    description: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    attribution: str = ""
    limits: str = Field(default="Not for diagnosis or any clinical use.", min_length=1)
    """Uses that a trained model is not for. Copied into the model card, like the three keys above."""
    scope: str = ""
    """What the images show, in a few words, such as "colon, H&E". Warnings about other slides name it."""
    mpp: float = Field(gt=0)
    """Pixel size of the images in µm."""
    root: str | None = None
    """Folder of the data, relative to the dataset.toml. The default is the folder of the dataset.toml."""
    mask_excluded: tuple[Byte, ...] = ()
    """Mask values without a class, such as glass. Losses and scores ignore these pixels."""
    classes: tuple[ClassSpec, ...] = Field(min_length=2, max_length=254)
    images: dict[Literal["train", "val", "test", "all"], tuple[Location, ...]]
    """Alternatives per split, of which the first that matches a file is used; or `all`, with a rule in `split`."""
    table: Table | None = None
    group: Group | None = None
    split: Annotated[TableSplit | HashSplit, Field(discriminator="by")] | None = None
    labels: Annotated[FileNameLabels | CsvLabels | FolderLabels | CropLabels, Field(discriminator="source")]
    background: BackgroundRule | None = None
    """None if glass and lumen are classes of their own."""
    compose: Compose | None = None
    """None if networks train on the images as they are."""
    settings: dict[str, Any] = {}
    """Training settings for this data set. They change the preset, and the user's settings change them."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """Return the splits that should have images."""
        there: tuple[object, ...]
        match self.split:
            case TableSplit() as rule:
                there = (rule.train, rule.val or rule.val_groups, rule.test)
            case HashSplit() as rule:
                there = (rule.train > 0, rule.val > 0, rule.train + rule.val < 1)
            case None:
                there = tuple(split in self.images for split in SPLITS)
        return tuple(split for split, some in zip(SPLITS, there, strict=True) if some)

    @field_validator("classes", mode="before")
    @classmethod
    def _default_colors(cls, value: Any) -> Any:
        if not isinstance(value, list) or not all(isinstance(spec, dict) for spec in value):
            return value
        without = [str(spec.get("name")) for spec in value if "color" not in spec]
        if not without:
            return value
        if len(without) < len(value):
            raise ValueError(f"color is missing for {', '.join(without)}; set the color of every class or of none")
        return [{**spec, "color": color} for spec, color in zip(value, class_colors(len(value)), strict=True)]

    @model_validator(mode="after")
    def _classes_differ(self) -> DatasetCard:
        _unique("class name", [spec.name for spec in self.classes])
        _unique("mask value", [v for spec in self.classes for v in spec.mask_values] + list(self.mask_excluded))
        return self

    @model_validator(mode="after")
    def _splits_fit_images(self) -> DatasetCard:
        if not self.images or not all(self.images.values()):
            raise ValueError("images must name at least one pattern for each split, or for all")
        if "all" in self.images and len(self.images) > 1:
            raise ValueError("images has both `all` and splits; set one of them")
        if ("all" in self.images) != (self.split is not None):
            raise ValueError("[split] and images.all belong together; set both or neither")
        needs_group = isinstance(self.split, HashSplit) or (self.split is not None and self.split.val_groups)
        if needs_group and self.group is None:
            raise ValueError("this split needs groups; describe in [group] how to find the group of an image")
        return self

    @model_validator(mode="after")
    def _columns_have_a_table(self) -> DatasetCard:
        in_group = self.group is not None and self.group.column is not None
        if self.table is None and (
            in_group or isinstance(self.split, TableSplit) or isinstance(self.labels, CsvLabels)
        ):
            raise ValueError("a column needs a table; add [table] with its files")
        return self

    @model_validator(mode="after")
    def _labels_fit_classes(self) -> DatasetCard:
        names = [spec.name for spec in self.classes]
        match self.labels:
            case CsvLabels(columns=tuple() as columns) if len(columns) != len(names):
                raise ValueError(
                    f"labels.columns has {len(columns)} names for {len(names)} classes; name one column per class"
                )
            case FolderLabels() as rule if strange := sorted(
                {name for folder in rule.folders for name in rule.classes_of(folder)} - set(names)
            ):
                raise ValueError(f"labels.folders names {', '.join(strange)}; the classes are {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _compose_fits(self) -> DatasetCard:
        if self.compose is None:
            return self
        if self.table is None or isinstance(self.labels, CropLabels):
            raise ValueError("compose needs a [table] and one label per image; labels cannot be crops of masks")
        if self.compose.blank not in (None, *(spec.name for spec in self.classes)):
            raise ValueError(f"compose.blank is {self.compose.blank!r}, which is not a class")
        names = [spec.name for spec in self.classes]
        used = {name for rule in self.compose.cut for tissue in rule.tissues for name in tissue.classes}
        whole = [rule.dataset for rule in self.compose.whole]
        _unique("data set in compose.whole", whole)
        if whole and "val" not in self.splits:
            raise ValueError("compose.whole needs a validation split; set val in [split]")
        if unknown := sorted(used - set(names)):
            raise ValueError(f"compose.cut names {', '.join(unknown)}; the classes are {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _masks_are_there(self) -> DatasetCard:
        for key, locations in self.images.items():
            masked = all(place.mask is not None for place in locations)
            from_mask = isinstance(self.labels, CropLabels) or not (
                set(self.labels.splits) >= (set(SPLITS) if key == "all" else {key})
            )
            if from_mask and not masked:
                raise ValueError(f"images.{key} needs a mask for each pattern, because labels are read from the masks")
            if masked and (bare := [spec.name for spec in self.classes if not spec.mask_values]):
                raise ValueError(f"images.{key} has masks, but mask_values is missing for {', '.join(bare)}")
        return self


def read_card(file: Path) -> DatasetCard:
    """Return the checked content of a dataset.toml. Raises DatasetFileError with the file and every wrong key."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetFileError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOML syntax or encoding
        raise DatasetFileError(f"{file}: is not valid TOML: {error}") from error
    try:
        return DatasetCard.model_validate(content)
    except ValidationError as error:
        raise DatasetFileError(f"{file}: {_plain(error)}; docs/datasets.md describes all keys") from error


def _plain(error: ValidationError) -> str:
    parts = []
    for found in error.errors():
        loc = found["loc"]
        # In a discriminated union, pydantic inserts the discriminator after the section name.
        loc = loc[:1] + loc[2:] if loc[:1] in {("split",), ("labels",)} else loc
        key = ".".join(str(part) for part in loc)
        match found["type"]:
            case "extra_forbidden":
                parts.append(f"unknown key {key}")
            case "missing":
                parts.append(f"key {key} is missing")
            case _:
                text = found["msg"].removeprefix("Value error, ")
                parts.append(f"{key}: {text}" if key else text)
    return "; ".join(parts)


def _checked_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"{pattern!r} has {groups} groups; it must have one")
    return pattern


def _unique(what: str, values: list[str] | list[int]) -> None:
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{what} {', '.join(twice)} is given twice")
