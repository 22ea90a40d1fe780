"""Files that survive a crash: synced, replaced as a whole, written by one process at a time."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import ConfigError, OutputError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")

WRITER_S = 10.0
"""Seconds to wait for another process that writes the same file. A table of 10,000 slides takes less."""

_FEW_INODES = 16
"""At most this many are free on a disk that ran out of inodes, because the failed write has removed its files."""

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""What a file system without locks reports, such as some network mounts."""


def local_path(path: Path | str, what: str) -> Path:
    """Return a path of this machine. Raises ConfigError for an address such as s3://bucket/a.svs.

    Without this check an output s3://bucket/x would become a local folder named "s3:". `what` begins the message.
    """
    # A Path has one slash of the two; a single letter is a drive of Windows.
    found = _SCHEME.match(str(path))
    if found:
        address = f"{found[1]}://{str(path)[found.end() :]}"
        raise ConfigError(
            f"{what}: {address} is an address ({found[1]}://), which is not supported; copy the data to a local or "
            f"mounted folder and pass its path"
        )
    return Path(path)


def printable_name(name: str) -> str:
    """Return the name of a file in which bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def nfc_name(name: str) -> str:
    """Return a name with composed letters (Unicode NFC), because a Mac decomposes the umlauts of file names."""
    return unicodedata.normalize("NFC", name)


def name_key(name: str) -> str:
    """Return a text that is equal for two names that a file system may take for the same name.

    Some file systems ignore case, and APFS and HFS+ also ignore whether letters are composed (NFC) or not (NFD).
    """
    return nfc_name(name).casefold()


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one file or folder, through links or on a file system that ignores case.

    The same holds for file systems that ignore Unicode forms (see `name_key`). Hard links are different files: the
    results of two slides with different names must not be mixed up.
    """
    first, second = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    return first == second or (name_key(str(first)) == name_key(str(second)) and _is_one_entry(first, second))


def _is_one_entry(first: Path, second: Path) -> bool:
    """Return whether two paths with equal `name_key` are one entry: both exist, and the folder does not list both."""
    if first == second:
        return True
    if not _is_one_entry(first.parent, second.parent):
        return False
    if first.name == second.name:
        return True
    # Inode numbers do not answer this: a FUSE file system can give each spelling a number of its own.
    try:
        listed = {path.name for path in first.parent.iterdir()}
    except OSError:
        return False
    return os.path.lexists(first) and os.path.lexists(second) and not {first.name, second.name} <= listed


class FirstPaths:
    """The first of several paths to the same file."""

    def __init__(self) -> None:
        self._paths: dict[str, list[Path]] = {}

    def of(self, path: Path) -> Path:
        """Return the first path passed to this method that leads to this file (see `same_file`)."""
        # Path.resolve raises if links form a loop.
        alike = self._paths.setdefault(name_key(os.path.realpath(path)), [])
        for former in alike:
            if same_file(former, path):
                return former
        alike.append(path)
        return path


def is_file(path: Path) -> bool:
    """Return whether a path is a file; False too if the path cannot be examined, as in a folder without permission."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises OSError then


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Bring an open file or folder to the disk."""
    import fcntl  # Windows lacks it, and there the commands must start to print that they need another system

    # On macOS, fsync leaves the data in the drive's cache, where a power cut loses it.
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network mounts and some file systems lack it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring a folder and all that is in it to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def disk_shortage(error: OSError, folder: Path) -> str | None:
    """Return what ran out on the disk of a folder and what to do, if a write failed for that reason, else None.

    Call this before files are removed, because the kernel reports both lack of space and lack of inodes as ENOSPC.
    """
    if error.errno == errno.EDQUOT:
        return f"the disk quota for {folder} is used up; delete files that count toward it, or ask for a larger quota"
    if error.errno != errno.ENOSPC:
        return None
    try:
        disk = os.statvfs(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    except OSError:
        return f"the disk of {folder} is full; free some space"
    free_mib = disk.f_bavail * disk.f_frsize / 2**20
    free = f"{free_mib:.0f} MiB free"
    # File systems without a limit of inodes state 0 of 0. Some derive free inodes from free space, so both run out.
    if disk.f_files and disk.f_favail <= _FEW_INODES and free_mib >= 1:
        return f"the disk of {folder} can hold no more files ({disk.f_favail} inodes and {free}); delete some files"
    return f"the disk of {folder} is full ({free}); free some space"


@contextmanager
def file_lock(path: Path, *, wait_s: float = -1) -> Iterator[None]:
    """Hold the lock that this file stands for, and remove the file at the end. The lock ends with the process.

    Raises filelock.Timeout if another process has the lock for more than `wait_s` seconds (below 0: never), OutputError
    if file locks fail, the file system does not allow the file's name, or the file belongs to a user who lets nobody
    else write it, and OSError if the file cannot be created.
    """
    was_there = path.exists()
    # Without flock, filelock would otherwise take the file itself as the lock, which a killed process leaves behind.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=wait_s, blocking=wait_s != 0)
    except Timeout:
        _check_name(path)
        raise
    except OSError as error:
        if error.errno == errno.EACCES and (owner := _owner(path)) is not None:
            raise OutputError(
                f"{path}: this lock file belongs to user {owner} and cannot be written by others (a run that is "
                f"killed leaves it behind); delete it if no run of that user is active"
            ) from error
        if error.errno not in _NO_LOCKS:
            raise
        if not was_there:
            path.unlink(missing_ok=True)
        raise OutputError(
            f"{path.parent}: file locks fail on this file system ({error.strerror}), so two runs could write the same "
            f"files; choose a folder on a local disk, or mount this file system with locks enabled"
        ) from error
    try:
        yield
    finally:
        # Before the release: a process that opened the file in the meantime sees that it is gone and makes a new one.
        # An unlocked file that stays does no harm, and the work is done.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str | None:
    """Return the name or number of the user who owns a file, or None if the file does not exist."""
    try:
        number = path.stat().st_uid
    except OSError:
        return None
    try:
        return path.owner()
    except (KeyError, OSError):  # as in a container, which does not know the users of the machine
        return str(number)


def _check_name(path: Path) -> None:
    """Raise OutputError if the file system does not allow this name, such as one with a colon on exFAT.

    Such a file system reports that the file does not exist, which filelock takes for a lock that was just released.
    """
    if path.exists():
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    except OSError as error:
        raise OutputError(
            f"{path.parent}: the file system does not allow a file named {printable_name(path.name)} "
            f"({error.strerror}); set another name in the column 'id' of a manifest, or choose another --output"
        ) from error
    # The file stays: another process may have its lock by now.


@contextmanager
def only_writer(path: Path, lock_path: Path, wait_s: float = WRITER_S) -> Iterator[None]:
    """Wait until no other process writes this file, then lock it. Remove partial files that killed processes left.

    Raises OutputError if another process has the lock for more than `wait_s` seconds, for instance a stopped one.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock_path, wait_s=wait_s))
        except Timeout:
            raise OutputError(
                f"{path}: another process has been writing it for more than {wait_s:g} s; end that process if it hangs "
                f"or was stopped with Ctrl-Z (it has the lock {lock_path.name})"
            ) from None
        for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            partial.unlink(missing_ok=True)
        yield


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new one, never a part."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


@contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Yield a temporary path for a file that replaces `path` at the end. A reader sees the old or the new file.

    After an error the old one stays, after a power cut the old or the new one. Without `synced`, the caller has to
    sync: many files together take less time.
    """
    # A process id is not unique: workers on several machines can have the same one.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if synced:
            sync(partial)
        partial.replace(path)
        if synced:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
