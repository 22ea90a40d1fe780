"""Functions that read a project with the standard library alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.pipeline.fakes import run_of

NAMES = ("Fall 1 + ü%20#.svs", "b.svs")


def record_path(folder: Path, slide: Path) -> None:
    run = run_of(folder)
    run["slide"]["path"] = str(slide)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")


def project_of(root: Path) -> dict[str, Any]:
    project: dict[str, Any] = json.loads((root / "results" / "qupath" / "project.qpproj").read_text(encoding="utf-8"))
    return project


def file_of(uri: str) -> Path:
    """Return the path that a file URI stands for."""
    assert urlsplit(uri).scheme == "file"
    assert uri.isascii()
    return Path(unquote(urlsplit(uri).path))


def slides_of(root: Path) -> dict[int, Path]:
    return {image["entryID"]: file_of(image["serverBuilder"]["uri"]) for image in project_of(root)["images"]}


def rows_of(root: Path) -> list[dict[str, str]]:
    lines = (root / "results" / "qupath" / "results.tsv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
