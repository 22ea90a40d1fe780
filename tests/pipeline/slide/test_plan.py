from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import SegmentConfig, resolve
from pipeline.errors import ConfigError
from pipeline.slide.plan import block_tissue, needed_tiles, plan_slide
from tests.models.networks import make_card
from tests.pipeline.fakes import COLORS, CPU, SMALL, region_slide
from tests.slides import PINK, painted, write_slide
from wsi.tissue_edge import possible_tissue


def test_only_tiles_with_tissue_are_planned(tmp_path: Path) -> None:
    _, slide, tissue, plan = plan_slide(region_slide(tmp_path / "slide.svs"), make_card(COLORS), SMALL)
    slide.close()
    grid = plan.grid
    # The tissue is the box (160, 96, 960, 640). Count every tile that touches the box, once for each of its blocks.
    expected = 0
    for block in grid.blocks():
        box_m = grid.box_m(block.box_out)
        for tile in grid.tiles(block.box_out):
            part = tile.intersect(box_m)
            touches = part.x < 1120 and part.right > 160 and part.y < 736 and part.bottom > 96
            expected += touches
    assert plan.tiles == expected == sum(len(needed_tiles(grid, block_tissue(grid, tissue, b), b)) for b in plan.blocks)
    assert {b.index for b in grid.blocks()} > {b.index for b in plan.blocks}
    summary = json.loads(json.dumps(plan.facts(resolve(SMALL, CPU)).as_json()))
    assert summary["map_size"] == [320, 208]
    assert summary["tissue_mm2"] == pytest.approx(0.96 * 0.64, rel=0.01)


def test_a_shared_backbone_computes_less_around_cores_that_lie_side_by_side(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.svs", painted((640, 320), ((0, 0, 640, 320), PINK)), mpp=1.0)
    computed = []
    for shared in (False, True):
        changes = {"shared_backbone": shared, "encoder": "tu-tf_efficientnet_lite0"}
        card = make_card(COLORS).model_copy(update={"margin": 64})
        card = card.model_copy(update={"segmenter": card.segmenter.model_copy(update=changes)})
        _, slide, _, plan = plan_slide(path, card, replace(SMALL, block_out=160, canvas_m=448))
        slide.close()
        assert (len(plan.blocks), plan.canvases) == (1, 2)
        computed.append(plan.computed_px)
    # Two cores of 320x320 px. Canvases have 64 px around them. Windows have 96 px at the edges of the block, 32 px
    # between them and 64 px below, where the block goes on.
    assert computed == [2 * (320 + 128) ** 2, 2 * (320 + 96 + 32) * (320 + 96 + 64)]


def test_nothing_beyond_the_slide_is_tissue(tmp_path: Path) -> None:
    # With 203 pixels, the last pixels of the mask and of the map reach beyond the slide.
    path = write_slide(tmp_path / "slide.svs", painted((203, 203), ((0, 0, 203, 203), PINK)), mpp=1.0)
    _, slide, tissue, plan = plan_slide(path, make_card(COLORS), replace(SMALL, block_out=64))
    slide.close()
    mask_HW = block_tissue(plan.grid, tissue, plan.blocks[0])
    assert plan.grid.size_out == (51, 51)
    assert mask_HW[:51, :51].all()
    assert mask_HW.sum() == 51 * 51


def test_the_tissue_of_a_block_is_that_of_its_parts(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.svs", painted((1400, 1300), ((170, 90, 900, 1100), PINK)), mpp=4.0)
    _, slide, tissue, plan = plan_slide(
        path, make_card(COLORS, mpp=4.0), replace(SMALL, block_out=320, output_stride=4)
    )
    slide.close()
    grid = replace(plan.grid, m_per_out=1, block_out=1400)
    (block,) = grid.blocks()
    mask_HW = block_tissue(grid, tissue, block)
    width, height = grid.size_out
    whole_HW = possible_tissue(tissue, block.box_out, grid.l0_per_out, grid.mpp_out)
    np.testing.assert_array_equal(mask_HW[:height, :width], whole_HW[:height, :width])
    assert 0 < mask_HW.mean() < 1


@pytest.mark.full
def test_memory_grows_with_workers_and_batches_and_not_with_the_slide(tmp_path: Path) -> None:
    def memory(size: tuple[int, int], margin: int = 32, **changes: int) -> int:
        path = write_slide(tmp_path / "slide.svs", painted(size, ((0, 0, *size), PINK)), mpp=4.0)
        config = replace(SMALL, block_out=64, **changes)  # type: ignore[arg-type] # whole-number fields only
        _, slide, _, plan = plan_slide(path, make_card(COLORS, mpp=4.0, margin=margin), config)
        slide.close()
        return plan.memory_bytes(resolve(config, replace(CPU, batch_size=config.batch_size or CPU.batch_size)))

    small, large = memory((1200, 800)), memory((3600, 2400))
    assert small == large
    assert memory((1200, 800), num_workers=6) > small
    assert memory((1200, 800), batch_size=64) > small
    # A margin that takes the whole canvas leaves a core of 32 px.
    assert memory((1200, 800), margin=64, canvas_m=128) == memory((1200, 800), margin=64, canvas_m=160)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mpp": 0.0}, "--mpp is 0.0; it must be a positive number"),
        ({"mpp": float("nan")}, "--mpp is nan"),
        ({"canvas_m": 100}, "canvas_m is 100; it must be a multiple of 32 from 128"),
        ({"block_out": 16, "output_stride": 1}, "block_out is 16; it must be a multiple of 32"),
        ({"output_stride": 3}, "--output-stride is 3; it must be 1, 2 or 4"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"num_workers": 0}, "--num-workers is 0"),
        ({"min_area_um2": -1.0}, "--min-area is -1.0"),
        ({"block_out": 100}, "block_out is 100; it must be a multiple of 16"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_name_of_their_flag(change: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SegmentConfig(**change)  # type: ignore[arg-type] # wrong on purpose


def test_only_what_changes_the_result_belongs_to_its_identity() -> None:
    same = [replace(SMALL, batch_size=3), replace(SMALL, num_workers=7), replace(SMALL, force=True)]
    assert all(config.parameters("torch") == SMALL.parameters("torch") for config in same)
    other = [replace(SMALL, canvas_m=512), replace(SMALL, mpp=0.3), replace(SMALL, block_out=64)]
    assert all(config.parameters("torch") != SMALL.parameters("torch") for config in other)
