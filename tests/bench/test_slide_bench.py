from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tifffile

from models.bundle import load_bundle
from pipeline.config import SegmentConfig
from pipeline.slide.canvases import canvas_cores
from pipeline.slide.plan import block_tissue, plan_slide
from tests.bench import agreement, floors, slide, synthetic_slide
from tests.pipeline.fakes import color_predictor, region_slide
from tests.slides import GLASS, PINK, painted, write_slide
from wsi.box import Box
from wsi.readers import READERS
from wsi.slide import open_slide
from wsi.tissue import find_tissue

SOURCE_BOX = (300, 300, 600, 600)
"""Box of the tissue on `source_slide`."""


def source_slide(path: Path) -> Path:
    """A slide of 4×3 fields of 512 pixels (tiles of 128, levels 1 and 4), with tissue in fields (0, 0) to (1, 1)."""
    rgb_HWC = painted((2048 + 96, 1536 + 32), (SOURCE_BOX, PINK))
    # No two tiles alike, so that a tile in the wrong place is seen.
    rgb_HWC[::16] = (rgb_HWC[::16] // 2 + np.arange(rgb_HWC.shape[1])[None, :, None] % 97).astype(np.uint8)
    return write_slide(path, rgb_HWC, mpp=1.0, power=10, levels=(1, 4))


def test_a_synthetic_slide_holds_the_sources_pixels_on_every_level_for_both_readers(tmp_path: Path) -> None:
    source = source_slide(tmp_path / "source.svs")
    path = synthetic_slide.write_synthetic(source, tmp_path / "large.svs", (4400, 1600), tissue=2)
    for open_reader in READERS.values():
        with closing(open_reader(source)) as old, closing(open_reader(path)) as new:
            assert [tuple(size) for size in new.level_sizes] == [(4400, 1600), (1100, 400)]
            for level, factor in enumerate((1, 4)):
                # Two whole copies side by side, 4×3 fields each, those fields left that hold tissue.
                field = Box(0, 0, 1024 // factor, 1024 // factor)
                pixels_HWC = old.read(level, field)
                assert np.array_equal(new.read(level, field), pixels_HWC)
                assert np.array_equal(new.read(level, field.shift(2048 // factor, 0)), pixels_HWC)
                assert not np.array_equal(new.read(level, field.shift(1024 // factor, 0)), pixels_HWC)


def test_a_synthetic_slide_states_its_resolution_and_has_the_tissue_asked_for(tmp_path: Path) -> None:
    source = source_slide(tmp_path / "source.svs")
    with open_slide(source) as slide_:
        own_um2 = find_tissue(slide_).area_um2
    for tissue in (1, 2, 3):
        path = synthetic_slide.write_synthetic(source, tmp_path / f"{tissue}.svs", (4400, 3200), tissue)
        with open_slide(path) as slide_:
            assert (slide_.info.mpp, slide_.info.mpp_source, slide_.info.vendor) == (1.0, "slide", "aperio")
            assert find_tissue(slide_).area_um2 == pytest.approx(tissue * own_um2, rel=0.1)


def test_half_the_tissue_takes_some_of_the_fields(tmp_path: Path) -> None:
    path = source_slide(tmp_path / "source.svs")
    with tifffile.TiffFile(path) as tiff:
        source = synthetic_slide.read_source(tiff, path)
        chosen = synthetic_slide.layout(source, (2048, 1536), tissue=0.5)
        assert chosen.shape == (3, 4, 2)
        placed_um2 = source.tissue_um2[chosen[..., 0], chosen[..., 1]]
        assert 0.4 < placed_um2.sum() / source.tissue_um2.sum() < 0.6
        # Row by row: the last of the four fields with tissue is what is left out.
        assert [bool(um2) for um2 in placed_um2[:2, :2].ravel()] == [True, True, True, False]


def test_jpeg_tiles_whose_tables_stand_apart_are_copied_whole(sample_slide: Path, tmp_path: Path) -> None:
    path = synthetic_slide.write_synthetic(sample_slide, tmp_path / "large.svs", (2400, 2880), tissue=1)
    with tifffile.TiffFile(sample_slide) as tiff:
        chosen = synthetic_slide.layout(synthetic_slide.read_source(tiff, sample_slide), (2400, 2880), tissue=1)
    for open_reader in READERS.values():
        with closing(open_reader(sample_slide)) as old, closing(open_reader(path)) as new:
            for y, x in ((0, 9), (4, 4), (11, 0)):
                from_y, from_x = (int(i) for i in chosen[y, x])
                pixels_HWC = new.read(0, Box(x * 240, y * 240, 240, 240))
                assert np.array_equal(pixels_HWC, old.read(0, Box(from_x * 240, from_y * 240, 240, 240)))


def test_tissue_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 times the source's tissue need more than 4400×1600"):
        synthetic_slide.write_synthetic(
            source_slide(tmp_path / "source.svs"), tmp_path / "large.svs", (4400, 1600), tissue=3
        )


def test_a_slide_without_a_field_of_glass_is_refused(tmp_path: Path) -> None:
    full = write_slide(tmp_path / "full.svs", painted((512, 512), ((0, 0, 512, 512), PINK)), mpp=1.0)
    with pytest.raises(ValueError, match="no field of glass"):
        synthetic_slide.write_synthetic(full, tmp_path / "large.svs", (1024, 1024), tissue=1)


def test_the_decode_floor_reads_what_the_blocks_read(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "region.svs")
    config, card = SegmentConfig(block_out=32, num_workers=2, device="cpu"), color_predictor().card
    _, opened, tissue, plan = plan_slide(path, card, config)
    with opened:
        reads = floors.planned_reads(opened.info, tissue, plan, card, config.canvas_m)
        # At 1 µm/px and one level, a block's strips cover its canvases, cut at the slide's edge.
        block = plan.blocks[0]
        cores_m = canvas_cores(plan.grid, block_tissue(plan.grid, tissue, block), block, card, config.canvas_m)
        height = min(max(c.bottom for c in cores_m) + 32, 832) - max(0, min(c.y for c in cores_m) - 32)
        assert len(reads.strips_lv) == len(plan.blocks)
        assert sum(box.height for box in reads.strips_lv[0]) == height
        # Blocks of 128 pixels with a margin of 32: much is read by two or more.
        assert reads.distinct_share < 0.8
        assert sum(b.width * b.height for strips in reads.strips_lv for b in strips) == reads.pixels
        assert set(floors.readable_backends(opened.info, 0)) == {"openslide", "tiffslide"}
        for backend in READERS:
            took = floors.decode(opened.info, reads, backend, workers=2)
            assert 0 < took.wall_s < math.inf
            assert took.cpu_s > 0


def test_the_network_floor_is_per_tile_and_leaves_the_predictor_as_it_was(tmp_path: Path) -> None:
    predictor = color_predictor(batch_size=3)
    calls: list[tuple[int, int]] = []

    def call(rgb_NHWC: np.ndarray) -> None:
        calls.append((len(rgb_NHWC), predictor.batch_size))

    tiles_NHWC = np.zeros((5, 96, 96, 3), np.uint8)
    took = floors.per_tile(predictor, tiles_NHWC, call, batch=4, count=10)
    # One to warm up, then ten tiles in batches of four.
    assert calls == [(4, 4), (4, 4), (4, 4), (2, 4)]
    assert predictor.batch_size == 3
    assert took.wall_s >= 0
    assert floors.best_batch(predictor, tiles_NHWC, predictor.logits) in {3, *floors.BATCHES["cpu"]}
    assert predictor.batch_size == 3


def test_tiles_from_memory_are_the_slides_own(tmp_path: Path) -> None:
    _, opened, tissue, plan = plan_slide(
        region_slide(tmp_path / "region.svs"), color_predictor().card, SegmentConfig(block_out=32)
    )
    with opened:
        rgb_NHWC = floors.sample_tiles(opened, tissue, plan, 12)
    assert rgb_NHWC.shape == (12, 256, 256, 3)
    assert {tuple(color) for color in rgb_NHWC.reshape(-1, 3)} > {PINK}


def test_labels_are_compared_pixel_by_pixel() -> None:
    plain_HW = np.array([[0, 1], [2, 2]], np.uint8)
    assert agreement.compare(plain_HW, plain_HW)["equal_share"] == 1
    found = agreement.compare(plain_HW, np.array([[0, 1], [2, 1]], np.uint8))
    assert found["different"] == 1
    assert found["equal_share"] == 0.75
    assert found["equal_share_of_tissue"] == pytest.approx(2 / 3)


@pytest.mark.full
def test_a_run_is_measured_against_its_floors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "BATCHES", {"cpu": (8,)})
    rgb_HWC = painted((1024, 768), ((200, 200, 500, 300), PINK))
    path = write_slide(tmp_path / "tiny.svs", rgb_HWC, mpp=1.0)
    slide.main([str(path), "-j", "1", "--device", "cpu", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    (run,) = found["runs"]
    assert found["plan"]["tiles"] == run["tiles"]["run"] > 0
    assert found["plan"]["tissue_mm2"] == pytest.approx(0.15, rel=0.1)
    # The process holds the run, the run holds its blocks, and no floor takes longer than what it is the floor of.
    assert 0 < run["seconds"]["blocks"] < run["segment_s"] < run["wall_s"]
    assert 0 < run["times"]["imports_s"] < run["times"]["model_s"] < run["times"]["first_block_s"] < run["wall_s"]
    assert 0 < run["floor_s"]["decode"] < run["floor_s"]["network"]
    assert run["efficiency"] == pytest.approx(run["floor_s"]["network"] / run["wall_s"])
    assert run["efficiency_without_start"] > run["efficiency"] > 0
    assert sum(run["shares"].values()) == pytest.approx(1)
    assert 100e6 < run["started_bytes"] <= run["peak_bytes"] < 4e9
    assert len(found["floors"]) == 2
    printed = capsys.readouterr().out
    assert f"| **efficiency** | **{run['efficiency']:.2f}** |" in printed


@pytest.mark.full
def test_the_plain_path_and_a_run_agree(tmp_path: Path) -> None:
    rgb_HWC = painted((640, 512), ((100, 100, 300, 200), PINK), ((150, 120, 60, 60), GLASS))
    path = write_slide(tmp_path / "tiny.svs", rgb_HWC, mpp=1.0)
    config = SegmentConfig(device="cpu", batch_size=4)
    plain_HW = agreement.plain_labels(path, "colon-gland", config)
    assert plain_HW.shape == (128, 160)
    assert plain_HW.max() <= len(load_bundle("colon-gland").card.classes)
    assert agreement.compare(plain_HW, agreement.run_labels(path, "colon-gland", config))["equal_share"] > 0.999
