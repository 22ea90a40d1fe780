"""What helps after a failed write, locks, and what brings a file to the disk."""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import Timeout

from pipeline.errors import OutputError
from pipeline.files import disk_shortage, file_lock, only_writer, same_file, sync
from pipeline.slide.blocks import BlockRecord
from pipeline.slide.journal import Journal
from tests.pipeline.ignored_case import ignore_case


@pytest.mark.parametrize(
    ("blocks", "inodes", "said"),
    [
        (512, (9000, 0), "can hold no more files (0 inodes and 2 MiB free); delete some files"),
        (512, (9000, 16), "can hold no more files (16 inodes and 2 MiB free); delete some files"),
        (512, (9000, 17), "is full (2 MiB free); free some space"),
        (0, (9000, 0), "is full (0 MiB free); free some space"),
        (512, (0, 0), "is full (2 MiB free); free some space"),  # btrfs: no limit of inodes
    ],
)
def test_a_full_disk_is_told_from_one_without_inodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, inodes: tuple[int, int], said: str
) -> None:
    asked: list[Path] = []

    def statvfs(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(f_bavail=blocks, f_frsize=4096, f_files=inodes[0], f_favail=inodes[1])

    monkeypatch.setattr(os, "statvfs", statvfs)
    folder = tmp_path / "out"  # could not be made
    assert disk_shortage(OSError(errno.ENOSPC, "No space"), folder) == f"the disk of {folder} {said}"
    assert asked == [tmp_path]


def test_a_used_up_quota_is_not_called_a_full_disk(tmp_path: Path) -> None:
    assert disk_shortage(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path) == (
        f"the disk quota for {tmp_path} is used up; delete files that count toward it, or ask for a larger quota"
    )


def test_other_errors_are_no_shortage(tmp_path: Path) -> None:
    assert disk_shortage(OSError(errno.EROFS, "Read-only file system"), tmp_path) is None


REFUSED = (
    r": file locks fail on this file system \((No locks available|Operation not supported|Function not implemented)\), "
    r"so two runs .*; "
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_excludes_others_and_leaves_no_file(tmp_path: Path) -> None:
    with file_lock(tmp_path / ".lock"):
        assert names(tmp_path) == [".lock"]
        with pytest.raises(Timeout), file_lock(tmp_path / ".lock", wait_s=0):
            pass
        assert names(tmp_path) == [".lock"]
    assert names(tmp_path) == []


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_that_refuses_locks_is_named_and_no_lock_file_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=f"^{tmp_path}{REFUSED}choose a folder on a local disk"),
        only_writer(tmp_path / "a.csv", tmp_path / ".a.lock"),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.usefixtures("without_locks")
def test_a_lock_file_that_was_there_may_be_held_by_another_machine_and_stays(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with pytest.raises(OutputError, match="file locks fail"), file_lock(tmp_path / ".lock", wait_s=0):
        pass
    assert names(tmp_path) == [".lock"]


@pytest.mark.full
@pytest.mark.parametrize("known", [True, False])
def test_a_lock_file_that_another_user_left_is_named_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    path = tmp_path / ".a.lock"
    path.touch()
    opens = os.open

    def of_another_user(opened: str | Path, flags: int, *arguments: int, **named: Any) -> int:
        if Path(opened) == path and flags & os.O_RDWR:
            raise FileExistsError if flags & os.O_EXCL else PermissionError(errno.EACCES, "Permission denied")
        return opens(opened, flags, *arguments, **named)

    def unknown(_: Path) -> str:
        raise KeyError

    monkeypatch.setattr(os, "open", of_another_user)
    if not known:
        monkeypatch.setattr(Path, "owner", unknown)
    owner = getpass.getuser() if known else os.getuid()
    with (
        pytest.raises(
            OutputError,
            match=rf"^{path}: this lock file belongs to user {owner} and cannot be written by others "
            rf"\(a run that is killed leaves it behind\); delete it if no run of that user is active$",
        ),
        file_lock(path, wait_s=0),
    ):
        pass
    assert names(tmp_path) == [".a.lock"], "it may be the lock of an active run"


@pytest.mark.full
def test_a_folder_in_which_no_lock_file_can_be_created_is_not_blamed_on_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError), file_lock(tmp_path / ".a.lock", wait_s=0):
        pass


def test_a_name_that_the_file_system_cannot_have_is_not_taken_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exFAT reports that a new file with a colon in its name does not exist."""
    opens = os.open

    def without_colons(path: str | Path, *arguments: int, **named: Any) -> int:
        if ":" in Path(path).name:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return opens(path, *arguments, **named)

    monkeypatch.setattr(os, "open", without_colons)
    with (
        pytest.raises(
            OutputError,
            match=r"does not allow a file named \.12:05\.lock \(No such file or directory\); set another name in",
        ),
        file_lock(tmp_path / ".12:05.lock", wait_s=0),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.full
def test_paths_lead_to_the_same_file_through_links_and_if_case_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("s", "S"):
        (tmp_path / folder).mkdir()
        for name in ("a", "A", "b"):
            (tmp_path / folder / name).touch()
    first = tmp_path / "s" / "a"
    (tmp_path / "link").symlink_to(first)
    (tmp_path / "s" / "hard").hardlink_to(first)
    assert same_file(first, tmp_path / "link")
    assert same_file(first, tmp_path / "S" / ".." / "s" / "a")
    assert not same_file(first, tmp_path / "s" / "hard")
    others = [tmp_path / "s" / "A", tmp_path / "S" / "a", tmp_path / "S" / "A"]
    assert [same_file(first, other) for other in others] == [False, False, False]
    ignore_case(monkeypatch)
    assert [same_file(first, other) for other in others] == [True, True, True]
    assert not same_file(first, tmp_path / "S" / "b")
    assert not same_file(tmp_path / "s" / "gone", tmp_path / "s" / "GONE")


@pytest.fixture(params=[True, False], ids=["supported", "refused"])
def mac_syncs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Sync as on macOS, on a disk that supports F_FULLFSYNC or not. Return the list of calls, and what one sync calls.

    51 is its number on macOS.
    """
    calls: list[str] = []

    def full(descriptor: int, command: int) -> int:
        assert command == 51
        os.fstat(descriptor)
        calls.append("F_FULLFSYNC")
        if not request.param:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    return calls, ["F_FULLFSYNC"] if request.param else ["F_FULLFSYNC", "fsync"]


@pytest.mark.full
def test_on_a_mac_the_cache_of_the_drive_is_emptied_if_the_disk_supports_it(
    tmp_path: Path, mac_syncs: tuple[list[str], list[str]]
) -> None:
    calls, expected = mac_syncs
    sync(tmp_path)
    assert calls == expected


@pytest.mark.full
def test_on_a_mac_the_journal_is_synced_like_other_files(
    tmp_path: Path, mac_syncs: tuple[list[str], list[str]]
) -> None:
    calls, expected = mac_syncs
    Journal(tmp_path, {}).append(BlockRecord(0, {}, [1], 0.0, 1, 1, 0, [], {}))
    assert calls == 2 * expected  # the journal and its folder


@pytest.mark.full
def test_without_f_fullfsync_files_are_synced_with_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", calls.append)
    sync(tmp_path)
    assert len(calls) == 1
