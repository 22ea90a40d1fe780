"""The default colors keep their distances, computed in plain Python and independently of the search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from pipeline.errors import DatasetFileError
from pipeline.formats.preview import BLEND
from pipeline.training.dataset_card import read_card
from pipeline.training.palettes import CLASS_COLORS, class_colors
from tests.bench.palettes import BACKGROUNDS, TISSUES, VISIONS, compare
from tests.repository import REPOSITORY

Vector = Sequence[float]

WHITE_D65 = (0.95047, 1.0, 1.08883)
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))


def times(matrix: Iterable[Vector], vector: Vector) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def lab_as_seen(rgb: Vector, vision: str) -> Vector:
    """Return the CIELAB of an sRGB color (0-255) after simulating color blindness on linear light."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    seen = [min(1.0, max(0.0, c)) for c in times(VISIONS[vision].tolist(), linear)]
    ratios = [a / b for a, b in zip(times(XYZ, seen), WHITE_D65, strict=True)]
    x, y, z = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in ratios)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def ciede2000(first: Vector, second: Vector) -> float:
    """Return the CIEDE2000 difference (Sharma, Wu, Dalal, Color Res. Appl. 30, 2005)."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    mean_c7 = ((math.hypot(a1, b1) + math.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * math.sqrt(mean_c7 / (mean_c7 + 25.0**7))
    c1, c2 = math.hypot(a1 * stretch, b1), math.hypot(a2 * stretch, b2)
    h1, h2 = (math.degrees(math.atan2(b, a * stretch)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = 0.0 if c1 * c2 == 0 else (h2 - h1 + 180) % 360 - 180
    if abs(h2 - h1) == 180:
        turn = h2 - h1
    d_l, d_c = l2 - l1, c2 - c1
    d_h = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn) / 2)
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    mean_h = h1 + h2 if c1 * c2 == 0 else (h1 + turn / 2) % 360
    t = sum(
        weight * math.cos(math.radians(factor * mean_h + shift))
        for weight, factor, shift in ((1, 0, 0), (-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.2, 4, -63))
    )
    s_l = 1 + 0.015 * (mean_l - 50) ** 2 / math.sqrt(20 + (mean_l - 50) ** 2)
    s_c, s_h = 1 + 0.045 * mean_c, 1 + 0.015 * mean_c * t
    r_c = 2 * math.sqrt(mean_c**7 / (mean_c**7 + 25.0**7))
    r_t = -math.sin(math.radians(60 * math.exp(-(((mean_h - 275) / 25) ** 2)))) * r_c
    l_part, c_part, h_part = d_l / s_l, d_c / s_c, d_h / s_h
    return math.sqrt(l_part**2 + c_part**2 + h_part**2 + r_t * c_part * h_part)


def least(first: Vector, second: Vector) -> float:
    """Return the smallest distance of two colors over all simulated readers."""
    return min(ciede2000(lab_as_seen(first, vision), lab_as_seen(second, vision)) for vision in VISIONS)


def over(color: Vector, tissue: Vector) -> Vector:
    return [BLEND * c + (1 - BLEND) * t for c, t in zip(color, tissue, strict=True)]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [  # from the paper's table 1
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_formula_gives_its_published_examples(first: Vector, second: Vector, expected: float) -> None:
    assert ciede2000(first, second) == pytest.approx(expected, abs=1e-4)


def test_simulated_vision_keeps_gray_gray() -> None:
    for vision in VISIONS:
        assert lab_as_seen((120, 120, 120), vision) == pytest.approx(lab_as_seen((120, 120, 120), "normal"), abs=0.02)
    assert ciede2000(lab_as_seen((200, 0, 0), "normal"), lab_as_seen((127, 108, 0), "normal")) > 35
    assert ciede2000(lab_as_seen((200, 0, 0), "deuteranopia"), lab_as_seen((127, 108, 0), "deuteranopia")) < 3


@pytest.mark.parametrize(
    ("count", "plain", "blended"),
    [(2, 72, 32), (3, 34, 17), (4, 30, 13.9), (5, 20, 13.9), (6, 16.9, 9.4), (8, 16, 8.5), (10, 14.6, 7.4)],
)
def test_any_two_of_the_first_colors_differ_for_every_reader(count: int, plain: float, blended: float) -> None:
    for first, second in itertools.combinations(class_colors(count), 2):
        assert least(first, second) > plain
        for tissue in TISSUES.tolist():
            assert least(over(first, tissue), over(second, tissue)) > blended


def test_each_color_differs_from_glass_stain_and_black() -> None:
    for color in CLASS_COLORS:
        assert min(least(color, background) for background in BACKGROUNDS.tolist()) > 8
        assert least(color, (0, 0, 0)) > 15
        assert min(least(over(color, tissue), tissue) for tissue in TISSUES.tolist()) > 7


def test_the_table_in_the_decision_record_equals_the_output_of_the_command() -> None:
    decision = (REPOSITORY / "docs" / "decisions" / "0006-colors.md").read_text(encoding="utf-8")
    rows = list(compare())
    assert len(rows) > 10
    assert [row for row in rows if row not in decision] == []


def test_more_classes_than_colors_are_refused() -> None:
    assert class_colors(10) == CLASS_COLORS
    assert len(set(CLASS_COLORS)) == 10
    with pytest.raises(ValueError, match="11 classes, but the palette has only 10 distinct colors"):
        class_colors(11)


CARD = """
name = "tiny"
description = "Made by a test."
licence = "CC0"
mpp = 0.5
classes = [{classes}]
images.train = [{{ image = "*.png" }}]
labels.source = "folders"
labels.splits = ["train"]
"""


def card_with(tmp_path: Path, *classes: str) -> Path:
    file = tmp_path / "dataset.toml"
    file.write_text(CARD.format(classes=", ".join(f"{{ {spec} }}" for spec in classes)), encoding="utf-8")
    return file


def test_a_data_set_without_colors_gets_the_default_colors(tmp_path: Path) -> None:
    card = read_card(card_with(tmp_path, 'name = "a"', 'name = "b"', 'name = "c"'))
    assert tuple(spec.color for spec in card.classes) == CLASS_COLORS[:3]


def test_given_colors_are_kept_and_a_partial_list_is_refused(tmp_path: Path) -> None:
    card = read_card(card_with(tmp_path, 'name = "a", color = [1, 2, 3]', 'name = "b", color = [4, 5, 6]'))
    assert [spec.color for spec in card.classes] == [(1, 2, 3), (4, 5, 6)]
    with pytest.raises(DatasetFileError, match=r"dataset\.toml: classes: color is missing for b; set the color"):
        read_card(card_with(tmp_path, 'name = "a", color = [1, 2, 3]', 'name = "b"'))
    with pytest.raises(DatasetFileError, match=r"11 classes, but the palette has only 10 distinct colors"):
        read_card(card_with(tmp_path, *(f'name = "class {k}"' for k in range(11))))
