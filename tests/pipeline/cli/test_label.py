"""The command `wsi-label`: a whole session, its subcommands, and its errors."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from models.bundle import DEFAULT_BUNDLE, load_bundle
from pipeline.cli.label import DEFAULT_MODEL, app
from pipeline.labeling.events import FolderStarted, SlideAdded
from pipeline.labeling.labels import Labels
from pipeline.labeling.slides import SlideFile
from pipeline.labeling.store import EventStore
from pipeline.training.dataset import load_dataset, samples
from tests.pipeline.labeling.desks import label_slide
from tests.pipeline.labeling.events import STROMA, TUMOR, label
from tests.pipeline.labeling.sessions import ask, started


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label_slide(tmp_path_factory.mktemp("slides") / "P07-a.svs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a labels folder with one label and no picture of it."""
    with EventStore(tmp_path / "l" / "labels.sqlite") as store:
        started = FolderStarted(mpp=1.0, side=64, seed=1, blind_share=0.0)
        store.append("ann", [started, TUMOR, STROMA, label(0, "present", "absent")])
    return tmp_path / "l"


def test_a_session_without_the_name_of_the_command_ends_with_a_data_set(slide: Path, tmp_path: Path) -> None:
    options: list[str | Path] = [
        "-o",
        tmp_path / "l",
        "--classes",
        "tumor, stroma",
        "--annotator",
        "Ann",
        "--patient",
        "^(P[0-9]+)-",
    ]
    with started(slide, *options, "--patient", "^(P[0-9]+)-", "--patch-side", "64") as process:
        assert process.stdout is not None
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)  \(press Ctrl-C to stop\)\n", process.stdout.readline())
        assert found is not None
        state = ask(found[1], "state.json")
        assert (state["annotator"], [one["name"] for one in state["classes"]]) == ("Ann", ["tumor", "stroma"])
        patch = state["upcoming"][0]
        new = {"patch": patch["id"], "answers": {1: "present", 2: "absent"}, "reason": patch["reason"],
               "mark": "none", "view": "single", "seconds": 3.0, "suggested": None}  # fmt: skip
        assert ask(found[1], "labels", {"labels": [new]})["counts"]["labeled"] == 1
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "")
    assert "warning: labeled patches: 1; label at least 50 before you train" in errors
    assert errors.splitlines()[-1] == f"wsi-label: ended; train with: wsi-train {tmp_path / 'l'} -o runs/name"
    dataset = load_dataset(tmp_path / "l")
    (split,) = {row.split(",")[3] for row in (tmp_path / "l" / "labels.csv").read_text().splitlines()[1:]}
    (sample,) = samples(dataset, split)  # type: ignore[arg-type]  # a split
    assert (sample.name, sample.group, sample.labels_K) == (patch["id"], "P07", (True, False))


def test_annotations_of_qupath_become_a_data_set(slide: Path, tmp_path: Path) -> None:
    def box(name: str, x: int, y: int, **more: Any) -> dict[str, Any]:
        ring = [[x, y], [x + 128, y], [x + 128, y + 64], [x, y + 64], [x, y]]
        return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "annotation", "classification": {"name": name}, **more}}  # fmt: skip

    file = tmp_path / "P07-a.svs.geojson"
    features = [box("Tumor", 192, 128), box("Stroma", 320, 128), box("Stroma", 512, 150), box("Tumor", 9000, 150)]
    features.append(box("x", 0, 0, isLocked=True))
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    options = ("-o", tmp_path / "l", "--map", "Tumor=carcinoma", "--patch-side", "64")
    done = invoke("import", tmp_path, "--slide", slide.parent, *options)
    assert done.exit_code == 0, done.output
    assert "4 complete patches, 4 covered in part (not imported; pass --partial" in done.output
    assert "warning: P07-a.svs.geojson: objects skipped: 1 locked; unlock them" in done.output
    outside = "objects skipped: 1 outside the slide; check that they were drawn on this slide"
    assert f"warning: P07-a.svs.geojson: {outside}\n" in done.output
    dataset = load_dataset(tmp_path / "l")
    assert dataset.class_names == ("carcinoma", "Stroma")
    labels = [one.labels_K for split in dataset.card.splits for one in samples(dataset, split)]
    assert sorted(map(str, labels)) == ["(False, True)"] * 2 + ["(True, False)"] * 2
    again = invoke("import", file, "--slide", slide, *options, "--partial")
    assert "4 covered in part (imported)" in again.output
    with EventStore(tmp_path / "l" / "labels.sqlite") as store:
        kinds = [one.event.kind for one in store.read()]
        assert (kinds.count("label"), kinds.count("slide")) == (8, 1)
        assert next(one.event for one in store.read() if isinstance(one.event, SlideAdded)).patient == "P07-a"


