"""Measure the borders of a result, for docs/benchmarks/edges.md.

    python -m tests.bench.edges outline RESULT
    python -m tests.bench.edges glass RESULT SLIDE
    python -m tests.bench.edges distance FOLDER

`outline` prints which share of the length of all polygons is horizontal or vertical. Real borders have hardly any, and
the edges of pixels have nothing else.

`glass` prints which share of each class, in the polygons and in the label image, is as bright as the slide's glass.

`distance` writes a slide with borders that are drawn at 0.5 µm per pixel into FOLDER, segments it, and prints the
Hausdorff distance between the drawn borders and those of the polygons: of the tissue, of a lumen in it, and between two
classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
import zarr
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.config import SegmentConfig
from pipeline.formats.features import Feature, read_features
from pipeline.results.record import Run, read_run
from pipeline.slide.recipe import segment_slide
from tests.pipeline.fakes import color_predictor
from tests.slides import GLASS, PINK, PURPLE, write_slide
from wsi.box import Box
from wsi.grid import make_grid
from wsi.resample import read_model_pixels
from wsi.slide import open_slide
from wsi.stain import bare_and_stained
from wsi.tissue import find_tissue

SIDE = 2000
"""Side of the drawn slide in pixels of 0.5 µm."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one of the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    outline, glass = commands.add_parser("outline"), commands.add_parser("glass")
    for command in (outline, glass):
        command.add_argument("result", type=Path, help="folder of a result, as results/CMU-1")
    glass.add_argument("slide", type=Path)
    commands.add_parser("distance").add_argument("folder", type=Path)
    options = vars(parser.parse_args(arguments))
    tables: dict[str, Callable[..., None]] = {
        "outline": print_outline,
        "glass": print_glass,
        "distance": print_distances,
    }
    tables[options.pop("command")](**options)


def print_outline(result: Path) -> None:
    """Print the share of the polygons' length that is horizontal or vertical."""
    polygons = [feature.geometry_l0 for feature in _features(result)]
    corners = shapely.get_num_coordinates(polygons).sum()
    print(f"{result.name}: {axis_parallel_share(polygons):.1%} of the outline is axis-parallel; {corners} corners")


def axis_parallel_share(geometries: Iterable[shapely.Geometry]) -> float:
    """Return the share of the length of lines and polygons that is horizontal or vertical."""
    total = parallel = 0.0
    for geometry in geometries:
        lines = geometry.boundary if geometry.geom_type == "Polygon" else geometry
        for line in shapely.get_parts(lines):
            steps = np.diff(shapely.get_coordinates(line), axis=0)
            lengths = np.hypot(steps[:, 0], steps[:, 1])
            total += lengths.sum()
            parallel += lengths[(steps == 0).any(axis=1)].sum()
    return parallel / total


def print_glass(result: Path, slide: Path) -> None:
    """Print the share of each class that is as bright as glass."""
    run = _run(result)
    bare_HW = bare_pixels(slide, run.plan.grid.mpp_out)
    labels_HW = np.asarray(zarr.open_array(result / f"{result.name}.ome.zarr" / "labels" / "classes" / "0")[:])
    drawn_HW = drawn_labels(_features(result), run.plan.grid.size_out, run.plan.grid.l0_per_out)
    height, width = (min(lengths) for lengths in zip(bare_HW.shape, labels_HW.shape, drawn_HW.shape, strict=True))
    for label, one in enumerate(run.classes, start=1):
        parts = [bare_HW[:height, :width][map_HW[:height, :width] == label] for map_HW in (drawn_HW, labels_HW)]
        polygons, labels = (f"{part.mean():.1%}" if part.size else "no pixels" for part in parts)
        print(f"{result.name}: {one.name}: {polygons} of the polygons and {labels} of the labels is glass")


def bare_pixels(path: Path, mpp: float) -> NDArray[np.bool_]:
    """Return which pixels of a slide are as bright as its glass, at `mpp` micrometers per pixel."""
    with open_slide(path) as slide:
        glass = find_tissue(slide).glass
        grid = make_grid(slide.info, model_mpp=mpp, output_stride=1, block_out=1024)
        bare_HW = np.zeros(grid.size_out[::-1], bool)
        for block in grid.blocks():
            box = block.box_out.intersect(Box(0, 0, *grid.size_out))
            rgb_HWC = read_model_pixels(slide, grid, box).rgb_HWC
            bare_HW[box.slices(Box(0, 0, 0, 0))] = bare_and_stained(rgb_HWC, glass)[0]
    return bare_HW


