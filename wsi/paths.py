"""What a path leads to."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Literal

Kind = Literal["file", "folder", "other"]
"""What a path leads to. "other" is, for example, a named pipe."""

_NOTHING_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def kind_of(path: Path) -> Kind | None:
    """Return what a path leads to; None if it does not exist, or is a link to nothing or to itself.

    Raises OSError if the path cannot be examined. From Python 3.14 on, `Path.is_file` and `Path.is_dir` return False
    in that case, and the reason, such as a missing permission or a stale mount, would be lost.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise
    except ValueError:  # the path contains a null character
        return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"
