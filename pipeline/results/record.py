"""What is said of a run: `run.json` for each slide, `summary.csv` for all."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

from models.runtimes import Runtime
from pipeline.config import ResolvedSettings, SegmentConfig

Status = Literal["done", "no tissue", "skipped", "failed"]

RUN_FORMAT = 2
"""Raised when results of older versions can no longer stand for a run of this one."""

_VERSIONS = ("wsi-segment", "torch", "openslide-python", "tiffslide", "zarr", "shapely", "segmentation-models-pytorch")


@dataclass(frozen=True)
class SlideResult:
    """How one slide ended."""

    slide: str
    status: Status
    seconds: float
    areas_mm2: dict[str, float] = field(default_factory=dict)
    """Area per class."""
    tissue_mm2: float | None = None
    folder: Path | None = None
    """Where the results are."""
    resumed_blocks: int = 0
    """Blocks that an earlier, interrupted run had finished."""
    warnings: tuple[str, ...] = ()
    error: str = ""

    def row(self) -> dict[str, object]:
        """The result in plain values."""
        return {
            "slide": self.slide,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "tissue_mm2": self.tissue_mm2,
            **{f"area_mm2 {name}": area for name, area in self.areas_mm2.items()},
            "resumed_blocks": self.resumed_blocks,
            "warnings": "; ".join(self.warnings),
            "error": self.error,
        }


def run_identity(slide_digest: str, model_digest: str, parameters: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs of a result: runs with an equal identity write the same result."""
    return {"format": RUN_FORMAT, "slide": slide_digest, "model": model_digest, "parameters": dict(parameters)}


def stored_runtime(folder: Path, settings: ResolvedSettings | SegmentConfig) -> Runtime | None:
    """Return the runtime of the finished result in `folder`, if that result may be kept whichever runtime made it.

    None if a runtime was requested, if the result is to be replaced, or if there is no result.
    """
    if settings.force or settings.runtime_requested:
        return None
    run = read_run(folder)
    parameters = cast("dict[str, object]", run["identity"]).get("parameters") if run else None
    runtime = parameters.get("runtime") if isinstance(parameters, dict) else None
    return cast("Runtime", runtime) if runtime in ("torch", "openvino") else None


def skipped_result(folder: Path, run: Mapping[str, object], seconds: float) -> SlideResult:
    """What to say of a slide whose result, with this `run.json`, was there already."""
    return SlideResult(
        slide=folder.name,
        status="skipped",
        seconds=seconds,
        areas_mm2=dict(cast("dict[str, float]", run.get("class_areas_mm2", {}))),
        tissue_mm2=cast("float | None", run.get("tissue_mm2")),
        folder=folder,
    )


def versions(runtime: str = "torch") -> dict[str, str]:
    """The versions that a result of this runtime depends on."""
    names = (*_VERSIONS, runtime) if runtime == "openvino" else _VERSIONS
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def read_run(folder: Path) -> dict[str, object] | None:
    """A finished result's `run.json`; None where there is none that can be read."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    # Another program's run.json is no sign that a run of ours wrote the folder.
    ours = isinstance(run, dict) and isinstance(run.get("identity"), dict) and isinstance(run.get("outputs"), list)
    return run if ours and all(isinstance(name, str) and "\0" not in name for name in run["outputs"]) else None


def write_run(folder: Path, run: Mapping[str, object]) -> None:
    """Write `run.json` into a result's folder."""
    (folder / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