def test_a_second_import_without_a_pattern_keeps_the_patient(slide: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.geojson"
    file.write_text('{"type": "FeatureCollection", "features": []}')
    with EventStore(tmp_path / "l" / "labels.sqlite") as store:
        store.append("ann", [FolderStarted(mpp=1.0, side=64, seed=1, blind_share=0.0), TUMOR, STROMA])
        for options, patient in ((["--patient", "^(P[0-9]+)-"], "P07"), ([], "P07"), (["--patient", "-(a)"], "a")):
            done = invoke("import", file, "--slide", slide, "-o", tmp_path / "l", *options)
            assert done.exit_code == 0, done.output
            (known,) = Labels(store.read()).slides.values()
            assert known.patient == patient


def test_an_import_lists_all_slides_without_a_patient_and_writes_nothing(slide: Path, tmp_path: Path) -> None:
    for name in ("A", "P1", "B"):
        (tmp_path / f"{name}.svs").symlink_to(label_slide(tmp_path / f"{name}-slide"))
        (tmp_path / f"{name}.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    done = invoke("import", tmp_path, "--slide", tmp_path, "-o", tmp_path / "l", "--patient", "^(P1)")
    assert (done.exit_code, (tmp_path / "l").exists()) == (2, False)
    assert "'^(P1)' does not match 2 file names: A.svs, B.svs; add" in done.stderr


def test_annotations_of_a_manifest_with_two_slides_are_refused(slide: Path, tmp_path: Path) -> None:
    ring = [[0, 0], [128, 0], [128, 128], [0, 128], [0, 0]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
               "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}}}  # fmt: skip
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    other = label_slide(tmp_path / "b.svs")
    for number, rows in enumerate((f"{slide}\n", f"{slide}\n{other}\n"), 1):
        (tmp_path / f"{number}.csv").write_text(f"slide\n{rows}")
    arguments = ("import", tmp_path / "a.geojson", "--annotator", "Ann", "--patch-side", "64", "-o", tmp_path / "l")
    refused = invoke(*arguments, "--slide", tmp_path / "2.csv")
    assert (refused.exit_code, (tmp_path / "l").exists()) == (1, False)
    assert f"{tmp_path}/2.csv: lists 2 slides; pass one slide, or a folder of slides, with --slide" in refused.stderr
    refused = invoke(*arguments, "--slide", slide, "--map", "Tumor=a", "--map", "Tumor=b")
    assert (refused.exit_code, (tmp_path / "l").exists()) == (2, False)
    assert "--map: 'Tumor' has two classes, 'a' and 'b'; pass one of them" in refused.stderr
    repeated = invoke(*arguments, "--slide", tmp_path / "1.csv", "--map", "Tumor=a", "--map", "Tumor=a")
    assert (
        "a new labels folder needs at least two classes, but the annotations have only a; pass --map" in repeated.stderr
    )


def test_annotations_with_less_than_two_classes_are_refused_with_what_was_left_out(slide: Path, tmp_path: Path) -> None:
    ring = [[0, 0], [128, 0], [128, 128], [0, 128], [0, 0]]
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
         "properties": {"objectType": "annotation", "classification": {"name": name}, "isLocked": name == "Stroma"}}
        for name in ("Tumor", "Ignore*", "Stroma")
    ]  # fmt: skip
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    arguments = ("import", tmp_path / "a.geojson", "--slide", slide, "--annotator", "Ann", "-o", tmp_path / "l")
    refused = invoke(*arguments)
    assert (refused.exit_code, (tmp_path / "l").exists()) == (1, False)
    assert refused.stderr == (
        "wsi-label: a new labels folder needs at least two classes, but the annotations have only Tumor (objects left "
        "out: 1 of a class that QuPath ignores, 1 locked; unlock them in QuPath if they are labels); pass --map for "
        "classes that QuPath ignores, such as --map 'Ignore*=other', or create the folder first with wsi-label SLIDES "
        "-o FOLDER --classes tumor,other\n"
    )
    assert invoke(*arguments, "--map", "Ignore*=other", "--patch-side", "64").exit_code == 0


@pytest.mark.parametrize(
    ("features", "left_out"),
    [([], ""), ([{"geometry": None}, {"properties": {"objectType": "detection"}}], " (objects left out: 1 without a "
     "class, 1 not annotations)")],
)  # fmt: skip
def test_files_without_annotations_are_named(
    slide: Path, tmp_path: Path, features: list[dict[str, Any]], left_out: str
) -> None:
    for name in "ab":
        content = {"type": "FeatureCollection", "features": features if name == "a" else []}
        (tmp_path / f"{name}.geojson").write_text(json.dumps(content), encoding="utf-8")
    refused = invoke("import", tmp_path / "a.geojson", tmp_path / "b.geojson", "--slide", slide, "-o", tmp_path / "l")
    assert (refused.exit_code, (tmp_path / "l").exists()) == (1, False)
    assert refused.stderr == (
        f"wsi-label: a.geojson, b.geojson: no annotations with a class{left_out}; in QuPath, assign classes to "
        "the annotations and export them again with File > Export objects as GeoJSON\n"
    )


def test_classes_are_listed_added_renamed_and_merged(folder: Path) -> None:
    done = invoke("classes", folder, "--add", "fat", "--rename", "tumor=carcinoma", "--merge", "fat=stroma")
    assert (done.exit_code, done.output.splitlines()[-2:]) == (0, ["carcinoma", "stroma"])
    assert invoke("classes", folder).output.splitlines()[-2:] == ["carcinoma", "stroma"]


def test_a_class_without_patches_is_removed_from_the_folder(folder: Path) -> None:
    assert invoke("classes", folder, "--add", "fat").exit_code == 0
    assert "0 labeled patches of 0 slides, 1 incomplete" in invoke("report", folder).output
    done = invoke("classes", folder, "--remove", "fat")
    assert (done.exit_code, done.output.splitlines()[-2:]) == (0, ["tumor", "stroma"])
    assert "1 labeled patches of 1 slides, 0 incomplete" in invoke("report", folder).output
    assert load_dataset(folder).class_names == ("tumor", "stroma")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--remove", "nobody"], 1, "class nobody does not exist; the classes are tumor, stroma"),
        (["--remove", "stroma"], 1, "class stroma cannot be removed, because a model needs at least two classes; add"),
        (
            ["--add", "fat", "--remove", "tumor"],
            1,
            "class tumor cannot be removed, because patches show it (1); "
            "merge it into another class with --merge, or label these patches again\n",
        ),
        (["--rename", "nobody=x"], 1, "class nobody does not exist; the classes are tumor, stroma"),
        (["--rename", "tumor=stroma"], 1, "class stroma already exists; to join the two, merge tumor into stroma"),
        (["--rename", "tumor=a:b"], 1, "without ':'"),
        (["--merge", "tumor=tumor"], 1, "class tumor cannot be merged into itself"),
        (["--merge", "tumor=stroma"], 1, "because a model needs at least two classes; add a class with --add first"),
        (["--merge", "tumor"], 2, "--merge: 'tumor' must be two names with = between them"),
    ],
)
def test_a_change_of_classes_that_makes_no_sense_is_refused(
    folder: Path, arguments: list[str], status: int, message: str
) -> None:
    done = invoke("classes", folder, *arguments)
    assert (done.exit_code, message in done.output) == (status, True), done.output


