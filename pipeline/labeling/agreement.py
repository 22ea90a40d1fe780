"""How well two annotators agree, per class, on patches that both labeled without suggestions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from pipeline.labeling.events import Answer, Labeled, Place
from pipeline.labeling.labels import Labels


@dataclass(frozen=True)
class Agreement:
    """Two annotators and one class."""

    annotators: tuple[str, str]
    class_name: str
    patches: int
    """Blind patches for which both answered about this class on the page."""
    same: int
    """Patches with the same answer."""
    kappa: float | None
    """Cohen's kappa; None without patches, or if all answers of both are the same."""


def agreements(labels: Labels) -> list[Agreement]:
    """Return the agreement of each pair of annotators about each class, on blind patches."""
    found = []
    blind = [place for place in labels.places() if labels.is_blind(place)]
    for one, other in combinations(labels.annotators(), 2):
        shared = list(_shared(labels, blind, one, other))
        for id_, spec in labels.classes.items():
            pairs = [(a[id_] == "present", b[id_] == "present") for a, b in shared if "unknown" not in (a[id_], b[id_])]
            same = sum(a == b for a, b in pairs)
            found.append(Agreement((one, other), spec.name, len(pairs), same, cohen_kappa(pairs)))
    return found


def _shared(
    labels: Labels, places: Sequence[Place], one: str, other: str
) -> Iterator[tuple[dict[int, Answer], dict[int, Answer]]]:
    for place in places:
        first, second = labels.label(place, one), labels.label(place, other)
        if first is not None and second is not None and _counts(first) and _counts(second):
            yield labels.answers(first), labels.answers(second)


def _counts(label: Labeled) -> bool:
    # Annotators who draw regions or correct a map may have seen predictions.
    return label.mark == "none" and label.view != "import"


def cohen_kappa(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """Return Cohen's kappa of two raters' yes and no answers: (observed - chance) / (1 - chance).

    None without pairs, or if chance agreement is 1 (Cohen 1960, Educ. Psychol. Meas. 20:37).
    """
    if not pairs:
        return None
    count = len(pairs)
    observed = sum(a == b for a, b in pairs) / count
    first, second = sum(a for a, _ in pairs) / count, sum(b for _, b in pairs) / count
    chance = first * second + (1 - first) * (1 - second)
    return None if chance == 1 else (observed - chance) / (1 - chance)
