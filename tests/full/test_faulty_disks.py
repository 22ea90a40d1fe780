"""Disks that are full, have no inodes, cannot be written or refuse locks: see `test_faults.py`."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.formats import outputs
from pipeline.progress import no_progress
from pipeline.slide import recipe
from tests.full.two_slides import Slides, at, names

pytestmark = pytest.mark.usefixtures("nothing_left")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, so that errors come from the kernel."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Take all that is free."""
    with ballast.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left on device"):
        while True:
            file.write(bytes(4096))


def filling_first(writes: Callable[..., object], ballast: Path) -> Callable[..., object]:
    """A function that finds a full disk the first time it is called."""
    filled: list[bool] = []

    def full(*arguments: object, **named: object) -> object:
        if not filled:
            fill(ballast)
            filled.append(True)
        return writes(*arguments, **named)

    return full


WRITERS = {
    "write_features": outputs,
    "build_pyramid": outputs,
    "write_preview": outputs,
    "write_slide_page": recipe,
    "write_result": recipe,
}


STAGES = ["create_store", "blocks", *WRITERS]


def test_a_disk_that_is_full_at_any_stage_ends_the_slide_by_name_and_the_run_goes_on_later(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "check_resources", lambda *_: None)
    with mounted(tmp_path / "small", "size=6m") as small:
        ballast = small / "ballast"
        for number, stage in enumerate(STAGES):
            output = small / f"out{number}"
            progress = at("segmenting", 4, lambda: fill(ballast)) if stage == "blocks" else no_progress
            with monkeypatch.context() as patch:
                if stage != "blocks":
                    module = WRITERS.get(stage, recipe)
                    patch.setattr(module, stage, filling_first(getattr(module, stage), ballast))
                # Somebody frees some space once the first slide has failed.
                a, b = slides.run(output, progress=progress, report=lambda _: ballast.unlink(missing_ok=True))
            assert a.error.startswith(f"a.svs: the disk of {output} is full ("), (stage, a)
            assert "run the same command again, which resumes from the finished blocks" in a.error
            assert b.status == "done", (stage, b.error)
            assert not (output / "a").exists()
            assert not list(output.rglob("*.partial"))
            slides.check_recovery(output, least=0 if stage == "create_store" else 4 if stage == "blocks" else 12)
            for result in ("a", "b"):
                shutil.rmtree(output / result)


@pytest.mark.parametrize("free", [1, 6, 30])
def test_a_disk_without_free_inodes_is_not_called_full(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(recipe, "check_resources", lambda *_: None)
    with mounted(tmp_path / "small", "size=20m,nr_inodes=300") as small:
        ballast = small / "ballast"
        ballast.mkdir()
        while os.statvfs(small).f_favail > free:
            (ballast / secrets.token_hex(8)).touch()
        output = small / "out"
        a, b = slides.run(output, report=lambda _: shutil.rmtree(ballast, ignore_errors=True))
        assert re.fullmatch(
            rf"a\.svs: the disk of {output} can hold no more files \(\d+ inodes and (19|20) MiB free\); delete some "
            r"files, and run the same command again, which resumes from the finished blocks",
            a.error,
        )
        assert b.status == "done", b.error
        slides.check_recovery(output)


@pytest.mark.parametrize("number", [0, 2, 9, 40, 120, -2])
def test_a_write_that_fails_only_when_it_is_synced_ends_the_slide_alone(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """File systems that allocate late, and network mounts, find out then. Negative: counted from the publishing on."""
    calls, sync = [0], os.fsync
    if number < 0:
        calls[0] = -(10**6)

    def failing(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == abs(number) + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    a, b = slides.run(tmp_path / "out", progress=at("publishing", 0, lambda: calls.__setitem__(0, 0)))
    assert (a.status, b.status) == ("failed", "done")
    assert a.error.startswith(f"a.svs: the disk of {tmp_path / 'out'} is full (")
    assert not (tmp_path / "out" / "a").exists()
    slides.check_recovery(tmp_path / "out", least=12 if number < 0 else 0)


def test_an_output_that_cannot_be_written_is_named_with_its_folder(slides: Slides, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for result in slides.run(tmp_path / "file"):
        assert result.error.startswith(f"{result.slide}.svs: cannot write {tmp_path / 'file'}: File exists; check that")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


def test_a_read_only_file_system_is_said_so(slides: Slides, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=6m") as disk:
        (disk / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for result in slides.run(disk / "out"):
            assert result.status == "failed"
            assert result.error.startswith(f"{result.slide}.svs: cannot write {disk / 'out'}")
            assert "Read-only file system" in result.error
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert names(disk / "out") == []
        assert [result.status for result in slides.run(disk / "out")] == ["done", "done"]


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_ends_every_slide_with_the_reason_and_leaves_no_file(
    slides: Slides, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused = f"{tmp_path / 'out'}: file locks fail on this file system ("
    for result in slides.run(tmp_path / "out"):
        assert result.status == "failed"
        assert result.error.startswith(refused)
    assert names(tmp_path / "out") == []
    # The table and the report are missing for the same reason.
    assert caplog.text.count(refused) >= 2
