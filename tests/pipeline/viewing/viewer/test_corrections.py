"""What the viewer's server saves of corrections, for whom, and what becomes of them."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import sqlite3
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from typer.testing import CliRunner

from models.tissue_class import TissueClass
from pipeline.cli.label import app as label_app
from pipeline.formats.features import Feature, read_features
from pipeline.labeling.corrections import CORRECTION_EVENTS, corrections_file, read_corrections, read_entries, relabeled
from pipeline.labeling.event_file import EventFile
from pipeline.labeling.events import Labeled, Undone
from pipeline.labeling.import_corrections import corrected_sources
from pipeline.labeling.labels import Labels
from pipeline.labeling.store import EventStore
from pipeline.training.dataset import load_dataset
from pipeline.viewing.viewer.results import find_results
from pipeline.viewing.viewer.uncertainty import uncertainties
from tests.pipeline.viewing.viewer.conftest import Answer, Site, serving


def post(site: Site, path: str, body: Any, **headers: str) -> Answer:
    """Post a body as the page does, which adds its author to an object."""
    if isinstance(body, dict):
        body = {"author": "ann"} | body
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
    sent = {"Origin": site.url, "Content-Type": "application/json"} | headers
    connection.request("POST", f"{site.data}{path}", json.dumps(body).encode(), sent)
    answer = connection.getresponse()
    read = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    connection.close()
    return read


def regions(site: Site) -> list[Feature]:
    return list(read_features(site.results[0].outlines, site.results[0].run.classes))


def of_region(site: Site, index: int, after: int) -> dict[str, Any]:
    """Return the request that gives a region a class."""
    region = regions(site)[index]
    return {"index": index, "label": region.label, "area_mm2": region.area_mm2, "after": after}


def undo(site: Site) -> dict[str, Any]:
    """Undo the latest correction, as the page does it. Return the answer."""
    last = json.loads(site.get("corrections.json").body)["last"]
    answer: dict[str, Any] = json.loads(post(site, "corrections/undo", {"last": last}).body)
    return answer


def test_a_correction_is_saved_beside_the_result_undone_and_becomes_labels(own_site: Site, tmp_path: Path) -> None:
    folder = own_site.results[0].folder
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert json.loads(own_site.get("corrections.json").body) == {
        "author": "ann", "corrections": [], "others": 0, "last": None
    }  # fmt: skip
    assert not corrections_file(folder).exists(), "looking writes nothing"
    (index,) = [n for n, one in enumerate(regions(own_site)) if one.label == 2]
    answer = post(own_site, "corrections", of_region(own_site, index, 1))
    assert answer.status == 200
    assert json.loads(answer.body)["corrections"] == [{"index": index, "after": 1, "author": "ann"}]
    (saved,) = read_corrections(folder)
    assert (saved.annotator, saved.event.before, saved.event.after) == ("ann", "class-1", "class-0")
    assert saved.event.polygon_l0.equals(regions(own_site)[index].geometry_l0)
    assert undo(own_site)["undone"] == index
    assert read_corrections(folder) == []
    assert undo(own_site)["undone"] is None
    post(own_site, "corrections", of_region(own_site, index, 1))
    exported = json.loads(own_site.get("corrections.geojson").body)["features"]
    assert [one["properties"]["classification"]["name"] for one in exported] == ["class-0"]
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    run = ["import", "--corrections", str(tmp_path / "results"), "-o", str(tmp_path / "l"), "--patch-side", "64"]
    done = CliRunner().invoke(label_app, [*run, "--patch-mpp", "1"])
    assert done.exit_code == 0, done.output
    with EventStore(tmp_path / "l" / "labels.sqlite") as store:
        labels = [(one.annotator, one.event) for one in store.read() if isinstance(one.event, Labeled)]
    # The region is 320×256 px with its left upper corner at (416, 256): columns 7 to 10, rows 4 to 7.
    assert {(event.place.x_l0, event.place.y_l0) for _, event in labels} == {
        (x, y) for x in (448, 512, 576, 640) for y in (256, 320, 384, 448)
    }
    made = {(who, event.source, event.reason, event.model, event.files) for who, event in labels}
    model = own_site.results[0].run.identity.model
    files = (f"results/{folder.name} (model {model[:12]})",)
    assert made == {("ann", "viewer", "correction", model, files)}

    undo(own_site)
    done = CliRunner().invoke(label_app, run)
    assert "16 removed, because the files do not show them anymore" in done.output
    with EventStore(tmp_path / "l" / "labels.sqlite") as store:
        assert Labels(store.read()).places() == []


def test_a_correction_that_is_sent_again_is_saved_once(own_site: Site) -> None:
    for _ in range(2):
        state = json.loads(post(own_site, "corrections", of_region(own_site, 0, 2)).body)
    assert len(state["corrections"]) == 1
    assert len(read_entries(own_site.results[0].folder)) == 1
    assert undo(own_site)["corrections"] == []


def test_a_page_of_another_author_saves_and_undoes_nothing(own_site: Site) -> None:
    folder = own_site.results[0].folder
    assert b'<meta name="annotator" content="ann">' in own_site.get("").body
    last = json.loads(post(own_site, "corrections", of_region(own_site, 0, 2)).body)["last"]
    for path, body in (("corrections", of_region(own_site, 1, 1)), ("corrections/undo", {"last": last})):
        answer = post(own_site, path, body | {"author": "bo"})
        assert (answer.status, answer.body.decode()) == (
            409,
            "wsi-view now runs with --annotator ann, and this page was loaded with bo. Reload the page to save as ann.",
        )
    assert len(read_entries(folder)) == 1


def test_an_undo_of_another_correction_than_the_latest_one_undoes_nothing(own_site: Site) -> None:
    first = json.loads(post(own_site, "corrections", of_region(own_site, 0, 2)).body)["last"]
    second = json.loads(post(own_site, "corrections", of_region(own_site, 0, 1)).body)["last"]
    for wrong in (first, None, second + 1):
        answer = json.loads(post(own_site, "corrections/undo", {"last": wrong}).body)
        assert (answer["undone"], answer["elsewhere"], answer["last"]) == (None, True, second)
    assert len(read_entries(own_site.results[0].folder)) == 2
    answer = json.loads(post(own_site, "corrections/undo", {"last": second}).body)
    assert (answer["undone"], answer["elsewhere"], answer["last"]) == (0, False, first)


def test_a_new_folder_of_corrections_gets_the_classes_of_the_result(own_site: Site, tmp_path: Path) -> None:
    folder = own_site.results[0].folder
    (index,) = [n for n, one in enumerate(regions(own_site)) if one.label == 2]
    assert post(own_site, "corrections", of_region(own_site, index, 1)).status == 200
    stored = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    stored["classes"][1]["role"] = "background"
    (folder / "run.json").write_text(json.dumps(stored), encoding="utf-8")
    run = ["import", "--corrections", str(folder), "-o", str(tmp_path / "l"), "--patch-side", "64", "--patch-mpp", "1"]
    done = CliRunner().invoke(label_app, run)
    assert done.exit_code == 0, done.output
    first, second = own_site.results[0].run.classes
    assert load_dataset(tmp_path / "l").classes == (first, TissueClass(second.name, second.color, "background"))
    run[run.index("-o") + 1] = str(tmp_path / "mapped")
    done = CliRunner().invoke(label_app, [*run, "--map", f"{second.name}=empty"])
    assert done.exit_code == 0, done.output
    assert load_dataset(tmp_path / "mapped").classes == (first, TissueClass("empty", second.color, "background"))


def test_corrections_of_a_linked_result_become_labels(results_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(next(results_folder.glob("block*")), tmp_path / "store" / "a")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "link").symlink_to(tmp_path / "store" / "a")
    with serving(find_results(tmp_path / "results")) as site:
        (index,) = [n for n, one in enumerate(regions(site)) if one.label == 2]
        assert post(site, "corrections", of_region(site, index, 1)).status == 200
    (source,) = corrected_sources(tmp_path / "results", None, "ann")
    assert [(one.annotator, [two.name for two in one.annotations]) for one in source.drawings] == [
        ("ann", [("class-0",)])
    ]


def test_results_of_two_models_with_the_same_folder_and_name_keep_their_labels(own_site: Site, tmp_path: Path) -> None:
    folder = own_site.results[0].folder
    other = shutil.copytree(folder, tmp_path / "b" / "results" / folder.name)
    stored = json.loads((other / "run.json").read_text(encoding="utf-8"))
    stored["identity"]["model"] = "0" * 64
    (other / "run.json").write_text(json.dumps(stored), encoding="utf-8")
    slide = own_site.results[0].run.identity.slide
    for result, model, x in ((folder, own_site.results[0].run.identity.model, 0), (other, "0" * 64, 256)):
        region = Feature(
            str(uuid.UUID(int=x)), 1, TissueClass("class-0", (1, 2, 3)), 0.005, shapely.box(x, 0, x + 128, 128)
        )
        with EventFile(corrections_file(result), CORRECTION_EVENTS) as file:
            file.append("ann", [relabeled(region, slide, model, "class-1")])

    def imported(result: Path) -> tuple[str, set[float]]:
        run = ["import", "--corrections", str(result.parent), "-o", str(tmp_path / "l"), "--patch-side", "64"]
        done = CliRunner().invoke(label_app, [*run, "--patch-mpp", "1"])
        assert done.exit_code == 0, done.output
        with EventStore(tmp_path / "l" / "labels.sqlite") as store:
            return done.output, {place.x_l0 for place in Labels(store.read()).places()}

    assert imported(folder)[1] == {0, 64}
    output, columns = imported(other)
    assert (columns, ", 0 removed" in output) == ({0, 64, 256, 320}, True)
    with EventFile(corrections_file(folder), CORRECTION_EVENTS) as file:
        file.append("ann", [Undone(numbers=(1,))])
    output, columns = imported(folder)
    assert (columns, ", 4 removed" in output) == ({256, 320}, True)


def test_what_the_page_cannot_have_sent_is_refused_and_not_saved(own_site: Site) -> None:
    good = of_region(own_site, 0, 2)
    for body, status in (
        (good | {"area_mm2": good["area_mm2"] * 1.1}, 409),
        (good | {"label": 2 if good["label"] == 1 else 1}, 409),
        (good | {"index": 99}, 409),
        (good | {"index": 10**30}, 422),
        (good | {"after": 3}, 409),
        (good | {"after": 0}, 422),
        (good | {"path": "x"}, 422),
        ([], 422),
    ):
        assert post(own_site, "corrections", body).status == status, body
    for headers in ({"Origin": "http://evil.example"}, {"Content-Type": "text/plain"}):
        assert post(own_site, "corrections", good, **headers).status == 403
        assert post(own_site, "corrections/undo", {"last": None}, **headers).status == 403
    assert own_site.get("corrections").status == 405
    assert not corrections_file(own_site.results[0].folder).exists()


def test_a_canceled_request_leaves_no_traceback(own_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    head = f"POST {own_site.data}corrections HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\n"
    with socket.create_connection(("127.0.0.1", own_site.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
        time.sleep(0.3)  # until the server reads the body
    for _ in range(5):
        assert own_site.get("corrections.json").status == 200
        time.sleep(0.1)
    assert caplog.records == []


def test_a_result_that_was_replaced_while_the_viewer_runs_gets_no_corrections(own_site: Site) -> None:
    folder = own_site.results[0].folder
    good = of_region(own_site, 0, 2)
    stored = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    stored["identity"]["model"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(stored), encoding="utf-8")
    answer = post(own_site, "corrections", good)
    assert (answer.status, answer.body) == (
        409,
        b"The result has changed; stop wsi-view, start it again, then reload the page.",
    )
    assert not corrections_file(folder).exists()


def test_undo_leaves_the_corrections_of_an_earlier_result(own_site: Site) -> None:
    folder = own_site.results[0].folder
    first = regions(own_site)[0]
    other = TissueClass("class-1", (1, 2, 3))
    earlier = relabeled(Feature(str(uuid.UUID(int=0)), 2, other, 0.1, shapely.box(0, 0, 9, 9)), "ab", "cd", "class-0")
    lost = relabeled(first, "ab", "cd", "a class of another model")
    with EventFile(corrections_file(folder), CORRECTION_EVENTS) as events:
        events.append("ann", [earlier, lost])
    answer = undo(own_site)
    assert answer == {
        "author": "ann", "corrections": [], "others": 2, "last": None, "undone": None, "elsewhere": False
    }  # fmt: skip
    assert len(read_corrections(folder)) == 2


def test_a_file_that_is_not_ours_is_never_changed(own_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    file = corrections_file(own_site.results[0].folder)
    file.write_bytes(b"notes of mine, long enough not to be taken for an empty database")
    answer = post(own_site, "corrections", of_region(own_site, 0, 2))
    assert (answer.status, answer.body) == (
        507, b"The corrections cannot be read or written; see the terminal for the reason."
    )  # fmt: skip
    assert file.read_bytes().startswith(b"notes of mine")
    assert "a.corrections.sqlite: cannot be opened as a file of corrections" in caplog.text


def test_damaged_corrections_are_an_error_that_names_their_file(
    own_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    assert post(own_site, "corrections", of_region(own_site, 0, 2)).status == 200
    file = corrections_file(own_site.results[0].folder)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(
            "INSERT INTO events (time, annotator, event) SELECT time, annotator, json_set(event, '$.region', 'x') "
            "FROM events"
        )
    pages = [own_site.get(name) for name in ("corrections.json", "corrections.geojson")]
    for answer in (*pages, post(own_site, "corrections/undo", {"last": None})):
        assert (answer.status, answer.body) == (
            507, b"The corrections cannot be read or written; see the terminal for the reason."
        )  # fmt: skip
    assert "a.corrections.sqlite: is damaged" in caplog.text


def test_the_uncertainty_is_one_minus_the_mean_probability_inside_each_region(own_site: Site) -> None:
    found = np.frombuffer(own_site.get("uncertainty").body, "<f4")
    assert found.shape == (len(regions(own_site)),)
    assert found.max() < 0.1, "the network's probabilities are close to 0 or 1"


def test_holes_and_regions_below_a_pixel_have_their_own_uncertainty() -> None:
    one, other = TissueClass("a", (1, 2, 3)), TissueClass("b", (4, 5, 6))
    hole = shapely.box(20, 20, 60, 60)
    features = [
        Feature("x", 1, one, 0, shapely.box(0, 0, 80, 80).difference(hole)),
        Feature("y", 2, other, 0, hole),
        Feature("z", 2, other, 0, shapely.box(91, 91, 92, 92)),
    ]
    probs_CHW = np.zeros((2, 10, 10), np.uint8)
    probs_CHW[0] = 204
    probs_CHW[:, 2:6, 2:6] = [[[0]], [[255]]]
    probs_CHW[1, 9, 9] = 51
    assert uncertainties(features, probs_CHW, 10.0).tolist() == pytest.approx([0.2, 0, 0.8])
    assert uncertainties([], probs_CHW, 1.0).shape == (0,)


def test_a_region_inside_a_thin_ring_keeps_its_pixels() -> None:
    """The ring has the smaller area, though it surrounds the region."""
    one, other = TissueClass("a", (1, 2, 3)), TissueClass("b", (4, 5, 6))
    inner = shapely.box(10, 10, 90, 90)
    ring = shapely.box(0, 0, 100, 100).difference(inner)
    probs_CHW = np.zeros((2, 10, 10), np.uint8)
    probs_CHW[0], probs_CHW[1, 1:9, 1:9] = 204, 51
    features = [Feature("x", 1, one, 0, ring), Feature("y", 2, other, 0, inner)]
    assert uncertainties(features, probs_CHW, 10.0).tolist() == pytest.approx([0.2, 0.8])
