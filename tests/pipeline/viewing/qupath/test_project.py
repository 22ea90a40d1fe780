"""Tests of the project as QuPath reads it, and of what an update keeps."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urljoin

import pytest

from pipeline.errors import OutputError
from pipeline.slide.recipe import segment_slide
from pipeline.viewing.qupath.project import packed_argb, write_project
from tests.pipeline.fakes import SMALL, constant_predictor
from tests.pipeline.features import checked_features
from tests.pipeline.viewing.qupath.projects import NAMES, file_of, project_of, rows_of, slides_of
from tests.repository import REPOSITORY
from tests.slides import PINK, PURPLE

OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
"""Nested too deeply to be read."""

# From Python 3.12 on, only functions in Python count for the limit of 1,000.
LEVELS = 600 if sys.version_info < (3, 12) else 3000
HALF_AS_DEEP = '{"a":' * LEVELS + "1" + "}" * LEVELS
"""Can be read, but not walked through by a function that calls itself twice per level."""


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_project_names_every_slide_and_the_reader_with_the_origin_of_the_polygons(root: Path) -> None:
    path = write_project(root / "results")
    assert path == root / "results" / "qupath" / "project.qpproj"
    project = project_of(root)
    assert slides_of(root) == {1: root / "slides" / NAMES[0], 2: root / "slides" / NAMES[1]}
    assert [image["imageName"] for image in project["images"]] == list(NAMES)
    for image in project["images"]:
        builder = image["serverBuilder"]
        assert (builder["builderType"], builder["providerClassName"], builder["args"]) == ("uri", OPENSLIDE, [])
        assert builder["uri"].startswith("file:/")
        assert (image["metadata"], image["tags"]) == ({}, [])
    assert "Fall%201%20%2B%20%C3%BC%2520%23.svs" in project["images"][0]["serverBuilder"]["uri"]
    assert project["lastID"] == 2
    assert file_of(project["uri"]) == path
    assert project["createTimestamp"] <= project["modifyTimestamp"]


def test_the_scripts_find_the_files_of_each_image_relative_to_the_project(root: Path) -> None:
    path = write_project(root / "results", tiles=True)
    rows = rows_of(root)
    assert [(row["entryID"], unquote(row["name"])) for row in rows] == [("1", NAMES[0]), ("2", NAMES[1])]
    for row, name in zip(rows, NAMES, strict=True):
        folder = root / "results" / Path(name).stem
        maps = path.parent / "maps" / folder.name
        base = "file:" + path.as_uri().removeprefix("file://")
        assert file_of(urljoin(base, row["geojson"])).resolve() == folder / f"{folder.name}.geojson"
        assert file_of(urljoin(base, row["tiles"])).resolve() == maps / f"{folder.name}.tiles.geojson"
        assert file_of(urljoin(base, row["overlays"])).resolve() == maps
        assert row["classes"] == "class-0,class-1"
        assert (int(row["width"]), int(row["height"])) == (1280, 832)
        assert not any(cell.startswith("/") for cell in row.values())
    readme = (path.parent / "README.txt").read_text(encoding="utf-8")
    assert len(readme.splitlines()) == 2
    assert "import_results" in readme
    scripts = {p.stem for p in (path.parent / "scripts").iterdir()}
    assert scripts == {"import_results", "show_probability", "export_annotations", "send_corrections"}


def test_the_docs_list_every_part_of_a_project(root: Path) -> None:
    folder = write_project(root / "results", tiles=True).parent
    listed = (REPOSITORY / "docs/viewing.md").read_text(encoding="utf-8").partition("| `results/qupath/` |")[2]
    parts = [path.name + "/" * path.is_dir() for path in folder.iterdir()]
    assert [part for part in parts if f"`{part}" not in listed.partition("\n\n")[0]] == []


def test_classes_have_the_colors_of_the_model(root: Path) -> None:
    write_project(root / "results")
    classes = json.loads((root / "results" / "qupath" / "classifiers" / "classes.json").read_text(encoding="utf-8"))
    java = [ctypes.c_int32(255 << 24 | r << 16 | g << 8 | b).value for r, g, b in (PINK, PURPLE)]
    assert classes == {"pathClasses": [{"name": "class-0", "color": java[0]}, {"name": "class-1", "color": java[1]}]}
    assert packed_argb((0, 0, 0)) == -16777216
    assert packed_argb((255, 255, 255)) == -1
    assert packed_argb((255, 0, 0)) == -65536


def test_an_update_without_new_results_changes_nothing(root: Path) -> None:
    path = write_project(root / "results", tiles=True)
    before = files_in(path.parent)
    write_project(root / "results", tiles=True)
    after = files_in(path.parent)
    assert {name: content for name, (content, _) in after.items()} == {name: c for name, (c, _) in before.items()}
    kept = [name for name in before if name.startswith("maps/") or name == "project.qpproj"]
    assert all(after[name][1] == before[name][1] for name in kept)
    assert not list((root / "results").rglob("*.partial"))
    assert not (root / "results" / ".qupath.lock").exists()


@pytest.mark.full
@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_is_named_and_no_lock_file_stays(root: Path) -> None:
    with pytest.raises(OutputError, match=f"^{root / 'results'}: file locks fail on this file system"):
        write_project(root / "results")
    assert not (root / "results" / ".qupath.lock").exists()


def test_an_update_keeps_what_the_user_saved_and_adds_new_slides(root: Path) -> None:
    late = root / "results" / Path(NAMES[0]).stem
    late.rename(root / "late")
    path = write_project(root / "results")
    assert list(slides_of(root)) == [1]
    project = project_of(root)
    # As QuPath saves it: a URI in another form, metadata, a rotated image, an image added by the user, used ids.
    plain = (root / "slides" / NAMES[1]).as_uri()
    turned = {"builderType": "rotated", "builder": project["images"][0]["serverBuilder"] | {"uri": plain}}
    project["images"][0] |= {"serverBuilder": turned, "imageName": "renamed", "description": "mine"}
    web = {"builderType": "uri", "uri": "https://example.org/slide", "providerClassName": "X", "args": []}
    project["images"].append({"serverBuilder": web, "entryID": 7, "imageName": "web", "metadata": {"a": "b"}})
    project["lastID"] = 9
    project["version"] = "0.7.0"
    path.write_text(json.dumps(project), encoding="utf-8")
    saved = path.parent / "data" / "1" / "data.qpdata"
    saved.parent.mkdir(parents=True)
    saved.write_bytes(b"drawn by hand")
    classes_path = path.parent / "classifiers" / "classes.json"
    classes_path.write_text(
        json.dumps({"pathClasses": [{"name": "class-1", "color": -5}, {"name": "Mine", "color": 7}]})
    )
    own_script = path.parent / "scripts" / "mine.groovy"
    own_script.write_text("print 1")

    (root / "late").rename(late)
    write_project(root / "results")
    merged = project_of(root)
    assert merged["images"][:2] == project["images"]
    assert merged["images"][2]["entryID"] == merged["lastID"] == 10
    assert file_of(merged["images"][2]["serverBuilder"]["uri"]) == root / "slides" / NAMES[0]
    assert len(merged["images"]) == 3
    assert merged["version"] == "0.7.0"
    assert merged["createTimestamp"] == project["createTimestamp"]
    assert {unquote(row["name"]): row["entryID"] for row in rows_of(root)} == {NAMES[0]: "10", NAMES[1]: "1"}
    classes = json.loads(classes_path.read_text())["pathClasses"]
    assert classes[:2] == [{"name": "class-1", "color": -5}, {"name": "Mine", "color": 7}]
    assert [entry["name"] for entry in classes] == ["class-1", "Mine", "class-0"]
    assert saved.read_bytes() == b"drawn by hand"
    assert own_script.read_text() == "print 1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"images":[{"entryID":"1"}]}',
        '{"images":[7]}',
        '{"images":[],"lastID":null}',
        '{"images":[{"entryID":1,"metadata":[1]}]}',
        '{"images":[{"entryID":1,"serverBuilder":{"uri":"https://[bad/x"}}]}',
        '{"images":[],"uri":"https://[bad/x"}',
        '{"images":[],"a":' + DEEP + "}",
        '{"images":[{"entryID":1,"serverBuilder":' + HALF_AS_DEEP + "}]}",
    ],
)
def test_a_project_that_cannot_be_read_stays_unchanged(root: Path, text: str) -> None:
    path = root / "results" / "qupath" / "project.qpproj"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(OutputError, match=r"project\.qpproj: is not a project that QuPath can read"):
        write_project(root / "results")
    assert [p.name for p in path.parent.iterdir()] == ["project.qpproj"]
    assert path.read_text() == text


@pytest.mark.parametrize(
    "text", ["", "[]", '{"pathClasses":{}}', '{"pathClasses":[7]}', '{"pathClasses":[],"a":' + DEEP + "}"]
)
def test_classes_that_cannot_be_read_stay_unchanged(root: Path, text: str) -> None:
    path = root / "results" / "qupath" / "classifiers" / "classes.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(OutputError, match=r"classes\.json: is not a list of classes that QuPath can read"):
        write_project(root / "results")
    assert [p.name for p in path.parent.parent.iterdir()] == ["classifiers"]
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["7", DEEP, "{"])
def test_pictures_of_which_nothing_is_known_are_made_again(root: Path, text: str) -> None:
    path = write_project(root / "results")
    made = path.parent / "maps" / "b" / "made_of.json"
    before = made.read_text()
    made.write_text(text)
    write_project(root / "results")
    assert made.read_text() == before


def test_a_folder_without_results_and_a_result_named_like_the_project_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no results of wsi-segment"):
        write_project(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (root / "results" / "b").rename(root / "results" / "qupath")
    with pytest.raises(OutputError, match="rename the slide"):
        write_project(root / "results")


def test_a_result_with_a_damaged_record_is_skipped_with_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "results" / "b" / "run.json").write_text("{")
    write_project(root / "results")
    assert slides_of(root) == {1: root / "slides" / NAMES[0]}
    folder = root / "results" / "b"
    assert f"{folder}: left out: its run.json is damaged or was written by another program" in caplog.text


def test_a_result_without_its_map_is_skipped_with_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(root / "results" / "b" / "b.ome.zarr")
    write_project(root / "results")
    assert slides_of(root) == {1: root / "slides" / NAMES[0]}
    assert f"{root / 'results' / 'b'}: left out" in caplog.text
    assert not (root / "results" / "qupath" / "maps" / "b").exists()


@pytest.mark.parametrize(("files", "content"), [("0/0/*/*", b"damaged"), ("*/.zarray", b"{")])
def test_a_result_whose_map_is_damaged_is_left_out_with_a_warning(
    root: Path, caplog: pytest.LogCaptureFixture, files: str, content: bytes
) -> None:
    damaged = [file for file in (root / "results" / "b" / "b.ome.zarr").glob(files) if file.is_file()]
    assert damaged
    for file in damaged:
        file.write_bytes(content)
    write_project(root / "results", tiles=True)
    assert slides_of(root) == {1: root / "slides" / NAMES[0]}
    assert [row["entryID"] for row in rows_of(root)] == ["1"]
    assert "b.ome.zarr: cannot be read: " in caplog.text
    assert not (root / "results" / "qupath" / "maps" / "b").exists()
    shutil.rmtree(root / "results" / Path(NAMES[0]).stem)
    with pytest.raises(OutputError, match="none of the maps can be read; segment the slides again with --force"):
        write_project(root / "results")


@pytest.mark.full
def test_pictures_and_tiles_of_an_earlier_result_are_replaced(root: Path) -> None:
    path = write_project(root / "results", tiles=True)
    maps = path.parent / "maps" / "b"
    before = (maps / "0.png").read_bytes()
    shutil.rmtree(root / "results" / "b")
    segment_slide(root / "slides" / "b.svs", root / "results", constant_predictor([1.0, 0.0]), SMALL)
    write_project(root / "results")
    assert (maps / "0.png").read_bytes() != before
    assert not list(maps.glob("*.geojson"))
    assert [row["tiles"] for row in rows_of(root)][1] == ""
    write_project(root / "results", tiles=True)
    assert len(checked_features(next(maps.glob("*.geojson")).read_text(encoding="utf-8"))) > 0
