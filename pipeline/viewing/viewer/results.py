"""What a result's folder says of itself: everything the page is told, read from run.json and the store's metadata."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import ViewError
from pipeline.results.record import read_run
from wsi.box import Box

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassFacts:
    """A class of the map. Class k of a result has channel k and label k + 1."""

    name: str
    color: tuple[int, int, int]
    area_mm2: float


@dataclass(frozen=True)
class Result:
    """A slide's result that can be shown. Immutable; holds nothing open."""

    id: str
    """Stands for the result in addresses: the same for the same folder name, whatever else is shown."""
    folder: Path
    slide: Path
    """Where the slide is thought to be."""
    slide_size: tuple[int, int]
    slide_digest: str
    slide_stamp: str
    """Sizes and times of change of the slide's files when it was segmented; empty for older results."""
    mpp: float
    """Micrometres per level-0 pixel."""
    bounds_l0: Box
    """The part of the slide that the result covers; its corner is the origin of map and outlines."""
    store: str
    """Name of the OME-Zarr in the folder."""
    outlines: str
    """Name of the GeoParquet in the folder."""
    l0_per_out: float
    map_size: tuple[int, int]
    classes: tuple[ClassFacts, ...]
    tissue_mm2: float
    polygons: int
    model: str
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The slide's name, as it is shown."""
        return self.folder.name.encode("utf-8", "backslashreplace").decode()


def find_results(path: Path) -> tuple[Result, ...]:
    """The result at `path`, or those in it, by name; of several, those that are whole. Raises ViewError where there is
    none.
    """
    if not path.is_dir():
        raise ViewError(f"{path}: no such folder; name a result's folder, or the folder that holds results")
    if (path / "run.json").is_file():
        return (load_result(path),)
    folders = sorted(p for p in path.iterdir() if not p.name.startswith(".") and (p / "run.json").is_file())
    results = tuple(_loadable(folders))
    if not results:
        raise ViewError(f"{path}: holds no result; make one with wsi-segment -o {path}")
    return results


def _loadable(folders: list[Path]) -> Iterator[Result]:
    for folder in folders:
        if read_run(folder) is None:
            continue
        try:
            yield load_result(folder)
        except ViewError as error:
            log.warning("left out: %s", error)


def load_result(folder: Path) -> Result:
    """Read one result's facts. Raises ViewError where its run.json or its store are not whole."""
    folder = folder.resolve()
    run: Any = read_run(folder)
    if run is None:
        raise ViewError(f"{folder}: holds no run.json of wsi-segment; name a result's folder")
    try:
        slide, plan = run["slide"], run["plan"]
        store = _output(run, ".ome.zarr")
        areas = run["class_areas_mm2"]
        return Result(
            id=hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:10],
            folder=folder,
            # Runs before the path was kept: it may lie beside the results.
            slide=Path(slide.get("path", folder.parent / slide["name"])),
            slide_size=(int(slide["size"][0]), int(slide["size"][1])),
            slide_digest=str(run["identity"]["slide"]),
            slide_stamp=str(slide.get("stamp", "")),
            mpp=float(slide["mpp"]),
            bounds_l0=Box(*map(int, slide["bounds"])),
            store=store,
            outlines=_output(run, ".parquet"),
            l0_per_out=float(plan["l0_per_lv"]) * float(plan["lv_per_m"]) * float(plan["m_per_out"]),
            map_size=(int(plan["map_size"][0]), int(plan["map_size"][1])),
            classes=tuple(ClassFacts(name, color, float(areas[name])) for name, color in _classes(folder / store)),
            tissue_mm2=float(run["tissue_mm2"]),
            polygons=int(run["polygons"]),
            model=str(run["model"]),
            warnings=tuple(map(str, run["warnings"])),
        )
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, OSError) as error:
        raise ViewError(
            f"{folder}: its run.json or its map is not whole ({type(error).__name__}: {error}); segment the slide again"
        ) from error


def with_slide(result: Result, moved: Path) -> Result:
    """The result with its slide looked for at `moved`: a file, or a folder that holds it under its old name."""
    return replace(result, slide=moved / result.slide.name if moved.is_dir() else moved)


def _output(run: dict[str, Any], end: str) -> str:
    name = str(next(name for name in (*run["outputs"], "") if str(name).endswith(end) or not name))
    # run.json may come from elsewhere, and names only what lies in its folder.
    if not name or "/" in name or "\\" in name:
        raise ValueError(f"no {end} among its outputs")
    return name


def _classes(store: Path) -> list[tuple[str, tuple[int, int, int]]]:
    """(name, colour) of the store's channels."""
    channels = json.loads((store / ".zattrs").read_text(encoding="utf-8"))["omero"]["channels"]
    found = []
    for channel in channels:
        red, green, blue = bytes.fromhex(channel["color"])
        found.append((str(channel["label"]), (red, green, blue)))
    return found
