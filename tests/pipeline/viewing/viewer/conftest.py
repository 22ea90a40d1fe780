"""Results for the viewer's tests, and a real server that shows them."""

from __future__ import annotations

import http.client
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.checks.result import broken_rules
from pipeline.slide.recipe import segment_slide
from pipeline.viewing.viewer.app import make_app
from pipeline.viewing.viewer.results import Result, find_results
from tests.browser import watched_page
from tests.local_server import serving_app
from tests.pipeline.fakes import REGIONS, SMALL, color_predictor
from tests.slides import painted, write_slide

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Page

UNREADABLE = (503, b"The slide or its result cannot be read; see the terminal for the reason.")
"""Status and body of an answer about a slide or result that cannot be read."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Site:
    """A running server."""

    port: int
    results: tuple[Result, ...]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def page(self) -> str:
        return f"{self.url}/slides/{self.results[0].id}/"

    @property
    def data(self) -> str:
        """The path of the data of the first result."""
        return f"/slides/{self.results[0].id}/{self.results[0].version}/"

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Return the answer to exactly this path, which the client does not normalize."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        """Return the answer to a path below the first result's data, or its page for an empty path."""
        return self.ask(f"{self.data}{path}" if path else f"/slides/{self.results[0].id}/")


def copied(results_folder: Path, target: Path, *names: str) -> Path:
    """Copy the one result to these names in `target`. Return `target`."""
    for name in names:
        shutil.copytree(next(results_folder.glob("block*")), target / name)
    return target


@contextmanager
def serving(results: tuple[Result, ...], port: int = 0, author: str = "ann") -> Iterator[Site]:
    """Serve results from a thread, at a port or at a free one for 0."""
    with serving_app(make_app(results, author), port) as used:
        yield Site(used, results)


def textured(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the regions of `region_slide` with a coarse texture that makes all tiles different, as rgb_HWC."""
    rgb_HWC = painted(size, *REGIONS).astype(np.int16)
    noise_hw = np.random.default_rng(7).integers(-20, 12, (-(-size[1] // 16), -(-size[0] // 16)))
    noise_HW = np.kron(noise_hw, np.ones((16, 16), np.int16))[: size[1], : size[0]]
    return np.clip(rgb_HWC + noise_HW[..., None], 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def results_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the result of one slide with two levels, 1280×832 pixels at 1 µm/px."""
    folder = tmp_path_factory.mktemp("viewer")
    slide = write_slide(folder / "block <1>.svs", textured((1280, 832)), mpp=1.0, levels=(1, 4))
    result = segment_slide(slide, folder / "results", color_predictor(), SMALL)
    assert result.folder is not None
    assert not [text for wrong in broken_rules(result.folder).values() for text in wrong]
    return folder / "results"


@pytest.fixture(scope="session")
def site(results_folder: Path) -> Iterator[Site]:
    """Serve the results."""
    with serving(find_results(results_folder)) as running:
        yield running


@pytest.fixture
def own_site(results_folder: Path, tmp_path: Path) -> Iterator[Site]:
    """Serve a copy of the results, to correct them.

    A test names it before its page: pytest ends fixtures in reverse order, and a page without its server is refused
    the tiles that it still asks for.
    """
    shutil.copytree(next(results_folder.glob("block*")), tmp_path / "results" / "a")
    with serving(find_results(tmp_path / "results")) as running:
        yield running


@pytest.fixture
def pair(results_folder: Path, tmp_path: Path) -> Iterator[Site]:
    """Serve two copies of the results, "a" and "b". See `own_site` for the order of fixtures."""
    for name in ("a", "b"):
        shutil.copytree(next(results_folder.glob("block*")), tmp_path / "results" / name)
    with serving(find_results(tmp_path / "results")) as running:
        yield running


@pytest.fixture(scope="module")
def shared_page(browser: Browser) -> Iterator[Page]:
    """Yield one page for tests that do not change the server. Errors on the page fail after the last test."""
    with watched_page(browser, permissions=["clipboard-read", "clipboard-write"]) as page:
        yield page
