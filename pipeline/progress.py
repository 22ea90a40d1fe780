"""Progress on stderr, with the time that is left."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from pipeline import segment


class ProgressBars:
    """A progress bar for the slide at work, and a line for each that has ended. Context manager."""

    def __init__(self, *, hidden: bool) -> None:
        self._console = Console(stderr=True)
        self._hidden = hidden
        self._lock = threading.Lock()
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

    def slide(self, name: str) -> segment.Progress:
        """A callback for one slide's progress; its bar takes the place of the last slide's."""
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        task = self._bars.add_task("planning", slide=name, total=None)
        stage = ""

        def update(description: str, done: int, total: int) -> None:
            nonlocal stage
            with self._lock:
                if description != stage:
                    stage = description
                    self._bars.reset(task, description=description, total=total)
                self._bars.update(task, completed=done, total=total)

        return update

    def say(self, line: str) -> None:
        """Print a line above the bar. Errors are printed even where progress is hidden."""
        if not self._hidden or line.startswith("failed"):
            self._console.print(Text(line), soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
