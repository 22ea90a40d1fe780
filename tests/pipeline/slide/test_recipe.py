"""A run over a slide finds its regions to one output pixel, its outputs agree, and errors name the slide."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from numpy.typing import NDArray

from pipeline.checks.ome_zarr import broken_ome_zarr_rules
from pipeline.checks.result import broken_rules
from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError, InferenceError, PlanError
from pipeline.slide import recipe
from pipeline.slide.plan import PlannedSlide, plan_slide
from pipeline.slide.recipe import segment_slide
from tests.cases import full
from tests.models.networks import ConstantClassifier, ConstantSegmenter
from tests.pipeline.fakes import (
    CORNER,
    REGIONS,
    SMALL,
    color_predictor,
    constant_predictor,
    labels_of,
    predictor,
    probs_of,
    published,
    region_slide,
    run_of,
    stating_bounds,
    truth,
)
from tests.pipeline.features import checked_features
from tests.slides import PINK, PURPLE, painted, write_slide
from wsi.box import Box
from wsi.errors import ResolutionError, SlideError, SlideReadError
from wsi.readers import READERS, BackendName, OpenSlideReader
from wsi.slide import open_slide
from wsi.tissue import find_tissue

BACKENDS: list[BackendName] = ["openslide", "tiffslide"]


def polygons_by_class(folder: Path) -> dict[str, shapely.Geometry]:
    features = checked_features((folder / f"{folder.name}.geojson").read_text(encoding="utf-8"))
    names = {f["properties"]["classification"]["name"] for f in features}
    return {
        name: shapely.union_all(
            [
                shapely.geometry.shape(f["geometry"])
                for f in features
                if f["properties"]["classification"]["name"] == name
            ]
        )
        for name in names
    }


def test_a_constant_model_gives_a_constant_map_over_the_whole_tissue(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "slide.svs")
    for number, logits in enumerate(([0.0, 0.0], [1.3, -0.4])):
        result = segment_slide(path, tmp_path / str(number), constant_predictor(logits), SMALL)
        assert result.folder is not None
        probs_KHW = probs_of(result.folder)
        with open_slide(path) as slide:
            height, width = probs_KHW.shape[1:]
            tissue_HW = np.zeros((height, width), bool)
            tissue = find_tissue(slide)
            tissue_HW[:] = tissue.sample(Box(0, 0, width, height), 4.0)
        share = 1 / (1 + np.exp(logits[1] - logits[0]))
        assert tissue_HW.sum() > 30_000
        assert np.unique(probs_KHW[0][tissue_HW]).tolist() == [int(share * 255 + 0.501)]
        assert np.unique(probs_KHW[1][tissue_HW]).tolist() == [int((1 - share) * 255 + 0.501)]
        assert not probs_KHW[:, ~tissue_HW].any()
        assert np.unique(labels_of(result.folder)[tissue_HW]).tolist() == [1]


def test_the_half_written_file_of_a_killed_worker_is_not_published(tmp_path: Path) -> None:
    left: list[Path] = []

    def leave_a_part(stage: str, done: int, _total: int) -> None:
        if stage == "segmenting" and done == 1:
            row = next(path for path in tmp_path.rglob("labels/classes/0/*") if path.is_dir())
            left.append(row / ".0.5eed.partial")
            left[0].write_bytes(b"half")

    result = segment_slide(
        region_slide(tmp_path / "slide.svs"), tmp_path / "out", color_predictor(), SMALL, leave_a_part
    )
    assert left
    assert result.folder is not None
    assert not list(tmp_path.rglob("*.partial"))
    assert not any(broken_rules(result.folder).values())


@pytest.mark.parametrize("bounded", [False, full(True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_color_model_finds_the_regions_of_a_slide_to_one_output_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: BackendName, bounded: bool
) -> None:
    path = tmp_path / "slide.svs"
    if bounded:
        x, y = CORNER
        shapes = [((left + x, top + y, w, h), color) for (left, top, w, h), color in REGIONS]
        write_slide(path, painted((1280 + 128, 832 + 64), *shapes), mpp=1.0)
        monkeypatch.setitem(READERS, backend, stating_bounds(READERS[backend]))
    else:
        region_slide(path)
    result = segment_slide(path, tmp_path / "out", color_predictor(), replace(SMALL, backend=backend))
    assert result.folder is not None
    labels_HW = labels_of(result.folder)
    expected_HW = truth((320, 208), 4)
    height, width = expected_HW.shape
    assert not labels_HW[height:].any()
    assert not labels_HW[:, width:].any()
    # The purple region lies inside the tissue: no pixel of it is off, whatever the tissue mask's border does.
    np.testing.assert_array_equal(labels_HW[:height, :width] == 2, expected_HW == 2)
    found = polygons_by_class(result.folder)
    pink, purple = (shapely.box(x, y, x + w, y + h) for (x, y, w, h), _ in REGIONS)
    assert found["class-1"].equals(purple)
    one_pixel = 4.0
    assert shapely.hausdorff_distance(found["class-0"], pink.difference(purple)) <= one_pixel * 2**0.5
    run = run_of(result.folder)
    assert run["slide"]["qupath_offset"] == ([64, 32] if bounded else [0, 0])
    assert run["class_areas_mm2"]["class-1"] == pytest.approx(320 * 256 / 1e6)


def test_every_output_shows_the_area_of_the_polygons_and_none_passes_the_slide(tmp_path: Path) -> None:
    """Small specks are in the label image and in the polygons of their neighbor. The slide ends inside a map pixel."""
    specks = [((200 + 40 * i, 480, 12, 12), PURPLE) for i in range(20)]
    size = 1277, 831
    path = write_slide(tmp_path / "slide.svs", painted(size, *REGIONS, ((1100, 700, 177, 131), PINK), *specks), mpp=1.0)
    config = replace(SMALL, min_area_um2=2000.0, simplify_px=1.0)
    result = segment_slide(path, tmp_path / "out", color_predictor(), config)
    assert result.folder is not None
    run, polygons = run_of(result.folder), polygons_by_class(result.folder)
    areas_mm2 = {name: geometry.area / 1e6 for name, geometry in sorted(polygons.items())}
    assert run["class_areas_mm2"] == result.areas_mm2 == pytest.approx(areas_mm2)
    pixels = np.bincount(labels_of(result.folder).ravel(), minlength=3)[1:] * 16e-6
    assert list(run["label_areas_mm2"].values()) == pytest.approx(list(pixels))
    assert run["label_areas_mm2"]["class-1"] > 1.01 * areas_mm2["class-1"]
    assert broken_rules(result.folder, quick=False)[result.folder / "slide.parquet"] == []
    right, bottom = shapely.total_bounds(list(polygons.values())).tolist()[2:]
    assert (right, bottom) == size


@pytest.mark.full
@pytest.mark.parametrize("mpp", [0.5, 0.4, 0.27])
def test_other_pixel_sizes_give_the_same_map(tmp_path: Path, mpp: float) -> None:
    """A whole factor reads level pixels unchanged, other factors average by area. Neither shifts the regions."""
    path = region_slide(tmp_path / "slide.svs", mpp=mpp)
    result = segment_slide(path, tmp_path / "out", color_predictor(), SMALL)
    assert result.folder is not None
    purple = polygons_by_class(result.folder)["class-1"]
    (x, y, w, h), _ = REGIONS[1]
    l0_per_out = 4 / mpp
    # Polygons are in level-0 pixels whatever the model's resolution is.
    assert shapely.hausdorff_distance(purple, shapely.box(x, y, x + w, y + h)) <= l0_per_out * 2**0.5


@pytest.mark.full
@pytest.mark.parametrize("stride", [1, 2])
def test_finer_maps_keep_the_regions_in_their_place(tmp_path: Path, stride: int) -> None:
    path = region_slide(tmp_path / "slide.svs")
    config = replace(SMALL, output_stride=stride, block_out=128)
    result = segment_slide(path, tmp_path / "out", color_predictor(output_stride=stride), config)
    assert result.folder is not None
    assert labels_of(result.folder).shape[1] >= 1280 // stride
    assert run_of(result.folder)["plan"]["map_mpp"] == stride
    found = polygons_by_class(result.folder)["class-1"]
    (x, y, w, h), _ = REGIONS[1]
    # Interpolated from the network's own 4 pixels: the border stays within one of them.
    assert shapely.hausdorff_distance(found, shapely.box(x, y, x + w, y + h)) <= 4.0
    assert broken_ome_zarr_rules(result.folder / "slide.ome.zarr") == []


def test_a_predictor_of_other_settings_than_the_runs_is_refused(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "slide.svs")
    with pytest.raises(ConfigError, match="made with output_stride 2, the settings request 4"):
        segment_slide(path, tmp_path / "out", color_predictor(output_stride=2), SMALL)


def test_all_outputs_follow_the_rules_of_their_readers(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "größe 組織.svs", mpp=0.5)
    result = segment_slide(path, tmp_path / "out put", color_predictor(), SegmentConfig(device="cpu"))
    folder = result.folder
    assert folder == tmp_path / "out put" / "größe 組織"
    names = {p.name for p in folder.iterdir()}
    stem = path.stem
    pictures = {"preview.png", "index.html", "thumbnail.jpg"}
    assert names == {
        f"{stem}.ome.zarr",
        f"{stem}.geojson",
        f"{stem}.parquet",
        "run.json",
        "left-out.geojson",
        "blocks.jsonl",
        "chunks.tsv",
        *pictures,
    }
    assert broken_ome_zarr_rules(folder / f"{stem}.ome.zarr") == []
    features = checked_features((folder / f"{stem}.geojson").read_text(encoding="utf-8"))
    table = pq.read_table(folder / f"{stem}.parquet")
    assert table.num_rows == len(features) == 2
    assert [f["id"] for f in features] == table["id"].to_pylist()
    run = run_of(folder)
    assert run["outputs"] == sorted(names)
    assert run["plan"]["map_mpp"] == 4.0
    assert result.areas_mm2["class-1"] == pytest.approx(320 * 256 * 0.25 / 1e6, rel=0.05)
    assert [p.name for p in folder.parent.iterdir()] == [stem]


def test_the_segmenter_on_every_tile_gives_the_labels_of_the_gate(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "slide.svs")
    skipping = segment_slide(path, tmp_path / "a", color_predictor(), SMALL)
    every = segment_slide(path, tmp_path / "b", color_predictor(skip_by_gate=False), SMALL)
    assert skipping.folder is not None
    assert every.folder is not None
    np.testing.assert_array_equal(labels_of(skipping.folder), labels_of(every.folder))
    np.testing.assert_array_equal(probs_of(skipping.folder), probs_of(every.folder))
    tiles = [run_of(folder)["tiles"] for folder in (skipping.folder, every.folder)]
    assert tiles[0]["segmented"] < tiles[1]["segmented"] == tiles[0]["run"]


def test_tiles_in_which_no_class_passes_are_background_and_counted(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "slide.svs")
    silent = predictor(ConstantClassifier([0.1, 0.1]), ConstantSegmenter([1.0, 0.0]))
    result = segment_slide(path, tmp_path / "out", silent, SMALL)
    assert result.status == "done"
    assert result.folder is not None
    assert not labels_of(result.folder).any()
    tiles = run_of(result.folder)["tiles"]
    assert tiles["without class"] == tiles["run"] > 0


@pytest.mark.full
def test_workers_and_batches_do_not_change_a_byte(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "slide.svs")
    config = replace(SMALL, simplify_px=1.0, min_area_um2=2000.0)
    a = segment_slide(path, tmp_path / "a", color_predictor(), replace(config, num_workers=1))
    b = segment_slide(path, tmp_path / "b", color_predictor(batch_size=5), replace(config, num_workers=4))
    assert a.folder is not None
    assert b.folder is not None
    assert published(a.folder) == published(b.folder)


def test_the_borders_of_blocks_cannot_be_seen(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "slide.svs")
    small = segment_slide(path, tmp_path / "a", color_predictor(), SMALL)
    whole = segment_slide(path, tmp_path / "b", color_predictor(), replace(SMALL, block_out=512))
    assert small.folder is not None
    assert whole.folder is not None
    np.testing.assert_array_equal(probs_of(small.folder), probs_of(whole.folder))
    a, b = (polygons_by_class(r.folder) for r in (small, whole) if r.folder)
    assert all(a[name].equals(b[name]) for name in b)
    assert len(json.loads((small.folder / "slide.geojson").read_text())["features"]) == 2


def test_a_slide_smaller_than_a_tile_works(tmp_path: Path) -> None:
    # 300 µm × 250 µm, all tissue.
    path = write_slide(tmp_path / "tiny.svs", painted((60, 50), ((0, 0, 60, 50), PINK)), mpp=5.0)
    result = segment_slide(path, tmp_path / "out", color_predictor(mpp=5.0), SMALL)
    assert result.folder is not None
    assert (labels_of(result.folder)[:12, :15] == 1).all()


def test_a_slide_without_tissue_gives_empty_but_valid_outputs(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "glass.svs", painted((1000, 700)), mpp=1.0)
    result = segment_slide(path, tmp_path / "out", color_predictor(), SMALL)
    assert result.status == "no tissue"
    assert result.folder is not None
    assert broken_ome_zarr_rules(result.folder / "glass.ome.zarr") == []
    assert checked_features((result.folder / "glass.geojson").read_text()) == []
    assert checked_features((result.folder / "left-out.geojson").read_text()) == []
    assert pq.read_table(result.folder / "glass.parquet").num_rows == 0
    assert not labels_of(result.folder).any()
    assert (result.folder / "preview.png").stat().st_size > 0
    assert result.areas_mm2 == {"class-0": 0.0, "class-1": 0.0}


class _FailingReader(OpenSlideReader):
    """Fails to read whatever touches one place of level 0."""

    def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
        common = box_lv.intersect(Box(512, 256, 64, 64))
        if level == 0 and common.width and common.height:
            raise OSError("Bogus marker length")
        return super().read(level, box_lv)


def test_unreadable_tiles_are_counted_and_named_and_too_many_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two levels: the thumbnail is read from the second, so that only the tiles meet the bad place.
    path, out = region_slide(tmp_path / "slide.svs", mpp=1.0, levels=(1, 8)), tmp_path / "out"

    config = replace(SMALL, backend="openslide")
    monkeypatch.setitem(READERS, "openslide", _FailingReader)
    with pytest.raises(SlideReadError, match=r"^slide\.svs: at least \d+ of \d+ tiles cannot be read \(at most 1%\)"):
        segment_slide(path, out, color_predictor(), config)
    assert not (out / "slide").exists()
    result = segment_slide(path, out, color_predictor(), replace(config, max_bad_share=0.5))
    assert result.status == "done"
    assert "tiles could not be read" in result.warnings[-1]
    run = run_of(out / "slide")
    assert run["tiles"]["unreadable"] > 0
    # A part of up to 256 pixels is given up around the bad place.
    assert all(box[0] < 512 + 64 + 256 and box[0] + box[2] > 512 - 256 for box in run["bad_tiles_l0"])
    # Once the place can be read again, those blocks are tried again.
    monkeypatch.setitem(READERS, "openslide", OpenSlideReader)
    assert segment_slide(path, tmp_path / "good", color_predictor(), config).warnings == ()


def test_places_of_unreadable_tiles_are_measured_from_the_corner_of_the_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = [((x + CORNER[0], y + CORNER[1], width, height), color) for (x, y, width, height), color in REGIONS]
    path = write_slide(tmp_path / "slide.svs", painted((1408, 896), *regions), mpp=1.0, levels=(1, 8))
    monkeypatch.setitem(READERS, "openslide", stating_bounds(_FailingReader))
    segment_slide(path, tmp_path / "out", color_predictor(), replace(SMALL, backend="openslide", max_bad_share=0.5))
    run = run_of(tmp_path / "out" / "slide")
    assert run["slide"]["qupath_offset"] == list(CORNER)
    # Tiles of 256 pixels, of which the first begins in the corner.
    assert run["bad_tiles_l0"] == [[x, y, 256, 256] for x in (256, 512) for y in (0, 256)]


def test_a_result_without_polygons_has_a_warning(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "slide.svs")
    result = segment_slide(path, tmp_path / "out", color_predictor(), replace(SMALL, min_area_um2=1e12))
    assert result.areas_mm2 == {"class-0": 0.0, "class-1": 0.0}
    assert result.warnings[-1] == (
        "the tissue has no polygons: its regions have no class, or are smaller than 1e+12 µm² (--min-area)"
    )


def test_a_network_that_gives_nan_names_the_place(tmp_path: Path) -> None:
    broken = predictor(ConstantClassifier([0.9, 0.9]), ConstantSegmenter([float("nan"), 0.0]))
    with pytest.raises(
        InferenceError, match=r"^slide\.svs: .*NaN.*level-0 \(x, y, width, height\) \(\d+, \d+, \d+, \d+\)"
    ):
        segment_slide(region_slide(tmp_path / "slide.svs"), tmp_path / "out", broken, SMALL)


def test_the_times_of_a_run_contain_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, plan, planned_s = time.perf_counter, plan_slide, [0.0]

    def long_plan(*args: Any, **settings: Any) -> PlannedSlide:
        planned_s[0] += 1000
        return plan(*args, **settings)

    monkeypatch.setattr(time, "perf_counter", lambda: real() + planned_s[0])
    monkeypatch.setattr(recipe, "plan_slide", long_plan)
    result = segment_slide(region_slide(tmp_path / "slide.svs"), tmp_path / "out", color_predictor(), SMALL)
    assert result.folder is not None
    assert planned_s == [1000]
    seconds = run_of(result.folder)["seconds"]
    assert min(seconds["plan"], seconds["total"], result.seconds) >= 1000


def test_a_plan_that_does_not_fit_ends_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = region_slide(tmp_path / "slide.svs")
    with pytest.raises(PlanError, match=r"GiB of memory.*lower --num-workers or --batch-size"):
        segment_slide(path, tmp_path / "out", color_predictor(batch_size=10**9), SMALL)
    import shutil

    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PlanError, match=r"on the disk of .* 0 MiB are free; free some space"):
        segment_slide(path, tmp_path / "out", color_predictor(), SMALL)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.full
def test_no_handles_or_threads_are_left(tmp_path: Path) -> None:
    import threading

    path = region_slide(tmp_path / "slide.svs")
    segment_slide(path, tmp_path / "first", color_predictor(), SMALL)
    handles, threads = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208 - names only
    segment_slide(path, tmp_path / "second", color_predictor(), SMALL)
    assert len(os.listdir("/proc/self/fd")) <= handles  # noqa: PTH208 - names only
    assert threading.active_count() <= threads


def test_a_slide_without_mpp_fails_and_works_with_the_flag(tmp_path: Path, shared_slides: Path) -> None:
    path = shared_slides / "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(ResolutionError, match="pass --mpp"):
        segment_slide(path, tmp_path / "out", color_predictor(), SMALL)
    assert not (tmp_path / "out").exists()
    config = SegmentConfig(mpp=0.25, device="cpu")
    assert segment_slide(path, tmp_path / "out", color_predictor(), config).status == "done"


@pytest.mark.full
def test_both_readers_give_the_same_labels_on_real_aperio_slides(
    tmp_path: Path, sample_slide: Path, shared_slides: Path
) -> None:
    # The second slide is read from a level 2.0005 times smaller, which OpenSlide shifts by up to a quarter of a pixel.
    for path, mpp, least in ((sample_slide, None, 1.0), (shared_slides / "TCGA-CR-7395-01A-01-TS1.svs", 0.25, 0.99)):
        maps = []
        for backend in BACKENDS:
            config = SegmentConfig(backend=backend, mpp=mpp, device="cpu")
            result = segment_slide(path, tmp_path / backend, color_predictor(), config)
            assert result.folder is not None
            maps.append(labels_of(result.folder))
        assert len(np.unique(maps[0])) == 3
        assert (maps[0] == maps[1]).mean() >= least


@pytest.mark.parametrize("name", ["broken.svs", "unreadable.svs", "unopenable.tiff", "missing.svs"])
def test_bad_files_leave_nothing_behind(tmp_path: Path, shared_slides: Path, name: str) -> None:
    with pytest.raises(SlideError, match=f"^{name}: "):
        segment_slide(shared_slides / name, tmp_path / "out", color_predictor(), SMALL)
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "out"])
