"""The folders in which a slide's result is built, and how it becomes visible.

results/slide/          the result: one rename makes it visible, complete; results/case/slide/ if names clash
results/.slide.work/    the working folder of an unfinished run
results/.slide.lock     held by the run; the kernel releases it when the process dies
results/.slide.old/     the former result, while --force replaces it
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import Timeout

from pipeline.errors import ConfigError, LockedError, OtherResultError, OutputError, RunRecordError
from pipeline.files import file_lock, is_file, same_file, sync, sync_tree, write_atomically
from pipeline.results.digests import changed_files
from pipeline.results.names import GROUP, RUN
from pipeline.results.record import Run, RunHeader, RunIdentity, read_header, read_run

log = logging.getLogger(__name__)

SHOWN = 3
"""Changed files that a message names. Further files are counted."""


@dataclass(frozen=True)
class ResultFolder:
    """The folders of one slide's run, under its lock."""

    target: Path
    work: Path
    work_identity: dict[str, object]
    """The inputs of the result, and what its blocks are computed with: the content of identity.json."""
    finished: Run | None = None
    """The record of a result of the same inputs that is already there: nothing is left to do."""
    damaged: bool = False
    """Whether `target` is a result of the same inputs of which some files are missing or changed."""

    @property
    def result(self) -> Path:
        """Return the folder in which the result is built."""
        return self.work / "result"

    @property
    def old(self) -> Path:
        """Return the folder of the former result while it is replaced."""
        return self.target.with_name(f".{self.target.name}.old")

    def resume_only(self, tissue: str) -> None:
        """Remove the finished blocks from the working folder if their tissue mask had another digest than `tissue`.

        The mask of a slide changes if a place that could not be read can be read later.
        """
        path = self.work / "tissue.txt"
        former = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if former == tissue:
            return
        if former is not None:
            self.start_over(tissue, "found other tissue, because other parts of the slide could be read")
        elif (self.work / "journal.jsonl").exists():
            self.start_over(tissue, "does not record its tissue")
        else:
            write_atomically(path, tissue)

    def start_over(self, tissue: str, reason: str) -> None:
        """Remove the finished blocks from the working folder. `reason` continues the warning about the former run."""
        log.warning("%s: the unfinished run in this folder %s; starting from the beginning", self.target, reason)
        path = self.work / "tissue.txt"
        # No digest equals this one: a run that is killed here continues to remove the blocks later.
        write_atomically(path, "")
        # The journal first: without it, the blocks do not count as finished.
        (self.work / "journal.jsonl").unlink(missing_ok=True)
        for part in filter(Path.is_dir, list(self.work.iterdir())):
            shutil.rmtree(part)
        self.result.mkdir()
        write_atomically(path, tissue)

    def publish(self) -> None:
        """Make the result visible under its name, replacing a former one, and remove the working folder."""
        sync_tree(self.result)
        if self.target.exists():
            self.target.rename(self.old)
        self.result.rename(self.target)
        sync(self.target.parent)
        _clear_old(self.old, self.target)
        shutil.rmtree(self.work, ignore_errors=True)


def check_output(output: Path, what: str) -> None:
    """Raise ConfigError if a folder for results would be a part of a result, or a file is in its place.

    `what` begins the message, which has no other path: flows with `hide_paths` know only this one.
    """
    if (result := _result_around(output)) is not None:
        raise ConfigError(f"{what}: {output} is part of the result {result.name}; choose another folder")
    # Path raises errors if a parent may not be searched; those are reported later.
    if os.path.islink(output) and not os.path.exists(output):  # noqa: PTH110, PTH114
        raise ConfigError(f"{what}: {output} is a link to a folder that does not exist; choose another folder")
    for path in (output, *output.absolute().parents):
        if is_file(path):
            raise ConfigError(
                f"{what}: {output} cannot be a folder, because {path.name} is a file; choose another folder"
            )


