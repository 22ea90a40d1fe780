"""Hostile files that are not slides, hostile names, and their effect on the process."""

from __future__ import annotations

import ast
import json
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import dask
import pytest

from models.bundle import load_bundle
from models.card import ClassifierCard, ModelCard, SegmenterCard
from models.errors import InvalidCardError
from models.tissue_class import TissueClass
from pipeline.batch.collect import collect_jobs
from pipeline.batch.names import OWN_NAMES, name_clashes
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError, OutputError, UnreadableImageError
from pipeline.pages.report_page import write_report
from pipeline.progress import no_progress
from pipeline.results.record import read_run
from pipeline.slide.recipe import segment_slide
from pipeline.training.dataset import Sample, image_size, read_rgb
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess
from pipeline.workers.open import open_workers
from tests.full.fuzz import fuzz
from tests.models.networks import ColorClassifier, ColorSegmenter, make_card
from tests.pipeline.fakes import COLORS, SMALL, color_predictor, predictor, run_of
from tests.pipeline.small_bundle import small_bundle
from tests.pipeline.summaries import rows_of
from tests.repository import REPOSITORY
from tests.slides import small_slide

CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "loads what a text names",
    "os.system": "a shell",
    "os.popen": "a shell",
    "pickle.load": "executes code from the file",
    "pickle.loads": "executes code from the file",
    "pickle.Unpickler": "executes code from the file",
    "marshal.loads": "makes code of bytes",
    "shelve.open": "is a pickle",
    "joblib.load": "is a pickle",
    "dill.loads": "is a pickle",
    "cloudpickle.loads": "is a pickle",
    "torch.load": "is a pickle",
    "torch.jit.load": "executes code from the file",
    "torch.hub.load": "executes code from the network",
    "yaml.load": "makes objects of what the file names",
    "pd.read_pickle": "is a pickle",
    "subprocess.getoutput": "a shell",
}
"""What may not be called on anything foreign, and why."""

ALLOWED = {
    ("pipeline/training/checkpoints.py", "torch.load"): "of a published checkpoint, with weights_only=True",
    ("pipeline/training/inputs.py", "torch.load"): "of a package's own file, with weights_only=True",
    (
        "pipeline/workers/cluster/slide_tasks.py",
        "pickle.loads",
    ): "from a worker of Dask's, which unpickles all that they say",
    (
        "pipeline/workers/cluster/tasks.py",
        "pickle.loads",
    ): "of what the client submits, which Dask unpickles anyway",
    (
        "pipeline/workers/outcome.py",
        "pickle.loads",
    ): "of bytes that the line itself has made, to see whether they can be",
}
"""The exceptions in the packages, each with its reason."""

OPTIONS = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False}
"""Options that turn what may be called into what may not."""


def name_of(function: ast.expr) -> str:
    """A called name as it is written: "torch.load"."""
    return ast.unparse(function) if isinstance(function, (ast.Name, ast.Attribute)) else ""


