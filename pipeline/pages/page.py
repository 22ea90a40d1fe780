"""Render HTML pages that work without a network, and the numbers on them."""

from __future__ import annotations

import base64
import io
import math
from functools import cache
from importlib.metadata import version

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from models.tissue_class import Color
from pipeline.results.areas import MISSING, share_text


def render_page(template: str, **values: object) -> str:
    """Return a template of pipeline/pages with these values, escaped. The same values give the same text."""
    return _environment().get_template(template).render(version=version("wsi-segment"), **values)


def area_text(mm2: float | None) -> str:
    """Return an area with about three digits: "1234 mm²", "12.3 mm²", "0.456 mm²", "< 0.001 mm²"."""
    if mm2 is None:
        return MISSING
    if 0 < mm2 < 0.001:
        return "< 0.001 mm²"
    digits = 3 if mm2 < 1 else max(0, 2 - int(math.log10(mm2)))
    return f"{mm2:.{digits if mm2 else 0}f} mm²"


def duration_text(seconds: float | None) -> str:
    """Return a duration: "45 s", "3 min 20 s", "2 h 5 min"."""
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def css_color(color: Color) -> str:
    """Return a color as style sheets write it."""
    red, green, blue = color
    return f"rgb({red} {green} {blue})"


def data_uri(picture: Image.Image, kind: str, **options: object) -> str:
    """Return a picture as the source of an <img>, so that the page contains it; `kind` is "jpeg" or "png"."""
    file = io.BytesIO()
    picture.save(file, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.pages", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"area": area_text, "share": share_text, "duration": duration_text, "color": css_color}
    return environment
