"""The page of one slide: a picture with its classes, the areas, the parameters and the provenance.

The page is one file, `index.html`, which contains its pictures. `thumbnail.jpg` is for the report. Neither contains
times or machine names: the same slide, model and parameters give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.tissue_class import Color
from pipeline.formats.familiarity import UNFAMILIAR
from pipeline.formats.outputs import file_description
from pipeline.formats.preview import BLEND, OUTLINE, length_text, outline, round_length_um
from pipeline.formats.slide_picture import SlidePicture
from pipeline.pages.page import data_uri, render_page
from pipeline.results.areas import class_areas
from pipeline.results.names import PAGE, THUMBNAIL
from pipeline.results.record import LeftOutArea, Run
from wsi.left_out import LeftOut

THUMBNAIL_PX = 256
"""Longer side. The report shows it at half this size."""
SCALE_BAR_SHARE = 0.25
"""Largest share of the picture's width."""

PARAMETERS = {
    "mpp": ("Requested pixel size", "µm/px"),
    "backend": ("Requested reader", ""),
    "canvas_m": ("Requested canvas size", "model pixels"),
    "output_stride": ("Model pixels per pixel of the map", ""),
    "min_area_um2": ("Smallest region or gap, before borders are smoothed", "µm²"),
    "simplify_px": ("Simplification of borders", "px of the map"),
    "keep_ungated": ("Keep the prediction if the gate rejects every class", ""),
    "exclude_folds": ("Leave out folds", ""),
    "precision": ("Number format of the networks", ""),
    "runtime": ("Runtime of the networks", ""),
    "block_out": ("Side of a block", "px of the map"),
}
"""The name and the unit of each parameter on the page."""


@dataclass(frozen=True)
class Layer:
    """A class, or a kind of left-out area, as two transparent pictures with the size of the slide's picture."""

    key: str
    """Joins the pictures with their checkbox."""
    name: str
    fill_uri: str
    outline_uri: str


def write_slide_page(folder: Path, run: Run, picture: SlidePicture) -> None:
    """Write the page and the thumbnail of the result that `run` records."""
    slide = Image.fromarray(picture.rgb_HWC)
    _thumbnail(slide, picture).save(folder / THUMBNAIL, quality=80, optimize=True)
    bar_um = round_length_um(SCALE_BAR_SHARE * slide.width * picture.um_per_px)
    text = render_page(
        "slide.html",
        run=run,
        title=run.slide_title,
        size=slide.size,
        slide_uri=data_uri(slide, "jpeg", quality=85, optimize=True),
        layers=_layers(picture),
        unfamiliar_uri=_unfamiliar_uri(picture),
        unfamiliar_color=UNFAMILIAR,
        left_out_layers=_left_out_layers(picture),
        left_out=_left_out(run),
        areas=class_areas(run.class_areas_mm2, run.classes),
        bar_share=bar_um / (slide.width * picture.um_per_px),
        bar_text=length_text(bar_um).replace("um", "µm"),
        parameters=_parameters(run.identity.parameters),
        files=[
            (name, quote(name, errors="surrogateescape"), file_description(name))
            for name in run.outputs
            if name not in (PAGE, THUMBNAIL)
        ],
    )
    (folder / PAGE).write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def _thumbnail(slide: Image.Image, picture: SlidePicture) -> Image.Image:
    """Return the slide with its classes, without outlines: at this size they would hide small regions."""
    classes = Image.fromarray(picture.labels_HW)
    classes.putpalette([0, 0, 0, *(value for one in picture.classes for value in one.color)])
    weight_HW = np.where(picture.labels_HW > 0, round(255 * BLEND), 0).astype(np.uint8)
    small = Image.composite(classes.convert("RGB"), slide, Image.fromarray(weight_HW))
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return small


def _layers(picture: SlidePicture) -> list[Layer]:
    """Return a layer for each class in the picture."""
    edge_HW = outline(picture.labels_HW)
    layers = []
    for number, one in enumerate(picture.classes, start=1):
        mask_HW = picture.labels_HW == number
        if mask_HW.any():
            red, green, blue = (round(OUTLINE * value) for value in one.color)
            edge_uri = _mask_uri(mask_HW & edge_HW, (red, green, blue))
            layers.append(Layer(str(number), one.name, _mask_uri(mask_HW, one.color), edge_uri))
    return layers


def _unfamiliar_uri(picture: SlidePicture) -> str | None:
    """Return the tissue that does not look like the training data, or None if there is none or it is not known."""
    mask_HW = picture.unfamiliar_HW
    return None if mask_HW is None or not mask_HW.any() else _mask_uri(mask_HW, UNFAMILIAR)


def _left_out_layers(picture: SlidePicture) -> list[Layer]:
    """Return a layer for each kind of left-out area in the picture."""
    edge_HW = outline(picture.left_out_HW)
    layers = []
    for kind in LeftOut:
        mask_HW = picture.left_out_HW == kind
        if mask_HW.any():
            edge_uri = _mask_uri(mask_HW & edge_HW, kind.color)
            layers.append(Layer(_key(kind), kind.title, _mask_uri(mask_HW, kind.color), edge_uri))
    return layers


def _left_out(run: Run) -> list[tuple[str, LeftOut, LeftOutArea]]:
    """Return key, kind and extent of each kind of left-out area that the slide has."""
    extents = {one.name: one for one in run.left_out if one.pieces}
    return [(_key(kind), kind, extents[kind.title]) for kind in LeftOut if kind.title in extents]


def _key(kind: LeftOut) -> str:
    return f"left-out-{kind:d}"


def _mask_uri(mask_HW: npt.NDArray[np.bool_], color: Color) -> str:
    """Return the pixels of a mask in one color and the others transparent, with one bit per pixel."""
    image = Image.fromarray(mask_HW.astype(np.uint8))
    image.putpalette([255, 255, 255, *color])
    # Not `optimize`: it takes seven times as long, for a tenth of the size.
    return data_uri(image, "png", bits=1, transparency=b"\x00\xff")


def _parameters(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = []
    for key, value in parameters.items():
        name, unit = PARAMETERS.get(key, (key, ""))
        named.append((name, f"{_plain(value)} {unit if value is not None else ''}".strip()))
    return named


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
