"""The pictures of an evaluation: positions and colors of their parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.formats.preview import MARGIN
from pipeline.training import pictures
from pipeline.training.pictures import Compared, write_comparison, write_confusion_matrix

CLASSES = [TissueClass("other", (230, 159, 0)), TissueClass("gland", (0, 158, 115))]
WHITE = [255, 255, 255]


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


def cell(rgb_HWC: NDArray[np.uint8], names: list[str], row: int, column: int, width: int = 120) -> list[int]:
    """Return the color of a cell, sampled beside its text."""
    x, y = pictures.matrix_corner(names)
    found: list[int] = rgb_HWC[y + row * pictures.CELL_HEIGHT + 4, x + column * width + 4].tolist()
    return found


def test_cells_are_as_dark_as_their_share_of_the_row(tmp_path: Path) -> None:
    matrix_RC = np.array([[30, 0, 10], [0, 60, 0]], dtype=np.int64)
    write_confusion_matrix(tmp_path / "c.png", matrix_RC, ["other", "gland"], ["other", "gland", "no class"], "title")
    rgb_HWC = pixels(tmp_path / "c.png")
    names = ["other (40.0 %)", "gland (60.0 %)"]

    def expected(share: float) -> list[int]:
        return [round(255 + (full - 255) * share) for full in (31, 84, 150)]

    for row, shares in enumerate([(0.75, 0, 0.25), (0, 1, 0)]):
        assert [cell(rgb_HWC, names, row, column) for column in range(3)] == [expected(share) for share in shares]


def test_an_empty_row_is_white_and_many_classes_fit_on_a_sheet(tmp_path: Path) -> None:
    names = [f"class {k} of many" for k in range(90)]
    matrix_RC = np.diag(np.arange(90)).astype(np.int64)
    write_confusion_matrix(tmp_path / "c.png", matrix_RC, names, names, "many")
    rgb_HWC = pixels(tmp_path / "c.png")
    rows = [f"{name} ({100 * k / 4005:.1f} %)" for k, name in enumerate(names)]
    assert cell(rgb_HWC, rows, 0, 0, width=20) == WHITE
    assert cell(rgb_HWC, rows, 89, 89, width=20) == list(pictures.FULL)
    assert rgb_HWC.shape[1] < 2300


def test_a_matrix_that_does_not_fit_its_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        write_confusion_matrix(tmp_path / "c.png", np.ones((2, 2), np.int64), ["a", "b"], ["a", "b", "c"], "t")
    assert not list(tmp_path.iterdir())


def test_image_truth_and_prediction_are_side_by_side(tmp_path: Path) -> None:
    truth_HW = np.zeros((64, 64), np.uint8)
    truth_HW[:, 32:] = 1
    truth_HW[:32, :32] = 255
    predicted_HW = np.full((64, 64), 2, np.uint8)
    predicted_HW[32:] = 1
    image = Compared("a: mIoU 12.3 %", np.full((64, 64, 3), 200, np.uint8), truth_HW, predicted_HW)
    write_comparison(tmp_path / "w.png", [image, image._replace(title="b")], CLASSES)
    rgb_HWC = pixels(tmp_path / "w.png")
    side, step = pictures.PANEL_PX, pictures.PANEL_PX + pictures.GAP
    tops = [MARGIN + pictures.ROW + pictures.GAP + 2 * pictures.ROW]
    tops.append(tops[0] + side + MARGIN + 2 * pictures.ROW)
    plain = [200, 200, 200]
    blended = [[round(0.55 * 200 + 0.45 * value) for value in one.color] for one in CLASSES]
    for top in tops:
        quarters = [
            [rgb_HWC[top + y, MARGIN + panel * step + x].tolist() for y in (80, 240) for x in (80, 240)]
            for panel in range(3)
        ]
        assert quarters[0] == [plain] * 4
        assert quarters[1] == [plain, blended[1], blended[0], blended[1]]
        assert quarters[2] == [plain, plain, blended[1], blended[1]]
    assert rgb_HWC[MARGIN + 8, MARGIN + 8].tolist() == [230, 159, 0]


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3)])
def test_images_of_any_form_and_names_in_any_script_are_drawn(tmp_path: Path, size: tuple[int, int]) -> None:
    labels_HW = np.zeros(size, np.uint8)
    image = Compared("größe 組織 " * 40, np.zeros((*size, 3), np.uint8), labels_HW, labels_HW)
    write_comparison(tmp_path / "w.png", [image], [TissueClass("組織", (1, 2, 3)), TissueClass("x" * 64, (4, 5, 6))])
    assert pixels(tmp_path / "w.png").shape[1] < 1200


def test_a_comparison_of_no_images_shows_the_legend(tmp_path: Path) -> None:
    write_comparison(tmp_path / "w.png", [], CLASSES)
    assert pixels(tmp_path / "w.png")[MARGIN + 8, MARGIN + 8].tolist() == [230, 159, 0]
