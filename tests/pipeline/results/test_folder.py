from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import LockedError, OtherResultError, OutputError
from pipeline.results.digests import write_result
from pipeline.results.find import result_folders, result_name
from pipeline.results.folder import ResultFolder, check_unlocked, is_locked, open_folder
from tests.pipeline.runs import IDENTITY, make_run


def build(folder: ResultFolder, *names: str, text: str = "new") -> None:
    for name in names:
        (folder.result / name).write_text(text)
    write_result(folder.result, make_run(outputs=(*names, "chunks.tsv", "run.json")), {})


def publish(out: Path, *names: str, text: str = "new", force: bool = False) -> None:
    with open_folder(out, "slide", IDENTITY, {}, force=force) as folder:
        build(folder, *names, text=text)
        folder.publish()


def contents(out: Path) -> dict[str, str]:
    return {
        p.relative_to(out).as_posix(): p.read_text()
        for p in out.rglob("*")
        if p.is_file() and p.name not in ("run.json", "chunks.tsv")
    }


def test_a_result_is_published_whole_without_leftovers(tmp_path: Path) -> None:
    publish(tmp_path, "slide.geojson", "preview.png")
    assert contents(tmp_path) == {"slide/slide.geojson": "new", "slide/preview.png": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["slide"]


def test_a_result_with_a_missing_file_is_not_finished(tmp_path: Path) -> None:
    publish(tmp_path, "slide.geojson", "preview.png")
    (tmp_path / "slide" / "preview.png").unlink()
    with (
        pytest.raises(OutputError, match=r"preview\.png is missing; pass --repair"),
        open_folder(tmp_path, "slide", IDENTITY, {}, force=False),
    ):
        pass


def test_force_removes_only_files_of_the_earlier_run(tmp_path: Path) -> None:
    publish(tmp_path, "slide.geojson", "old.txt", text="old")
    (tmp_path / "slide" / "notes.txt").write_text("mine")
    (tmp_path / "slide" / "extra.csv").write_text("mine, too")
    publish(tmp_path, "slide.geojson", "extra.csv", force=True)
    assert contents(tmp_path) == {
        "slide/slide.geojson": "new",
        "slide/extra.csv": "new",
        "slide/extra.csv.kept": "mine, too",
        "slide/notes.txt": "mine",
    }


@pytest.mark.parametrize("run", ['{"mine": 1}', '{"identity": {}, "outputs": null}', "[]", "no json"])
def test_force_deletes_nothing_beside_another_programs_run_json(tmp_path: Path, run: str) -> None:
    (tmp_path / "slide").mkdir()
    (tmp_path / "slide" / "run.json").write_text(run)
    for force in (False, True):
        with (
            pytest.raises(OutputError, match="damaged or was written by another program"),
            open_folder(tmp_path, "slide", IDENTITY, {}, force=force),
        ):
            pass
    assert (tmp_path / "slide" / "run.json").read_text() == run


@pytest.mark.parametrize("killed_after", ["first rename", "second rename"])
def test_a_kill_while_a_result_is_replaced_loses_no_result(tmp_path: Path, killed_after: str) -> None:
    publish(tmp_path, "slide.geojson", text="old")
    (tmp_path / "slide" / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError), open_folder(tmp_path, "slide", IDENTITY, {}, force=True) as folder:
        build(folder, "slide.geojson")
        (folder.work / "journal.jsonl").touch()
        folder.target.rename(folder.old)
        if killed_after == "second rename":
            folder.result.rename(folder.target)
        raise RuntimeError("killed")
    with open_folder(tmp_path, "slide", IDENTITY, {}, force=False) as folder:
        assert folder.finished is not None
    expected = "old" if killed_after == "first rename" else "new"
    found = {k: v for k, v in contents(tmp_path).items() if not k.startswith(".")}
    assert found == {"slide/slide.geojson": expected, "slide/notes.txt": "mine"}
    assert not (tmp_path / ".slide.old").exists()


def test_an_interrupted_run_with_force_resumes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_folder(tmp_path, "slide", IDENTITY, {}, force=True) as folder:
        (folder.work / "journal.jsonl").write_text("finished blocks")
        raise KeyboardInterrupt
    with open_folder(tmp_path, "slide", IDENTITY, {}, force=True) as folder:
        assert (folder.work / "journal.jsonl").read_text() == "finished blocks"


def test_a_full_disk_when_a_run_resumes_keeps_the_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError), open_folder(tmp_path, "slide", IDENTITY, {}, force=False) as folder:
        (folder.work / "journal.jsonl").write_text("finished blocks")
        raise RuntimeError("the disk is full")

    def no_space(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_space)
        with open_folder(tmp_path, "slide", IDENTITY, {}, force=False):
            pass
    assert json.loads((tmp_path / ".slide.work" / "identity.json").read_text()) == IDENTITY.as_json() | {
        "computed_with": {}
    }
    assert (tmp_path / ".slide.work" / "journal.jsonl").read_text() == "finished blocks"


