"""What is said of a run: `run.json` for each slide, `summary.csv` for all."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

from filelock import FileLock

from pipeline.config import SegmentConfig
from pipeline.errors import OutputError
from pipeline.journal import sync

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


def run_identity(slide_digest: str, model_digest: str, config: SegmentConfig) -> dict[str, object]:
    """What a result is made of: runs with an equal one would write the same."""
    return {"format": RUN_FORMAT, "slide": slide_digest, "model": model_digest, "parameters": config.parameters()}


def with_runtime_of(folder: Path, config: SegmentConfig) -> SegmentConfig:
    """The settings with the runtime that the result in `folder` was made by, for those who asked for none: it stands,
    whichever it was. As they are where there is no result, or it is to be replaced.
    """
    run = None if config.force else read_run(folder)
    stated = cast("dict[str, object]", run["identity"]).get("parameters") if run else None
    runtime = stated.get("runtime") if isinstance(stated, dict) else None
    return replace(config, runtime=runtime) if runtime in ("torch", "openvino") else config


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


def write_summary(output: Path, results: Iterable[SlideResult]) -> Path:
    """Bring `summary.csv` up to date: a row for each slide, those of earlier runs into the same folder kept.

    Raises OutputError where the file that is there is no such table; it is left as it is.
    """
    path = output / "summary.csv"
    with only_writer(path, output / ".summary.lock"):
        rows = read_summary(path)
        for result in results:
            # A skipped slide's row still tells what the run that made its result found, unless one failed in between.
            if result.status != "skipped" or rows.get(result.slide, {}).get("status", "failed") == "failed":
                rows[result.slide] = result.row()
        names: dict[str, None] = {}
        for row in rows.values():
            names |= dict.fromkeys(row)
        names = {n: None for n in names if n not in ("warnings", "error")} | {"warnings": None, "error": None}
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), restval="")
        writer.writeheader()
        writer.writerows(rows[slide] for slide in sorted(rows))
        write_atomically(path, text.getvalue())
    return path


def read_summary(path: Path) -> dict[str, dict[str, object]]:
    """The rows of a `summary.csv` by their slides, none where there is no such file; all values are text.

    Raises OutputError where the file is no summary.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = [{}]
    # None: a row longer than the header.
    if any("slide" not in row or None in row for row in rows):
        raise OutputError(f"{path}: is no summary that a run has written; move it away, the next run makes a new one")
    return {row["slide"]: {**row} for row in rows}


@contextmanager
def only_writer(path: Path, lock_path: Path) -> Iterator[None]:
    """Wait until no other process writes this file, and keep others from it; what killed ones left of it is removed."""
    with FileLock(lock_path):
        try:
            for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
                partial.unlink(missing_ok=True)
            yield
        finally:
            lock_path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new one, never a part."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` at the end: a reader sees the old or the new one.

    After an error the old one stays, after a power cut the old or the new one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
