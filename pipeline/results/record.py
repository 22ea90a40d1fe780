"""The record of a run: what `run.json` states about one slide's result.

`Run` is the only description of the file's content. `write_run` writes it, and `read_run` reads it back and checks
every value. Only `pipeline/checks` reads the file on its own, on purpose.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from models.runtimes import Runtime
from models.tissue_class import TissueClass
from pipeline.config import ResolvedSettings, SegmentConfig
from pipeline.errors import RunRecordError
from pipeline.files import is_file
from pipeline.results.names import RUN
from wsi.box import Box
from wsi.grid import Grid
from wsi.readers import reader_versions

RUN_FORMAT = 7
"""Raise this number if a result of an older version must not count as finished."""

PACKAGE = "wsi-segment"
"""Name of this package, whose version a result contains."""

_VERSIONS = (
    PACKAGE,
    "torch",
    "timm",
    "segmentation-models-pytorch",
    "numpy",
    "scipy",
    "pillow",
    "zarr",
    "numcodecs",
    "pyarrow",
    "shapely",
)
"""Packages whose code computes or writes the bytes of a result, beside the `reader_versions`."""


def _file_name(name: str) -> str:
    if not name or any(part in name for part in "/\\\0"):
        raise ValueError(f"{name!r} is not the name of a file in the result's folder")
    return name


def _scale(value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{value} is not a positive number")
    return value


FileName = Annotated[str, AfterValidator(_file_name)]
Positive = Annotated[float, AfterValidator(_scale)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Familiarity(_Record):
    """How much of a slide's tissue resembles the training data of the model."""

    unfamiliar_share: float
    """Share of the tissue's area that does not, from 0 to 1."""
    share_limit: float
    """The slide has a warning if the share is larger."""
    l0_per_px: Positive
    """Level-0 pixels per pixel of `familiarity.png`, whose origin is that of the map."""

    @property
    def is_unfamiliar(self) -> bool:
        """Return whether so much of the slide is unfamiliar that its map cannot be trusted."""
        return self.unfamiliar_share > self.share_limit


class RunIdentity(_Record):
    """The inputs of a result: two runs with equal identities write the same result."""

    format: int
    slide: str
    """SHA-256 of the slide, see `slide_digest`."""
    model: str
    """SHA-256 of the model card, which contains the digests of the weights."""
    parameters: dict[str, Any]
    """`SegmentConfig.parameters`."""

    def as_json(self) -> dict[str, object]:
        """Return the identity as `run.json` and the working folder store it."""
        return self.model_dump(mode="json")


class SlideFacts(_Record):
    """What the record states about the slide. It never holds other properties: they may name a patient."""

    name: str
    path: Path | None = None
    """Absolute path at the time of the run; None if someone removed it from the file."""
    size: tuple[int, int]
    """(width, height) of level 0."""
    mpp: Positive
    """Micrometers per level-0 pixel."""
    mpp_source: str
    vendor: str
    backend: str
    bounds: Box
    """The part of level 0 that the result covers."""
    qupath_offset: tuple[int, int]
    """Where the origin of map and polygons lies in level 0."""
    stamp: str = ""
    """Sizes and modification times of the slide's files, see `slide_stamp`; empty in older results."""


class TileCounts(_Record):
    """How many tiles of the slide took which way."""

    run: int
    """Tiles with tissue, squares of `Grid.tile_m` model pixels."""
    segmented: int
    without_class: int = Field(
        validation_alias=AliasChoices("without class", "without_class"), serialization_alias="without class"
    )
    unreadable: int


class LeftOutArea(_Record):
    """How much of one kind of area tissue detection found beside plain tissue."""

    name: str
    """`LeftOut.title`."""
    area_mm2: float
    pieces: int