def test_the_report_counts_labels_and_compares_annotators(folder: Path) -> None:
    with EventStore(folder / "labels.sqlite") as store:
        opened = [SlideAdded(digest=digest, stamp="s", name="b.svs", patient="b") for digest in ("cd", "ef")]
        store.append("ann", [*opened, label(64, "absent", "present"), label(128, mark="unsure")])
        store.append("bob", [label(0, "present", "absent")])
    done = invoke("report", folder)
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert "2 labeled patches of 1 slides, 0 incomplete or disputed, 1 unsure, 0 artifacts" in lines
    assert "tumor: present in 1" in lines
    assert "ann and bob, tumor: 0 of 0 blind patches alike, kappa not defined" in lines
    assert any("3 labeled patches have no picture yet" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["report", "none"], 1, "none: has no labels.sqlite"),
        (["report", "n" * 300], 1, "n: has no labels.sqlite"),
        (["none.svs", "-o", "l"], 1, "a model needs at least two classes"),
        (["page", "none.svs", "-o", "l", "--classes", "a,b", "--patient", "("], 2, "not a valid regular expression"),
        (["none.svs", "-o", "l", "--classes", "a,b", "--patient", "(x)(y)"], 2, "has 2 groups; it must have one"),
        (["none.svs", "-o", "l", "--classes", "a,b", "--patient", "^(P)-"], 2, "does not match the file name none.svs"),
        (
            [
                "P1-a",
                "3b",
                "2b",
                "3b",
                "4b",
                "5b",
                "6b",
                "7b",
                "-o",
                "l",
                "--classes",
                "a,b",
                "--patient",
                "^(P[0-9]+)-",
            ],
            2,
            "wsi-label: --patient: '^(P[0-9]+)-' does not match 6 file names: 3b, 2b, 4b, 5b, 6b, ...; add the missing "
            "form to the pattern after a |, as in '^(P[0-9]+|Case [0-9]+)', or rename the files\n",
        ),
        (["none.svs", "-o", "l", "--classes", "a,b", "-m", "none"], 1, "neither a shipped model"),
        (["import", "none.geojson", "--slide", "a.svs", "-o", "l"], 1, "none.geojson: cannot be read"),
    ],
)
def test_what_cannot_work_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert (done.exit_code, message in done.output) == (status, True), done.output