@contextmanager
def open_folder(
    output: Path,
    name: str,
    identity: RunIdentity,
    computed_with: Mapping[str, object],
    *,
    slide: Path | None = None,
    force: bool = False,
    repair: bool = False,
) -> Iterator[ResultFolder]:
    """Take the lock of one slide's result, `output/<name>`, and prepare its working folder. `name` may have slashes.

    `slide` is the slide's file. If the target holds the result of another file, the error names both.

    The run resumes from a working folder with the same `identity` whose blocks were `computed_with` the same values;
    any other one is removed. After an error the working folder stays if it holds finished blocks.

    Raises LockedError if another process has the lock, and OutputError if file locks fail. Raises
    OtherResultError if the target holds the result of other inputs, unless `force` is set. Raises OutputError if the
    target holds something else, or if files of the target are missing or changed, unless `force` or `repair` is set.
    With `repair`, every file is read; otherwise, sizes are compared.
    """
    # The folders above count too: Bio-Formats takes every file below them for a part of a store.
    if ".zarr" in str(output.absolute()) or ".zarr" in name:
        raise OutputError(
            f"{output / name}: the path of a result must not contain .zarr, because viewers would open it as a store; "
            f"choose another --output or rename the slide"
        )
    output = _make_group(output, name)
    name = Path(name).name
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock_file(output, name), wait_s=0))
        except Timeout:
            raise _locked(output / name) from None
        folder = _prepare(output, name, identity, computed_with, slide, force=force, repair=repair)
        try:
            yield folder
        except BaseException:
            if not (folder.work / "journal.jsonl").exists():
                shutil.rmtree(folder.work, ignore_errors=True)
            raise


def lock_file(output: Path, name: str) -> Path:
    """Return the lock file of a slide. A killed run leaves the file behind, unlocked."""
    result = output / name
    return result.with_name(f".{result.name}.lock")


def check_unlocked(output: Path, name: str) -> None:
    """Raise LockedError if another process is working on a slide."""
    if is_locked(output, name):
        raise _locked(output / name)


def _locked(target: Path) -> LockedError:
    return LockedError(f"{target}: another process is working on this slide; wait until it ends")


def is_locked(output: Path, name: str) -> bool:
    """Return whether a run is working on a slide. Removes the lock file of a killed run.

    Raises OutputError if file locks fail on the file system.
    """
    path = lock_file(output, name)
    if not path.exists():
        return False
    try:
        with file_lock(path, wait_s=0):
            return False
    except Timeout:
        return True


def finished_run(target: Path, identity: RunIdentity, *, read: bool = False) -> Run | None:
    """Return the record of the result in `target` if it has the same inputs and none of its files is changed.

    `read`: read every file; otherwise, sizes are compared (`changed_files`).
    """
    header = read_header(target)
    if header is None or header.identity != identity.as_json() or changed_files(target, read=read):
        return None
    return read_run(target)


def _prepare(
    output: Path,
    name: str,
    identity: RunIdentity,
    computed_with: Mapping[str, object],
    slide: Path | None,
    *,
    force: bool,
    repair: bool,
) -> ResultFolder:
    work_identity = identity.as_json() | {"computed_with": dict(computed_with)}
    folder = ResultFolder(output / name, output / f".{name}.work", work_identity)
    if folder.old.exists():
        # The run that replaced this result was killed.
        if folder.target.exists():
            _clear_old(folder.old, folder.target)
        else:
            folder.old.rename(folder.target)
    if folder.target.exists():
        header = read_header(folder.target)
        if header is None:
            raise OutputError(_foreign(folder.target))
        if not force:
            if header.identity != identity.as_json():
                raise OtherResultError(_another_run(folder.target, header, identity.as_json(), slide))
            changed = changed_files(folder.target, read=repair)
            if not changed:
                _clear_rest(folder.work, identity)
                return replace(folder, finished=read_run(folder.target))
            if not repair:
                raise OutputError(
                    f"{_damage(folder.target, changed)}; pass --repair to compute the damaged blocks again, or "
                    f"--force to compute the whole slide again"
                )
            log.warning("%s", _damage(folder.target, changed))
            folder = replace(folder, damaged=True)
    header_path = folder.work / "identity.json"
    former, wanted = _read_json(header_path), work_identity
    if folder.work.exists() and former != wanted:
        if isinstance(former, dict):
            log.warning(
                "%s: the unfinished run in this folder is a different one (%s); starting from the beginning",
                folder.target,
                "; ".join(filter(None, (_other_inputs(former, wanted), *_other_values(former, wanted)))),
            )
        shutil.rmtree(folder.work)
    folder.result.mkdir(parents=True, exist_ok=True)
    if not header_path.exists():
        write_atomically(header_path, json.dumps(wanted))
        sync(output)
    return folder