class PlanFacts(_Record):
    """The grid of a run, and what the plan expected of it. `run.json` stores the grid's fields beside the others."""

    grid: Grid
    blocks: int
    tiles: int
    canvases: int = 0
    computed_px: int = 0
    """Model pixels of all canvases, with their margins; 0 in older results."""
    tissue_mm2: float
    """Area of the tissue mask, whose border the blocks have not drawn yet."""
    memory_bytes: int
    disk_bytes: int

    @model_validator(mode="before")
    @classmethod
    def _grid_of_its_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "grid" in values:
            return values
        names = [field.name for field in dataclasses.fields(Grid)]
        return values | {"grid": {name: values[name] for name in names if name in values}}

    @model_validator(mode="after")
    def _scales_are_positive(self) -> Self:
        try:
            for value in (self.grid.l0_per_out, self.grid.mpp_out, *self.grid.size_out):
                _scale(value)
        except ArithmeticError as error:  # pydantic takes only a ValueError as the fault of a value
            raise ValueError(f"the grid is not possible: {error}") from error
        return self

    @model_serializer
    def as_json(self) -> dict[str, object]:
        """Return the plan as JSON values, with the grid's derived map size and pixel size."""
        return dataclasses.asdict(self.grid) | {
            "blocks": self.blocks,
            "tiles": self.tiles,
            "canvases": self.canvases,
            "computed_px": self.computed_px,
            "map_size": list(self.grid.size_out),
            "map_mpp": self.grid.mpp_out,
            "tissue_mm2": self.tissue_mm2,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
        }


class FileFacts(_Record):
    """What shows that a file of a result is unchanged."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Run(_Record):
    """The record of one slide's result. The fields are the keys of `run.json`, in this order.

    After them, `write_run` adds the key "sha256", see `record_digest`.
    """

    identity: RunIdentity
    name: str = ""
    """Path of the result below the output folder, with slashes; empty in older results."""
    status: Literal["done", "no tissue", "unrecognized"]
    slide: SlideFacts
    model: str
    """Name of the model."""
    scope: str = ""
    """What the training data of the model show, such as "colon, H&E"; empty if the model's card does not state it."""
    limits: str = ""
    """Uses that the model is not for; empty in older results."""
    familiarity: Familiarity | None = None
    """None if the model has no statistics of its training data, or if the slide has no tissue."""
    tissue_mm2: float
    """Area of the tissue inside the slide, as the blocks drew it, without classes with the role "background"."""
    fold_mm2: float
    left_out: tuple[LeftOutArea, ...] = ()
    """Everything that is not plain tissue, in the order of `wsi.left_out.LeftOut`; empty in older results."""
    classes: tuple[TissueClass, ...]
    class_areas_mm2: dict[str, float]
    """Area of the polygons of every class by its name. Pages, `summary.csv` and the preview show this figure."""
    label_areas_mm2: dict[str, float] = Field(default_factory=dict)
    """Area of every class, counted in pixels of the label image, which is neither simplified nor rid of small regions.
    Empty in older results."""
    polygons: int
    tiles: TileCounts
    bad_tiles_l0: tuple[Box, ...]
    """Tiles that could not be read completely, measured from `SlideFacts.qupath_offset`."""
    warnings: tuple[str, ...]
    """The warning about tissue unlike the training data is the first one."""
    plan: PlanFacts
    resumed_blocks: int
    """Blocks that an earlier, interrupted run had finished."""
    device: str
    computed_with: dict[str, Any] = Field(default_factory=dict)
    """`ResolvedSettings.computed_with`; empty in older results. With `versions`, it decides the bytes of a block."""
    seconds: dict[str, float]
    """Time per stage. Stages with a colon in their name are parts of others and overlap."""
    versions: dict[str, str]
    outputs: tuple[FileName, ...]
    """Every file and folder of the result, sorted."""
    digests: dict[FileName, FileFacts] = Field(default_factory=dict)
    """The facts about each file of `outputs` but `run.json`. The files of the map are in `chunks.tsv`. Empty in results
    of older versions."""

    @model_validator(mode="after")
    def _every_class_has_an_area(self) -> Self:
        names = [one.name for one in self.classes]
        if names != list(self.class_areas_mm2):
            raise ValueError(f"class_areas_mm2 has {list(self.class_areas_mm2)}, classes has {names}")
        return self

    @property
    def unfamiliar_warning(self) -> str:
        """Return the warning about tissue unlike the training data, or an empty text."""
        is_unfamiliar = self.familiarity is not None and self.familiarity.is_unfamiliar
        return self.warnings[0] if is_unfamiliar and self.warnings else ""

    @property
    def other_warnings(self) -> tuple[str, ...]:
        """Return the warnings but `unfamiliar_warning`."""
        return self.warnings[1:] if self.unfamiliar_warning else self.warnings

    @property
    def slide_title(self) -> str:
        """Return the name that pages show: that of the result, or of the slide's file without its ending."""
        return self.name or Path(self.slide.name).stem


