"""Pictures of an evaluation: the confusion matrix, and the images with the worst predictions.

Shape suffixes: R rows and C columns of a matrix, H and W an image, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.tissue_class import Color, TissueClass
from pipeline.formats.preview import FAINT, INK, MARGIN, PAPER, TITLE, fitting, font_of_size, overlay

TEXT = 16
ROW = 26
"""Height of a line of text."""
FULL: Color = (31, 84, 150)
"""Color of a cell that contains all pixels of its row."""
CELL_HEIGHT = 56
CELL_WIDTHS = (12, 120)
"""Smallest and largest cell width."""
LEGIBLE = 48
"""Smallest cell width with text."""
MATRIX_WIDTH = 1800
"""Largest total width of the cells."""
PANEL_PX = 320
"""Longer side of each panel of a comparison."""
GAP = 14
COMPARISON_PX = 3 * PANEL_PX + 2 * GAP


class Compared(NamedTuple):
    """An image with its prediction, and its truth if it has a mask."""

    title: str
    rgb_HWC: NDArray[np.uint8]
    truth_HW: NDArray[np.uint8] | None
    """Class index; values from K up mean "no class"."""
    predicted_HW: NDArray[np.uint8]


def write_confusion_matrix(
    path_png: Path, matrix_RC: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str], title: str
) -> None:
    """Draw a matrix of pixel counts as shares of each row: rows are true classes, columns are predicted classes.

    Cell colors go from white (0 %) to `FULL` (100 %). The row name includes the share of the row in all pixels. Rows
    without pixels stay white.
    """
    if matrix_RC.shape != (len(rows), len(columns)):
        raise ValueError(f"the matrix has shape {matrix_RC.shape}, but the names need {(len(rows), len(columns))}")
    text = font_of_size(TEXT)
    totals_R = matrix_RC.sum(axis=1, keepdims=True)
    share_RC = matrix_RC / np.maximum(totals_R, 1)
    share_R = totals_R[:, 0] / max(1, int(totals_R.sum()))
    width = min(CELL_WIDTHS[1], max(CELL_WIDTHS[0], MATRIX_WIDTH // len(columns)))
    names = [fitting(f"{name} ({_percent(share)})", 300, text) for name, share in zip(rows, share_R, strict=True)]
    left, top = matrix_corner(names)
    sheet_width = max(left + width * len(columns), 480) + MARGIN
    sheet = Image.new("RGB", (sheet_width, top + CELL_HEIGHT * len(rows) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (MARGIN, MARGIN - 4), fitting(title, sheet_width - 2 * MARGIN, font_of_size(TITLE)), INK, font_of_size(TITLE)
    )
    draw.text((left, MARGIN + TITLE + 8), "predicted", FAINT, text)
    draw.text((left - 12, top - ROW), "truth", FAINT, text, anchor="ra")
    for j, name in enumerate(columns):
        if width >= LEGIBLE:
            draw.text(
                (left + j * width + width // 2, top - ROW), fitting(name, width - 8, text), INK, text, anchor="ma"
            )
    for i, name in enumerate(names):
        middle = top + i * CELL_HEIGHT + CELL_HEIGHT // 2
        draw.text((left - 12, middle), name, INK, text, anchor="rm")
        for j, share in enumerate(share_RC[i]):
            x = left + j * width
            box = (x, middle - CELL_HEIGHT // 2, x + width - 2, middle + CELL_HEIGHT // 2 - 2)
            draw.rectangle(box, fill=_shade(share), outline=(225, 225, 228))
            if width >= LEGIBLE:
                ink = PAPER if share > 0.5 else INK
                draw.text((x + width // 2, middle), _percent(share), ink, text, anchor="mm")
    sheet.save(path_png, format="PNG")


def matrix_corner(names: Sequence[str]) -> tuple[int, int]:
    """Return the (x, y) of the first cell on the sheet of a matrix with these row names."""
    return round(MARGIN + max(font_of_size(TEXT).getlength(name) for name in names) + 12), MARGIN + TITLE + 8 + 2 * ROW


def write_comparison(path_png: Path, images: Iterable[Compared], classes: Sequence[TissueClass]) -> None:
    """Draw one row per image (image, truth if known, and prediction, in the colors of the classes) and a legend.

    Pixels without a class keep the color of the image.
    """
    colors = [one.color for one in classes]
    rows = [_comparison(one, colors) for one in images]
    text = font_of_size(TEXT)
    legend_width = sum(_legend_width(one.name) for one in classes)
    width = max(legend_width, COMPARISON_PX) + 2 * MARGIN
    sheet = Image.new("RGB", (width, MARGIN + ROW + GAP + sum(row.height + MARGIN for row in rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    x, y = MARGIN, MARGIN
    for one in classes:
        draw.rectangle((x, y, x + 16, y + 16), fill=one.color, outline=INK)
        draw.text((x + 24, y), fitting(one.name, 300, text), INK, text)
        x += _legend_width(one.name)
    y += ROW + GAP
    for row in rows:
        sheet.paste(row, (MARGIN, y))
        y += row.height + MARGIN
    sheet.save(path_png, format="PNG")


def _legend_width(name: str) -> int:
    return round(24 + font_of_size(TEXT).getlength(fitting(name, 300, font_of_size(TEXT))) + 28)


def _comparison(one: Compared, colors: Sequence[Color]) -> Image.Image:
    """Return the panels of an image below its title."""
    height, width = one.rgb_HWC.shape[:2]
    scale = PANEL_PX / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(one.rgb_HWC).resize(size, Image.Resampling.BICUBIC)
    panels = {"image": image}
    for name, labels_HW in (("truth", one.truth_HW), ("prediction", one.predicted_HW)):
        if labels_HW is not None:
            panels[name] = overlay(image, _labels(labels_HW, len(colors)), colors)
    text, step = font_of_size(TEXT), size[0] + GAP
    row = Image.new("RGB", (COMPARISON_PX, 2 * ROW + size[1]), PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((0, 0), fitting(one.title, row.width, text), INK, text)
    for i, (name, panel) in enumerate(panels.items()):
        draw.text((i * step, ROW), fitting(name, size[0], text), FAINT, text)
        row.paste(panel, (i * step, 2 * ROW))
    return row


def _labels(classes_HW: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Return labels for `overlay`: 0 for no class, k + 1 for class k."""
    return np.where(classes_HW < count, classes_HW + np.uint8(1), np.uint8(0))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _shade(share: float) -> Color:
    red, green, blue = (round(255 + (full - 255) * share) for full in FULL)
    return red, green, blue
