"""What the arguments of `wsi-label` name: slides with their patients, annotations to import, and pairs of classes.

Arguments that cannot be used end the program with a line that names them.
"""

from __future__ import annotations

# Heavy libraries are imported inside the functions, so that `--help` answers at once.
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.commands import EXIT_USAGE, fail

if TYPE_CHECKING:
    from pipeline.labeling.import_annotations import ImportSource
    from pipeline.labeling.slides import SlideFile

PROGRAM = "wsi-label"

NAMED = 5
"""Most names that a message lists."""


def slide_files(inputs: list[Path], mpp: float | None, *, recursive: bool) -> list[SlideFile]:
    """Return the slides that the arguments name, without patients."""
    from pipeline.batch.collect import collect_jobs
    from pipeline.labeling.slides import SlideFile

    return [SlideFile(job.path, mpp=job.mpp or mpp) for job in collect_jobs(inputs, recursive=recursive)]


def only_slide_file(slide: Path, mpp: float | None) -> SlideFile:
    """Return the slide of an import. See `slide_files`."""
    files = slide_files([slide], mpp, recursive=False)
    if len(files) != 1:
        fail(PROGRAM, f"{slide}: lists {len(files)} slides; pass one slide, or a folder of slides, with --slide")
    return files[0]


def with_patients(files: list[SlideFile], patient: str | None) -> list[SlideFile]:
    """Return the slides with their patients. `patient` is the expression that finds the patient in a name."""
    if patient is None:
        return files
    pattern = _patient_pattern(patient)
    matches = [pattern.search(file.path.name) for file in files]
    found = [match[1] if match else "" for match in matches]
    names = list(dict.fromkeys(file.path.name for file, one in zip(files, found, strict=True) if not one))
    if names:
        listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        which = f"the file name {listed}" if len(names) == 1 else f"{len(names)} file names: {listed}"
        fail(
            PROGRAM,
            f"--patient: {patient!r} does not match {which}; add the missing form to the pattern after a |, as in "
            "'^(P[0-9]+|Case [0-9]+)', or rename the files",
            EXIT_USAGE,
        )
    return [replace(file, patient=one) for file, one in zip(files, found, strict=True)]


def import_sources(
    files: list[Path], corrections: Path | None, slide: Path | None, annotator: str, mpp: float | None
) -> list[ImportSource]:
    """Return what to import: annotations in files, or corrections of results."""
    from pipeline.labeling.import_annotations import annotation_sources, joined_sources
    from pipeline.labeling.import_corrections import corrected_sources

    if (corrections is None) == (not files):
        fail(PROGRAM, "pass either files of annotations or --corrections with a folder of results", EXIT_USAGE)
    if corrections is not None:
        return joined_sources(corrected_sources(corrections, slide, annotator))
    if slide is None:
        fail(PROGRAM, "pass the slide of the annotations, or the folder of the slides, with --slide", EXIT_USAGE)
    return joined_sources(annotation_sources(files, slide, annotator, mpp))


def class_pairs(texts: list[str]) -> dict[str, str]:
    """Return the class for each class of QuPath, from texts old=new."""
    pairs: dict[str, str] = {}
    for text in texts:
        old, new = two_names("--map", text)
        if pairs.setdefault(old, new) != new:
            fail(PROGRAM, f"--map: {old!r} has two classes, {pairs[old]!r} and {new!r}; pass one of them", EXIT_USAGE)
    return pairs


def two_names(option: str, text: str) -> tuple[str, str]:
    """Return the names before and after the = of an option's value."""
    old, equals, new = text.partition("=")
    if not (equals and old and new):
        fail(PROGRAM, f"{option}: {text!r} must be two names with = between them", EXIT_USAGE)
    return old, new


def _patient_pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        fail(PROGRAM, f"--patient: {text!r} is not a valid regular expression: {error}", EXIT_USAGE)
    if pattern.groups != 1:
        fail(PROGRAM, f"--patient: {text!r} has {pattern.groups} groups; it must have one", EXIT_USAGE)
    return pattern
