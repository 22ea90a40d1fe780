"""The settings of a run, as requested (`SegmentConfig`) and with every choice made (`ResolvedSettings`).

Every default of a run has its home here, except the batch size, which depends on the device (`models.runtimes`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import get_type_hints

from models.runtimes import OUTPUT_STRIDES, Compute, Precision, Runtime, RuntimeName
from pipeline.errors import ConfigError
from pipeline.limits import available_cores

RESULTS_FOLDER = "results"
"""Folder for the results, if none is named."""

MOST_WORKERS = 8
"""Workers on a machine with more cores, if no number is requested."""

LARGEST_BLOCK_OUT = 16384
"""Largest side of a block in map pixels: its maps take tens of GB."""

PROCESSES_PER_CORE = 4
"""Largest N of local:N per available core, unless `FEWEST_ALLOWED_PROCESSES` is more. Processes that wait for a slow
disk leave their core to others, so a few per core can be of use; more only take memory."""

FEWEST_ALLOWED_PROCESSES = 16
"""N of local:N may have this value on any machine, because a machine can have more GPUs than cores."""


@dataclass(frozen=True)
class MapSettings:
    """The settings that do not depend on the machine. Raises ConfigError if a value is out of range."""

    mpp: float | None = None
    """Micrometers per level-0 pixel. None: the slide's own value; `SlideInfo.mpp` holds the result."""
    backend: str = "auto"
    """Reader, a key of `wsi.readers.READERS`. "auto": chosen for each slide; `SlideInfo.backend` holds the result."""
    canvas_m: int | None = None
    """Largest side of a canvas in model pixels, with its margin. Larger canvases compute fewer pixels twice, smaller
    canvases need less memory. None: chosen for the model, see `pipeline.slide.canvases.largest_canvas`."""
    output_stride: int = OUTPUT_STRIDES[0]
    """Model pixels per pixel of the stored map."""
    min_area_um2: float = 2000.0
    """Smallest region or gap, before borders are smoothed: smaller ones become part of a neighbor, and 0 keeps all. The
    label image does not change."""
    simplify_px: float = 1.0
    """Tolerance of the polygons' borders, in map pixels; 0 keeps the edges of the pixels."""
    keep_ungated: bool = False
    """Use the segmenter's prediction if the gate rejects every class, instead of "no class"."""
    exclude_folds: bool = False
    """Leave folds out of the map and its areas. They are in the layer of left-out areas either way."""
    precision: Precision = "float32"
    """Number format of the networks."""
    max_bad_share: float = 0.01
    """A slide fails if a larger share of its tiles cannot be read."""
    block_out: int = 1024
    """Side of a block in map pixels, at most `LARGEST_BLOCK_OUT`. Larger blocks compute fewer pixels twice, smaller
    blocks need less memory."""
    force: bool = False
    """Replace an existing result, even if it was made with other settings."""
    repair: bool = False
    """Compute the damaged parts of an existing result again."""

    def __post_init__(self) -> None:
        _check(self.mpp is None or (math.isfinite(self.mpp) and self.mpp > 0), "--mpp", self.mpp, "a positive number")
        _check(
            self.canvas_m is None or (self.canvas_m >= 128 and self.canvas_m % 32 == 0),
            "canvas_m",
            self.canvas_m,
            "a multiple of 32 from 128",
        )
        if self.force and self.repair:
            raise ConfigError("--force computes whole slides again and --repair only damaged blocks; pass only one")
        _check_backend(self.backend)
        _check(self.output_stride in OUTPUT_STRIDES, "--output-stride", self.output_stride, "1, 2 or 4")
        _check(0 <= self.min_area_um2 < math.inf, "--min-area", self.min_area_um2, "a number, 0 or more")
        _check(0 <= self.simplify_px < math.inf, "--simplify", self.simplify_px, "a number, 0 or more")
        _check(0 <= self.max_bad_share <= 1, "max_bad_share", self.max_bad_share, "between 0 and 1")
        step = max(16, 32 // self.output_stride)  # blocks consist of whole cells of 32 model pixels
        _check(
            step <= self.block_out <= LARGEST_BLOCK_OUT and self.block_out % step == 0,
            "block_out",
            self.block_out,
            f"a multiple of {step} up to {LARGEST_BLOCK_OUT}",
        )

    def parameters(self, runtime: Runtime) -> dict[str, object]:
        """Return the settings that decide a result computed by `runtime`: equal parameters give equal results.

        A setting that came later is left out at its default, so that earlier results keep their parameters.
        """
        parameters: dict[str, object] = {
            "mpp": self.mpp,
            "backend": self.backend,
            "canvas_m": self.canvas_m,
            "output_stride": self.output_stride,
            "min_area_um2": self.min_area_um2,
            "simplify_px": self.simplify_px,
            "keep_ungated": self.keep_ungated,
            "precision": self.precision,
            "runtime": runtime,
            "block_out": self.block_out,
        }
        return parameters | ({"exclude_folds": True} if self.exclude_folds else {})


@dataclass(frozen=True)
class SegmentConfig(MapSettings):
    """The settings as requested. `resolve` makes the choices that are left open."""

    device: str = "auto"
    """"auto", or a name of `models.devices.available_devices`."""
    model_digest: str | None = None
    """SHA-256 that the card of every model of the run must have. None: any."""
    runtime: RuntimeName = "auto"
    """Library that runs the networks. "auto": OpenVINO on a CPU if it is installed and fits the model, else PyTorch."""
    batch_size: int | None = None
    """Canvases of one size per call of a network. None: `models.runtimes.default_batch_size`."""
    num_workers: int | None = None
    """Blocks that are read and written at the same time. None: one per core, at most `MOST_WORKERS`."""

    @property
    def runtime_requested(self) -> bool:
        """Return whether the user named the runtime. If not, a finished result of another runtime is kept."""
        return self.runtime != "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        digest = self.model_digest
        _check(digest is None or re.fullmatch("[0-9A-Fa-f]{64}", digest), "--model-digest", digest, "64 hex digits")
        _check(self.batch_size is None or self.batch_size >= 1, "--batch-size", self.batch_size, "1 or more")
        _check(self.num_workers is None or self.num_workers >= 1, "--num-workers", self.num_workers, "1 or more")


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(MapSettings):
    """The settings of a run with every choice made, in the process that has the device. `resolve` makes them."""

    device: str
    """A torch device, such as "cpu" or "cuda:1"."""
    runtime: Runtime
    threads: int
    """CPU threads of a network."""
    processor: str
    """See `Compute.processor`."""
    batch_size: int
    """Canvases of one size per call of a network."""
    num_workers: int
    """Blocks that are read and written at the same time."""
    runtime_requested: bool
    """See `SegmentConfig.runtime_requested`."""

    def computed_with(self) -> dict[str, object]:
        """Return what else decides the bytes of a block: blocks that differ in this are not mixed in one result.

        OpenVINO returns the same bits for any number of threads and any batch, and PyTorch does not: measured by
        `tests.bench.thread_bytes`.
        """
        facts: dict[str, object] = {"device": self.device.partition(":")[0], "processor": self.processor}
        if self.runtime == "torch":
            facts["batch_size"] = self.batch_size
            if self.device == "cpu":
                facts["threads"] = self.threads
        return facts

    @property
    def in_flight(self) -> int:
        """Return the largest number of blocks in memory: one waits for the device."""
        return self.num_workers + 1


def resolve(config: SegmentConfig, compute: Compute) -> ResolvedSettings:
    """Return the settings of a run whose networks are computed this way, such as `Predictor.compute`.

    Call it in the process that has the device, after the model is loaded: only then is it known whether OpenVINO takes
    the model. Raises ConfigError if `config` requests something else than `compute` has.
    """
    for name, requested, present in (
        ("device", config.device, compute.device),
        ("precision", config.precision, compute.precision),
        ("runtime", config.runtime, compute.runtime),
        ("batch_size", config.batch_size, compute.batch_size),
    ):
        if requested not in (None, "auto", present):
            raise ConfigError(f"the predictor was made with {name} {present}, the settings request {requested}")
    return ResolvedSettings(
        **{field.name: getattr(config, field.name) for field in fields(MapSettings) if field.name != "precision"},
        precision=compute.precision,
        device=compute.device,
        runtime=compute.runtime,
        threads=compute.threads,
        processor=compute.processor,
        batch_size=compute.batch_size,
        num_workers=config.num_workers or default_workers(),
        runtime_requested=config.runtime_requested,
    )


def default_workers() -> int:
    """Return the number of workers on this machine if none is requested."""
    return min(MOST_WORKERS, available_cores())


def misplaced_bool(kind: type, values: Mapping[str, object]) -> str | None:
    """Return the first name whose value is or contains true or false, although this field of `kind` is not a bool.

    Return None if all values may be what they are. Pydantic would use 1 or 0 for a misplaced bool. All names must be
    fields of `kind`.
    """
    types = get_type_hints(kind)
    for name, value in values.items():
        parts = value if isinstance(value, list | tuple) else [value]
        if types[name] is not bool and any(isinstance(part, bool) for part in parts):
            return name
    return None


def _check(holds: object, flag: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{flag} is {value}; it must be {allowed}")


def _check_backend(backend: str) -> None:
    if backend != "auto":
        from wsi.readers import READERS  # loads the libraries, which --help does not need

        _check(backend in READERS, "--backend", backend, " or ".join(["auto", *READERS]))
