"""Whether the legend of wsi-view has the colors that the class map has on the slide.

    python -m tests.bench.legend

Chromium shows a slide of the three mean tissue colors of `tests.bench.palettes`, with every class color of the default
model and of our palette as its map. The distance is CIEDE2000 between the fill on the screenshot and the swatch.
Before, the swatch had the plain class color, and the map an opacity of 0.35. Now, both are as the page shows them.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from models.bundle import load_bundle
from models.predictor import Predictor
from models.tissue_class import Color
from pipeline.results.record import read_run, write_run
from pipeline.slide.recipe import segment_slide
from pipeline.training.palettes import CLASS_COLORS
from pipeline.viewing.viewer.app import make_app
from pipeline.viewing.viewer.results import find_results
from tests.bench.palettes import TISSUES
from tests.browser import FLAGS, capture, chromium, until
from tests.local_server import serving_app
from tests.models.networks import ColorClassifier, ColorSegmenter, make_card
from tests.pipeline.fakes import SMALL
from tests.slides import painted, write_slide

if TYPE_CHECKING:
    from playwright.sync_api import Page

SIDE = 384
"""Width and height of a field of tissue, in pixels of the slide."""
SWATCH = "#classes .swatch"


def tissue_result(folder: Path) -> Path:
    """Segment a slide with one field of each of `TISSUES`. Return the folder of the result."""
    colors = [(int(red), int(green), int(blue)) for red, green, blue in TISSUES]
    boxes = [((64 + k * SIDE, 64, SIDE, SIDE), color) for k, color in enumerate(colors)]
    slide = write_slide(folder / "tissue.svs", painted((128 + 3 * SIDE, 128 + SIDE), *boxes), mpp=1.0)
    networks = ColorClassifier(colors), ColorSegmenter(colors, sharpness=400.0)
    predictor = Predictor(make_card(colors), "0" * 64, *networks, device="cpu")
    result = segment_slide(slide, folder / "results", predictor, SMALL)
    assert result.folder is not None
    return result.folder


def recolored(result: Path, color: Color) -> None:
    """Give every class of a result this color."""
    run = read_run(result)
    assert run is not None
    classes = tuple(dataclasses.replace(one, color=color) for one in run.classes)
    write_run(result, run.model_copy(update={"classes": classes}))


def shot(page: Page, url: str) -> NDArray[np.float64]:
    """Return the settled page as rgb_HWC."""
    page.goto("about:blank")
    page.goto(url)
    until(page, "window.wsiView?.osd.world.getItemCount() > 1 && wsiView.osd.world.getItemAt(1).getFullyLoaded()")
    page.wait_for_timeout(300)
    return np.asarray(Image.open(io.BytesIO(capture(page))).convert("RGB")).astype(float)


def distances(page: Page, url: str, color: Color) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distance of the fill and the swatch over each tissue, before and now."""
    place = f"#x={64 + 1.5 * SIDE}&y={64 + SIDE / 2}&zoom=0.5&outlines=0"
    before, now = shot(page, f"{url}{place}&map=0.35"), shot(page, f"{url}{place}")
    box, stage = page.locator(SWATCH).first.bounding_box(), page.locator("#stage").bounding_box()
    assert box is not None
    assert stage is not None
    swatch = patch(now, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, 2)
    middle = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    fills = [[patch(one, middle[0] + k * SIDE / 2, middle[1], 8) for k in (-1, 0, 1)] for one in (before, now)]
    return delta(np.array(fills[0]), np.array(color)), delta(np.array(fills[1]), swatch)


def patch(rgb_HWC: NDArray[np.float64], x: float, y: float, half: int) -> NDArray[np.float64]:
    """Return the mean color around a position."""
    left, top = round(x), round(y)
    mean_C: NDArray[np.float64] = rgb_HWC[top - half : top + half, left - half : left + half].mean(axis=(0, 1))
    return mean_C


def delta(rgb_N3: NDArray[np.float64], other_3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return CIEDE2000 of each color to another one."""
    return np.asarray(deltaE_ciede2000(rgb2lab(rgb_N3[None] / 255)[0], rgb2lab(other_3[None, None] / 255)[0]))


def table() -> Iterator[str]:
    """Yield the rows of the table."""
    from playwright.sync_api import sync_playwright

    card = load_bundle("colon-gland").card
    colors = {one.name: one.color for one in card.classes}
    colors |= {f"palette {k}": color for k, color in enumerate(CLASS_COLORS, start=1)}
    yield "| class color | before: mean | largest | now: mean | largest |"
    yield "|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        result = tissue_result(Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 700})
        for name, color in colors.items():
            recolored(result, color)
            results = find_results(result)
            with serving_app(make_app(results, "ann")) as port:
                before, now = distances(page, f"http://127.0.0.1:{port}/slides/{results[0].id}/", color)
                page.goto("about:blank")
            values = (before.mean(), before.max(), now.mean(), now.max())
            yield f"| {name} {color} | " + " | ".join(f"{value:.1f}" for value in values) + " |"
        browser.close()


if __name__ == "__main__":
    for row in table():
        print(row, flush=True)