def test_a_path_with_zarr_is_refused(tmp_path: Path) -> None:
    for out, name in ((tmp_path / "a.zarr", "slide"), (tmp_path, "slide.zarr")):
        with pytest.raises(OutputError, match=r"must not contain \.zarr"):
            open_folder(out, name, IDENTITY, {}, force=False).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_result_in_a_folder_is_found_and_its_folder_is_marked(tmp_path: Path) -> None:
    with open_folder(tmp_path, "case/deep/slide", IDENTITY, {}) as folder:
        assert (folder.target, is_locked(tmp_path, "case/deep/slide")) == (tmp_path / "case" / "deep" / "slide", True)
        build(folder, "slide.geojson")
        folder.publish()
    (tmp_path / "foreign" / "slide").mkdir(parents=True)
    (tmp_path / "foreign" / "slide" / "run.json").write_text("{}")
    (found,) = result_folders(tmp_path)
    assert (found, result_name(tmp_path, found)) == (tmp_path / "case" / "deep" / "slide", "case/deep/slide")
    marks = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".wsi-segment")]
    assert sorted(marks) == ["case/.wsi-segment", "case/deep/.wsi-segment"]
    assert not is_locked(tmp_path, "case/deep/slide")


@pytest.mark.parametrize(("output", "name"), [("slide", "b"), ("slide/deep", "b"), ("", "slide/b")])
def test_a_result_inside_another_result_is_refused(tmp_path: Path, output: str, name: str) -> None:
    publish(tmp_path, "slide.geojson")
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(OutputError, match=r"b: lies inside the result .*slide; choose another --output"),
        open_folder(tmp_path / output, name, IDENTITY, {}),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_read_is_left_out_with_a_warning(
    tmp_path: Path, unexaminable: Callable[[Path, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, "a.txt")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    unexaminable(foreign, errno.EACCES)
    assert result_folders(tmp_path) == [tmp_path / "slide"]
    assert caplog.messages == [f"{foreign}: cannot be searched for results: Permission denied"]


def test_a_group_that_cannot_be_listed_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, "a.txt")
    group = tmp_path / "case"
    group.mkdir()
    (group / ".wsi-segment").touch()
    iterdir = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:  # root may list everything
        if path == group:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert result_folders(tmp_path) == [tmp_path / "slide"]
    assert caplog.messages == [f"{group}: cannot be searched for results: Permission denied"]
    with pytest.raises(PermissionError):
        result_folders(group)


def test_results_of_linked_groups_are_found_once_by_their_own_names(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    for root, name in ((output, "case/slide"), (elsewhere, "other/slide")):
        with open_folder(root, name, IDENTITY, {}) as folder:
            build(folder, "slide.geojson")
            folder.publish()
    (output / "case" / "again").symlink_to("../case")
    (output / "a").symlink_to("case")
    (output / "b").symlink_to(elsewhere / "other")
    assert result_folders(output) == [output / "b" / "slide", output / "case" / "slide"]


def test_a_setting_that_only_one_of_two_runs_has_is_named(tmp_path: Path) -> None:
    publish(tmp_path, "a.txt")
    other = IDENTITY.model_copy(update={"parameters": IDENTITY.parameters | {"exclude_folds": True}})
    with (
        pytest.raises(OutputError, match="it was made with exclude_folds unset instead of True"),
        open_folder(tmp_path, "slide", other, {}),
    ):
        pass


@pytest.mark.parametrize(
    ("model", "reason"), [("e", "made by another version"), ("f", "made by another version; other model")]
)
def test_a_result_of_an_earlier_format_is_refused_as_made_by_an_earlier_version(
    tmp_path: Path, model: str, reason: str
) -> None:
    publish(tmp_path, "a.txt")
    later = IDENTITY.model_copy(update={"format": IDENTITY.format + 1, "model": model * 64})
    with (
        pytest.raises(OtherResultError, match=rf"slide: holds the result of another run \({reason}\); pass --force"),
        open_folder(tmp_path, "slide", later, {}),
    ):
        pass


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    publish(tmp_path, "a.txt")
    record = tmp_path / "slide" / "run.json"
    record.write_text(record.read_text()[:-40])
    message = r"slide: its run\.json is damaged or was written by another program; move the folder away"
    for force, repair in ((False, False), (False, True), (True, False)):
        with (
            pytest.raises(OutputError, match=message),
            open_folder(tmp_path, "slide", IDENTITY, {}, force=force, repair=repair),
        ):
            pass


def test_a_locked_slide_is_refused_before_any_work(tmp_path: Path) -> None:
    check_unlocked(tmp_path, "slide")
    with (
        open_folder(tmp_path, "slide", IDENTITY, {}),
        pytest.raises(LockedError, match="another process is working on this slide"),
    ):
        check_unlocked(tmp_path, "slide")


@pytest.mark.usefixtures("without_locks")
def test_a_result_on_a_file_system_without_locks_is_refused_by_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match=f"^{out}: file locks fail on this file system"),
        open_folder(out, "slide", IDENTITY, {}),
    ):
        pass
    assert list(out.iterdir()) == []
    (out / ".slide.lock").touch()
    with pytest.raises(OutputError, match=f"^{out}: file locks fail on this file system"):
        check_unlocked(out, "slide")
