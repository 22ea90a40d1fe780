from __future__ import annotations

import pytest
from rich.console import Console

from pipeline.cli.progress import ProgressBars


def test_a_terminal_that_goes_away_does_not_end_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []

    def gone(_: Console, text: object, **__: object) -> None:
        printed.append(str(text))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Console, "print", gone)
    with ProgressBars(hidden=False) as bars:
        bars.slide("a\x1b[2J")("segmenting", 1, 2)
        bars.end("a\x1b[2J", "done       a\x1b[2J")
        bars.line("1 slide")
    assert printed == ["done       a\\x1b[2J", "1 slide"]
