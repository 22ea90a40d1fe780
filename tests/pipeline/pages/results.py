"""Results with the files that the pages read, and helpers that read the pages in a browser."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.formats.slide_picture import SlidePicture
from pipeline.pages.slide_page import write_slide_page
from pipeline.results.record import write_run
from pipeline.results.slide_result import SlideResult
from tests.browser import capture
from tests.pipeline.fakes import run_of
from tests.pipeline.runs import IDENTITY, make_run
from wsi.left_out import LeftOut

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page

RED, BLUE = (255, 0, 0), (0, 0, 255)
SIZE = (600, 400)
BOXES = {"tumour": (60, 40, 200, 120), "stroma": (300, 80, 250, 280)}
"""x, y, width and height of the dark boxes on the slide of `write_result`; each has one class."""
PEN = (20, 340, 100, 40)
"""x, y, width and height of the box that `left_out_HW` marks as pen."""
PARAMETERS = {"mpp": None, "canvas_m": 896, "min_area_um2": 2000.0, "runtime": "openvino"}
NASTY = "größe 組織 <b>&\"'"


def write_result(
    output: Path, name: str = "slide", *, names: tuple[str, str] = ("tumour", "stroma"), **facts: Any
) -> Path:
    """Write the files that the report reads: a gray slide with two dark boxes, each of one class. Return the folder."""
    folder = output / name
    folder.mkdir(parents=True)
    classes = tuple(TissueClass(one, color) for one, color in zip(names, (RED, BLUE), strict=True))
    identity = IDENTITY.model_copy(update={"parameters": PARAMETERS})
    run = make_run(name, **({"identity": identity, "classes": classes} | facts))
    rgb_HWC = np.full((*SIZE[::-1], 3), 200, np.uint8)
    labels_HW = np.zeros(SIZE[::-1], np.uint8)
    for number, (x, y, width, height) in enumerate(BOXES.values(), start=1):
        rgb_HWC[y : y + height, x : x + width] = 20
        labels_HW[y : y + height, x : x + width] = number
    write_run(folder, run)
    left_out_HW = np.zeros(SIZE[::-1], np.uint8)
    x, y, width, height = PEN
    left_out_HW[y : y + height, x : x + width] = LeftOut.PEN
    write_slide_page(folder, run, SlidePicture(rgb_HWC, labels_HW, left_out_HW, classes, um_per_px=10.0))
    return folder


def result_of(folder: Path, **facts: Any) -> SlideResult:
    run = run_of(folder)
    columns = {"tissue_mm2": run["tissue_mm2"]}
    defaults: dict[str, Any] = {"seconds": 75.0, "areas_mm2": run["class_areas_mm2"]}
    return SlideResult(slide=folder.name, status="done", columns=columns, **(defaults | facts))


def opened(page: Page, path: Path) -> Page:
    page.goto(path.as_uri())
    return page


def names(page: Page) -> list[str]:
    """Return the slides that the table shows, from top to bottom."""
    return [text.splitlines()[0] for text in page.locator("tbody tr:visible th").all_inner_texts()]


def row(page: Page, name: str) -> str:
    text = page.locator("tbody tr").filter(has=page.locator("th", has_text=name)).inner_text()
    return " ".join(text.split())


def stage(page: Page) -> NDArray[np.int16]:
    """Return a screenshot of the slide and its classes, as rgb_HWC."""
    return np.asarray(Image.open(io.BytesIO(capture(page.locator("#stage")))).convert("RGB")).astype(np.int16)


def near(rgb_HWC: NDArray[np.int16], color: tuple[int, int, int], within: int = 40) -> NDArray[np.bool_]:
    return np.asarray((np.abs(rgb_HWC - np.array(color)) <= within).all(axis=2))
