"""The address of the page in a real browser: it restores the view, and links copy it."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.browser import capture, until
from tests.pipeline.viewing.viewer.conftest import Site
from tests.pipeline.viewing.viewer.screen import settle, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page


@pytest.mark.full
def test_the_address_restores_the_place_and_the_layers(shared_page: Page, site: Site) -> None:
    show(shared_page, site, "#x=500&y=300&zoom=1.25&map=0.6&outlines=0&off=0")
    shared_page.keyboard.press("ArrowRight")
    shared_page.keyboard.press("+")
    shared_page.keyboard.press("p")
    settle(shared_page)
    shared_page.wait_for_timeout(400)
    url, view = shared_page.url, shared_page.evaluate("() => wsiView.view()")
    assert view["x"] > 600
    assert view["zoom"] == pytest.approx(1.25 * 1.5, rel=0.01)
    picture = capture(shared_page)
    shared_page.goto("about:blank")
    shared_page.goto(url)
    settle(shared_page)
    again = shared_page.evaluate("() => wsiView.view()")
    assert [again[k] for k in ("x", "y", "zoom")] == pytest.approx([view[k] for k in ("x", "y", "zoom")], rel=1e-3)
    assert shared_page.get_by_role("checkbox", name="class-0").is_checked() is False
    assert shared_page.get_by_role("checkbox", name=re.compile("Outlines")).is_checked() is False
    assert shared_page.get_by_role("checkbox", name=re.compile("Probabilities")).is_checked()
    one, two = (
        np.asarray(Image.open(io.BytesIO(p)).convert("RGB")).astype(int) for p in (picture, capture(shared_page))
    )
    assert np.abs(one - two)[60:840, 60:900].mean() < 1.5


@pytest.mark.full
def test_a_link_has_the_view_at_which_a_movement_ends_and_the_layers_that_are_shown_now(
    shared_page: Page, site: Site
) -> None:
    show(shared_page, site, "#x=500&y=300&zoom=1&map=0.5")
    for key in ("m", "ArrowRight", "l"):
        shared_page.keyboard.press(key)
    until(shared_page, "document.getElementById('link').textContent === 'Copied'")
    link = shared_page.evaluate("() => navigator.clipboard.readText()")
    settle(shared_page)
    found = re.search(r"#x=([\d.]+)&.*&map=0&", link)
    assert found is not None, link
    x = shared_page.evaluate("() => wsiView.view().x")
    assert x > 600
    assert float(found[1]) == pytest.approx(x, abs=0.2)


@pytest.mark.full
@pytest.mark.parametrize(
    "address",
    [
        "#x=100&y=100&zoom=1e200",
        "#x=1e12&y=5&zoom=1",
        "#x=-1e30&y=1e300&zoom=1&turn=30",
        "#x=640&y=416&zoom=0.001",
        "#x=1e20&y=416&zoom=1e-9",
    ],
)
def test_an_address_beyond_the_slide_shows_the_slide(shared_page: Page, site: Site, address: str) -> None:
    shared_page.goto("about:blank")
    shared_page.goto(f"{site.page}{address}")
    settle(shared_page)
    view = shared_page.evaluate("() => wsiView.view()")
    half = view["width"] / view["zoom"] / 2
    assert view["x"] - half < 1280
    assert view["x"] + half > 0
    assert abs(view["y"] - 416) < 416 + half
    assert 0.05 <= view["zoom"] <= 8
    assert shared_page.evaluate("() => wsiView.osd.world.getItemAt(0).getTilesToDraw().length") > 0
    shared_page.keyboard.press("m")
    until(shared_page, "location.hash.includes('map=0&')")


@pytest.mark.full
def test_after_going_back_the_controls_show_the_state_of_the_page(pair: Site, page: Page) -> None:
    page.goto(f"{pair.url}/slides/{pair.results[0].id}/")
    settle(page)
    tools = ("correcting", "table-on", "compare-on")
    for tool in tools:
        page.locator(f"#{tool}").check()
    page.locator("#slides").select_option(label="b")
    page.wait_for_url(f"**/{pair.results[1].id}/**")
    settle(page)
    page.go_back()
    page.wait_for_url(f"**/{pair.results[0].id}/**")
    settle(page)
    assert page.evaluate("() => document.getElementById('slides').selectedOptions[0].textContent") == "a"
    assert [page.locator(f"#{tool}").is_checked() for tool in tools] == [False] * 3


@pytest.mark.full
def test_a_link_that_the_browser_does_not_copy_can_be_copied_by_hand(page: Page, site: Site) -> None:
    show(page, site)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); }")
    page.keyboard.press("l")
    until(page, "document.getElementById('announcement').textContent.includes('from the address bar')")
    assert page.locator("#link").inner_text() == "Copy from the address bar"