def drawn_labels(features: Iterable[Feature], size_out: tuple[int, int], l0_per_out: float) -> NDArray[np.uint8]:
    """Return the label of each pixel of the map by the polygons; 0 outside them.

    A pixel belongs to the polygon around its center, by the even-odd rule along its row.
    """
    width, height = size_out
    labels_HW = np.zeros((height, width), np.uint8)
    for feature in features:
        _, xy, (ring_offsets, _) = shapely.to_ragged_array([feature.geometry_l0])
        xy = xy / l0_per_out - 0.5
        top, bottom = max(0, int(np.ceil(xy[:, 1].min()))), min(height - 1, int(np.floor(xy[:, 1].max())))
        starts = np.delete(np.arange(len(xy)), ring_offsets[1:] - 1)
        start, stop = xy[starts], xy[starts + 1]
        low, high = np.minimum(start, stop)[:, 1], np.maximum(start, stop)[:, 1]
        first, last = np.ceil(low).astype(int), np.ceil(high).astype(int)  # the rows in [low, high)
        edge = np.repeat(np.arange(len(starts)), last - first)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
        slope = (stop - start)[edge, 0] / (stop - start)[edge, 1]
        column = np.clip(np.ceil(start[edge, 0] + (row - start[edge, 1]) * slope), 0, width).astype(int)
        inside = (row >= top) & (row <= bottom)
        turns_HW = np.zeros((bottom - top + 1, width + 1), np.uint8)
        np.bitwise_xor.at(turns_HW, (row[inside] - top, column[inside]), 1)
        labels_HW[top : bottom + 1][np.bitwise_xor.accumulate(turns_HW, axis=1)[:, :-1] > 0] = feature.label
    return labels_HW


class Border(NamedTuple):
    """How well a border of polygons follows the drawn one."""

    distance_um: float
    """Hausdorff distance."""
    axis_parallel: float


def print_distances(folder: Path) -> None:
    """Print how far the borders of polygons are from the drawn ones."""
    for name, border in drawn_borders(folder).items():
        print(f"{name}: {border.distance_um:.1f} µm from the drawn border; {border.axis_parallel:.1%} axis-parallel")


def drawn_borders(folder: Path) -> dict[str, Border]:
    """Write and segment the drawn slide, and compare the borders of the tissue, of the lumen and between classes."""
    shapes = {
        "tissue": wavy(1000, 1000, 800, 7),
        "lumen": wavy(620, 1000, 120, 3),
        "class": wavy(1300, 1000, 220, 5),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = write_slide(folder / "drawn.svs", drawn((SIDE, SIDE), shapes), mpp=0.5)
    result = segment_slide(path, folder / "results", color_predictor(), SegmentConfig(device="cpu", force=True))
    assert result.folder is not None
    features = list(_features(result.folder))
    whole = shapely.union_all([feature.geometry_l0 for feature in features])
    (inner,) = (feature.geometry_l0 for feature in features if feature.label == 2)
    lines = {"tissue": whole.exterior, "class": inner.exterior}
    if whole.interiors:
        lines["lumen"] = max(whole.interiors, key=lambda ring: shapely.Polygon(ring).area)
    return {
        name: Border(
            0.5 * float(shapely.hausdorff_distance(shapes[name].exterior, line, densify=0.001)),
            axis_parallel_share([line]),
        )
        for name, line in lines.items()
    }


def wavy(x: float, y: float, radius: float, waves: int) -> shapely.Polygon:
    """Return a disk whose radius rises and falls by a tenth."""
    angle = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
    reach = radius * (1 + 0.1 * np.sin(waves * angle))
    return shapely.Polygon(np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], axis=1))


def drawn(size: tuple[int, int], shapes: dict[str, shapely.Polygon]) -> NDArray[np.uint8]:
    """Return a slide with tissue, a class in it, and a lumen."""
    picture = Image.new("RGB", size, GLASS)
    draw = ImageDraw.Draw(picture)
    for name, color in (("tissue", PINK), ("class", PURPLE), ("lumen", GLASS)):
        # Pillow counts from the centers of pixels.
        draw.polygon([(x - 0.5, y - 0.5) for x, y in shapes[name].exterior.coords], fill=color)
    return np.asarray(picture)


def _features(result: Path) -> Iterable[Feature]:
    return read_features(result / f"{result.name}.parquet", _run(result).classes)


def _run(result: Path) -> Run:
    run = read_run(result)
    if run is None:
        raise SystemExit(f"{result}: not a result of wsi-segment")
    return run


if __name__ == "__main__":
    main()
