"""Attacks on the promise: whatever shows the area of a class shows that of its polygons."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import shapely.geometry
from starlette.testclient import TestClient

from pipeline.batch.queue import run_batch
from pipeline.formats import preview
from pipeline.progress import no_progress
from pipeline.viewing.viewer.app import make_app
from pipeline.viewing.viewer.results import find_results
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess
from tests.pipeline.fakes import REGIONS, SMALL, color_predictor, run_of
from tests.pipeline.features import checked_features
from tests.pipeline.summaries import rows_of
from tests.slides import PURPLE, painted, write_slide

MPP = 0.5


def areas_on(page: str) -> dict[str, list[str]]:
    """Return the areas that a page shows beside each class."""
    text = " ".join(html.unescape(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)).split())
    found = defaultdict(list)
    for name, area in re.findall(r"(class-\d) (\d\S* mm²)", text):
        found[name].append(area)
    return found


def test_every_output_shows_the_area_of_the_polygons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legend: list[tuple[str, str]] = []
    monkeypatch.setattr(preview, "_draw_entry", lambda _, __, name, share, *___: legend.append((name, share)))
    # The label image has the specks, which are too small for polygons.
    specks = [((200 + 40 * i, 480, 24, 24), PURPLE) for i in range(20)]
    path = write_slide(tmp_path / "slide.svs", painted((1280, 832), *REGIONS, *specks), mpp=MPP)
    workers = InProcess(lambda _: color_predictor(), "any", replace(SMALL, min_area_um2=2000.0))
    (result,) = run_batch([SlideJob(path)], tmp_path, workers, lambda _: no_progress, lambda _: None)
    assert result.folder is not None
    features = checked_features((result.folder / "slide.geojson").read_text(encoding="utf-8"))
    drawn, measured, tabled = ({"class-0": 0.0, "class-1": 0.0} for _ in range(3))
    for feature in features:
        properties = feature["properties"]
        name = properties["classification"]["name"]
        drawn[name] += shapely.geometry.shape(feature["geometry"]).area * MPP**2 / 1e6
        measured[name] += properties["measurements"]["Area mm^2"]
    for row in pq.read_table(result.folder / "slide.parquet").to_pylist():
        tabled[row["class"]] += row["area_mm2"]
    run = run_of(result.folder)
    assert run["label_areas_mm2"]["class-1"] > 1.05 * drawn["class-1"], "the label image has other areas"
    summary = {name: float(rows_of(tmp_path)["slide"][f"area_mm2 {name}"]) for name in drawn}

    with TestClient(make_app(find_results(tmp_path), "ann"), base_url="http://127.0.0.1") as client:
        (viewed,) = find_results(tmp_path)
        facts = client.get(f"/slides/{viewed.id}/{viewed.version}/facts.json").json()
        pages = [client.get(address).text for address in ("/", f"/slides/{viewed.id}/")]
    served = {one["name"]: one["area_mm2"] for one in facts["classes"]}
    for areas_mm2 in (measured, tabled, run["class_areas_mm2"], result.areas_mm2, summary, served):
        assert areas_mm2 == pytest.approx(drawn)
    pages += [(folder / "index.html").read_text(encoding="utf-8") for folder in (tmp_path, result.folder)]
    for page in pages:
        shown = areas_on(page)
        assert {name: set(areas) for name, areas in shown.items()} == {
            name: {f"{area:.3f} mm²"} for name, area in drawn.items()
        }
    assert legend == [(name, f"{100 * area / sum(drawn.values()):.1f} %") for name, area in drawn.items()]
