"""How fast `wsi-view` answers, and whether drawing many polygons stalls the page.

    python -m tests.bench.viewer RESULT             tiles and outlines, asked for as a browser does
    python -m tests.bench.viewer RESULT --frames    times between frames in Chromium while it pans and zooms

RESULT is a slide's result folder. The server runs in a process of its own, as a user's does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from models.tissue_class import TissueClass
from pipeline.formats.features import measure_features, write_features
from pipeline.formats.polygons import Region

WINDOW = (1280, 900)
CONNECTIONS = 6
"""What browsers open to one host."""


@contextmanager
def served(result: Path) -> Iterator[tuple[str, int, str, psutil.Process]]:
    """Host, port and path of the page of a result, and the process of its own that serves it."""
    command = [sys.executable, "-m", "pipeline.cli.view", str(result), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.match(r"http://([\d.]+):(\d+)/", process.stdout.readline())
            assert found is not None
            host, port = found[1], int(found[2])
            connection = http.client.HTTPConnection(host, port)
            connection.request("GET", "/")
            page = connection.getresponse().getheader("location")
            assert page is not None
            yield host, port, page, psutil.Process(process.pid)
        finally:
            process.terminate()


def path_of_views(facts: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(x, y, screen pixels per level-0 pixel) of a walk: into the slide in steps, along at each, and out again."""
    width, height = facts["width"], facts["height"]
    whole = min(WINDOW[0] / width, WINDOW[1] / height)
    random_ = random.Random(0)
    views = []
    # Over tissue, because people look at tissue.
    for x, y in ((0.17, 0.58), (0.33, 0.83), (0.69, 0.35), (0.85, 0.4)):
        zoom, x_l0, y_l0 = whole, x * width, y * height
        while zoom < 1.0:
            views.append((x_l0, y_l0, zoom))
            zoom *= 1.5
        for step in range(24):
            views.append((x_l0, y_l0, (1.0, 0.5, 0.25)[step // 8]))
            x_l0 += random_.uniform(0.1, 0.6) * WINDOW[0] / views[-1][2]
            y_l0 += random_.uniform(-0.3, 0.3) * WINDOW[1] / views[-1][2]
    return views


def tiles_in_view(
    view: tuple[float, float, float], size: tuple[float, float], tile: int, levels: int, l0_per_px: float
) -> list[tuple[int, int, int]]:
    """(level, column, row) of the tiles that fill a view, at the level that OpenSeadragon takes: not enlarged beyond
    twice, which is its `minPixelRatio` of a half."""
    x, y, zoom = view
    level = next((i for i in range(levels - 1, -1, -1) if l0_per_px * 2**i * zoom <= 2.0), 0)
    side = tile * l0_per_px * 2**level
    half = (WINDOW[0] / 2 / zoom, WINDOW[1] / 2 / zoom)
    columns = range(max(0, int((x - half[0]) // side)), min(int(-(-size[0] // side)), int((x + half[0]) // side) + 1))
    rows = range(max(0, int((y - half[1]) // side)), min(int(-(-size[1] // side)), int((y + half[1]) // side) + 1))
    return [(level, column, row) for row in rows for column in columns]


def measure_tiles(result: Path) -> None:
    """Print the latencies of a walk over the slide, per layer."""
    with served(result) as (host, port, page, process):
        version = re.search(rb'name="version" content="(\w+)"', fetch(http.client.HTTPConnection(host, port), page))
        assert version is not None
        data = f"{page}{version[1].decode()}/"
        facts = json.loads(fetch(http.client.HTTPConnection(host, port), f"{data}facts.json"))
        latencies: dict[str, list[float]] = defaultdict(list)
        asked: set[str] = set()
        start, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        for view in path_of_views(facts):
            wanted = [(layer, path) for layer, path in requests_of(view, facts, data) if path not in asked]
            asked.update(path for _, path in wanted)
            ask_all(host, port, wanted, latencies)
        seconds, cpu = time.perf_counter() - start, sum(process.cpu_times()[:2]) - cpu
        for detail in range(len(facts["tolerances"])):
            ask_all(host, port, [("outlines", f"{data}outlines/{detail}")], latencies)
    print(f"{'layer':<12} {'answers':>7} {'p50 ms':>7} {'p95 ms':>7} {'max ms':>7}")
    for layer, values in latencies.items():
        p95 = statistics.quantiles(values, n=20, method="inclusive")[-1]
        print(f"{layer:<12} {len(values):>7} {statistics.median(values):>7.0f} {p95:>7.0f} {max(values):>7.0f}")
    print(f"{len(asked)} tiles in {seconds:.1f} s over {CONNECTIONS} connections")
    print(f"{cpu / len(asked) * 1e3:.1f} ms of processor time per tile; load of the machine {os.getloadavg()[0]:.1f}")


def requests_of(view: tuple[float, float, float], facts: dict[str, Any], data: str) -> Iterator[tuple[str, str]]:
    """(layer, path) of every tile of a view with all layers on."""
    slide, map_ = facts["slide"], facts["map"]
    size = (facts["width"], facts["height"])
    for level, column, row in tiles_in_view(view, size, slide["tile"], slide["levels"], 1.0):
        yield "slide", f"{data}slide/{level}/{column}_{row}.jpg"
    size = (map_["width"] * map_["l0_per_px"], map_["height"] * map_["l0_per_px"])
    for level, column, row in tiles_in_view(view, size, map_["tile"], map_["levels"], map_["l0_per_px"]):
        yield "class map", f"{data}labels/{2 ** len(facts['classes']) - 1}/{level}/{column}_{row}.png"
        for k in range(len(facts["classes"])):
            yield "probability", f"{data}class/{k}/{level}/{column}_{row}.png"


def ask_all(host: str, port: int, wanted: Sequence[tuple[str, str]], latencies: dict[str, list[float]]) -> None:
    """Ask for everything over a browser's number of connections; notes milliseconds from question to whole answer."""
    waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for one in wanted:
        waiting.put(one)

    def work() -> None:
        connection = http.client.HTTPConnection(host, port)
        while True:
            try:
                layer, path = waiting.get_nowait()
            except queue.Empty:
                connection.close()
                return
            start = time.perf_counter()
            fetch(connection, path)
            latencies[layer].append((time.perf_counter() - start) * 1e3)

    threads = [threading.Thread(target=work) for _ in range(min(CONNECTIONS, len(wanted)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fetch(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, f"{path}: {answer.status}"
    return body


def with_polygons(result: Path, target: Path, count: int) -> Path:
    """A copy of a result with `count` round, jagged polygons all over its slide; returns its folder."""
    copy = target / result.name
    shutil.copytree(result, copy)
    run = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(0)
    _, _, width, height = run["slide"]["bounds"]
    names = list(run["class_areas_mm2"])
    regions = []
    for i in range(count):
        polygon = jagged(rng, rng.uniform((0, 0), (width, height)), rng.lognormal(4.6, 0.7))
        regions.append(Region(label=i % len(names) + 1, geometry_out=polygon, open=False))
    classes = [TissueClass(name, (0, 0, 0)) for name in names]
    files = copy / f"{result.name}.geojson", copy / f"{result.name}.parquet"
    write_features(*files, regions, classes, 1.0, (width, height), run["slide"]["mpp"], "0" * 64)
    stored, areas_mm2 = measure_features(files[1], classes)
    text = json.dumps(run | {"polygons": stored, "class_areas_mm2": areas_mm2})
    (copy / "run.json").write_text(text, encoding="utf-8")
    return copy


def jagged(rng: np.random.Generator, middle: NDArray[np.float64], radius: float) -> shapely.Polygon:
    """A polygon of about 100 corners whose distance from the middle varies by a third."""
    angles = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    distances = radius * rng.uniform(0.75, 1.05, angles.size)
    return shapely.Polygon(middle + np.stack([np.cos(angles), np.sin(angles)], axis=1) * distances[:, None])


FRAMES = """async (moves) => {
  const times = [];
  let last = performance.now(), going = true;
  const tick = (now) => { times.push(now - last); last = now; if (going) requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
  const {osd} = window.wsiView;
  const P = window.OpenSeadragon.Point;
  for (const [kind, a, b] of moves) {
    const { width } = osd.viewport.getBounds();
    if (kind === "zoom") osd.viewport.zoomBy(a); else osd.viewport.panBy(new P(a * width, b * width));
    osd.viewport.applyConstraints();
    await new Promise((done) => setTimeout(done, 350));
  }
  going = false;
  return times.slice(2);
}"""
MOVES = (
    *[("pan", 0.2, 0.1)] * 3, *[("pan", -0.2, -0.1)] * 3, *[("zoom", 1.6, 0)] * 4, *[("pan", 0.3, 0.1)] * 4,
    *[("pan", -0.3, 0.05)] * 4, *[("zoom", 1.6, 0)] * 3, *[("pan", 0.3, 0.1)] * 4, *[("zoom", 1 / 1.6, 0)] * 6,
)  # fmt: skip


def measure_frames(result: Path, count: int) -> None:
    """Print the times between frames in Chromium, with the result's own and with `count` polygons, and with none."""
    from playwright.sync_api import sync_playwright

    from tests.browser import FLAGS, chromium

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        many = with_polygons(result, Path(folder), count)
        points = shapely.get_num_coordinates(
            shapely.from_wkb(pq.read_table(many / f"{many.name}.parquet")["geometry"].to_numpy())
        ).sum()
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        print(f"{count} polygons of {points} points; milliseconds between frames")
        print(f"{'shown':<28} {'frames':>7} {'p50':>6} {'p95':>6} {'max':>6} {'drawn in':>9}")
        for shown, folder_, hash_ in (
            ("slide alone", many, "#map=0&outlines=0"),
            ("outlines", many, "#map=0&outlines=1"),
            ("outlines and class map", many, "#map=0.35&outlines=1"),
        ):
            with served(folder_) as (host, port, page_path, _):
                page = browser.new_page(viewport={"width": WINDOW[0], "height": WINDOW[1]}, bypass_csp=True)
                page.goto(f"http://{host}:{port}{page_path}{hash_}")
                page.wait_for_function("window.wsiView && window.wsiView.osd.world.getItemAt(0)?.getFullyLoaded()")
                page.wait_for_timeout(2000)
                times = sorted(page.evaluate(FRAMES, MOVES))
                drawn = page.evaluate("window.wsiView.outlines.drawnMs")
                page.close()
            print(
                f"{shown:<28} {len(times):>7} {times[len(times) // 2]:>6.0f} {times[int(len(times) * 0.95)]:>6.0f} "
                f"{times[-1]:>6.0f} {drawn:>6.0f} ms"
            )
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--frames", action="store_true")
    parser.add_argument("--polygons", type=int, default=10_000)
    arguments = parser.parse_args()
    if arguments.frames:
        measure_frames(arguments.result, arguments.polygons)
    else:
        measure_tiles(arguments.result)