@pytest.mark.full
def test_a_model_gives_its_classes_to_the_folder_that_a_failed_start_left(slide: Path, tmp_path: Path) -> None:
    assert invoke(slide, "-o", tmp_path / "l").exit_code == 1
    with started(slide, "-o", tmp_path / "l", "--model", DEFAULT_MODEL) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split(" ")[0]
        names = [one["name"] for one in ask(url, "state.json")["classes"]]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    classes = load_bundle(DEFAULT_MODEL).card.classes
    assert names == [one.name for one in classes]
    assert load_dataset(tmp_path / "l").classes == tuple(classes), "with their colors, and glass as background"
    assert "background" in {one.role for one in classes}


@pytest.mark.parametrize(
    "arguments",
    [["a.svs", "-o", "new", "--classes", "a,b"], ["import", "a.geojson", "--slide", "a.svs", "-o", "new"],
     ["classes", "l"]],
)  # fmt: skip
def test_a_user_without_a_name_is_asked_for_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.chdir(folder.parent)
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stderr == "wsi-label: this user has no user name; pass your name with --annotator\n"
    assert not (folder.parent / "new").exists()
    assert invoke("classes", "l", "--annotator", "Ann").exit_code == 0


def nobody() -> str:
    raise KeyError("getpwuid(): uid not found: 12345")


def test_the_patient_of_a_new_slide_is_its_name_and_a_known_slide_keeps_its_patient() -> None:
    files = [SlideFile(Path("x", name)) for name in ("a.svs", "a.b.svs", "no-ending")]
    assert [file.added("d", "s", None).patient for file in files] == ["a", "a.b", "no-ending"]
    known = SlideAdded(digest="d", stamp="s", name="a.svs", patient="P7")
    assert [file.added("d", "s", known).patient for file in files] == ["P7"] * 3
    assert SlideFile(Path("a.svs"), "P8").added("d", "s", known).patient == "P8"


def test_the_default_model_is_the_shipped_one() -> None:
    assert DEFAULT_MODEL == DEFAULT_BUNDLE


@pytest.mark.parametrize("command", [("a.svs",), ("import", "a.geojson", "--slide", "a.svs")])
def test_an_address_as_output_is_refused(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*command, "-o", "s3://bucket/labels")
    assert result.exit_code == 2
    assert "--output: s3://bucket/labels is an address (s3://), which is not supported" in result.stderr
    assert list(tmp_path.iterdir()) == []
