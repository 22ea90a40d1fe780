"""Tests of the project's Groovy scripts with stubs of QuPath's classes, because QuPath itself is not available."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import shapely.geometry

from pipeline.labeling.annotations import read_annotations
from pipeline.labeling.corrections import sent_file
from pipeline.labeling.import_annotations import slide_of
from pipeline.labeling.import_corrections import corrected_sources
from pipeline.results.names import LEFT_OUT
from pipeline.slide.recipe import segment_slide
from pipeline.viewing.qupath.project import write_project
from tests.pipeline.fakes import SMALL, color_predictor, region_slide, run_of
from tests.slides import PINK
from wsi.left_out import LeftOut

STUBS = Path(__file__).parent / "stubs"
NAMES = ("d.svs", "ä b+c.svs")

Play = Callable[..., dict[str, Any]]


def java_environment() -> dict[str, str]:
    java = shutil.which("java")
    assert java is not None
    # Debian's groovy needs JAVA_HOME. Without a locale, Java decodes file names as ASCII.
    home = os.environ.get("JAVA_HOME", str(Path(java).resolve().parent.parent))
    return os.environ | {"JAVA_HOME": home, "LC_ALL": "C.UTF-8"}


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Return a function that performs a user's steps on a project; see `act.groovy`."""
    if shutil.which("groovyc") is None or shutil.which("java") is None:
        pytest.skip("no groovy: install Debian's packages groovy and default-jre-headless")
    classes, environment = tmp_path_factory.mktemp("classes"), java_environment()
    sources = sorted(path for path in STUBS.rglob("*.groovy") if path.name != "act.groovy")
    subprocess.run(["groovyc", "-d", classes, *sources], env=environment, check=True)
    command: list[str | Path] = ["groovy", "-cp", classes, STUBS / "act.groovy"]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(project: Path, *steps: str) -> dict[str, Any]:
        stdin.write(json.dumps([str(project), *steps]) + "\n")
        stdin.flush()
        state: dict[str, Any] = json.loads(stdout.readline())
        return state

    with process:
        yield run
        stdin.close()
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def segmented(play: Play, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scripts")
    (root / "slides").mkdir()
    for name in NAMES:
        segment_slide(region_slide(root / "slides" / name), root / "results", color_predictor(), SMALL)
    write_project(root / "results")
    return root


def ids_of(root: Path, name: str) -> list[str]:
    stem = Path(name).stem
    text = (root / "results" / stem / f"{stem}.geojson").read_text(encoding="utf-8")
    return [feature["id"] for feature in json.loads(text)["features"]]


def add_pen(folder: Path) -> str:
    """Give a result an area of pen, and return the id of its annotation."""
    feature = json.loads((folder / f"{folder.name}.geojson").read_text(encoding="utf-8"))["features"][0]
    feature |= {"id": "00000000-0000-4000-8000-000000000000"}
    feature["properties"]["classification"] = {"name": "pen*", "color": list(LeftOut.PEN.color)}
    text = json.dumps({"type": "FeatureCollection", "features": [feature]})
    (folder / LEFT_OUT).write_text(text, encoding="utf-8")
    run = run_of(folder)
    run["left_out"] = [{"name": "pen", "area_mm2": 0.1, "pieces": 1}]
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return str(feature["id"])


@pytest.mark.full
def test_every_image_gets_its_regions_locked_and_with_their_class(play: Play, segmented: Path) -> None:
    state = play(segmented / "results" / "qupath" / "project.qpproj", "run=import_results")
    for name in NAMES:
        objects = state["objects"][name]
        assert [o["id"] for o in objects] == ids_of(segmented, name)
        assert Counter(o["class"] for o in objects) == {"class-0": 1, "class-1": 1}
        assert all(o["locked"] and o["type"] == "annotation" for o in objects)
    assert state["saves"] == dict.fromkeys(NAMES, 2)  # before and after the objects are sorted
    assert state["types"] == dict.fromkeys(NAMES, "BRIGHTFIELD_H_E")
    assert [o["name"] for o in state["objects"]["d.svs"]] == [f"{o['class']} 1" for o in state["objects"]["d.svs"]]
    assert state["resolved"] == dict.fromkeys(NAMES, 1)
    assert state["synced"] == 1
    assert state["said"].splitlines() == [
        *(f"{name}: 2 objects imported, 0 from an earlier import replaced" for name in NAMES),
        "Done.",
    ]


def test_a_second_import_makes_no_duplicates_and_keeps_objects_of_the_user(play: Play, segmented: Path) -> None:
    steps = ("run=import_results", "draw", "stale", "unlock", "run=import_results")
    state = play(segmented / "results" / "qupath" / "project.qpproj", *steps)
    for name in NAMES:
        objects = state["objects"][name]
        assert len({o["id"] for o in objects}) == len(objects) == 3
        assert sorted(o["class"] for o in objects) == ["class-1", "edited", "mine"]
        assert {o["id"] for o in objects if o["class"] != "mine"} == set(ids_of(segmented, name))
        assert f"{name}: 1 objects imported, 2 from an earlier import replaced, 1 unlocked by you kept" in state["said"]


def test_without_a_window_each_image_is_imported_once_and_saved_by_qupath(play: Play, segmented: Path) -> None:
    state = play(segmented / "results" / "qupath" / "project.qpproj", "headless", "headless")
    assert {name: [o["id"] for o in state["objects"][name]] for name in NAMES} == {
        n: ids_of(segmented, n) for n in NAMES
    }
    assert len(state["said"].splitlines()) == 2 * len(NAMES)
    assert state["saves"] == dict.fromkeys(NAMES, 2)


def test_an_open_image_changes_on_the_screen_and_is_not_saved(play: Play, segmented: Path) -> None:
    steps = (f"open={NAMES[1]}", "run=import_results")
    state = play(segmented / "results" / "qupath" / "project.qpproj", *steps)
    assert state["saves"] == {NAMES[0]: 2, NAMES[1]: 0}
    assert state["filled"] is True
    assert [o["id"] for o in state["objects"][NAMES[1]]] == ids_of(segmented, NAMES[1])


def test_an_import_is_saved_before_qupath_sorts_its_objects(play: Play, segmented: Path) -> None:
    state = play(segmented / "results" / "qupath" / "project.qpproj", "unsortable", "run=import_results")
    assert state["saves"] == dict.fromkeys(NAMES, 1)
    assert all(len(objects) == 3 for objects in state["objects"].values())
    assert "d.svs: the objects are imported, but QuPath could not sort them: side location conflict" in state["said"]
    assert state["said"].splitlines()[-1] == "Done."


def test_a_type_that_the_user_has_set_stays(play: Play, segmented: Path) -> None:
    state = play(segmented / "results" / "qupath" / "project.qpproj", "fluorescence", "run=import_results")
    assert state["types"] == dict.fromkeys(NAMES, "BRIGHTFIELD_OTHER")


def test_tiles_are_imported(play: Play, segmented: Path, tmp_path: Path) -> None:
    root = shutil.copytree(segmented, tmp_path / "copy")
    project = write_project(root / "results", tiles=True)
    state = play(project, "run=import_results", "run=import_results")
    for name in NAMES:
        assert Counter(o["type"] for o in state["objects"][name]) == {"annotation": 2, "tile": 15}


def test_areas_beside_the_tissue_are_imported_locked_and_hidden(play: Play, segmented: Path, tmp_path: Path) -> None:
    root = shutil.copytree(segmented, tmp_path / "copy")
    folder = root / "results" / "d"
    pen = add_pen(folder)
    project = write_project(root / "results")
    state = play(project, f"open={NAMES[0]}", "run=import_results", "run=import_results")
    objects = state["objects"][NAMES[0]]
    assert [o["id"] for o in objects] == [*ids_of(root, NAMES[0]), pen]
    assert [(o["class"], o["name"], o["locked"]) for o in objects][-1] == ("pen*", "pen* 1", True)
    assert state["hidden"] == ["pen*"]
    assert f"{NAMES[0]}: 3 objects imported, 3 from an earlier import replaced" in state["said"]
    # Without a window there is nothing to hide.
    assert len(play(project, "headless")["objects"][NAMES[0]]) == 3
    # What is exported for training does not contain them.
    play(project, "run=import_results", "run=export_annotations")
    read = read_annotations(project.parent / "annotations" / f"{NAMES[0]}.geojson")
    assert (read.found, read.skipped) == ((), {"regions of wsi-segment, which are predictions": 3})
    (folder / LEFT_OUT).unlink()
    assert f"{LEFT_OUT} is missing" in play(project, "run=import_results")["said"]


def test_moved_slides_are_found_and_a_lost_slide_does_not_stop_the_others(
    play: Play, segmented: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(segmented, tmp_path / "old")
    path = old / "results" / "qupath" / "project.qpproj"
    path.write_text(path.read_text(encoding="utf-8").replace(str(segmented), str(old)), encoding="utf-8")
    new = old.rename(tmp_path / "new")
    project = new / "results" / "qupath" / "project.qpproj"
    state = play(project, "forget", "run=import_results")  # the table alone is enough
    assert state["said"].splitlines()[-1] == "Done."
    found = {Path(unquote(urlsplit(uri).path)) for uris in state["uris"].values() for uri in uris}
    assert found == {new / "slides" / name for name in NAMES}

    (new / "slides" / "d.svs").unlink()
    state = play(project, "run=import_results")
    lost, other, done = state["said"].splitlines()
    assert lost.startswith(f"d.svs: NOT imported: the slide is not at {old / 'slides' / 'd.svs'}; move it back")
    assert other.startswith("ä b+c.svs: 2 objects imported")
    assert done == "Done, but 1 of 2 slides were not imported; the lines above give the reasons."
    assert {name: len(state["objects"][name]) for name in NAMES} == {"d.svs": 0, "ä b+c.svs": 2}


def test_missing_projects_images_and_files_are_reported(play: Play, segmented: Path, tmp_path: Path) -> None:
    project = segmented / "results" / "qupath" / "project.qpproj"
    assert "No project is open" in play(project, "no-project", "run=import_results")["said"]
    assert "No image of the project is open" in play(project, "run=show_probability")["said"]
    copy = shutil.copytree(segmented, tmp_path / "copy")
    (copy / "results" / "d" / "d.geojson").unlink()
    said = play(copy / "results" / "qupath" / "project.qpproj", "run=import_results")["said"]
    assert "d.svs: NOT imported" in said
    assert "d.geojson is missing" in said
    (copy / "results" / "qupath" / "results.tsv").unlink()
    said = play(copy / "results" / "qupath" / "project.qpproj", "run=import_results")["said"]
    assert "Run 'wsi-export qupath' on the results again" in said


def test_the_probability_of_a_class_is_shown_and_removed(play: Play, segmented: Path) -> None:
    project = segmented / "results" / "qupath" / "project.qpproj"
    show = (f"open={NAMES[0]}", "choose=class-0", "run=show_probability", "run=show_probability")
    state = play(project, *show)
    assert state["asked"] == ["class-0", "class-1", "(none)"]
    ((overlay,),) = state["overlays"]
    assert overlay["box"] == [0, 0, 1280, 832]
    assert overlay["size"] == [320, 208]
    # Left of the middle, inside the pink region.
    assert overlay["pixel"] == int.from_bytes(bytes((255, *PINK)), "big", signed=True)
    assert state["shown"] is True
    assert play(project, *show, "choose=(none)", "run=show_probability")["overlays"] == []
    assert play(project, f"open={NAMES[0]}", "run=show_probability")["overlays"] == []


@pytest.mark.parametrize("way", ["run=export_annotations", "headless=export_annotations"])
def test_annotations_are_exported_under_the_name_of_their_slide(
    play: Play, segmented: Path, tmp_path: Path, way: str
) -> None:
    root = shutil.copytree(segmented, tmp_path / "copy")
    project = root / "results" / "qupath" / "project.qpproj"
    state = play(project, "run=import_results", "draw", way)
    files = {file.name: file for file in (project.parent / "annotations").iterdir()}
    assert set(files) == {f"{name}.geojson" for name in NAMES}
    for name in NAMES:
        assert f"{name}: 3 annotations exported" in state["said"]
        read = read_annotations(files[f"{name}.geojson"])
        assert [one.name for one in read.found] == [("mine",)]
        assert read.skipped == {"regions of wsi-segment, which are predictions": 2}
        assert slide_of(files[f"{name}.geojson"], root / "slides") == root / "slides" / name


def test_an_open_image_is_exported_as_it_is_on_the_screen_and_an_empty_one_is_left_out(
    play: Play, segmented: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(segmented, tmp_path / "copy")
    project = root / "results" / "qupath" / "project.qpproj"
    state = play(project, f"open={NAMES[1]}", "run=export_annotations")
    assert state["said"].splitlines()[:2] == [f"{name}: no annotations" for name in NAMES]
    play(project, f"open={NAMES[1]}", "draw", "run=export_annotations")
    assert len(read_annotations(project.parent / "annotations" / f"{NAMES[1]}.geojson").found) == 1
    assert "No project is open" in play(project, "no-project", "run=export_annotations")["said"]


@pytest.mark.parametrize("way", ["run=send_corrections", "headless=send_corrections"])
def test_only_what_a_person_changed_in_qupath_is_imported_and_results_stay_as_they_are(
    play: Play, segmented: Path, tmp_path: Path, way: str
) -> None:
    root = shutil.copytree(segmented, tmp_path / "copy")
    results = root / "results"
    before = {file: file.read_bytes() for file in (results / "d").rglob("*") if file.is_file()}
    areas = {o["id"]: shapely.geometry.shape(o["geometry"]).area for o in features(results / "d" / "d.geojson")}
    state = play(results / "qupath" / "project.qpproj", "run=import_results", "stale", "reclassify=mucin", "draw", way)
    assert all(f"{name}: 4 annotations sent" in state["said"] for name in NAMES)
    assert before == {file: file.read_bytes() for file in (results / "d").rglob("*") if file.is_file()}
    assert sorted(p.name for p in results.glob("*corrections*")) == [
        f"{Path(n).stem}.corrections.geojson" for n in NAMES
    ]
    sources = {one.name: one for one in corrected_sources(results, root / "slides", "ann")}
    assert set(sources) == {Path(name).stem for name in NAMES}
    (drawing,) = sources["d"].drawings
    assert (drawing.annotator, drawing.source, drawing.reason) == ("ann", "qupath", "correction")
    relabeled, drawn = drawing.annotations
    assert (relabeled.name, drawn.name) == (("mucin",), ("mine",))
    assert relabeled.shape.area == pytest.approx(areas[state["objects"]["d.svs"][0]["id"]])
    assert drawn.shape.equals(shapely.box(0, 0, 256, 256))
    assert sources["d"].skipped == {"without a change": 1, "regions of wsi-segment, which are predictions": 1}
    assert sources["d"].slide == root / "slides" / "d.svs"


def test_images_without_a_result_and_a_lost_table_are_reported(play: Play, segmented: Path, tmp_path: Path) -> None:
    results = shutil.copytree(segmented, tmp_path / "copy") / "results"
    table = results / "qupath" / "results.tsv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    table.write_text("".join(lines[:2]), encoding="utf-8")
    said = play(results / "qupath" / "project.qpproj", f"open={NAMES[1]}", "draw", "run=send_corrections")["said"]
    assert len([line for line in said.splitlines() if line.endswith("not one of the results; not sent")]) == 1
    assert f'Done. Import the changes: wsi-label import --corrections "{results}" -o labels' in said
    assert len([name for name in NAMES if sent_file(results / Path(name).stem).exists()]) == 1
    table.unlink()
    said = play(results / "qupath" / "project.qpproj", "run=send_corrections")["said"]
    assert "Run 'wsi-export qupath' on the results again" in said
    assert (
        "No project is open"
        in play(results / "qupath" / "project.qpproj", "no-project", "run=send_corrections")["said"]
    )


def features(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["features"]
    return found
