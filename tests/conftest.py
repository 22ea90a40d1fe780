"""Settings and slides that all tests share."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pipeline.cli import sample
from pipeline.errors import SampleError
from tests.repository import REPOSITORY

# Set before anything loads torch, also for the processes that tests start. A second thread does not speed up such small
# networks, and the last bits of results depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

# Examples have no deadline, because a busy machine may stall at any time.
# The default run draws the same examples each time; `python -m tests.explore` draws others with the second profile.
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=40)
settings.register_profile("explore", deadline=None, derandomize=False, max_examples=200, print_blob=True)
settings.load_profile("fixed")

# The fixtures `browser` and `page`.
pytest_plugins = ["tests.browser"]

# A shell without job control starts background jobs with Ctrl-C ignored. The tests' processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sample_slide() -> Path:
    """Return the small real Aperio slide that `wsi-segment --sample` uses."""
    try:
        return sample.sample_slide()
    except SampleError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared_slides() -> Path:
    """Return the folder of the developers' larger slides, which are not part of the repository."""
    shared = Path(os.environ.get("WSI_SEGMENT_SHARED", REPOSITORY.parent / "shared"))
    slides = shared / "data" / "slides"
    if not slides.is_dir():
        pytest.skip("no shared slides: put them beside the checkout in shared/, or set WSI_SEGMENT_SHARED")
    return slides


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file system refuse locks, as some network mounts do."""

    def refused(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refused)


@pytest.fixture
def unexaminable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Return a function that lets every look at a file in a folder fail with an error number. Root may look at all.

    `Path.is_file` and similar methods return False then, as from Python 3.14 on; before, they raise the error.
    """
    stat = os.stat

    def fail_in(folder: Path, number: int) -> None:
        def failing(path: Any, **options: Any) -> os.stat_result:
            if not isinstance(path, int) and Path(path).parent == folder:
                raise OSError(number, os.strerror(number), str(path))
            return stat(path, **options)

        monkeypatch.setattr(os, "stat", failing)

    for name, of_314 in {
        "is_file": os.path.isfile,
        "is_dir": os.path.isdir,
        "exists": os.path.exists,
        "is_symlink": os.path.islink,
    }.items():
        monkeypatch.setattr(Path, name, of_314)
    return fail_in
