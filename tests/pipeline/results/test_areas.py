from __future__ import annotations

import pytest

from pipeline.results.areas import UNKNOWN, class_areas, share_text
from tests.pipeline.runs import STROMA, TUMOR


def test_shares_are_of_the_classified_area() -> None:
    tumor, stroma = class_areas({"tumor": 1.0, "stroma": 3.0}, (TUMOR, STROMA))
    assert (tumor.name, tumor.color, tumor.area_mm2, tumor.share) == ("tumor", TUMOR.color, 1.0, 0.25)
    assert stroma.share == 0.75


def test_nothing_classified_has_no_share() -> None:
    assert [one.share for one in class_areas({"tumor": 0.0}, (TUMOR,))] == [None]


def test_a_class_without_a_record_is_gray() -> None:
    assert [one.color for one in class_areas({"tumor": 1.0, "lost": 1.0}, (TUMOR,))] == [TUMOR.color, UNKNOWN]


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (0.0, "0 %"), (0.0004, "< 0.1 %"), (0.738, "73.8 %"), (1.0, "100.0 %")]
)
def test_shares_are_percentages(share: float | None, text: str) -> None:
    assert share_text(share) == text
