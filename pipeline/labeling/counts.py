"""How many patches of a labels folder are labeled."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.labeling.labels import Labels


@dataclass(frozen=True)
class Counts:
    """Patches of this folder, of all annotators."""

    labeled: int
    """Patches with an answer for every class."""
    incomplete: int
    """Patches that lack an answer: labeled before a class was added, imported in part, or disputed."""
    unsure: int
    artifact: int
    present: dict[int, int]
    """Labeled patches in which a class is present, by class number."""
    by_slide: dict[str, int]
    """Labeled patches by the slide's digest."""


def count(labels: Labels) -> Counts:
    """Return how many patches of a folder are labeled."""
    found = Counts(0, 0, 0, 0, dict.fromkeys(labels.classes, 0), dict.fromkeys(labels.slides, 0))
    complete = incomplete = unsure = artifact = 0
    for place in labels.places():
        verdict = labels.verdict(place)
        unsure += verdict.mark == "unsure"
        artifact += verdict.mark == "artifact"
        if verdict.mark != "none":
            continue
        if "unknown" in verdict.answers.values():
            incomplete += 1
            continue
        complete += 1
        found.by_slide[place.slide] = found.by_slide.get(place.slide, 0) + 1
        for id_, answer in verdict.answers.items():
            found.present[id_] += answer == "present"
    return Counts(complete, incomplete, unsure, artifact, found.present, found.by_slide)
