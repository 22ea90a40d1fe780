"""Take the pictures of wsi-view and of the report in docs/ from the result of a slide.

    wsi-segment --sample -o results
    python -m tests.docs_pictures results/CMU-1-Small-Region

Run it after a change of the pages or of the default model, and look at the pictures. The result stays as it is.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pipeline.viewing.viewer.app import make_app
from pipeline.viewing.viewer.results import find_results
from tests.browser import FLAGS, capture, chromium, until
from tests.local_server import serving_app
from tests.pipeline.viewing.viewer.screen import place_on_screen, settle
from tests.repository import REPOSITORY

if TYPE_CHECKING:
    from playwright.sync_api import Page

DOCS = REPOSITORY / "docs"
VIEW = {"width": 1180, "height": 780}
REPORT = {"width": 1180, "height": 780}


def take(result: Path) -> None:
    """Write docs/viewer.png, docs/correct.jpg and docs/report.png."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        copy = shutil.copytree(result, Path(folder) / result.name)  # the corrections lie beside it
        results = find_results(copy)
        bounds = results[0].run.slide.bounds
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        page = browser.new_page(viewport=VIEW)  # type: ignore[arg-type]  # a size
        with serving_app(make_app(results, "ann")) as port:
            page.goto(f"http://127.0.0.1:{port}/slides/{results[0].id}/")
            settle(page)
            viewer(page, bounds.width / 2, bounds.height / 2)
            save(page, DOCS / "viewer.png")
            correct(page)
            save(page, DOCS / "correct.jpg")
            page.goto("about:blank")
        page.set_viewport_size(REPORT)  # type: ignore[arg-type]  # a size
        page.goto((copy / "index.html").as_uri())
        page.wait_for_timeout(500)
        save(page, DOCS / "report.png")
        browser.close()


def viewer(page: Page, x: float, y: float) -> None:
    """Show the table of regions and the region at a place of level 0."""
    page.keyboard.press("g")
    until(page, "document.querySelector('#rows tr') && !document.getElementById('rows').textContent.includes('…')")
    page.locator("#classes").evaluate("one => one.scrollIntoView()")
    page.mouse.move(*place_on_screen(page, x, y))
    until(page, "document.getElementById('values').textContent && !document.getElementById('tip').hidden")
    settle(page)


def correct(page: Page) -> None:
    """Give the second largest region the other class, then select the largest."""
    for key in ("g", "c", "n", "n"):
        page.keyboard.press(key)
        page.wait_for_timeout(500)
    label = int(page.evaluate("() => wsiView.selection.last.label"))
    page.keyboard.press("2" if label == 1 else "1")
    until(page, "document.getElementById('corrections-saved').textContent.startsWith('Saved')")
    page.keyboard.press("n")
    page.mouse.move(0, 0)
    page.keyboard.press("0")
    page.locator("#regions").evaluate("one => one.scrollIntoView()")
    settle(page)
    until(page, "document.getElementById('values').getAttribute('aria-busy') === 'false'")


def save(page: Page, file: Path) -> None:
    """Save the page as a JPEG or a PNG."""
    picture = Image.open(io.BytesIO(capture(page))).convert("RGB")
    if file.suffix == ".jpg":
        picture.save(file, quality=80)
    else:
        picture.save(file, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    take(parser.parse_args().result)
