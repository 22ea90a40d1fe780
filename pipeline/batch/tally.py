"""How many slides of a batch ended in which way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipeline.results.slide_result import STATUSES, SlideResult


def tally(results: Sequence[SlideResult]) -> str:
    """Return the counts as text: "8 slides: 5 done, 2 failed", or "8 slides: 3 skipped, 5 failed before, 0 new"."""
    counts = Counter(result.status for result in results)
    parts = [f"{counts[status]} {status}" for status in STATUSES if status != "failed" and counts[status]]
    new, before = new_failures(results), sum(result.failed_before for result in results)
    if before:
        parts.append(f"{before} failed before, {new} new")
    elif new:
        parts.append(f"{new} failed")
    return f"{slide_count(len(results))}: " + (", ".join(parts) or "none")


def new_failures(results: Sequence[SlideResult]) -> int:
    """Return how many slides failed in this run, without the failures that an earlier run left."""
    return sum(result.status == "failed" and not result.failed_before for result in results)


def slide_count(count: int) -> str:
    """Return "1 slide", "2 slides" and so on."""
    return f"{count} slide{'' if count == 1 else 's'}"
