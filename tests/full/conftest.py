"""Mark every test of this folder as `full`, because all of them attack the program. Two slides for tests of faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.slide.recipe import segment_slide
from tests.full.two_slides import CONFIG, Slides, thread_names
from tests.pipeline.fakes import color_predictor, published, region_slide
from tests.slides import PINK, painted, write_slide

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; the hook gets those of all folders."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Slides:
    folder = tmp_path_factory.mktemp("slides")
    # Two levels: the thumbnail is read from the second, so that only the tiles meet the bad place.
    a = region_slide(folder / "a.svs", levels=(1, 8))
    b = write_slide(folder / "b.svs", painted((300, 250), ((20, 20, 250, 200), PINK)), mpp=1.0)
    result = segment_slide(a, folder / "undisturbed", color_predictor(), CONFIG)
    assert result.folder is not None
    return Slides(a, b, published(result.folder))


@pytest.fixture
def nothing_left(slides: Slides, tmp_path: Path) -> Iterator[None]:
    """No descriptors, threads or processes of a run outlive it, and no locks or half-written files."""
    process = psutil.Process()
    handles, threads, children = process.num_fds(), thread_names(), set(process.children())
    yield
    assert process.num_fds() <= handles
    assert thread_names() <= threads
    assert set(process.children()) <= children
    assert [path for path in tmp_path.rglob("*") if path.name.endswith((".lock", ".partial"))] == []
