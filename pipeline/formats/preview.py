"""The preview: a picture of one slide with the classes over it, a legend with shares and a scale bar."""

from __future__ import annotations

import bisect
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from models.tissue_class import Color
from pipeline.formats.familiarity import UNFAMILIAR
from pipeline.results.areas import ClassArea, share_text
from wsi.box import Box

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

BLEND = 0.45
"""Weight of the class color over the slide: classes differ clearly, and nuclei stay visible below them."""
OUTLINE = 0.2
"""Share of the class color in its outline. This dark, the outline is visible on any stain and beside any fill."""
PANEL_PX = 1100
"""Longer side of each panel. Larger thumbnails are reduced, smaller ones enlarged."""
MIN_SIDE_PX = 48
"""Panels of very thin slides are padded to this side."""
MARGIN = 28
TEXT = 20
TITLE = 28
INK: Color = (32, 32, 36)
FAINT: Color = (110, 110, 118)
PAPER: Color = (255, 255, 255)
BACKDROP: Color = (244, 244, 245)
WARNING_INK: Color = (127, 29, 29)
WARNING_PAPER: Color = (254, 226, 226)
WARNING_LINE = 26
"""Distance between the lines of the warning."""
HATCH_PX = 14
"""Distance between the lines over unfamiliar tissue."""
ASCII = {"ß": "ss", "µ": "u", "–": "-", "—": "-", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L"}
"""Letters that Unicode's own decomposition does not change."""


def write_preview(
    path_png: Path,
    thumbnail_rgb_HWC: npt.NDArray[np.uint8],
    labels_HW: npt.NDArray[np.integer],
    areas: Sequence[ClassArea],
    title: str,
    um_per_px: float,
    unfamiliar_HW: npt.NDArray[np.bool_] | None = None,
    warning: str = "",
) -> None:
    """Write one PNG: the slide on the left, the slide with its classes on the right, title, legend and scale bar.

    A `warning` stands below the title, and hatching covers the tissue that `unfamiliar_HW` marks.

    `labels_HW` (0 background, 1.. in the order of `areas`) covers the same field as the thumbnail at any resolution.
    `um_per_px` is the size of a thumbnail pixel in micrometers. The legend shows each class's share.
    """
    height, width = thumbnail_rgb_HWC.shape[:2]
    scale = PANEL_PX / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    slide = Image.fromarray(thumbnail_rgb_HWC).resize(
        size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    )
    classes = overlay(slide, labels_HW, [one.color for one in areas])
    legend = [
        (_legend_name(number, one.name), share_text(one.share) if one.share else "none", one.color)
        for number, one in enumerate(areas, start=1)
    ]
    if unfamiliar_HW is not None and unfamiliar_HW.any():
        classes = hatched(classes, unfamiliar_HW)
        legend.append(("hatched: unlike the training data", "", UNFAMILIAR))
    sheet = _compose([_mount(slide), _mount(classes)], legend, title, warning, um_per_px / scale)
    # Level 6, the default, takes half again as long and saves a twelfth of the size.
    sheet.save(path_png, format="PNG", compress_level=3)


def overlay(slide: Image.Image, labels_HW: npt.NDArray[np.integer], colors: Sequence[Color]) -> Image.Image:
    """Return the slide with each class blended over it and outlined in a dark shade of its color."""
    # Nearest neighbor: a mixture of two labels would be a third class.
    labels = np.asarray(Image.fromarray(labels_HW.astype(np.uint8)).resize(slide.size, Image.Resampling.NEAREST))
    palette = np.array([(0, 0, 0), *colors], dtype=np.float32)
    color_HWC = palette[np.minimum(labels, len(colors))]
    rgb_HWC = np.asarray(slide.convert("RGB"), dtype=np.float32)
    blended_HWC = np.where((labels > 0)[..., None], (1 - BLEND) * rgb_HWC + BLEND * color_HWC, rgb_HWC)
    outlined_HWC = np.where(outline(labels)[..., None], OUTLINE * color_HWC, blended_HWC)
    return Image.fromarray(np.round(outlined_HWC).astype(np.uint8))


def hatched(picture: Image.Image, mask_HW: npt.NDArray[np.bool_]) -> Image.Image:
    """Return the picture with diagonal lines over the mask, which covers the same field at any resolution."""
    mask = Image.fromarray(mask_HW).resize(picture.size, Image.Resampling.NEAREST)
    y, x = np.ogrid[: picture.height, : picture.width]
    # Each line has a light edge, so that it is visible over every class and every stain.
    place_HW = (x + y) % HATCH_PX
    rgb_HWC = np.array(picture.convert("RGB"))
    for lines_HW, color in ((place_HW < 5, PAPER), (place_HW // 3 == 0, UNFAMILIAR)):
        rgb_HWC[lines_HW & np.asarray(mask)] = color
    return Image.fromarray(rgb_HWC)


def round_length_um(longest_um: float) -> float:
    """Return the largest of 1, 2, 5 x 10^n µm that is at most `longest_um`."""
    power = 10.0 ** math.floor(math.log10(longest_um))
    return next((step * power for step in (5, 2) if step * power <= longest_um), power)


def length_text(length_um: float) -> str:
    """Return a length as text: "2 mm", "0.5 mm", "50 um" (the font has no µ)."""
    return f"{length_um / 1000:g} mm" if length_um >= 100 else f"{length_um:g} um"


def outline(labels_HW: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return the pixels of classes beside another label: two pixels wide between classes, one toward background."""
    edge_HW = np.zeros(labels_HW.shape, bool)
    for here, there in ((np.s_[1:, :], np.s_[:-1, :]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = labels_HW[here] != labels_HW[there]
        edge_HW[here] |= differ
        edge_HW[there] |= differ
    return edge_HW & (labels_HW > 0)


def _mount(picture: Image.Image) -> Image.Image:
    """Return the picture in a frame, on a backdrop of at least `MIN_SIDE_PX`."""
    size = max(MIN_SIDE_PX, picture.width), max(MIN_SIDE_PX, picture.height)
    mounted = Image.new("RGB", size, BACKDROP)
    mounted.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    ImageDraw.Draw(mounted).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=(200, 200, 204))
    return mounted


def _compose(
    panels: list[Image.Image], legend: list[tuple[str, str, Color]], title: str, warning: str, um_per_px: float
) -> Image.Image:
    """Return one sheet with title, warning, panels, scale bar and legend.

    The panels stand side by side. For a very wide slide they stand one above the other, because they would be strips.
    """
    width, height = panels[0].size
    stacked = width > 3 * height
    body_width = width if stacked else 2 * width + MARGIN
    sheet_width = max(body_width, 720) + 2 * MARGIN
    text, title_font = font_of_size(TEXT), font_of_size(TITLE)
    rows = _legend_rows(legend, sheet_width - 2 * MARGIN, text)
    body_height = 2 * height + MARGIN if stacked else height
    lines = _wrapped(f"Warning: {warning}", sheet_width - 2 * MARGIN - 28, text) if warning else []
    # The padding of the box, the lines, and the space below.
    banner = 18 + WARNING_LINE * len(lines) + MARGIN // 2 if lines else 0
    bar_y = MARGIN + TITLE + MARGIN + banner + body_height + 20
    legend_y = bar_y + 64
    sheet = Image.new("RGB", (sheet_width, legend_y + len(rows) * 40 + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), fitting(title, sheet_width - 2 * MARGIN, title_font), INK, title_font)
    if lines:
        place = Box(MARGIN, MARGIN + TITLE + MARGIN // 2, sheet_width - 2 * MARGIN, banner - MARGIN // 2)
        _draw_warning(draw, place, lines, text)
    x, y = MARGIN + (sheet_width - 2 * MARGIN - body_width) // 2, MARGIN + TITLE + MARGIN + banner
    for i, panel in enumerate(panels):
        sheet.paste(panel, (x, y + i * (height + MARGIN)) if stacked else (x + i * (width + MARGIN), y))
    _draw_scale_bar(draw, (x, bar_y), um_per_px, width, text)
    draw.text((sheet_width - MARGIN, bar_y + 14), "% of the classified area", FAINT, text, anchor="ra")
    for i, row in enumerate(rows):
        for offset, (name, share, color) in row:
            _draw_entry(draw, (MARGIN + offset, legend_y + i * 40), name, share, color, text)
    return sheet


def _draw_warning(draw: ImageDraw.ImageDraw, place: Box, lines: Sequence[str], font: Font) -> None:
    box = (place.x, place.y, place.right - 1, place.bottom)
    draw.rounded_rectangle(box, radius=6, fill=WARNING_PAPER, outline=WARNING_INK, width=2)
    for i, line in enumerate(lines):
        draw.text((place.x + 14, place.y + 10 + i * WARNING_LINE), line, WARNING_INK, font)


def _draw_scale_bar(
    draw: ImageDraw.ImageDraw, xy: tuple[int, int], um_per_px: float, panel_px: int, font: Font
) -> None:
    # For a very thin slide the bar may be wider than the panel; otherwise it would be unreadable.
    length_um = round_length_um(max(150.0, min(260.0, 0.4 * panel_px)) * um_per_px)
    x, y, length_px = xy[0], xy[1], max(1, round(length_um / um_per_px))
    draw.rectangle((x, y, x + length_px - 1, y + 5), fill=INK)
    for end in (x, x + length_px - 1):
        draw.line((end, y - 5, end, y + 10), fill=INK, width=2)
    draw.text((x, y + 14), length_text(length_um), INK, font)


def _draw_entry(
    draw: ImageDraw.ImageDraw, xy: tuple[int, int], name: str, share: str, color: Color, font: Font
) -> None:
    x, y = xy
    draw.rounded_rectangle((x, y, x + 24, y + 24), radius=4, fill=color, outline=INK)
    draw.text((x + 34, y), name, INK, font)
    draw.text((x + 34 + font.getlength(name) + 10, y), share, FAINT, font)


def _legend_rows(
    legend: list[tuple[str, str, Color]], width: int, font: Font
) -> list[list[tuple[int, tuple[str, str, Color]]]]:
    """Return rows of (x offset, entry), in as many columns of equal width as fit."""
    legend = [(fitting(name, width - 160, font), share, color) for name, share, color in legend]
    widest = max((34 + font.getlength(name) + 10 + font.getlength(share) + 36 for name, share, _ in legend), default=1)
    columns = max(1, min(len(legend), int((width + 36) // widest)))
    rows = [legend[i : i + columns] for i in range(0, len(legend), columns)]
    return [[(round(i * widest), entry) for i, entry in enumerate(row)] for row in rows]


def _legend_name(number: int, name: str) -> str:
    """Return the name of a class, with its number if the font lacks some of its letters: names could look the same."""
    drawable = _drawable(name)
    return f"class {number}: {drawable}" if drawable.count("?") > name.count("?") else name


def _wrapped(text: str, width: float, font: Font) -> list[str]:
    """Return the text on as many lines as it needs."""
    lines: list[str] = []
    for word in _drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [fitting(line, width, font) for line in lines]


def fitting(text: str, width: float, font: Font) -> str:
    """Return the text on one line, with its middle cut out if it is too wide: file names differ at both ends."""
    text = _drawable(text)
    if font.getlength(text) <= width:
        return text

    def shortened(kept: int) -> str:
        return f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"

    too_long = bisect.bisect_right(range(len(text)), width, key=lambda kept: font.getlength(shortened(kept)))
    return shortened(max(0, too_long - 1))


def _drawable(text: str) -> str:
    """Return the text in ASCII, which is all that Pillow's own font has: without accents, other letters as "?"."""
    for letter, plain in ASCII.items():
        text = text.replace(letter, plain)
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in " ".join("".join(letters).split()))


def font_of_size(size: int) -> Font:
    """Return Pillow's own font, which needs no file, at a size in pixels."""
    return ImageFont.load_default(size)
