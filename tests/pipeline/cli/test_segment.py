"""The command as users run it. No process may use the network."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from models import runtimes
from models.predictor import Predictor
from pipeline.results.record import read_run
from tests.dicom import write_instance
from tests.pipeline.cli.segment_command import invoke
from tests.pipeline.fakes import region_slide
from tests.pipeline.small_bundle import small_bundle
from tests.pipeline.summaries import rows_of
from tests.repository import REPOSITORY
from tests.slides import PINK, painted, small_slide, write_slide

# The hook also sees calls from C. Nothing can catch _exit.
OFFLINE = """
import os, sys
def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        os.write(2, f"network: {event} {arguments}".encode())
        os._exit(99)
sys.addaudithook(forbid)
from pipeline.cli.segment import main
"""
COMMAND = [sys.executable, "-c", OFFLINE + "main()"]
OPTIONS = """-o --output -m --model --mpp --device --precision --batch-size -j --num-workers --recursive
--force --retry-failed --scheduler --spread --slide-timeout --dry-run --json -v --verbose -q --quiet"""


def start(folder: Path, *arguments: str, command: list[str] = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of `wsi-segment` in a folder, on the CPU with the shipped model."""
    process = start(folder, *arguments, "--device", "cpu")
    out, err = process.communicate()
    return process.returncode, out, err


def test_the_console_script_calls_main() -> None:
    (script,) = entry_points(group="console_scripts", name="wsi-segment")
    assert script.value == "pipeline.cli.segment:main"


def test_help_is_fast_imports_no_heavy_library_and_lists_every_option(tmp_path: Path) -> None:
    seen = "\ntry: main()\nfinally: print('modules', *{name.partition('.')[0] for name in sys.modules})"
    cpu_seconds, text = [], ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = start(tmp_path, "--help", command=[sys.executable, "-c", OFFLINE + seen])
        text, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(cpu_seconds) < 0.5
    text, _, modules = text.partition("modules ")
    assert "typer" in modules.split()
    assert not {"torch", "zarr", "dask", "prefect", "numpy", "openslide", "shapely"} & set(modules.split())
    for option in OPTIONS.split():
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), option
    assert "0 no slide failed in this run, 1 a slide failed, or the only slide" in " ".join(text.split())


def test_bad_slides_fail_with_one_line_each_and_are_not_tried_again(fake: Path) -> None:
    slides, out = fake / "slides", fake / "out"
    slides.mkdir()
    small_slide(slides / "größe 組織.svs")
    (slides / "corrupt.svs").write_bytes(b"no slide at all" * 100)
    write_slide(slides / "bare.svs", painted((300, 250), ((20, 20, 250, 200), PINK)), mpp=None)
    write_slide(slides / "glass.svs", painted((500, 400)), mpp=1.0)
    bad = {"corrupt": "cannot be opened as a slide", "bare": "does not contain micrometers per pixel; pass --mpp"}

    def run(*arguments: str) -> tuple[int, list[str]]:
        result = invoke("slides", *arguments, "-o", "out")
        assert result.stdout.splitlines() == ["out/glass", "out/größe 組織"]
        rows = {name: row for name, row in rows_of(out).items() if name != "missing"}
        assert {name: row["status"] for name, row in rows.items()} == {
            "bare": "failed",
            "corrupt": "failed",
            "glass": "no tissue",
            "größe 組織": "done",
        }
        assert all(rows[name]["error"].startswith(f"{name}.svs: ") == (name in bad) for name in rows)
        return result.exit_code, result.stderr.splitlines()

    def one_line(lines: list[str], start: str) -> str:
        (line,) = (line for line in lines if line.startswith(start))
        return line

    status, lines = run()
    assert (status, len(lines)) == (1, 5)
    assert all(reason in one_line(lines, f"failed     {name}.svs: ") for name, reason in bad.items())
    assert one_line(lines, "done       größe 組織: ")
    assert lines[-1] == "4 slides: 1 done, 1 no tissue, 2 failed"
    visible = sorted(path.name for path in out.iterdir() if not path.name.endswith(".failed.json"))
    assert visible == ["glass", "größe 組織", "index.html", "summary.csv"]

    status, lines = run()
    assert (status, len(lines)) == (0, 5)
    before = "failed     before, not tried again (see --retry-failed): "
    assert all(reason in one_line(lines, f"{before}{name}.svs: ") for name, reason in bad.items())
    assert one_line(lines, "skipped    größe 組織: ")
    assert lines[-1] == "4 slides: 2 skipped, 2 failed before, 0 new"

    status, lines = run("missing.svs", "--retry-failed")
    assert (status, len(lines)) == (1, 6)
    assert "no such file" in one_line(lines, "failed     missing.svs: ")
    assert lines[-1] == "5 slides: 2 skipped, 3 failed"


