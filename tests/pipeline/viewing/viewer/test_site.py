"""Tests of what the server answers and to whom: patient data must not leave except through the page."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ViewError
from pipeline.results.record import read_run, write_run
from pipeline.viewing.viewer import app
from pipeline.viewing.viewer.identity import in_daemon
from pipeline.viewing.viewer.open_results import MOST_OPEN, OpenResult, OpenResults, open_checked, unavailable
from pipeline.viewing.viewer.results import Result, find_results, with_slide
from pipeline.web.application import SECURITY_HEADERS
from pipeline.web.server import listening
from tests.pipeline.viewing.viewer.conftest import UNREADABLE, Site, copied, serving
from tests.slides import painted, write_slide


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/assets/../../viewer/app.py",
        "/assets/..%2fapp.py",
        "/assets/%2e%2e%2f%2e%2e%2fapp.py",
        "/assets/%2e%2e/app.py",
        "/assets/..%5capp.py",
        "/assets//etc/passwd",
        "/assets/%2fetc%2fpasswd",
        "/assets/viewer.css%00.js",
        "/assets/%00",
        "/assets/viewer.html",
        "/slides/../run.json",
        "/slides/%2e%2e/facts.json",
        "/slides/..%2f..%2f/facts.json",
        "/slides/%2fetc/facts.json",
        "/slides/%00/facts.json",
        "/slides/block%20%3C1%3E/facts.json",
        "{data}run.json",
        "{data}preview.png",
        "{data}../run.json",
        "{data}%2e%2e/run.json",
        "{data}slide/0/..%2f..%2frun.json",
        "{data}slide/0/0_0.png",
        "{data}slide/0/-1_0.jpg",
        "{data}slide/label/0_0.jpg",
        "{data}outlines/..%2f..%2frun.json",
        "{data}label",
        "{data}macro",
        "{data}associated/label.jpg",
    ],
)
def test_addresses_outside_the_pages_are_not_found(site: Site, path: str) -> None:
    answer = site.ask(path.format(data=site.data))
    assert (answer.status, answer.body) == (404, b"Not Found")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("number", ["9" * 40, "9" * 5000])
def test_numbers_beyond_all_levels_are_not_found(site: Site, number: str) -> None:
    answer = site.get(f"slide/{number}/0_0.jpg")
    assert answer.status == 404
    assert b"Traceback" not in answer.body


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", ["/", "/assets/viewer.js", "{page}", "{data}facts.json", "{data}slide/0/0_0.jpg"])
def test_only_reading_is_allowed(site: Site, method: str, path: str) -> None:
    answer = site.ask(path.format(page=f"/slides/{site.results[0].id}/", data=site.data), method)
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_small_areas_are_not_zero_in_the_list_and_on_the_page(pair: Site) -> None:
    folder = pair.results[0].folder
    run = read_run(folder)
    assert run is not None
    kind = run.left_out[0].model_copy(update={"pieces": 1, "area_mm2": 0.0004})
    areas = dict.fromkeys(run.class_areas_mm2, 0.0036)
    write_run(
        folder,
        run.model_copy(update={"tissue_mm2": 0.0005, "class_areas_mm2": areas, "left_out": (kind,)}),
    )
    with serving(find_results(folder.parent)) as small:
        for page in (small.ask("/"), small.get("")):
            text = page.body.decode()
            assert "&lt; 0.001 mm²" in text
            assert "0.004 mm²" in text
            assert "0.00 mm²" not in text
            assert "0.000 mm²" not in text


def test_head_answers_as_get_without_the_body(site: Site) -> None:
    path = f"{site.data}slide/0/0_0.jpg"
    head, get = site.ask(path, "HEAD"), site.ask(path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(get.body))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("localhost", 200),
        ("evil.example", 400),
        ("evil.example:{port}", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example:{port}", 400),
        ("0.0.0.0:{port}", 400),
        ("", 400),
    ],
)
def test_host_names_of_other_machines_are_refused(site: Site, host: str, status: int) -> None:
    for path in ("/assets/viewer.js", f"{site.data}slide/0/0_0.jpg"):
        assert site.ask(path, Host=host.format(port=site.port)).status == status


def test_every_answer_has_the_security_headers_and_none_allows_other_sites(site: Site) -> None:
    page = f"/slides/{site.results[0].id}/"
    answers = [
        site.ask(path, Origin="http://evil.example") for path in ("/", page, f"{site.data}slide/0/0_0.jpg", "/none")
    ]
    answers += [site.ask("/", Host="evil.example"), site.ask("/assets/viewer.js", "POST")]
    assert [answer.status for answer in answers] == [307, 200, 200, 404, 400, 405]
    for answer in answers:
        for name, value in SECURITY_HEADERS.items():
            assert answer.headers[name.lower()] == value
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert "server" not in answer.headers
    policy = SECURITY_HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy


def test_it_listens_on_this_machine_only() -> None:
    with listening(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        # Without this protocol, asyncio does not disable Nagle's algorithm, and every answer takes 40 ms longer.
        assert listener.proto == socket.IPPROTO_TCP
        with pytest.raises(ViewError, match=f"port {listener.getsockname()[1]} cannot be used"):
            listening(listener.getsockname()[1])


def test_facts_do_not_reveal_paths(site: Site, results_folder: Path) -> None:
    page = site.get("").body + site.get("facts.json").body
    for secret in (str(results_folder.parent), str(results_folder.name), ".svs", "openslide"):
        assert secret.encode() not in page
    facts = json.loads(site.get("facts.json").body)
    assert (facts["width"], facts["height"], facts["mpp"]) == (1280, 832, 1.0)
    assert (facts["map"]["l0_per_px"], facts["map"]["width"]) == (4.0, 320)
    assert [c["color"] for c in facts["classes"]] == ["#d682b4", "#6e3c8c"]
    # 960×640 px less the 320×256 px of the other region, at 1 µm
    assert [c["area_mm2"] for c in facts["classes"]] == pytest.approx([0.5325, 0.0819], rel=0.05)


def test_names_are_escaped(site: Site) -> None:
    assert b'<h1 title="block &lt;1&gt;">block &lt;1&gt;</h1>' in site.get("").body


def test_the_segmented_slide_is_recognized(site: Site) -> None:
    assert json.loads(site.get("identity.json").body) == {"same": True}


def test_several_results_are_listed_and_each_has_its_own_page(results_folder: Path, tmp_path: Path) -> None:
    names = ("one", "two", "<three>")
    results = find_results(copied(results_folder, tmp_path / "r", *names))
    assert {result.folder.name for result in results} == set(names)
    with serving(results) as site:
        index = site.ask("/")
        assert index.status == 200
        for result in results:
            assert f'/slides/{result.id}/">'.encode() in index.body
            assert site.ask(f"/slides/{result.id}/{result.version}/slide/1/0_0.jpg").status == 200
        assert b"&lt;three&gt;" in index.body
        assert b"<three>" not in index.body


def test_a_result_that_cannot_be_examined_any_more_does_not_affect_the_list_of_slides(
    results_folder: Path, tmp_path: Path
) -> None:
    results = find_results(copied(results_folder, tmp_path / "r", "one", "two"))
    # A name that is too long fails as a folder without permission does, also for root.
    lost = replace(results[0], folder=tmp_path / ("n" * 300))
    with serving((results[1], lost)) as site:
        index = site.ask("/")
        assert index.status == 200
        assert f'/slides/{lost.id}/">'.encode() in index.body
        assert f"/slides/{lost.id}/{lost.version}/thumbnail.jpg".encode() not in index.body
        assert f"/slides/{results[1].id}/{results[1].version}/thumbnail.jpg".encode() in index.body
        assert site.ask(f"/slides/{lost.id}/").status == 200
        assert site.ask(f"/slides/{lost.id}/{lost.version}/facts.json").status == 503


def test_the_least_recently_used_slides_are_closed(results_folder: Path, tmp_path: Path) -> None:
    results = find_results(copied(results_folder, tmp_path, *"abcdef"))
    opened = OpenResults(results)
    with opened.using(results[0]) as first:
        for result in results[1:]:
            with opened.using(result):
                pass
        with opened.using(results[0]) as again:
            assert again is first  # in use: not closed, however many came after it
    with opened.using(results[1]):
        pass
    assert len(opened._open) <= MOST_OPEN
    opened.close()


def test_another_slide_of_the_same_name_is_refused(results_folder: Path, tmp_path: Path) -> None:
    result = find_results(results_folder)[0]
    other = write_slide(tmp_path / result.slide.name, painted((640, 416)), mpp=1.0)
    for moved in (other, tmp_path):
        with pytest.raises(ViewError, match=r"is not the slide that .* 640×416 px .* not 1280×832"):
            open_checked(with_slide(result, moved))
    with pytest.raises(ViewError, match=r"no such file .*pass its new path with --slide"):
        open_checked(with_slide(result, tmp_path / "gone.svs"))


def test_a_slide_of_the_same_size_with_other_bytes_is_detected(results_folder: Path, tmp_path: Path) -> None:
    result = find_results(results_folder)[0]
    other = write_slide(tmp_path / "b.svs", painted((1280, 832)), mpp=1.0, levels=(1, 4))
    with serving((with_slide(result, other),)) as site:
        assert json.loads(site.get("identity.json").body) == {"same": False}


def test_a_slide_that_is_replaced_while_it_is_shown_is_refused(results_folder: Path, tmp_path: Path) -> None:
    result = find_results(results_folder)[0]
    slide = Path(shutil.copy(result.slide, tmp_path / "a.svs"))
    other = write_slide(tmp_path / "b.svs", painted((1280, 832)), mpp=1.0, levels=(1, 4))
    with serving((with_slide(result, slide),)) as site:
        assert json.loads(site.get("identity.json").body) == {"same": True}
        assert site.get("slide/1/0_0.jpg").status == 200
        other.replace(slide)
        for path in ("facts.json", "slide/0/0_0.jpg", "slide/0/1_0.jpg", "corrections.json"):
            answer = site.get(path)
            assert (answer.status, answer.body) == (
                409,
                b"The slide has changed; stop wsi-view, start it again, then reload the page.",
            ), path
        assert json.loads(site.get("identity.json").body) == {"same": False}
    with serving((with_slide(result, slide),)) as again:
        assert again.get("slide/0/0_0.jpg").status == 200
        assert again.ask(f"{site.data}slide/0/0_0.jpg").status == 409, "a page of the earlier slide is refused"


def test_an_unreadable_slide_is_compared_again_when_it_is_there(results_folder: Path, tmp_path: Path) -> None:
    result = find_results(results_folder)[0]
    with serving((with_slide(result, tmp_path / "a.svs"),)) as site:
        assert json.loads(site.get("identity.json").body) == {"same": None}
        shutil.copy(result.slide, tmp_path / "a.svs")
        assert json.loads(site.get("identity.json").body) == {"same": True}
        assert site.get("slide/0/0_0.jpg").status == 200


def test_a_slide_that_disappears_is_an_error_without_its_path(
    results_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = with_slide(find_results(results_folder)[0], tmp_path / "gone.svs")
    with serving((result,)) as site:
        answer = site.get("slide/0/0_0.jpg")
        assert (answer.status, answer.body) == UNREADABLE
        assert json.loads(site.get("identity.json").body) == {"same": None}
    assert "gone.svs: no such file" in caplog.text


def test_a_slide_that_cannot_be_examined_is_an_error_without_its_path(
    results_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = replace(find_results(results_folder)[0], slide=tmp_path / ("n" * 300 + ".svs"))
    assert unavailable(result) == (
        f"{result.slide}: cannot be read (File name too long); check the path and its permissions"
    )
    with serving((result,)) as site:
        answer = site.get("slide/0/0_0.jpg")
        assert (answer.status, answer.body) == UNREADABLE
        assert json.loads(site.get("identity.json").body) == {"same": None}
    assert "n.svs: cannot be read: File name too long" in caplog.text


def test_a_comparison_of_the_slide_that_fails_is_tried_again(
    results_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(_: Result) -> bool:
        if not calls:
            calls.append(1)
            raise MemoryError
        return True

    calls: list[int] = []
    monkeypatch.setattr(app, "is_segmented_slide", compare)
    with serving(find_results(results_folder)[:1]) as site:
        assert site.get("identity.json").status == 500
        assert json.loads(site.get("identity.json").body) == {"same": True}


def test_an_error_of_work_on_a_daemon_thread_reaches_the_caller() -> None:
    def fail() -> bool:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        asyncio.run(asyncio.wait_for(in_daemon(fail), 10))


CHANGED = (409, b"The result has changed; stop wsi-view, start it again, then reload the page.")


def replace_result(folder: Path) -> None:
    """Replace a result by one that has the classes in another order, as `wsi-segment --force` can do."""
    run = read_run(folder)
    assert run is not None
    new = folder.with_name("new")
    shutil.copytree(folder, new)
    areas = dict(reversed(run.class_areas_mm2.items()))
    write_run(new, run.model_copy(update={"classes": run.classes[::-1], "class_areas_mm2": areas}))
    shutil.rmtree(folder)
    new.rename(folder)


def test_nothing_is_answered_about_a_result_that_was_replaced(own_site: Site) -> None:
    assert own_site.get("outlines/4").status == 200
    replace_result(own_site.results[0].folder)
    for path in (
        "facts.json", "slide/0/0_0.jpg", "class/0/0/0_0.png", "labels/3/0/0_0.png", "values/1_1.json", "outlines/0",
        "uncertainty", "regions.geojson?numbers=0", "thumbnail.jpg", "corrections.json", "corrections.geojson",
    ):  # fmt: skip
        answer = own_site.get(path)
        assert (answer.status, answer.body) == CHANGED, path


@pytest.mark.full
def test_data_of_a_result_that_is_not_shown_anymore_are_refused_after_a_restart(
    results_folder: Path, tmp_path: Path
) -> None:
    folder = copied(results_folder, tmp_path / "r", "a") / "a"
    with serving(find_results(folder)) as site:
        assert site.get("facts.json").status == 200
    with serving(find_results(folder)) as same:
        assert same.ask(f"{site.data}facts.json").status == 200, "nothing has changed"
    elsewhere = copied(results_folder, tmp_path / "other", "a")
    replace_result(folder)
    for shown in (folder, elsewhere):
        with serving(find_results(shown)) as other:
            assert other.results[0].id == site.results[0].id, "the page has the same address"
            for path in ("facts.json", "slide/0/0_0.jpg", "outlines/0", "values/1_1.json", "corrections.json"):
                answer = other.ask(f"{site.data}{path}")
                assert (answer.status, answer.body) == (409, b"The result has changed; reload the page."), path
                assert other.get(path).status == 200, path


@pytest.mark.parametrize("gone", [False, True])
def test_an_answer_that_was_made_while_the_result_was_replaced_is_not_sent(
    own_site: Site, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    def regions(opened: OpenResult, _: object) -> bytes:
        replace_result(opened.result.folder)
        if gone:
            raise OSError("a file of the earlier result is gone")
        return b"regions of the new result"

    monkeypatch.setattr(OpenResult, "regions", regions)
    answer = own_site.get("regions.geojson?numbers=0")
    assert (answer.status, answer.body) == CHANGED
