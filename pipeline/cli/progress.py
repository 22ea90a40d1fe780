"""Progress on stderr, with the remaining time."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline import progress
from pipeline.console import printable


class ProgressBars:
    """Shows a progress bar for each running slide and a line for each finished one. Context manager."""

    def __init__(self, *, hidden: bool) -> None:
        self._console = Console(stderr=True)
        self._hidden = hidden
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.fields[slide]}", markup=False),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=hidden or not self._console.is_terminal,
        )

    def slide(self, name: str) -> progress.Progress:
        """Return the progress callback of one slide."""
        self._remove(name)
        task = self._tasks[name] = self._bars.add_task("planning", slide=printable(name), total=None)
        stage = ""

        def update(description: str, done: int, total: int) -> None:
            nonlocal stage
            with self._lock:
                if description != stage:
                    stage = description
                    self._bars.reset(task, description=description, total=total)
                self._bars.update(task, completed=done, total=total)

        return update

    def end(self, name: str, line: str) -> None:
        """Remove a slide's bar and print a line above the other bars. Errors are printed even if progress is hidden."""
        self._remove(name)
        if not self._hidden or line.startswith("failed"):
            self._print(line)

    def line(self, text: str) -> None:
        """Print a line above the bars, unless progress is hidden."""
        if not self._hidden:
            self._print(text)

    def _print(self, text: str) -> None:
        # A terminal that was closed, or a full log, must not end the batch.
        with suppress(OSError):
            self._console.print(Text(printable(text)), soft_wrap=True)

    def _remove(self, name: str) -> None:
        with self._lock:
            task = self._tasks.pop(name, None)
            if task is not None:
                self._bars.remove_task(task)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
