"""Draw docs/architecture.svg from the imports: each room stands one floor above the rooms that it imports.

    python -m tests.draw_architecture

Floors and arrows come from the code and the lines of text from the table of rooms in CONTRIBUTING.md. Only the columns
are chosen by hand, so that few lines cross. The same code gives the same bytes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from tests.imports import Graph, import_graph, room_graph, without_shortcuts
from tests.repository import REPOSITORY

PICTURE = REPOSITORY / "docs" / "architecture.svg"

COLUMNS = {
    "flows": 0.5, "pipeline.cli": 2.0,
    "pipeline.batch": 0, "pipeline.viewing": 2, "pipeline.checks": 3,
    "pipeline.workers": 0, "pipeline.labeling": 2,
    "pipeline.web": 0.5, "pipeline.console": 1.5, "pipeline.training": 2.5,
    "pipeline.slide": 0,
    "pipeline.pages": 0, "pipeline.progress": 1,
    "pipeline.formats": 0,
    "pipeline.results": 0,
    "pipeline.files": 0, "pipeline.config": 1,
    "models": 1, "wsi": 2, "pipeline.errors": 3, "pipeline.limits": 4,
}  # fmt: skip
"""Room -> column, from the left. A room that is not listed stands in column 4."""

COLORS = {"flows": "#7c4dbd", "pipeline": "#2b6cb0", "models": "#c05621", "wsi": "#2f7d5b"}

BOX_W, BOX_H = 236, 82
STEP_X, STEP_Y = 268, 128
MARGIN, HEAD = 40, 92
BEND = 54
"""Height in which an arrow changes its column, just above the room that it leads to."""
INK, SOFT, PAPER, BAND = "#1a202c", "#4a5568", "#ffffff", "#f5f7fa"


@dataclass(frozen=True)
class Box:
    """A room in the picture; x and y of its upper left corner in pixels."""

    room: str
    x: float
    y: float
    floor: int

    @property
    def color(self) -> str:
        """Return the color of the room's package."""
        return COLORS[self.room.partition(".")[0]]

    def covers(self, x: float, top: float, bottom: float) -> bool:
        """Return whether a vertical line from `top` to `bottom` runs through the box."""
        return self.x < x < self.x + BOX_W and top < self.y + BOX_H and bottom > self.y


@dataclass(frozen=True)
class Arrow:
    """An import: straight down from the upper box, then a bend to the top of the lower one."""

    start: Box
    end: Box
    x0: float
    x1: float

    @property
    def bend_y(self) -> float:
        """Return where the straight part ends."""
        return self.end.y - BEND

    def path(self) -> str:
        """Return the `d` of the SVG path."""
        top, tip = self.start.y + BOX_H, self.end.y - 7
        middle = (self.bend_y + tip) / 2
        bend = f"C{self.x0:g} {middle:g} {self.x1:g} {middle:g} {self.x1:g} {tip:g}"
        return f"M{self.x0:g} {top:g}V{self.bend_y:g}{bend}"


def explanations() -> dict[str, str]:
    """Return room -> its line in the table of rooms in CONTRIBUTING.md."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/.]+)` \| (.+?) \|$", text, re.MULTILINE)
    return {name.removesuffix("/").removesuffix(".py").replace("/", "."): line for name, line in rows}


def floors(graph: Graph) -> dict[str, int]:
    """Return room -> floor. Each room stands as high as the rooms that import it allow."""
    importers = {room: {other for other, targets in graph.items() if room in targets} for room in graph}
    depth: dict[str, int] = {}

    def depth_of(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((depth_of(other) for other in importers[room]), default=-1)
        return depth[room]

    highest = max(depth_of(room) for room in graph)
    return {room: highest - depth[room] for room in graph}


def place(graph: Graph) -> dict[str, Box]:
    """Return room -> its box."""
    floor = floors(graph)
    highest = max(floor.values())
    return {
        room: Box(room, MARGIN + COLUMNS.get(room, 4) * STEP_X, HEAD + (highest - floor[room]) * STEP_Y, floor[room])
        for room in graph
    }


def arrows(graph: Graph, boxes: dict[str, Box]) -> Iterator[Arrow]:
    """Yield the arrows between boxes; those that share a side of a box leave or arrive next to each other."""
    for room, targets in graph.items():
        for target in sorted(targets):
            start, end = boxes[room], boxes[target]
            out = sorted(targets, key=lambda one: (boxes[one].x, boxes[one].floor))
            into = sorted((one for one in graph if target in graph[one]), key=lambda one: (boxes[one].x, one))
            yield Arrow(start, end, port(start, out.index(target), len(out)), port(end, into.index(room), len(into)))


def port(box: Box, index: int, count: int) -> float:
    """Return x of one of `count` arrows at a side of a box."""
    return box.x + BOX_W * (index + 1) / (count + 1)


def crossed_boxes(graph: Graph) -> list[tuple[str, str, str]]:
    """Return (importer, imported, room) for each arrow that runs through a third room's box."""
    boxes = place(graph)
    return [
        (arrow.start.room, arrow.end.room, box.room)
        for arrow in arrows(without_shortcuts(graph), boxes)
        for box in boxes.values()
        if box not in (arrow.start, arrow.end) and box.covers(arrow.x0, arrow.start.y + BOX_H, arrow.bend_y)
    ]


