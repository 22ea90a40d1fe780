from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.slides import reduce, write_slide
from wsi import thumbnail
from wsi.box import Box
from wsi.readers import Reader
from wsi.slide import Pixels, Slide, open_slide
from wsi.thumbnail import read_thumbnail


@pytest.mark.parametrize("most_px", [16, 100, 16 * 30, 16 * 70, 10**6])
def test_a_thumbnail_is_read_in_parts_of_limited_size_that_do_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_px: int
) -> None:
    """A row of the thumbnail of a slide with one level needs as many pixels as the slide is wide, times the factor."""
    rgb_HWC = np.random.default_rng(0).integers(0, 255, (40, 280, 3), dtype=np.uint8)
    boxes: list[Box] = []

    class _Watched(Slide):
        def read(self, level: int, box_lv: Box) -> Pixels:
            boxes.append(box_lv)
            pixels = super().read(level, box_lv)
            bad = box_lv.intersect(Box(101, 7, 2, 6))  # in the thumbnail's columns 25 and rows 1 to 3
            return Pixels(pixels.rgb_HWC, (bad,) if bad.width and bad.height else ())

    with open_slide(write_slide(tmp_path / "slide.svs", rgb_HWC, mpp=0.5)) as slide, _Watched(slide.info) as watched:
        monkeypatch.setattr(thumbnail, "STRIP_PX", most_px)
        found = read_thumbnail(watched, 2.0)
    np.testing.assert_array_equal(found.rgb_HWC, reduce(rgb_HWC, 4))
    assert max(box.width * box.height for box in boxes) <= most_px
    assert sum(box.width * box.height for box in boxes) == 280 * 40
    assert found.unreadable_share == pytest.approx(12 / (280 * 40))
    assert {(box.x, box.right) for box in found.unreadable_px} == {(25, 26)}
    assert (min(box.y for box in found.unreadable_px), max(box.bottom for box in found.unreadable_px)) == (1, 4)


def test_a_truncated_slide_logs_a_few_unreadable_parts_and_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def truncated(_: Slide) -> Reader:
        raise ValueError("the tile is beyond the end of the file")

    with open_slide(write_slide(tmp_path / "a.svs", np.zeros((1024, 1024, 3), np.uint8), mpp=0.5)) as slide:
        monkeypatch.setattr(Slide, "_reader", truncated)
        assert len(read_thumbnail(slide, 2.0).unreadable_px) == 16
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(" Box")[0] for text in warnings] == [
        *["a.svs: cannot read"] * 5,
        "a.svs: further parts that cannot be read are counted and not logged",
        "a.svs: 16 parts of the thumbnail cannot be read",
    ]