def _make_group(output: Path, name: str) -> Path:
    """Make the folder in which a result lies and return it. Raises OutputError if it lies inside another result."""
    folder = (output / name).parent
    if (path := _result_around(folder)) is not None:
        raise OutputError(
            f"{output / name}: lies inside the result {path}; choose another --output, or name the result in the "
            f"column 'id' of a manifest"
        )
    _make_durably(folder)
    while folder != output:
        if not (folder / GROUP).exists():
            (folder / GROUP).touch()
            sync(folder)
        folder = folder.parent
    return (output / name).parent


def _result_around(folder: Path) -> Path | None:
    """Return the result that this folder is or lies in, if there is one."""
    whole = Path(os.path.realpath(folder))
    return next((path for path in (whole, *whole.parents) if read_header(path) is not None), None)


def _make_durably(folder: Path) -> None:
    """Make a folder and its parents so that a power cut does not remove them."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync(path.parent)


def _clear_rest(work: Path, identity: RunIdentity) -> None:
    """Remove the working folder of a run that was killed after its result became visible."""
    former = _read_json(work / "identity.json")
    if work.exists() and (not isinstance(former, dict) or former | identity.as_json() == former):
        shutil.rmtree(work)


def _foreign(target: Path) -> str:
    if (target / RUN).is_file():
        return (
            f"{target}: its {RUN} is damaged or was written by another program; move the folder away or choose another "
            f"--output"
        )
    return f"{target}: was not written by wsi-segment; move it away or choose another --output"


def _another_run(target: Path, header: RunHeader, identity: Mapping[str, object], slide: Path | None) -> str:
    if slide is not None and header.identity.get("slide") != identity["slide"]:
        stored = None
        with suppress(RunRecordError):  # a damaged record does not name its slide
            stored = read_run(target)
        if stored is not None and (stored.slide.path is None or not same_file(stored.slide.path, slide)):
            # The folder of the other slide is left out, because flows with `hide_paths` cannot know it.
            return (
                f"{slide}: {target} holds the result of another slide, {stored.slide.name} (see its {RUN}); choose "
                f"another --output, or name the new result in the column 'id' of a manifest; --force would remove the "
                f"result of the other slide"
            )
    settings = ", ".join(_other_values(header.identity, identity))
    return (
        f"{target}: holds the result of another run ({_other_inputs(header.identity, identity)}); pass "
        f"--force to replace it, or choose another --output" + (f"; it was made with {settings}" if settings else "")
    )


def _damage(target: Path, changed: Sequence[str]) -> str:
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return f"{target}: the result was damaged after the run: {'; '.join(changed[:SHOWN])}{more}"


def _other_inputs(former: Mapping[str, object], identity: Mapping[str, object]) -> str:
    versions = ["made by another version"] if former.get("format") != identity["format"] else []
    names = [name for name in identity if name != "format" and former.get(name) != identity[name]]
    return "; ".join([*versions, *([f"other {', '.join(names)}"] if names else [])])


def _other_values(former: Mapping[str, object], identity: Mapping[str, object]) -> Iterator[str]:
    """Yield what differs in the parameters and the computation, as "canvas_m 640 instead of 512", the former first."""
    for key in ("parameters", "computed_with"):
        then, now = former.get(key), identity.get(key)
        if isinstance(then, dict) and isinstance(now, dict):
            # A setting that came later is left out at its default.
            yield from (
                f"{name} {then.get(name, 'unset')} instead of {now.get(name, 'unset')}"
                for name in now | then
                if then.get(name) != now.get(name)
            )


def _clear_old(old: Path, target: Path) -> None:
    """Remove the files of the former run. Files that others added move to the new result."""
    if not old.exists():
        return
    header = read_header(old)
    written = set(header.outputs) if header else set()
    for path in old.iterdir():
        if path.name not in written and path.name != RUN:
            path.rename(_free_place(target / path.name))
    sync(target)
    for path in old.iterdir():
        if path.name != RUN:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # Last: after an interruption, it still lists what the run wrote.
    (old / RUN).unlink(missing_ok=True)
    old.rmdir()


def _free_place(path: Path) -> Path:
    while path.exists():
        path = path.with_name(f"{path.name}.kept")
    return path


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
