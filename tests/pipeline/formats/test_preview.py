"""The preview picture: its parts, their colors, and slides of odd shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.tissue_class import Color, TissueClass
from pipeline.formats import preview
from pipeline.formats.preview import length_text, overlay, round_length_um, write_preview
from pipeline.results.areas import ClassArea, class_areas

CLASSES = [TissueClass("Tumor", (200, 0, 0)), TissueClass("Stroma", (0, 160, 20))]


AREAS = class_areas({"Tumor": 1.0, "Stroma": 1.0}, CLASSES)


def halves(height: int, width: int) -> NDArray[np.uint8]:
    """Return labels: 1 on the left half, 2 on the right half, background in the top quarter."""
    labels_HW = np.ones((height, width), np.uint8)
    labels_HW[:, width // 2 :] = 2
    labels_HW[: height // 4] = 0
    return labels_HW


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (1, 1), (2000, 7), (7, 2000), (2600, 1900)])
def test_slides_of_any_shape_give_a_picture_of_reasonable_size(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    thumbnail_rgb_HWC = np.full((height, width, 3), 200, np.uint8)
    write_preview(tmp_path / "p.png", thumbnail_rgb_HWC, halves(50, 30), AREAS, "a slide", 8.0)
    with Image.open(tmp_path / "p.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert 700 <= picture.width <= 2400
        assert 300 <= picture.height <= 1500


@pytest.mark.parametrize("title", ["", "日本 🔬 Ñandú – µm", "a\nb\x00c\ud800", "long " * 200])
def test_any_title_is_drawn(tmp_path: Path, title: str) -> None:
    areas = [ClassArea(name, (1, 2, 3), 1.0, 0.025) for name in (title or "x", "long" * 16)] * 20
    write_preview(tmp_path / "p.png", np.zeros((40, 60, 3), np.uint8), halves(4, 6), areas, title, 100.0)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_an_empty_map_gives_a_picture(tmp_path: Path) -> None:
    write_preview(
        tmp_path / "p.png", np.zeros((40, 60, 3), np.uint8), np.zeros((4, 6), np.uint8), AREAS, "empty", 100.0
    )
    assert (tmp_path / "p.png").exists()


def test_classes_are_blended_and_outlined_over_the_slide_and_background_is_unchanged() -> None:
    slide = Image.new("RGB", (80, 80), (200, 180, 220))
    rgb_HWC = np.asarray(overlay(slide, halves(20, 20), [one.color for one in CLASSES]))
    assert rgb_HWC[10, 40].tolist() == [200, 180, 220]
    assert rgb_HWC[60, 10].tolist() == [round(0.55 * 200 + 0.45 * 200), round(0.55 * 180), round(0.55 * 220)]
    assert rgb_HWC[60, 70].tolist() == [110, round(0.55 * 180 + 0.45 * 160), round(0.55 * 220 + 0.45 * 20)]
    assert rgb_HWC[60, 39].tolist() == [40, 0, 0]
    assert rgb_HWC[60, 40].tolist() == [0, 32, 4]
    assert rgb_HWC[20, 10].tolist() == [40, 0, 0]


def test_a_large_thumbnail_and_its_scale_bar_are_reduced(tmp_path: Path) -> None:
    small, large = (np.full((height, 2 * height, 3), 255, np.uint8) for height in (550, 1100))
    write_preview(tmp_path / "a.png", small, halves(5, 10), AREAS, "t", 10.0)
    write_preview(tmp_path / "b.png", large, halves(5, 10), AREAS, "t", 5.0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_scale_bar_has_the_stated_length(tmp_path: Path) -> None:
    write_preview(tmp_path / "p.png", np.full((550, 1100, 3), 255, np.uint8), halves(5, 10), AREAS, "t", 10.0)
    with Image.open(tmp_path / "p.png") as picture:
        ink_HW = (np.asarray(picture) == preview.INK).all(axis=2)
    # At most 260 px of 10 µm: 2 mm, 200 px.
    longest = max(len(run) for row in ink_HW for run in "".join("x" if v else " " for v in row).split())
    assert longest == pytest.approx(200, abs=2)


def test_the_scale_bar_of_a_tall_slide_has_the_stated_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    monkeypatch.setattr(preview, "_draw_scale_bar", lambda _, __, um_per_px, *___: scales.append(um_per_px))
    write_preview(tmp_path / "p.png", np.full((1600, 11, 3), 255, np.uint8), halves(10, 5), AREAS, "t", 10.0)
    assert scales == [pytest.approx(1600 * 10.0 / preview.PANEL_PX)]


@pytest.mark.parametrize(("size", "count"), [((600, 400), 1), ((200, 600), 2)])
def test_a_warning_is_drawn_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], count: int
) -> None:
    warning = "81 % of the tissue of this slide does not look like the model's training data (colon cancer, H&E)"
    lines: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def text(draw: ImageDraw.ImageDraw, xy: tuple[int, int], words: str, ink: Color, *more: Any, **to: Any) -> None:
        if ink == preview.WARNING_INK:
            lines.append(words)
        draw_text(draw, xy, words, ink, *more, **to)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    pictures = []
    for name, said in (("a", ""), ("b", warning)):
        write_preview(tmp_path / name, np.full((*size[::-1], 3), 0, np.uint8), halves(4, 6), [], "t", 9.0, warning=said)
        pictures.append(np.asarray(Image.open(tmp_path / name)))
    assert len(lines) == count
    assert " ".join(lines) == f"Warning: {warning}"
    plain_HWC, warned_HWC = pictures
    banner = len(warned_HWC) - len(plain_HWC)
    is_ink_HW = (warned_HWC == preview.WARNING_INK).all(axis=2)
    assert np.flatnonzero(is_ink_HW.any(axis=1))[-1] < banner + preview.MARGIN + preview.TITLE + preview.MARGIN
    # The banner moves everything below it.
    np.testing.assert_array_equal(warned_HWC[200 + banner :], plain_HWC[200:])


@given(st.floats(0.01, 1e6))
def test_round_lengths_are_one_two_or_five_times_a_power_of_ten(longest_um: float) -> None:
    length_um = round_length_um(longest_um)
    assert longest_um / 2.5 * (1 - 1e-9) <= length_um <= longest_um * (1 + 1e-9)
    assert f"{length_um:e}"[0] in "125"


def test_lengths_are_written_in_readable_units() -> None:
    assert [length_text(um) for um in (2000, 500, 100, 50, 0.5)] == ["2 mm", "0.5 mm", "0.1 mm", "50 um", "0.5 um"]


def test_text_is_reduced_to_what_the_font_can_draw() -> None:
    font = preview.font_of_size(20)
    assert preview.fitting("Größe – é 🔬\n日", 1000, font) == "Grosse - e ? ?"
    assert preview.fitting("abcdefghij" * 10, 150, font)[0] == "a"
    assert font.getlength(preview.fitting("abcdefghij" * 10, 150, font)) <= 150


def test_the_legend_has_the_shares_of_the_areas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legend: list[tuple[str, str]] = []
    monkeypatch.setattr(preview, "_draw_entry", lambda _, __, name, share, *___: legend.append((name, share)))
    areas = class_areas({"Tumor": 3.0, "Stroma": 1.0, "Fat": 0.0}, CLASSES)
    write_preview(tmp_path / "p.png", np.zeros((40, 60, 3), np.uint8), halves(8, 8), areas, "t", 1.0)
    assert legend == [("Tumor", "75.0 %"), ("Stroma", "25.0 %"), ("Fat", "none")]


def test_classes_whose_names_the_font_lacks_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legend: list[str] = []
    monkeypatch.setattr(preview, "_draw_entry", lambda _, __, name, *___: legend.append(name))
    areas = class_areas({"опухоль": 3.0, "строма??": 1.0, "Drüse?": 1.0, "β-cell": 0.0}, CLASSES)
    write_preview(tmp_path / "p.png", np.zeros((40, 60, 3), np.uint8), halves(8, 8), areas, "t", 1.0)
    assert legend == ["class 1: ???????", "class 2: ????????", "Druse?", "class 4: ?-cell"]
