from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.bench.familiarity import Measured, auroc, folds_table, main


def _measured(name: str, *images: tuple[float, ...]) -> Measured:
    return Measured(name, tuple(np.array(image, np.float32) for image in images))


def test_the_auroc_counts_ties_as_one_half() -> None:
    # Of the six pairs, four are in order and one is a tie.
    assert auroc(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])) == pytest.approx(4.5 / 6)


def test_an_image_is_flagged_if_more_than_half_of_its_windows_are_beyond_the_limit() -> None:
    assert _measured("01", (0.5, 1.5), (2.0, 1.5), (0.5, 0.7), (1.0, 1.0)).flagged(0.5) == 0.25


def test_the_table_of_folds_has_a_row_for_each_slide_and_one_for_all_images() -> None:
    first = _measured("01", (0.5, 0.6), (0.7, 0.8, 1.5)), _measured("skin", (2.0,), (0.9,))
    second = _measured("02", (0.9, 1.2, 1.3), (0.5, 0.5)), _measured("skin", (3.0,), (3.0,))
    assert folds_table([first, second]).splitlines()[2:] == [
        # A third of an image's windows is below the limit of a slide, two thirds are above it. Skin: 2.0 is farther
        # than all five windows, 0.9 than four.
        "| 01 | 2 | 0 % | 20 % | 50 % | 0.900 |",
        "| 02 | 2 | 50 % | 40 % | 100 % | 1.000 |",
        "| all | 4 | 25 % | 30 % | | mean 0.950 |",
    ]


def test_a_model_is_required_without_folds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "folder"])
    assert "MODEL and OWN are required" in capsys.readouterr().err


def test_models_and_folds_exclude_each_other_and_a_folder_without_folds_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["colon-gland", "glas", "--data", "folder", "--folds", "folds"])
    assert "omit MODEL and OWN" in capsys.readouterr().err
    (tmp_path / "kather2016").mkdir()
    (tmp_path / "recipe.json").write_text('{"dataset": "kather-2016", "images": 1}')
    with pytest.raises(SystemExit, match="no finished fold"):
        main(["--data", str(tmp_path), "--folds", str(tmp_path)])