@pytest.mark.full
def test_stdout_contains_only_json_and_quiet_leaves_stderr_empty(tmp_path: Path) -> None:
    small_slide(tmp_path / "a slide.svs")
    status, stdout, stderr = command(tmp_path, "a slide.svs", "-o", "out put", "--json", "--quiet", "--mpp", "2")
    assert (status, stderr) == (0, "")
    (result,) = json.loads(stdout)
    assert (result["slide"], result["status"], result["folder"]) == ("a slide", "done", "out put/a slide")
    run = read_run(tmp_path / "out put" / "a slide")
    assert run is not None
    assert result["areas_mm2"] == run.class_areas_mm2
    assert run.slide.mpp == 2.0
    assert run.slide.mpp_source == "argument"


@pytest.mark.full
def test_an_interrupted_run_names_the_command_that_resumes_it(tmp_path: Path) -> None:
    # The slide has nine blocks of 1024 model pixels, with a spot of tissue in each.
    spots = [((200 + 512 * x, 200 + 512 * y, 100, 100), PINK) for x in range(3) for y in range(3)]
    write_slide(tmp_path / "big.svs", painted((1400, 1400), *spots), mpp=2.0)
    arguments = ["big.svs", "-o", "out", "--output-stride", "1", "-j", "1", "--device", "cpu"]
    process = start(tmp_path, *arguments)
    journal = tmp_path / "out" / ".big.work" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if journal.read_bytes().count(b"\n") >= 1:
                break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (130, "")
    assert len(stderr.splitlines()) == 1
    assert re.match(r"wsi-segment: big\.svs: interrupted.*; run the same command again to resume", stderr)
    assert not (tmp_path / "out" / "big").exists()
    again = start(tmp_path, *arguments)
    stdout, stderr = again.communicate()
    assert (again.returncode, stdout) == (0, "out/big\n")
    assert re.search(r"^done       big: .*resumed after [1-8] blocks?", stderr)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["big", "index.html", "summary.csv"]


def test_an_interrupt_before_the_first_slide_exits_130_too(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "from_bundle", interrupt)
    result = invoke(str(small_slide(fake / "a.svs")))
    assert result.exit_code == 130
    assert result.stderr == "wsi-segment: interrupted; run the same command again to resume\n"


def test_results_go_to_stdout_and_progress_to_stderr(fake: Path) -> None:
    region_slide(fake / "a.svs")
    first = invoke("a.svs", "-o", "out")
    assert (first.exit_code, first.stdout) == (0, "out/a\n")
    assert re.fullmatch(r"done       a: class-0 0\.5\d mm², class-1 0\.08 mm² \(\d+\.\d s\)\n", first.stderr)
    second = invoke("a.svs", "-o", "out")
    assert (second.exit_code, second.stdout) == (0, "out/a\n")
    assert "(same inputs, result kept)" in second.stderr


def test_a_full_stderr_does_not_stop_the_run(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, file: object = None) -> None:
        if file is not None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.cli.segment.print", full, raising=False)
    small_slide(fake / "a.svs")
    model = small_bundle(fake / "model").path  # not shipped, so its digest is printed
    assert invoke("a.svs", "-m", str(model), "-o", "out").exit_code == 0
    assert (fake / "out/a/run.json").is_file()


