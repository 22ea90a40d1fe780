"""Runs that meet an earlier result: finished ones are kept, stopped ones are resumed, and locked ones are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import Cancelled, LockedError, OtherResultError, OutputError
from pipeline.results.folder import open_folder
from pipeline.slide.recipe import segment_slide
from tests.cases import full
from tests.pipeline.fakes import SMALL, color_predictor, constant_predictor, labels_of, published, region_slide
from tests.pipeline.ignored_case import ignore_case
from tests.pipeline.runs import IDENTITY
from tests.slides import small_slide


def test_a_finished_result_is_kept_another_runs_is_refused_and_force_replaces_it(tmp_path: Path) -> None:
    path, out = region_slide(tmp_path / "slide.svs"), tmp_path / "out"
    assert segment_slide(path, out, color_predictor(), SMALL).status == "done"
    folder = out / "slide"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = segment_slide(path, out, color_predictor(), SMALL)
    assert again.status == "skipped"
    assert again.areas_mm2["class-1"] == pytest.approx(320 * 256 / 1e6)
    with pytest.raises(OutputError, match=r"another run \(other model\); pass --force"):
        segment_slide(path, out, constant_predictor([1.0, 0.0]), SMALL)
    with pytest.raises(OutputError, match="other parameters"):
        segment_slide(path, out, color_predictor(), replace(SMALL, canvas_m=512))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    (folder / "notes.txt").write_text("mine")
    forced = segment_slide(path, out, constant_predictor([1.0, 0.0]), replace(SMALL, force=True))
    assert forced.status == "done"
    assert (folder / "notes.txt").read_text() == "mine"
    assert set(np.unique(labels_of(folder))) == {0, 1}
    assert sorted(p.name for p in out.iterdir()) == ["slide"]


@pytest.mark.full
def test_a_changed_slide_in_another_spelling_is_not_another_slide_if_case_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    segment_slide(small_slide(tmp_path / "slide.svs"), out, color_predictor(), SMALL)
    changed = region_slide(tmp_path / "SLIDE.svs")
    with pytest.raises(OtherResultError, match="holds the result of another slide"):
        segment_slide(changed, out, color_predictor(), SMALL, name="slide")
    ignore_case(monkeypatch)
    with pytest.raises(OtherResultError, match=r"holds the result of another run \(other slide\); pass --force"):
        segment_slide(changed, out, color_predictor(), SMALL, name="slide")


def test_a_slide_with_the_name_of_another_ones_result_is_refused_by_both_names(tmp_path: Path) -> None:
    first, out = small_slide(tmp_path / "first.svs"), tmp_path / "out"
    segment_slide(first, out, color_predictor(), SMALL, name="slide")
    second = region_slide(tmp_path / "second.svs")
    expected = (
        f"{second}: {out / 'slide'} holds the result of another slide, first.svs (see its run.json); choose another "
        "--output, or name the new result in the column 'id' of a manifest; --force would remove the result of the "
        "other slide"
    )
    with pytest.raises(OtherResultError) as refused:
        segment_slide(second, out, color_predictor(), SMALL, name="slide")
    assert str(refused.value) == expected
    region_slide(first)
    (tmp_path / "link").symlink_to(tmp_path)
    for same in (first, tmp_path / "link" / "first.svs"):
        with pytest.raises(OtherResultError, match=r"another run \(other slide\); pass --force to replace it"):
            segment_slide(same, out, color_predictor(), SMALL, name="slide")
    record = out / "slide" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"polygons": "x"}))
    with pytest.raises(OtherResultError, match=r"another run \(other slide\); pass --force to replace it"):
        segment_slide(second, out, color_predictor(), SMALL, name="slide")


def test_a_folder_that_no_run_made_is_never_touched(tmp_path: Path) -> None:
    path, out = region_slide(tmp_path / "slide.svs"), tmp_path / "out"
    (out / "slide").mkdir(parents=True)
    (out / "slide" / "thesis.docx").write_text("years of work")
    for force in (False, True):
        with pytest.raises(OutputError, match="was not written by wsi-segment"):
            segment_slide(path, out, color_predictor(), replace(SMALL, force=force))
    assert [p.name for p in (out / "slide").iterdir()] == ["thesis.docx"]
    assert [p.name for p in out.iterdir()] == ["slide"]


@pytest.mark.full
def test_two_runs_do_not_work_on_one_slide(tmp_path: Path) -> None:
    from filelock import FileLock

    path, out = region_slide(tmp_path / "slide.svs"), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".slide.lock"), pytest.raises(LockedError, match="another process is working on this slide"):
        segment_slide(path, out, color_predictor(), SMALL)
    assert segment_slide(path, out, color_predictor(), SMALL).status == "done"


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from dataclasses import replace
    from pipeline.slide.recipe import segment_slide
    from tests.pipeline.fakes import SMALL, color_predictor

    def progress(stage, done, total):
        if (stage, done) == ("segmenting", 9) or stage == sys.argv[3]:
            os.kill(os.getpid(), getattr(signal, sys.argv[4]))

    config = replace(SMALL, simplify_px=1.0, min_area_um2=2000.0)
    segment_slide(Path(sys.argv[1]), Path(sys.argv[2]), color_predictor(), config, progress)
""")


