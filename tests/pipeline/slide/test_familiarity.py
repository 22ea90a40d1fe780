from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.familiarity import WINDOW
from pipeline.formats.familiarity import CELL_OUT, LIMIT
from pipeline.slide.familiarity import CellDistances, join_values, save_values, values_file
from tests.pipeline.runs import GRID
from wsi.box import Box

BLOCK = Box(64, 128, 64, 64)
TISSUE_HW = np.ones((64, 64), bool)

windows = st.lists(
    st.tuples(st.integers(0, 160), st.integers(60, 220), st.integers(4, 60), st.floats(0, 2)), min_size=1, max_size=6
)


def add(cells: CellDistances, window_out: Box, distance: float) -> None:
    rows, columns = [(window_out.y, window_out.bottom)], [(window_out.x, window_out.right)]
    cells.add(rows, columns, np.array([[distance]]))


@given(windows)
@example([(5, 69, 60, 1.5)])  # 191.5: the weights round the mean to just below, the bounds to just above
def test_a_cell_has_a_mean_of_the_windows_that_overlap_it(drawn: list[tuple[int, int, int, float]]) -> None:
    cells = CellDistances(BLOCK)
    for x, y, side, distance in drawn:
        add(cells, Box(x, y, side, side), distance)
    values_hw, tissue_px, _ = cells.values(TISSUE_HW)
    covered = 0
    for (row, column), value in np.ndenumerate(values_hw):
        cell = Box(BLOCK.x + column * CELL_OUT, BLOCK.y + row * CELL_OUT, CELL_OUT, CELL_OUT)
        over = [d for x, y, side, d in drawn if min(cell.intersect(Box(x, y, side, side))[2:]) > 0]
        if not over:
            assert value == 0
            continue
        covered += CELL_OUT**2
        half = 0.5 + 1e-9  # stored as a whole number
        assert 1 + 127 * min(over) - half <= value <= 1 + 127 * max(over) + half
    assert tissue_px == covered


def test_windows_near_the_center_of_a_cell_count_more() -> None:
    cells = CellDistances(BLOCK)
    add(cells, Box(64, 128, CELL_OUT, CELL_OUT), 0.0)  # centered on the first cell
    add(cells, Box(60, 124, 3 * CELL_OUT, 3 * CELL_OUT), 2.0)  # its center lies beside the cell
    assert 1 < cells.values(TISSUE_HW)[0][0, 0] < LIMIT


def test_tissue_is_counted_in_pixels_of_the_map() -> None:
    cells = CellDistances(BLOCK)
    add(cells, BLOCK, 0.5)
    add(cells, Box(64, 128, CELL_OUT, CELL_OUT), 20.0)
    tissue_HW = np.zeros((64, 64), bool)
    tissue_HW[0, :10] = tissue_HW[40, :30] = True
    values_hw, tissue_px, unfamiliar_px = cells.values(tissue_HW)
    assert (tissue_px, unfamiliar_px) == (40, 8)
    assert values_hw[0, 0] > LIMIT
    assert np.count_nonzero(values_hw) == 6


def test_windows_of_an_image_lie_as_the_model_measured_them() -> None:
    m_per_out = 4
    image_m = Box(BLOCK.x * m_per_out, BLOCK.y * m_per_out, WINDOW + 32, WINDOW + 32)
    together, single = CellDistances(BLOCK), CellDistances(BLOCK)
    distances_rc = np.array([[0.25, 0.5], [1.0, 1.5]], np.float32)
    together.add_windows(image_m, distances_rc, m_per_out)
    for (row, column), distance in np.ndenumerate(distances_rc):
        # The second window of a row or column ends with the image.
        window_m = Box(image_m.x + 32 * column, image_m.y + 32 * row, WINDOW, WINDOW)
        add(single, window_m.reduce(m_per_out), float(distance))
    assert np.array_equal(together.values(TISSUE_HW)[0], single.values(TISSUE_HW)[0])


def test_blocks_join_to_a_map_that_ends_with_the_slide(tmp_path: Path) -> None:
    grid = replace(GRID, size_m=(4 * 100, 4 * 70), block_out=64)
    blocks = grid.blocks()
    assert len(blocks) == 4
    for block in blocks[:3]:
        save_values(values_file(tmp_path, block), np.full((8, 8), block.index + 1, np.uint8))
    joined = join_values(tmp_path, grid, blocks[:3], tissue_px=200, unfamiliar_px=50)
    assert joined.share == pytest.approx(0.25)
    assert joined.values_HW.tolist() == [[1] * 8 + [2] * 5] * 8 + [[3] * 8 + [0] * 5]