def test_the_qupath_project_is_written_although_stdout_is_closed(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    small_slide(fake / "a.svs")
    printed = invoke("a.svs", "-o", "out", "--qupath")
    assert printed.stdout.splitlines()[0] == "out/a"
    (project,) = map(Path, printed.stdout.splitlines()[1:])
    shutil.rmtree(fake / "out/qupath")
    monkeypatch.setattr("pipeline.cli.segment.print", closed, raising=False)
    invoke("a.svs", "-o", "out", "--qupath")
    assert project.is_file()


def test_quiet_prints_only_errors(fake: Path) -> None:
    small_slide(fake / "a.svs")
    (fake / "b.svs").write_bytes(b"nothing")
    assert (invoke("a.svs", "-q").exit_code, invoke("a.svs", "-q").output) == (0, "")
    result = invoke("a.svs", "b.svs", "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("failed     b.svs: ")


def test_json_of_a_batch_has_an_entry_for_each_slide(fake: Path) -> None:
    small_slide(fake / "a.svs")
    result = invoke("a.svs", "missing.svs", "--json", "-o", "out")
    assert result.exit_code == 1
    done, failed = json.loads(result.stdout)
    assert (done["status"], done["folder"], done["error"]) == ("done", "out/a", "")
    assert (failed["status"], failed["folder"]) == ("failed", None)
    assert failed["error"].startswith("missing.svs: no such file")


def test_the_only_slide_is_alone_however_it_is_named(fake: Path) -> None:
    (fake / "series").mkdir()
    for name, columns in (("1.dcm", 512), ("2.dcm", 1024)):
        write_instance(fake / "series" / name, "1.2.3", columns=columns)  # headers only: the slide fails
    (fake / "in").mkdir()
    (fake / "in/bad.svs").write_bytes(b"not a slide")
    for status, slides in (
        (1, ["series/1.dcm"]), (1, ["series/1.dcm"]), (1, ["series/2.dcm"]), (0, ["series"]),
        (1, ["in/bad.svs"]), (1, ["in/bad.svs", "in/bad.svs"]), (0, ["in"]), (0, ["in", "in/bad.svs"]),
    ):  # fmt: skip
        assert invoke(*slides, "-o", "out").exit_code == status, slides


def test_json_names_the_failures_of_earlier_runs(fake: Path) -> None:
    (fake / "bad.svs").write_bytes(b"not a slide")
    assert [invoke("bad.svs", "--json").exit_code for _ in range(2)] == [1, 1]
    (again,) = json.loads(invoke("bad.svs", "--json").stdout)
    assert (again["status"], again["failed_before"]) == ("failed", True)


def test_a_result_of_another_run_is_refused_and_force_replaces_it(fake: Path) -> None:
    small_slide(fake / "a.svs")
    assert invoke("a.svs").exit_code == 0
    refused = invoke("a.svs", "--simplify", "2")
    assert refused.exit_code == 1
    assert "results/a: holds the result of another run (other parameters); pass --force" in refused.stderr
    assert invoke("a.svs", "--simplify", "2", "--force").exit_code == 0
    run = read_run(fake / "results" / "a")
    assert run is not None
    assert run.identity.parameters["simplify_px"] == 2


def test_recursive_and_manifests_find_their_slides(fake: Path) -> None:
    (fake / "slides" / "deep").mkdir(parents=True)
    write_slide(fake / "slides" / "deep" / "a.svs", painted((300, 250), ((20, 20, 250, 200), PINK)), mpp=None)
    (fake / "slides" / "list.csv").write_text("slide,mpp\ndeep/a.svs,2.0\n", encoding="utf-8")
    flat = invoke("slides")
    assert flat.exit_code == 2
    assert "pass --recursive" in flat.stderr
    below = invoke("slides", "--recursive", "--mpp", "1", "-o", "one")
    listed = invoke("slides/list.csv", "--mpp", "1", "-o", "two")
    assert (below.stdout, listed.stdout) == ("one/a\n", "two/a\n")
    runs = [read_run(fake / name / "a") for name in ("one", "two")]
    assert [run.slide.mpp for run in runs if run] == [1.0, 2.0]


def test_a_dry_run_prints_the_plan_and_writes_nothing(fake: Path) -> None:
    write_slide(fake / "a [b].svs", painted((1280, 832), ((160, 96, 960, 640), PINK)), mpp=0.5, levels=(1, 2))
    result = invoke("a [b].svs", "--dry-run", "-o", "out", "--json")
    assert result.exit_code == 0
    (plan,) = json.loads(result.stdout)
    assert plan["slide"] == "a [b].svs"
    assert (plan["mpp"], plan["mpp_source"], plan["level"]) == (0.5, "slide", 1)
    assert plan["blocks"] == 1
    assert plan["tiles"] > 0
    assert plan["memory_bytes"] > 0
    assert plan["disk_bytes"] > 0
    assert (plan["device"], plan["precision"], plan["result"]) == ("cpu", "float32", "a [b]")
    assert plan["runtime"] in ("torch", "openvino")
    assert plan["instructions"]
    assert plan["seconds_estimated"] > 0
    text = invoke("a [b].svs", "--dry-run", "-o", "out")
    assert text.exit_code == 0
    lines = [line.split(maxsplit=1) for line in text.stdout.splitlines()[1:]]
    facts = {name: value for name, value in lines if name != "mpp"}
    assert text.stdout.startswith("a [b].svs\n")
    assert re.search(r"^  mpp source +slide$", text.stdout, re.MULTILINE)
    assert (facts["level"], facts["blocks"], facts["tiles"]) == ("1", "1", str(plan["tiles"]))
    assert facts["memory"].endswith(" MiB")
    assert facts["disk"].endswith(" MiB")
    assert [p.name for p in fake.iterdir()] == ["a [b].svs"]


def test_a_dry_run_refuses_a_runtime_that_cannot_compute_in_the_precision(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = SimpleNamespace(get_property=lambda *_: ["FP32"])
    monkeypatch.setattr(runtimes, "load_openvino", lambda: SimpleNamespace(Core=lambda: core))
    monkeypatch.setattr(runtimes, "processor_flags", lambda: frozenset({"bf16"}))
    for module in ("models.runtimes", "pipeline.cli.plans"):
        monkeypatch.setattr(f"{module}.find_spec", lambda _: object())
    small_slide(fake / "a.svs")
    result = invoke("a.svs", "--dry-run", "--device", "cpu", "--runtime", "openvino", "--precision", "bf16")
    assert result.exit_code != 0
    assert "runtime openvino: this machine's processor does not compute in bf16; use precision float32" in result.stderr


def test_a_dry_run_shows_what_would_fail(fake: Path) -> None:
    for name in ("x", "y"):
        (fake / name).mkdir()
        small_slide(fake / name / "a.svs")
    (fake / "bad.svs").write_bytes(b"nothing")
    result = invoke("x", "y", "bad.svs", "--dry-run", "--json")
    assert result.exit_code == 1
    plans = json.loads(result.stdout)
    assert [(plan["result"], plan.get("error", "")[:34]) for plan in plans] == [
        ("x/a", ""), ("y/a", ""), ("bad", "bad.svs: cannot be opened as a sli")
    ]  # fmt: skip


@pytest.mark.usefixtures("fake")
def test_rows_that_cannot_be_written_are_the_last_line_and_give_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def immutable(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("pipeline.batch.board.write_summary", immutable)
    result = invoke(str(small_slide(tmp_path / "a.svs")), "-o", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert (tmp_path / "out" / "a" / "run.json").exists()
    assert result.stderr.splitlines()[-1].startswith(
        f"wsi-segment: {tmp_path / 'out'}: 1 row of this run could not be written to summary.csv; "
    )