@pytest.mark.parametrize(
    "stage",
    [full("segmenting"), full("joining polygons"), full("building the pyramid"), full("publishing")],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, stage: str) -> None:
    path, out = region_slide(tmp_path / "slide.svs"), tmp_path / "out"
    config = replace(SMALL, simplify_px=1.0, min_area_um2=2000.0)
    script = KILLED if stage == "segmenting" else KILLED.replace('("segmenting", 9)', "None")
    killed = subprocess.run(
        [sys.executable, "-c", script, str(path), str(out), stage if stage != "segmenting" else "-", "SIGKILL"],
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    assert not (out / "slide").exists()
    # What a crash of the machine may leave: a line cut short, and a block whose file is damaged.
    journal = out / ".slide.work" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    finished = len(lines)
    journal.write_bytes(b"".join(lines) + lines[-1][: len(lines[-1]) // 2])
    damaged = json.loads(json.loads(lines[0])["record"])
    (out / ".slide.work" / next(iter(damaged["files"]))).write_bytes(b"torn")

    blocks: list[int] = []
    resumed = segment_slide(
        path,
        out,
        color_predictor(),
        config,
        lambda name, done, _: blocks.append(done) if name == "segmenting" else None,
    )
    assert resumed.resumed_blocks == finished - 1 >= 8
    assert blocks[0] == finished - 1
    undisturbed = segment_slide(path, tmp_path / "undisturbed", color_predictor(), config)
    assert blocks[-1] == len(blocks) - 1 + finished - 1
    assert resumed.folder is not None
    assert undisturbed.folder is not None
    assert published(resumed.folder) == published(undisturbed.folder)
    assert [p.name for p in out.iterdir()] == ["slide"]


@pytest.mark.full
def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    path, out = region_slide(tmp_path / "slide.svs"), tmp_path / "out"
    stopped = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(out), "-", "SIGINT"],
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert "slide.svs: interrupted; run the same command again to resume" in stopped.stderr.splitlines()[-1]
    assert not (out / "slide").exists()
    config = replace(SMALL, simplify_px=1.0, min_area_um2=2000.0)
    assert segment_slide(path, out, color_predictor(), config).resumed_blocks >= 9


@pytest.mark.full
def test_an_unfinished_run_of_other_inputs_is_not_gone_on_with(tmp_path: Path) -> None:
    path, out = region_slide(tmp_path / "slide.svs"), tmp_path / "out"

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "joining polygons":
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError):
        segment_slide(path, out, constant_predictor([1.0, 0.0]), SMALL, interrupt)
    assert (out / ".slide.work" / "journal.jsonl").exists()
    result = segment_slide(path, out, color_predictor(), SMALL)
    assert result.resumed_blocks == 0
    assert set(np.unique(labels_of(out / "slide"))) == {0, 1, 2}


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a slide, its result in `undisturbed`, and the working folder of its unfinished run."""

    def interrupt(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("segmenting", 9):
            raise KeyboardInterrupt

    root = tmp_path_factory.mktemp("unfinished")
    path = region_slide(root / "slide.svs")
    segment_slide(path, root / "undisturbed", color_predictor(), SMALL)
    with pytest.raises(Cancelled):
        segment_slide(path, root, color_predictor(), SMALL, interrupt)
    return root


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"")], ids=["missing", "empty"])
def test_a_resumed_run_writes_the_metadata_of_the_map_again(
    unfinished: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    out = shutil.copytree(unfinished, tmp_path / "out")
    store = out / ".slide.work" / "result" / "slide.ome.zarr"
    files = [*store.rglob(".z*"), store / "OME" / "METADATA.ome.xml"]
    assert len(files) > 5
    for file in files:
        spoil(file)
    resumed = segment_slide(out / "slide.svs", out, color_predictor(), SMALL)
    assert resumed.resumed_blocks >= 9
    assert published(out / "slide") == published(out / "undisturbed" / "slide")


def replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def put_first(file: Path, line: bytes) -> None:
    file.write_bytes(line + b"\n" + file.read_bytes())


MAP = "result/slide.ome.zarr"
DAMAGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    # the damage of the working folder, and whether it leaves finished blocks
    "tissue that is not text": (lambda work: (work / "tissue.txt").write_bytes(b"\xff"), False),
    "a line of many brackets": (lambda work: put_first(work / "journal.jsonl", b"[" * 200_000), True),
    "a file instead of a group": (lambda work: replace_by_a_file(work / MAP / "OME"), False),
    "a file instead of the map": (lambda work: replace_by_a_file(work / MAP), False),
    "a folder instead of metadata": (lambda work: replace_by_a_folder(work / MAP / "1" / ".zarray"), False),
}


@pytest.mark.full
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("force", [full(force) if force else force for force in (False, True)])
def test_a_run_gets_over_a_damaged_working_folder(
    unfinished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, *, force: bool
) -> None:
    spoil, resumes = DAMAGES[damage]
    out = shutil.copytree(unfinished, tmp_path / "out")
    spoil(out / ".slide.work")
    result = segment_slide(out / "slide.svs", out, color_predictor(), replace(SMALL, force=force))
    assert (result.resumed_blocks >= 9) == resumes
    assert ("starting from the beginning" in caplog.text) != resumes
    assert published(out / "slide") == published(out / "undisturbed" / "slide")


@pytest.mark.full
def test_a_full_disk_is_said_so_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real file system of 4 MiB, so that the error comes from the kernel."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        (small / "ballast").write_bytes(b"x" * (4 * 2**20 - 300 * 1024))
        monkeypatch.setattr("pipeline.slide.recipe.check_resources", lambda *_: None)
        path = region_slide(tmp_path / "slide.svs")
        with pytest.raises(OutputError, match=r"^slide\.svs: the disk of .* is full .*free some space"):
            segment_slide(path, small / "out", color_predictor(), replace(SMALL, canvas_m=512))
        assert not (small / "out" / "slide").exists()
        (small / "ballast").unlink()
        result = segment_slide(path, small / "out", color_predictor(), replace(SMALL, canvas_m=512))
        assert result.status == "done"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_locked_slide_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "slide.svs").write_bytes(b"not a slide")
    with (
        open_folder(tmp_path / "out", "slide", IDENTITY, {}),
        pytest.raises(LockedError, match="another process is working on this slide"),
    ):
        segment_slide(tmp_path / "slide.svs", tmp_path / "out", color_predictor(), SMALL)
