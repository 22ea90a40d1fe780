"""From a slide without labels to a model, its map, a correction and a better model, as a new user does it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from models.bundle import load_bundle
from pipeline.labeling.corrections import read_corrections
from pipeline.labeling.events import Labeled
from pipeline.labeling.store import EventStore
from pipeline.results.record import read_run
from tests.browser import until
from tests.pipeline.viewing.viewer.screen import settle
from tests.repository import REPOSITORY

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Page

SIDE = 64
TINY = ["region=64", "view=96", "margin=32", "position_views=4", "classifier_epochs=2", "segmenter_epochs=1",
        "classifier_steps=10", "segmenter_steps=4", "confidence=0"]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def command(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", f"pipeline.cli.{name}", *map(str, arguments)]


def run(name: str, *arguments: str | Path) -> str:
    """Run a command to its end. Return what it printed."""
    done = subprocess.run(
        command(name, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def server(name: str, *arguments: str | Path) -> Iterator[str]:
    """Start a server; yield the address of its page. At the end the server is killed."""
    with subprocess.Popen(
        command(name, *arguments, "--no-browser"), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[0]
        finally:
            process.kill()


def ready(page: Page) -> None:
    saved = "!wsiLabel.orders.pending.length && !wsiLabel.orders.undoing"
    until(page, f"{saved} && document.querySelector('#stage .patch')?.complete", seconds=60)


def is_dense(url: str, patch: str) -> bool:
    """Return whether a patch is dark: many nuclei, as a person sees it."""
    with urllib.request.urlopen(f"{url}patches/{patch}/patch.jpg") as answer:
        return float(np.asarray(Image.open(io.BytesIO(answer.read())).convert("L")).mean()) < 170


def label_with_keys(page: Page, url: str, count: int) -> None:
    """Label patches in the single view: class 1 if they are dense, otherwise class 2."""
    for _ in range(count):
        patch = str(page.evaluate("() => wsiLabel.single.patch.id"))
        page.keyboard.press("1" if is_dense(url, patch) else "2")
        page.keyboard.press("Enter")
        until(page, f"wsiLabel.single.patch?.id !== '{patch}'", seconds=60)
        ready(page)


def label_in_grid(page: Page, url: str, count: int) -> int:
    """Save the dense patches of a grid, at most `count`. Return their number."""
    images = "[...document.querySelectorAll('#patches img')]"
    until(page, f"{images}.length && {images}.every((image) => image.complete)", seconds=120)
    patches = page.evaluate(
        "() => { wsiLabel.grid.patches.shown = true; return wsiLabel.grid.patches.map((p) => p.id); }"
    )
    fitting = [n for n, patch in enumerate(patches) if is_dense(url, patch)][:count]
    for n in range(len(patches)):
        button = page.locator("#patches button").nth(n)
        if button.get_attribute("aria-pressed") != str(n not in fitting).lower():
            button.click()
    page.keyboard.press("Enter")
    until(page, "!wsiLabel.grid.patches.shown", seconds=120)
    return len(fitting)


def labeled(folder: Path) -> list[Labeled]:
    with EventStore(folder / "labels.sqlite") as store:
        return [one.event for one in store.read() if isinstance(one.event, Labeled)]


def test_a_new_user_gets_a_model_corrects_its_map_and_trains_again(
    page: Page, sample_slide: Path, tmp_path: Path
) -> None:
    labels, results = tmp_path / "labels", tmp_path / "results"
    folder: list[str | Path] = ["-o", labels, "--patch-side", str(SIDE), "--patch-mpp", "1", "--annotator", "ann"]
    with server("label", sample_slide, *folder, "--classes", "dense,loose") as url:
        page.goto(url)
        ready(page)
        label_with_keys(page, url, 30)
        page.goto("about:blank")  # the page fetches the next patches ahead, which would fail without a server
    assert len(labeled(labels)) == 30, "a killed server keeps every label"
    with server("label", sample_slide, *folder) as url:
        page.goto(url)
        ready(page)
        label_with_keys(page, url, 30)
        page.keyboard.press("g")
        page.keyboard.press("1")
        missing = 40
        while missing:
            missing -= label_in_grid(page, url, missing)
        page.goto("about:blank")
    made = labeled(labels)
    assert [one.view for one in made].count("single") == 60
    assert [one.view for one in made].count("grid") == 40
    assert len({one.place for one in made}) == 100
    run("label", "report", labels)

    settings = [part for setting in TINY for part in ("-s", setting)]
    run("train", labels, "-o", tmp_path / "first", *settings)
    first = load_bundle(tmp_path / "first" / "bundle")
    assert [one.name for one in first.card.classes] == ["dense", "loose"]
    printed = run("evaluate", first.path, labels, "--split", "val", "-o", tmp_path / "evaluation", "--json")
    scores = json.loads(printed)["patches"]["scores"]["gate_on"]
    assert {name: round(scores[name], 4) for name in ("balanced", "exact")} == {
        name: first.card.metrics[f"val_{name}"] for name in ("balanced", "exact")
    }
    run("segment", sample_slide, "-m", first.path, "-o", results)

    (result,) = [path.parent for path in results.glob("*/run.json")]
    with server("view", results, "--annotator", "bob") as url:
        page.goto(url)
        settle(page)
        page.keyboard.press("c")
        # A region of the smaller class: the largest region can cover most labeled patches.
        record = read_run(result)
        assert record is not None
        areas = record.class_areas_mm2
        rare = 1 + ["dense", "loose"].index(min(areas, key=lambda name: areas[name]))
        label, seen = 0, -1
        for _ in range(50):
            if label == rare:
                break
            page.keyboard.press("n")
            until(page, f"wsiView.selection.last && wsiView.selection.last.index !== {seen}")
            label, seen = page.evaluate("() => [wsiView.selection.last.label, wsiView.selection.last.index]")
        assert label == rare, "the map has no region of the smaller class"
        page.keyboard.press("2" if label == 1 else "1")
        until(page, "document.getElementById('corrections-saved').textContent.startsWith('Saved')")
        page.goto("about:blank")
    (correction,) = read_corrections(result)
    assert (correction.annotator, correction.event.model) == ("bob", first.digest)

    said = run("label", "import", "--corrections", results, "--partial", *folder)
    assert said.startswith(f"{result.name}: ")
    corrected = [one for one in labeled(labels) if one.reason == "correction"]
    assert corrected
    assert {(one.source, one.model) for one in corrected} == {("viewer", first.digest)}
    printed = run("train", labels, "-o", tmp_path / "second", *settings, "--init", first.path)
    second = load_bundle(Path(json.loads(printed)["bundle"]))
    assert second.card.started_from == first.digest
    run("segment", sample_slide, "-m", second.path, "-o", tmp_path / "again")