def dangerous(source: str) -> list[str]:
    """The calls in a module's text that are in `CALLS`, and those with one of `OPTIONS`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        if name in CALLS:
            found.append(name)
        found += [
            f"{name}({option.arg}=)"
            for option in node.keywords
            if option.arg in OPTIONS
            and not (isinstance(option.value, ast.Constant) and option.value.value is not OPTIONS[option.arg])
        ]
    return found


def test_no_package_runs_unpickles_or_hands_to_a_shell_what_is_foreign() -> None:
    found = {
        (path.relative_to(REPOSITORY).as_posix(), call)
        for package in ("wsi", "models", "pipeline", "flows")
        for path in (REPOSITORY / package).rglob("*.py")
        for call in dangerous(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)


def test_the_exceptions_are_what_their_reasons_say() -> None:
    inputs = (REPOSITORY / "pipeline" / "training" / "inputs.py").read_text(encoding="utf-8")
    assert inputs.count("return Path(getattr(module, file_class).get_model_file_path())") == 1
    assert inputs.count("torch.load(_imagenet_file(name), weights_only=True)") == inputs.count("torch.load(") == 1
    checkpoints = REPOSITORY / "pipeline" / "training" / "checkpoints.py"
    assert 'torch.load(file, map_location="cpu", weights_only=True)' in checkpoints.read_text("utf-8")
    outcome = REPOSITORY / "pipeline" / "workers" / "outcome.py"
    assert "pickle.loads(pickle.dumps(error))" in outcome.read_text("utf-8")


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=choice)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_a_dangerous_call_is_seen(line: str) -> None:
    assert len(dangerous(f"def f():\n    {line}\n")) == 1
    assert dangerous("np.load(path, allow_pickle=False)\nmodel.eval()\nre.compile('x')") == []


@pytest.mark.parametrize(
    "name", ["...svs", "..svs", ".hidden.svs", ".a.work.svs", "index.html.svs", "Summary.csv.tif", "QuPath.svs", ".."]
)
def test_a_slide_whose_name_is_in_the_way_of_our_own_files_fails_alone_and_by_name(tmp_path: Path, name: str) -> None:
    slides, output = tmp_path / "slides", tmp_path / "results" / "deep"
    slides.mkdir()
    bad, good = slides / name, small_slide(slides / "good.svs")
    if name != "..":
        small_slide(bad)
    workers = InProcess(lambda _: color_predictor(), "model", SMALL)
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    results = run_batch([SlideJob(bad), SlideJob(good)], output, workers, lambda _: no_progress, lambda _: None)
    assert [result.status for result in results] == ["failed", "done"]
    assert results[0].error.startswith(f"{bad}: results are named after slides, and {bad.stem!r} cannot be the name of")
    new = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - before
    assert {path.parts[:2] for path in new} <= {("results",), ("results", "deep")}
    assert sorted(path.name for path in output.iterdir()) == ["good", "index.html", "summary.csv"]


def test_the_names_that_are_kept_free_are_those_that_runs_write(tmp_path: Path) -> None:
    from pipeline.viewing.qupath.project import write_project

    output = tmp_path / "out"
    workers = InProcess(lambda _: color_predictor(), "model", SMALL)
    jobs = [SlideJob(small_slide(tmp_path / "a.svs"))]
    run_batch(jobs, output, workers, lambda _: no_progress, lambda _: None)
    write_project(output)
    assert {path.name for path in output.iterdir()} == {"a", *OWN_NAMES}


@pytest.mark.parametrize("name", ["CON.svs", "a b.svs", "-rf.svs", "$(id).svs", "%2e%2e.svs", "é\n.svs", "=1+1.svs"])
def test_a_strange_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    result = segment_slide(small_slide(tmp_path / name), tmp_path / "out", color_predictor(), SMALL)
    assert result.folder == tmp_path / "out" / Path(name).stem
    assert write_report(tmp_path / "out").is_file()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([Path(name).stem, "index.html"])


def test_a_manifest_may_name_slides_anywhere_and_results_stay_in_the_output(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    small_slide(tmp_path / "up.svs")
    absolute = small_slide(tmp_path / "absolute.svs")
    manifest = tmp_path / "lists" / "m.csv"
    manifest.write_text(f"slide,mpp\n../up.svs,1\n{absolute},1\n../lists/../up.svs,1\n..,\n../no/../../x,\n")
    jobs = collect_jobs([manifest])
    workers = InProcess(lambda _: color_predictor(), "model", SMALL)
    output = tmp_path / "results" / "here"
    results = run_batch(jobs, output, workers, lambda _: no_progress, lambda _: None)
    assert [result.status for result in results] == ["done", "done", "failed", "failed"]
    assert sorted(path.name for path in output.iterdir()) == ["absolute", "index.html", "summary.csv", "up"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["absolute.svs", "lists", "results", "up.svs"]


def test_a_zero_byte_in_a_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"slide,mpp\na.svs,1\nb\0.svs,1\n")
    with pytest.raises(ConfigError, match=r"m\.csv(, line 3: the column 'slide' contains a zero|: cannot be read)"):
        collect_jobs([tmp_path / "m.csv"])


@pytest.mark.parametrize("length", [200, 251])
def test_a_name_as_long_as_names_can_be_works_or_fails_by_name(tmp_path: Path, length: int) -> None:
    slide = small_slide(tmp_path / ("x" * length + ".svs"))
    workers = InProcess(lambda _: color_predictor(), "model", SMALL)
    (result,) = run_batch([SlideJob(slide)], tmp_path / "out", workers, lambda _: no_progress, lambda _: None)
    if length == 200:
        assert result.status == "done"
    else:
        assert result.status == "failed"
        assert "File name too long" in result.error
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "summary.csv"]


@pytest.mark.parametrize("length", [240, 246, 249])
def test_a_name_that_is_too_long_for_its_files_fails_before_the_work(tmp_path: Path, length: int) -> None:
    slide = small_slide(tmp_path / ("y" * length + ".svs"))
    stages: list[str] = []

    def run() -> None:
        segment_slide(slide, tmp_path / "out", color_predictor(), SMALL, lambda stage, *_: stages.append(stage))

    if length < 249:
        run()
        return
    with pytest.raises(OutputError, match="File name too long"):
        run()
    assert "joining polygons" not in stages


def test_an_output_folder_that_is_a_link_is_the_folder_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    segment_slide(small_slide(tmp_path / "a.svs"), tmp_path / "out", color_predictor(), SMALL)
    assert read_run(tmp_path / "disk" / "a") is not None


@pytest.mark.parametrize("name", [".a.work", ".a.old", "a"])
def test_a_planted_link_never_lets_a_run_remove_or_replace_what_it_leads_to(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(precious)
    with pytest.raises(OutputError):
        segment_slide(small_slide(tmp_path / "a.svs"), tmp_path / "out", color_predictor(), SMALL)
    assert {path.name: path.read_text() for path in precious.iterdir()} == {"thesis.txt": "years of work"}


@pytest.mark.parametrize("name", [".a.lock", ".summary.lock", ".report.lock", "summary.csv", "index.html"])
def test_a_planted_link_never_lets_a_run_overwrite_the_file_it_leads_to(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("slide,status\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(precious)
    workers = InProcess(lambda _: color_predictor(), "model", SMALL)
    job = SlideJob(small_slide(tmp_path / "a.svs"))
    run_batch([job], tmp_path / "out", workers, lambda _: no_progress, lambda _: None)
    assert precious.read_text() == "slide,status\n"


class Tags(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def test_html_in_class_names_and_slide_names_is_text_on_the_pages_and_in_the_viewer(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from pipeline.viewing.viewer.app import make_app
    from pipeline.viewing.viewer.results import find_results

    names = (EVIL[:64].strip(), "</script><b onclick='x'>")
    pages = {}
    for kind, chosen, stem in (("evil", names, "<b onload=x>&amp;"), ("plain", ("gland", "stroma"), "plain")):
        classes = tuple(TissueClass(n, c) for n, c in zip(chosen, COLORS, strict=True))
        model = predictor(ColorClassifier(COLORS), ColorSegmenter(COLORS, sharpness=400.0))
        model.card = make_card(COLORS).model_copy(update={"classes": classes})
        output = tmp_path / kind
        folder = segment_slide(small_slide(tmp_path / f"{stem}.svs"), output, model, SMALL).folder
        assert folder is not None
        geojson = json.loads((folder / f"{stem}.geojson").read_text(encoding="utf-8"))
        assert {f["properties"]["classification"]["name"] for f in geojson["features"]} == {chosen[0]}
        with TestClient(make_app(find_results(output), "ann"), base_url="http://127.0.0.1") as client:
            (found,) = find_results(output)
            viewer = client.get(f"/slides/{found.id}/").text
            facts = client.get(f"/slides/{found.id}/{found.version}/facts.json").json()
            assert [one["name"] for one in facts["classes"]] == list(chosen)
        texts = [write_report(output).read_text(encoding="utf-8"), (folder / "index.html").read_text("utf-8"), viewer]
        pages[kind] = [Tags(text).found for text in texts]
    assert pages["evil"] == pages["plain"]
    assert all(len(tags) > 10 for tags in pages["plain"])


def test_html_in_a_changed_run_json_and_summary_is_text_on_the_report(tmp_path: Path) -> None:
    folder = segment_slide(small_slide(tmp_path / "a.svs"), tmp_path / "out", color_predictor(), SMALL).folder
    assert folder is not None
    readable = run_of(folder) | {"model": EVIL, "warnings": [EVIL]}
    damaged = readable | {"status": EVIL, "class_areas_mm2": {EVIL: 1.0}, "classes": [{"name": EVIL, "color": [1, 2]}]}
    for run in (readable, damaged):
        (folder / "run.json").write_text(json.dumps(run))
        text = write_report(tmp_path / "out").read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert all("onerror" not in names for _, names in Tags(text).found)
        assert ("&lt;script&gt;alert(1)" in text) == (run is readable)
        assert ("a/run.json is missing or cannot be read" in text) == (run is damaged)


@pytest.mark.parametrize("name", ["a:b", "a\nb", "a\x00b", " a", "", "x" * 65, "\u202ea"])
def test_a_class_name_that_readers_stumble_over_is_refused(tmp_path: Path, name: str) -> None:
    bundle = small_bundle(tmp_path / "small").path
    card = json.loads((bundle / "model.json").read_text(encoding="utf-8"))
    card["classes"][0]["name"] = name
    (bundle / "model.json").write_text(json.dumps(card))
    with pytest.raises(InvalidCardError, match=r"model\.json: classes\.0\.name"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/any/x", "tu-hf-hub:someone/model", "../x", "a b"])
def test_a_card_cannot_make_the_libraries_fetch_a_network(name: str) -> None:
    with pytest.raises(ValueError, match="String should match pattern"):
        SegmenterCard(encoder=name, depth=4, rates=(1, 2, 4))
    with pytest.raises(ValueError, match="String should match pattern"):
        ClassifierCard(backbone=name, head="gap")


def test_a_card_nested_a_hundred_thousand_times_is_refused(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "small").path
    (bundle / "model.json").write_bytes(b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(InvalidCardError, match="not valid JSON"):
        load_bundle(bundle)
    assert ModelCard.model_config["extra"] == "forbid"


def test_a_picture_that_claims_to_be_huge_is_refused_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    sample = Sample("bomb", tmp_path / "bomb.png", None, "", (True, False))
    for read in (read_rgb, image_size):
        with pytest.raises(UnreadableImageError, match=r"bomb\.png: cannot be read: Image size \(3600000000 pixels\)"):
            read(sample)


@pytest.mark.parametrize(
    ("target", "tries", "seen"),
    [
        ("bundles", 25, {"InvalidCardError", "WeightsMismatchError"}),
        ("journals", 30, {"result"}),
        ("tables", 200, {"result", "ConfigError", "LabelError", "OutputError"}),
        ("toml", 200, {"DatasetFileError", "TrainConfigError", "MissingImagesError"}),
        ("geojson", 30, {"result"}),
    ],
)
def test_spoilt_files_end_with_a_result_or_an_error_of_ours(target: str, tries: int, seen: set[str]) -> None:
    tally = fuzz(target, seed=7, numbers=iter(range(tries)))
    assert not tally.findings, tally.details()
    assert tally.tries == tries
    assert seen <= set(tally.outcomes)


def test_a_reader_that_crashes_ends_a_process_and_not_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # Each process that is ended and started anew loads torch: one is enough to see it.
    monkeypatch.setattr("pipeline.workers.cluster.local_processes.ALLOWED_FAILURES", 0)
    bundle = small_bundle(tmp_path / "small").path
    config = SegmentConfig(
        block_out=64, num_workers=1, device="cpu", batch_size=4, runtime="torch", backend="openslide"
    )
    slides = [small_slide(tmp_path / f"{name}.svs") for name in ("crash", "last")]
    with (
        dask.config.set({"distributed.worker.preload": ["tests.full.segfaulting"]}),
        open_workers("local", str(bundle), config) as workers,
    ):
        results = run_batch(
            [SlideJob(path) for path in slides], tmp_path / "out", workers, lambda _: no_progress, lambda _: None
        )
    assert [result.status for result in results] == ["failed", "done"]
    assert results[0].error.startswith("crash.svs: every process that ran it died")
    assert {name: row["status"] for name, row in rows_of(tmp_path / "out").items()} == {
        "crash": "failed",
        "last": "done",
    }
    assert not name_clashes([SlideJob(path) for path in slides])
