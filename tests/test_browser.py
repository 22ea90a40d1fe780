"""The browser that tests of pages drive: it sees faults, and nothing leaves this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page

from tests.browser import CAPTURES, axe_findings, capture, is_local, screenshot, watched_page

GOOD = '<!doctype html><html lang="en"><title>good</title><main><h1>Good</h1></main></html>'


def test_page_runs_scripts_and_is_pictured(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WSI_SEGMENT_SCREENSHOTS", raising=False)
    page.set_content(GOOD + "<script>document.title = 6 * 7</script>")
    assert page.title() == "42"
    assert screenshot(page, "good", tmp_path).read_bytes().startswith(b"\x89PNG")
    assert axe_findings(page) == []


@pytest.mark.parametrize(
    ("refusals", "pictured"),
    [
        (["Page.captureScreenshot: Unable to capture screenshot"], True),
        (["Unable to capture screenshot"] * (CAPTURES - 1), True),
        (["Unable to capture screenshot"] * CAPTURES, False),
        (["Target crashed"], False),
        (["Unable to capture screenshot", "Target crashed"], False),
    ],
)
def test_a_refused_capture_is_tried_again(
    page: Page, monkeypatch: pytest.MonkeyPatch, refusals: list[str], pictured: bool
) -> None:
    left = list(refusals)
    monkeypatch.setattr("tests.browser.time.sleep", lambda _seconds: None)

    def screenshot_or_refusal(*, full_page: bool) -> bytes:
        if left:
            raise Error(left.pop(0))
        return b"picture" if full_page else b""

    monkeypatch.setattr(page, "screenshot", screenshot_or_refusal)
    if pictured:
        assert capture(page, full_page=True) == b"picture"
    else:
        with pytest.raises(Error, match=refusals[-1]):
            capture(page, full_page=True)
    assert left == []


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("console.error('on fire')", "error: on fire"),
        ("setTimeout(() => { throw new Error('lost') })", "uncaught: lost"),
        ("fetch('http://192.0.2.1/x').catch(() => 0)", "asked for http://192.0.2.1/x"),
        ("fetch('http://127.0.0.1.example.org/x').catch(() => 0)", "asked for http://127.0.0.1.example.org/x"),
    ],
)
def test_faults_of_a_page_are_seen(browser: Browser, script: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(fault)), watched_page(browser) as faulty:
        faulty.set_content(f"{GOOD}<script>{script}</script>")
        faulty.wait_for_timeout(200)


def test_axe_finds_a_picture_without_words(page: Page) -> None:
    page.set_content(GOOD + '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" width="9" height="9">')
    assert [line.split(":")[0] for line in axe_findings(page)] == ["critical image-alt"]


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8080/a", True),
        ("file:///a/b.html", True),
        ("data:text/plain,a", True),
        ("https://127.0.0.1.example.org/", False),
        ("http://example.org/127.0.0.1/", False),
    ],
)
def test_only_this_machine_is_local(url: str, local: bool) -> None:
    assert is_local(url) == local