class RunHeader(_Record):
    """What shows that wsi-segment wrote a folder. It is readable even if other values of the record are damaged."""

    identity: dict[str, Any]
    outputs: tuple[str, ...]
    computed_with: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)

    @property
    def blocks_computed_with(self) -> dict[str, Any]:
        """Return what the blocks were computed with, as `ResultFolder.work_identity` has it."""
        return self.computed_with | {"versions": self.versions}


def run_identity(slide_digest: str, model_digest: str, parameters: Mapping[str, object]) -> RunIdentity:
    """Return the inputs of a result: runs with an equal identity write the same result."""
    return RunIdentity(format=RUN_FORMAT, slide=slide_digest, model=model_digest, parameters=dict(parameters))


def stored_runtime(folder: Path, settings: ResolvedSettings | SegmentConfig) -> Runtime | None:
    """Return the runtime of the finished result in `folder`, if that result may be kept whichever runtime made it.

    Return None if a runtime was requested, if the result is to be replaced, or if there is no result.
    """
    if settings.force or settings.runtime_requested:
        return None
    header = read_header(folder)
    parameters = header.identity.get("parameters") if header else None
    runtime = parameters.get("runtime") if isinstance(parameters, dict) else None
    return cast("Runtime", runtime) if runtime in ("torch", "openvino") else None


def versions(runtime: str = "torch") -> dict[str, str]:
    """Return the versions that a result of this runtime depends on."""
    names = (*_VERSIONS, runtime) if runtime == "openvino" else _VERSIONS
    return package_versions(names) | reader_versions()


def installed_versions() -> dict[str, str]:
    """Return the versions that a result of any runtime depends on. OpenVINO may be missing, because it is optional."""
    try:
        return versions("openvino")
    except PackageNotFoundError:
        return versions()


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of Python and of each named package, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def record_digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the values of a `run.json`, without "sha256" itself and the slide's path.

    The values are serialized as JSON in ASCII, with sorted keys and without spaces. The path is left out because people
    may remove it from the file.
    """
    kept = {key: value for key, value in values.items() if key != "sha256"}
    if isinstance(slide := kept.get("slide"), dict):
        kept["slide"] = {key: value for key, value in slide.items() if key != "path"}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def record_is_unchanged(folder: Path) -> bool:
    """Return whether the values of `run.json` are those that `write_run` wrote."""
    values = _json(folder)
    return isinstance(values, dict) and values.get("sha256") == record_digest(values)


def write_run(folder: Path, run: Run) -> None:
    """Write `run.json` into a result's folder."""
    values = run.model_dump(mode="json", by_alias=True)
    # pydantic replaces bytes that are not UTF-8 in keys, though not in values.
    values["digests"] = {name: facts.model_dump(mode="json") for name, facts in run.digests.items()}
    text = json.dumps(values | {"sha256": record_digest(values)}, indent=2, ensure_ascii=False)
    # A file name may hold bytes that are not UTF-8. Their escapes are valid JSON, and `read_run` restores the name.
    (folder / RUN).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_header(folder: Path) -> RunHeader | None:
    """Return the header of a result of wsi-segment, or None if the folder does not hold one."""
    return _header(_json(folder))


def read_run(folder: Path) -> Run | None:
    """Return the record of a finished result, or None if the folder does not hold a result of wsi-segment.

    Raises RunRecordError, which names the first bad value, if the record is one of ours but damaged.
    """
    values = _json(folder)
    if _header(values) is None:
        return None
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "its values"
        raise RunRecordError(
            f"{folder / RUN}: {place}: {first['msg']}; segment the slide again with --force"
        ) from error


def _json(folder: Path) -> object:
    if not is_file(folder / RUN):  # to open a named pipe would wait forever
        return None
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _header(values: object) -> RunHeader | None:
    try:
        header = RunHeader.model_validate(values)
    except ValidationError:
        return None
    return None if any("\0" in name for name in header.outputs) else header
