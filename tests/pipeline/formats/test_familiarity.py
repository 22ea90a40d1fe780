from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.formats.familiarity import CELL_OUT, OPACITY, UNFAMILIAR, FamiliarityMap, encoded, write_familiarity


def test_values_tell_tissue_at_the_limit_from_unfamiliar_tissue_and_from_glass() -> None:
    distance_HW = np.array([[0.0, 0.5, 1.0], [1.1, 2.0, 9.0]])
    is_tissue_HW = np.array([[True, True, True], [True, True, False]])
    assert encoded(distance_HW, is_tissue_HW).tolist() == [[1, 65, 128], [141, 255, 0]]


def test_the_picture_shows_unfamiliar_cells_only_and_keeps_the_values(tmp_path: Path) -> None:
    values_HW = np.array([[0, 1, 128], [129, 200, 255]], np.uint8)
    write_familiarity(tmp_path / "f.png", FamiliarityMap(values_HW, 0.5))
    with Image.open(tmp_path / "f.png") as picture:
        assert np.array_equal(np.asarray(picture), values_HW)
        rgba_HWC = np.asarray(picture.convert("RGBA"))
    assert (rgba_HWC[0, :, 3] == 0).all()
    assert (rgba_HWC[1] == [*UNFAMILIAR, OPACITY]).all()


def test_pixels_of_the_map_take_the_value_of_their_cell() -> None:
    familiarity = FamiliarityMap(np.array([[0, 255], [128, 129]], np.uint8), 0.5)
    found = familiarity.at(np.array([0, CELL_OUT - 1, CELL_OUT]), np.array([0, CELL_OUT]))
    assert found.tolist() == [[False, False, True], [False, False, True]]
