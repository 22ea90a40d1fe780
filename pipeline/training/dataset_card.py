"""The schema of a dataset.toml, and the function that reads and checks one. docs/datasets.md describes every key."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from models.card import MODEL_NAME
from models.tissue_class import Byte
from pipeline.errors import DatasetFileError
from pipeline.training.dataset_sections import (
    SPLITS,
    WHITE,
    BackgroundRule,
    ClassSpec,
    Compose,
    CropLabels,
    CsvLabels,
    FileNameLabels,
    FolderLabels,
    Group,
    HashSplit,
    Location,
    PixelSize,
    Section,
    Split,
    Table,
    TableSplit,
    check_unique,
)
from pipeline.training.palettes import class_colors


class DatasetCard(Section):
    """The content of a dataset.toml."""

    name: str
    """Also the name of a model that is trained on the data, unless the settings have another one."""
    description: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    attribution: str = ""
    limits: str = Field(default="Not for diagnosis or any clinical use.", min_length=1)
    """Uses that a trained model is not for. Copied into the model card, like the three keys above."""
    scope: str = ""
    """What the images show, in a few words, such as "colon, H&E". Warnings about other slides name it."""
    mpp: PixelSize
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
    settings: dict[str, Any] = Field(default={})
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

    @field_validator("name")
    @classmethod
    def _name_of_a_model(cls, value: str) -> str:
        if not re.fullmatch(MODEL_NAME, value):
            raise ValueError(
                f"{value!r} must start with a letter or digit and contain only these, '.', '_' and '-', such as lung-1"
            )
        return value

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
        check_unique("class name", [spec.name for spec in self.classes])
        check_unique("mask value", [v for spec in self.classes for v in spec.mask_values] + list(self.mask_excluded))
        if self.background is not None and WHITE in (spec.name for spec in self.classes):
            raise ValueError(
                f"class name {WHITE} is reserved for the pixels of [background] in scores; choose another name for the "
                "class, or remove [background]"
            )
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
        if without := [split for split in self.splits if split not in self.labels.splits]:
            raise ValueError(f"compose needs labels in every split; add {', '.join(without)} to labels.splits")
        if self.compose.blank not in (None, *(spec.name for spec in self.classes)):
            raise ValueError(f"compose.blank is {self.compose.blank!r}, which is not a class")
        names = [spec.name for spec in self.classes]
        whole = [rule.dataset for rule in self.compose.whole]
        check_unique("data set in compose.whole", whole)
        if whole and "val" not in self.splits:
            raise ValueError("compose.whole needs a validation split; set val in [split]")
        used = {name for rule in self.compose.cut for tissue in rule.tissues for name in tissue.classes}
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
            case "too_short" if key == "classes":
                parts.append("classes: name at least two classes, such as tumor and other")
            case "missing":
                parts.append(f"key {key} is missing")
            case _:
                text = found["msg"].removeprefix("Value error, ")
                parts.append(f"{key}: {text}" if key else text)
    return "; ".join(parts)
