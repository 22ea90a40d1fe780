"""The server of wsi-label: what it shows, what it saves, and whom it refuses."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from models.bundle import Bundle
from pipeline.labeling.app import make_app
from pipeline.labeling.desk import Desk
from pipeline.labeling.session import NewLabel
from pipeline.labeling.store import EventStore
from pipeline.web.application import MAX_POSTED, SECURITY_HEADERS
from tests.pipeline.labeling.desks import answers, damage, desk, label_slide, save

URL = "http://127.0.0.1:8000"


@contextmanager
def client(at: Desk) -> Iterator[TestClient]:
    with TestClient(make_app(at), base_url=URL, headers={"Origin": URL}, raise_server_exceptions=False) as opened:
        yield opened


def label(patch: dict[str, Any], *present: int, **changed: Any) -> dict[str, Any]:
    """Return what the page sends for a patch if it shows classes 1 and 2."""
    answers = {id_: "present" if id_ in present else "absent" for id_ in (1, 2, *present)}
    words = {"answers": answers, "mark": "none", "view": "single", "seconds": 2.0, "suggested": None}
    return {"patch": patch["id"], "reason": patch["reason"], **words, **changed}


def events(folder: Path) -> int:
    with EventStore(folder / "labels.sqlite") as store:
        return len(store.read())


def test_a_label_is_in_the_file_before_the_answer_and_the_next_patch_comes_with_it(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        state = page.get("/state.json").json()
        assert [one["name"] for one in state["classes"]] == ["class-0", "class-1"]
        before = events(tmp_path / "l")
        first, second = state["upcoming"][:2]
        after = page.post("/labels", json={"labels": [label(first, 1)]}).json()
        assert events(tmp_path / "l") == before + 3, "two slides and a label"
        assert after["upcoming"][0] == second
        assert after["history"][0]["label"] == {"present": [1], "mark": "none"}
        assert (after["counts"]["labeled"], after["classes"][0]["present"]) == (1, 1)
        undone = page.post("/undo", json={"last": after["last"]}).json()
        assert [one["id"] for one in undone["undone"]] == [first["id"]]
        assert undone["counts"]["labeled"] == 0


def test_undo_leaves_a_label_of_a_slide_that_is_not_open(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides[1:], shipped) as at:
        save(at, at.session.upcoming(1)[0], 1)
    with desk(tmp_path / "l", slides[:1], shipped) as at, client(at) as page:
        before = events(tmp_path / "l")
        answer = page.post("/undo", json={"last": []})
        assert (answer.status_code, answer.json()["undone"], answer.json()["counts"]["labeled"]) == (200, [], 1)
        assert events(tmp_path / "l") == before
        own = at.session.upcoming(1)[0]
        save(at, own, 2)
        last = page.get("/state.json").json()["last"]
        assert [one["id"] for one in page.post("/undo", json={"last": last}).json()["undone"]] == [own.place.id]
        assert page.post("/undo", json={"last": []}).json()["undone"] == []


def test_an_order_that_is_sent_again_is_saved_and_undone_once(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        first, second = page.get("/state.json").json()["upcoming"][:2]
        page.post("/labels", json={"labels": [label(first, 1)]})
        before = events(tmp_path / "l")
        order = {"labels": [label(second, 1)], "order": "a"}
        for _ in range(2):
            state = page.post("/labels", json=order).json()
            assert (events(tmp_path / "l"), state["counts"]["labeled"]) == (before + 1, 2)
        undo = {"last": state["last"]}
        for _ in range(2):
            undone = page.post("/undo", json=undo).json()
            assert [one["id"] for one in undone["undone"]] == [second["id"]]
            assert (events(tmp_path / "l"), undone["counts"]["labeled"]) == (before + 2, 1)


def test_an_order_that_was_undone_in_another_tab_is_saved_if_it_is_sent_again(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        (patch, *_) = page.get("/state.json").json()["upcoming"]
        order = {"labels": [label(patch, 1)], "order": "a"}
        last = page.post("/labels", json=order).json()["last"]
        assert page.post("/undo", json={"last": last}).json()["counts"]["labeled"] == 0
        for _ in range(2):
            state = page.post("/labels", json=order).json()
            assert (state["counts"]["labeled"], state["history"][0]["label"]["present"]) == (1, [1])
        undone = page.post("/undo", json={"last": state["last"]}).json()
        assert ([one["id"] for one in undone["undone"]], undone["last"]) == ([patch["id"]], [])


def test_a_restarted_server_saves_what_a_page_sends_again_once(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        state = page.get("/state.json").json()
        first, second = state["upcoming"][:2]
        old = {"labels": [label(first, 1)], "order": "a", "session": state["session"]}
        page.post("/labels", json=old)
        saved = events(tmp_path / "l")
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        assert page.post("/labels", json={**old, "again": True}).json()["counts"]["labeled"] == 1
        assert events(tmp_path / "l") == saved
        new = {**old, "labels": [label(first, 1), label(second, 2)], "order": "b", "again": True}
        state = page.post("/labels", json=new).json()
        assert (events(tmp_path / "l"), state["counts"]["labeled"]) == (saved + 1, 2)
        assert [one["id"] for one in state["history"]] == [second["id"], first["id"]]


def test_after_a_restart_a_label_that_is_sent_again_does_not_replace_a_newer_one(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        (patch, *_) = page.get("/state.json").json()["upcoming"]
        lost = {"labels": [label(patch, 1, seconds=1.0)], "order": "a"}
        page.post("/labels", json=lost)
        page.post("/labels", json={"labels": [label(patch, 2, seconds=2.0)], "order": "b"})
        saved = events(tmp_path / "l")
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        state = page.post("/labels", json={**lost, "again": True}).json()
        assert (events(tmp_path / "l"), state["history"][0]["label"]["present"]) == (saved, [2])
        back = {"labels": [label(patch, 1, seconds=3.0)], "order": "c", "again": True}
        state = page.post("/labels", json=back).json()
        assert (events(tmp_path / "l"), state["history"][0]["label"]["present"]) == (saved + 1, [1])


def test_a_page_of_another_folder_or_annotator_saves_and_undoes_nothing(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        state = page.get("/state.json").json()
        (patch, *_) = state["upcoming"]
        save(at, at.session.upcoming(1)[0], 1)
        last = page.get("/state.json").json()["last"]
    for folder, annotator in (("other", "ann"), ("l", "bob")):
        with desk(tmp_path / folder, slides, shipped, annotator=annotator) as at, client(at) as page:
            before = events(tmp_path / folder)
            for path, body in (("/labels", {"labels": [label(patch, 1)]}), ("/undo", {"last": last})):
                answer = page.post(path, json={**body, "session": state["session"]})
                failed = {"/labels": "NOT saved", "/undo": "NOT undone"}[path]
                said = f"{failed}: wsi-label now runs with another labels folder or annotator than this page."
                assert (answer.status_code, answer.text.startswith(said)) == (409, True)
            assert events(tmp_path / folder) == before


def test_a_page_is_asked_to_wait_for_the_slides_of_a_restarted_server(
    tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        patch, last = page.get("/state.json").json()["upcoming"][0], [7]
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        monkeypatch.setattr(at.slides, "opened", lambda: 1)
        monkeypatch.setattr(at.slides, "ready", list)
        answer = page.post("/labels", json={"labels": [label(patch, 1)]})
        assert (answer.status_code, answer.text) == (503, "wsi-label is still opening the slides.")
        answer = page.post("/undo", json={"last": last})
        assert (answer.status_code, answer.text) == (
            503, "NOT undone: wsi-label is still opening the slides. Press z again in a moment."
        )  # fmt: skip
        monkeypatch.undo()
        assert page.post("/labels", json={"labels": [label(patch, 1)]}).status_code == 200


def test_one_undo_takes_back_an_order_that_was_changed_before_it_was_sent_again(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        (patch, *_) = page.get("/state.json").json()["upcoming"]
        for present in (1, 2):
            state = page.post("/labels", json={"labels": [label(patch, present)], "order": "a"}).json()
        assert state["history"][0]["label"]["present"] == [2]
        undone = page.post("/undo", json={"last": state["last"]}).json()
        assert [one["id"] for one in undone["undone"]] == [patch["id"]]
        assert (undone["undone"][0]["label"], undone["counts"]["labeled"], undone["last"]) == (None, 0, [])


def test_an_undo_of_another_label_than_the_last_one_is_refused(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        first, second = page.get("/state.json").json()["upcoming"][:2]
        old = page.post("/labels", json={"labels": [label(first, 1)]}).json()["last"]
        new = page.post("/labels", json={"labels": [label(second, 1)]}).json()["last"]
        before = events(tmp_path / "l")
        answer = page.post("/undo", json={"last": old})
        assert (answer.status_code, answer.text) == (
            409, "NOT undone: your last label was made in another tab. Reload this page to see it."
        )  # fmt: skip
        assert events(tmp_path / "l") == before
        assert page.post("/undo", json={"last": new}).json()["last"] == old


def test_the_pictures_are_those_of_the_patch(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        patch = at.session.upcoming(1)[0]
        ready = at.slides.of(patch.place)
        assert ready is not None
        for kind, expected in (
            ("patch", ready.patches.pixels(patch.place)), ("context", ready.patches.context(patch.place)),
            ("slide", ready.thumbnail_HWC),
        ):  # fmt: skip
            answer = page.get(f"/patches/{patch.place.id}/{kind}.jpg")
            assert answer.headers["content-type"] == "image/jpeg"
            shown = np.asarray(Image.open(io.BytesIO(answer.content)))
            assert shown.shape == expected.shape
            assert np.abs(shown.astype(int) - expected).mean() < 6


def test_a_patch_that_cannot_be_read_has_no_picture(tmp_path: Path, shipped: Bundle) -> None:
    slide = damage(label_slide(tmp_path / "a.svs"), 520, 390)
    with desk(tmp_path / "l", [slide], shipped) as at, client(at) as page:
        patches = {(one.place.x_l0, one.place.y_l0): one.place.id for one in at.session.upcoming(400)}
        for corner, status in (((512.0, 384.0), 503), ((448.0, 256.0), 200)):
            assert page.get(f"/patches/{patches[corner]}/patch.jpg").status_code == status


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Origin": "http://evil.example"}, "{}", 403),
        ({"Origin": "null"}, "{}", 403),
        ({"Origin": ""}, "{}", 403),
        ({"Origin": "http://127.0.0.1:9"}, "{}", 403),
        ({"Content-Type": "text/plain"}, "{}", 403),
        ({"Host": "evil.example"}, "{}", 400),
        ({}, " " * (MAX_POSTED + 1), 413),
        ({}, "not json", 422),
        ({}, '{"labels": [], "more": 1}', 422),
        ({}, '{"labels": [{"patch": "x"}]}', 422),
    ],
)
def test_only_the_page_can_save(
    tmp_path: Path, slides: list[Path], shipped: Bundle, headers: dict[str, str], body: str, status: int
) -> None:
    with desk(tmp_path / "l", slides[:1], shipped) as at, client(at) as page:
        before = events(tmp_path / "l")
        sent = {"Content-Type": "application/json", **headers}
        assert page.post("/labels", content=body, headers=sent).status_code == status
        assert events(tmp_path / "l") == before


def test_unknown_patches_classes_and_addresses_are_refused(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides[:1], shipped) as at, client(at) as page:
        (patch, *_) = page.get("/state.json").json()["upcoming"]
        before = events(tmp_path / "l")
        unknown = "0" * 20
        for body in ({"labels": [label({**patch, "id": unknown}, 1)]}, {"labels": [], "excluded": [unknown]}):
            answer = page.post("/labels", json=body)
            assert (answer.status_code, answer.text) == (
                404,
                "NOT saved: the slide of this patch is not open. Stop wsi-label and start it with this slide on the "
                "same port.",
            )
        assert page.post("/labels", json={"labels": [label(patch, 99)]}).status_code == 507
        assert page.post("/labels", json={"labels": [label(patch, 1, seconds=-1)]}).status_code == 422
        for address in ("/patches/none/patch.jpg", "/assets/../app.py", "/assets/none.js", "/labels.sqlite"):
            assert page.get(address).status_code == 404
        assert page.get("/labels").status_code == 405
        assert events(tmp_path / "l") == before


def test_every_answer_has_the_security_headers_and_no_path(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        patch = page.get("/state.json").json()["upcoming"][0]["id"]
        for address in ("/", "/state.json", "/assets/label.js", f"/patches/{patch}/patch.jpg", "/none"):
            answer = page.get(address)
            assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
            assert str(tmp_path).encode() not in answer.content
            assert str(slides[0].parent).encode() not in answer.content


def test_a_full_disk_is_reported_and_nothing_is_shown_as_saved(
    tmp_path: Path, slides: list[Path], shipped: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        patches = page.get("/state.json").json()["upcoming"]
        at.session._store._connection.execute("PRAGMA max_page_count = 1")
        many = [label(patch, 1, suggested=dict.fromkeys(range(2000), 0.5)) for patch in patches]
        answer = page.post("/labels", json={"labels": many})
        assert (answer.status_code, answer.text) == (507, "NOT saved; see the terminal for the reason.")
        assert "NOT saved (database or disk is full)" in caplog.text
        assert page.get("/state.json").json()["counts"]["labeled"] == 0


def test_suggestions_are_made_only_by_a_given_model_and_never_for_blind_patches(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, client(at) as page:
        patch = page.get("/state.json").json()["upcoming"][0]
        assert page.post("/suggestion", json={"patch": patch["id"]}).status_code == 409
    with desk(tmp_path / "l", slides, shipped, model=shipped, classes=["class-1", "other"]) as at, client(at) as page:
        patches = at.session.upcoming(30)
        blind, seen = (next(p for p in patches if p.blind is wanted) for wanted in (True, False))
        answer = page.post("/suggestion", json={"patch": blind.place.id})
        assert (answer.status_code, "blind" in answer.text) == (409, True)
        answer = page.post("/suggestion", json={"patch": seen.place.id})
        assert at.model is not None
        rgb_1HWC = at.slides.pixels([seen.place])
        expected = at.model.see(rgb_1HWC).presence_NK[0]
        assert answer.json() == {
            "model": "test", "suggested": {str(k + 1): round(float(p), 3) for k, p in enumerate(expected)}
        }  # fmt: skip


def test_a_grid_shows_patches_that_look_like_the_labeled_ones(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides[:1], shipped) as at, client(at) as page:
        asked = {"class_id": 2}
        assert page.post("/grid", json=asked).json()["why"].startswith("First label a patch")
        assert page.post("/grid", json={"class_id": 9}).status_code == 409
        purple = {p.place.id for p in at.session.upcoming(400) if is_purple(at, p.place)}
        known = [
            NewLabel(p.place, answers(at, 2 if p.place.id in purple else 1), "none", "single", 1.0)
            for p in at.session.upcoming(60)
        ]
        at.session.save(known, {})
        for _ in range(600):
            grid = page.post("/grid", json=asked).json()
            if not grid["missing"]:
                break
            time.sleep(0.05)
        found = [patch["id"] for patch in grid["patches"]]
        left = [p for p in at.session.unseen() if p.id in purple]
        assert len(left) >= 3
        # The network has random weights, but half of the nearest patches are purple, as one in nine of all is.
        assert len(set(found[: len(left)]) & {place.id for place in left}) >= 0.5 * len(left)
        assert not any(patch["blind"] for patch in grid["patches"])


def is_purple(at: Desk, place: Any) -> bool:
    rgb_HWC = at.slides.pixels([place])[0]
    return bool((rgb_HWC[..., 1] < 90).mean() == 1)


def test_html_in_a_folder_s_name_is_text(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "<b>x&y", slides[:1], shipped) as at, client(at) as page:
        assert "<b>" not in page.get("/").text
        assert "&lt;b&gt;x&amp;y" in page.get("/").text
