"""docs/architecture.svg shows the imports as they are, and its drawing rules hold."""

from __future__ import annotations

import pytest

from tests.draw_architecture import PICTURE, crossed_boxes, draw, explanations, floors, place
from tests.imports import Graph, import_graph, room_graph, without_shortcuts

SMALL: Graph = {
    "flows": {"models", "wsi", "pipeline.slide"},
    "pipeline.slide": {"models", "wsi"},
    "models": set(),
    "wsi": set(),
}
"""A small house: three floors, two shortcuts."""


@pytest.fixture(scope="module")
def rooms() -> Graph:
    return room_graph(import_graph())


def test_the_picture_is_what_the_script_draws_now(rooms: Graph) -> None:
    expected = draw(rooms, explanations())
    assert PICTURE.read_text(encoding="utf-8") == expected, "run python -m tests.draw_architecture"


def test_contributing_explains_every_room_and_no_other(rooms: Graph) -> None:
    assert set(explanations()) == set(rooms)


def test_every_explanation_fits_into_its_box() -> None:
    assert {room: line for room, line in explanations().items() if len(line) > 62} == {}


def test_no_arrow_runs_through_a_room_and_no_two_rooms_share_a_place(rooms: Graph) -> None:
    boxes = place(rooms).values()
    assert crossed_boxes(rooms) == [], "choose other COLUMNS in tests/draw_architecture.py"
    assert len({(box.x, box.y) for box in boxes}) == len(boxes)


def test_a_shortcut_is_not_drawn() -> None:
    assert without_shortcuts(SMALL) == {
        "flows": {"pipeline.slide"},
        "pipeline.slide": {"models", "wsi"},
        "models": set(),
        "wsi": set(),
    }
    assert draw(SMALL, dict.fromkeys(SMALL, "A room.")).count('stroke-width="1.6"') == 3


def test_a_room_stands_above_all_rooms_that_it_imports(rooms: Graph) -> None:
    assert floors(SMALL) == {"flows": 2, "pipeline.slide": 1, "models": 0, "wsi": 0}
    floor = floors(rooms)
    assert all(floor[room] > floor[target] for room, targets in rooms.items() for target in targets)


def test_an_arrow_through_a_room_is_found() -> None:
    # config stands between progress and wsi, below the place that the arrow leaves from.
    graph: Graph = {
        "pipeline.cli": {"pipeline.viewing"},
        "pipeline.viewing": {"pipeline.formats"},
        "pipeline.formats": {"wsi"},
        "flows": {"pipeline.progress"},
        "pipeline.progress": {"pipeline.config", "wsi"},
        "pipeline.config": {"models"},
        "models": set(),
        "wsi": set(),
    }
    assert crossed_boxes(graph) == [("pipeline.progress", "wsi", "pipeline.config")]


def test_a_room_without_an_explanation_is_refused() -> None:
    with pytest.raises(KeyError, match="wsi"):
        draw(SMALL, {"flows": "A.", "models": "B.", "pipeline.slide": "C."})