def draw(graph: Graph, lines: dict[str, str]) -> str:
    """Return the picture of a room graph as SVG. Raises KeyError for a room without a line of text."""
    boxes = place(graph)
    shown = list(arrows(without_shortcuts(graph), boxes))
    width = max(box.x for box in boxes.values()) + BOX_W + MARGIN
    height = max(box.y for box in boxes.values()) + BOX_H + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" role="img">',
            "<title>Rooms of wsi-segment and their imports</title>",
            f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>',
            *head(),
            *bands(boxes, width),
            *(f'<path d="{arrow.path()}" fill="none" stroke="{arrow.start.color}" stroke-width="1.6"/>{tip(arrow)}'
              for arrow in shown),
            *(line for box in boxes.values() for line in drawn(box, lines[box.room])),
            "</svg>",
            "",
        ]
    )  # fmt: skip


def head() -> Iterator[str]:
    """Yield the title and the key."""
    yield f'<text x="{MARGIN}" y="38" font-size="21" font-weight="bold" fill="{INK}">Rooms and their imports</text>'
    yield (
        f'<text x="{MARGIN}" y="62" font-size="13" fill="{SOFT}">An arrow points from a room to a room '
        "that it imports. Imports that a longer path of arrows already shows are left out.</text>"
    )


def bands(boxes: dict[str, Box], width: float) -> Iterator[str]:
    """Yield a band for every other floor."""
    for y in sorted({box.y for box in boxes.values()})[::2]:
        yield f'<rect y="{y - 16:g}" width="{width:g}" height="{BOX_H + 32}" fill="{BAND}"/>'


def tip(arrow: Arrow) -> str:
    """Return the head of an arrow."""
    x, y = arrow.x1, arrow.end.y - 1
    return f'<path d="M{x - 4.5:g} {y - 8:g}H{x + 4.5:g}L{x:g} {y:g}Z" fill="{arrow.start.color}"/>'


def drawn(box: Box, line: str) -> Iterator[str]:
    """Yield the elements of a box: its frame, the room's name and its line of text."""
    name = box.room.replace(".", "/")
    yield (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{BOX_W}" height="{BOX_H}" rx="7" fill="{PAPER}" '
        f'stroke="{box.color}" stroke-width="1.4"/>'
    )
    yield f'<rect x="{box.x:g}" y="{box.y:g}" width="6" height="{BOX_H}" rx="3" fill="{box.color}"/>'
    yield (
        f'<text x="{box.x + 18:g}" y="{box.y + 25:g}" font-size="15" font-weight="bold" fill="{box.color}">'
        f"{escape(name)}</text>"
    )
    for row, part in enumerate(textwrap.wrap(line.replace("`", ""), 33)):
        y = box.y + 46 + 16 * row
        yield f'<text x="{box.x + 18:g}" y="{y:g}" font-size="12" fill="{SOFT}">{escape(part)}</text>'


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw(room_graph(import_graph()), explanations()), encoding="utf-8")


if __name__ == "__main__":
    main()
