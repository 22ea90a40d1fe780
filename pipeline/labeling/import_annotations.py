"""Labels of patches from annotations that were drawn in QuPath.

A class is present in a patch if it covers at least `PRESENT` of it. If the annotations of all classes together cover at
least `COMPLETE` of the patch, the other classes are absent. Otherwise they are unknown, because nobody said what the
rest of the patch shows.

Shape suffix: N patches.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from models.tissue_class import TissueClass
from pipeline.errors import LabelingError
from pipeline.files import printable_name
from pipeline.labeling.annotations import ENDINGS, Annotation, read_annotations
from pipeline.labeling.events import Answer, Event, Labeled, Place, Recorded, SlideAdded
from pipeline.labeling.labels import Labels, label_of
from pipeline.labeling.masks import Cutter
from pipeline.labeling.patches import SlidePatches

PRESENT = 0.05
COMPLETE = 0.95


@dataclass(frozen=True)
class Drawing:
    """Annotations that one person made on one slide, and where they come from."""

    annotator: str
    annotations: Sequence[Annotation]
    source: Literal["qupath", "viewer"] = "qupath"
    reason: Literal["import", "correction"] = "import"
    model: str | None = None
    """Digest of the model whose map was corrected."""
    files: tuple[str, ...] = ()
    """`file_label` of the files of annotations, or `result_label` of the corrected results."""


@dataclass(frozen=True)
class ImportSource:
    """What people drew on one slide."""

    name: str
    """For messages."""
    slide: Path
    drawings: Sequence[Drawing]
    skipped: Mapping[str, int]
    """Reason -> number of objects that do not count."""
    mpp: float | None = None
    """Micrometers per pixel of the slide, if its file does not state it."""
    digest: str | None = None
    """Digest of the slide's file, if it is known."""
    classes: Sequence[TissueClass] = ()
    """Classes of a corrected result. A new folder gets them even if nobody drew them."""


@dataclass(frozen=True)
class Imported:
    """What became of the annotations of a slide."""

    complete: int
    """Patches with an answer for every class."""
    partial: int
    """Patches that are covered in part, and so lack an answer for some class."""
    ignored: int
    """Patches that an ignored class covers."""
    kept: int
    """Patches that keep a label that this person made on the page."""
    taken_back: int
    """Patches whose answers change because the same files no longer show an earlier label."""
    outside: int
    """Annotations that lie wholly outside the slide."""


@dataclass(frozen=True)
class Drawn:
    """The annotations of a slide by class."""

    shapes: Mapping[int, BaseGeometry]
    """Class number -> its annotated area."""
    ignored: BaseGeometry
    """Area of the classes that QuPath ignores and that no mapping names."""


def target_name(annotation: Annotation, mapping: Mapping[str, str]) -> str | None:
    """Return the class for an annotation: as mapped by its whole name or its first part, or else its first part.

    Return None if QuPath ignores the class and no mapping names it.
    """
    whole = ": ".join(annotation.name)
    for name in (whole, annotation.name[0]):
        if name in mapping:
            return mapping[name]
    return None if annotation.is_ignored else annotation.name[0]


def drawn(annotations: Iterable[Annotation], mapping: Mapping[str, str], ids: Mapping[str, int]) -> Drawn:
    """Join annotations by class. `ids` are the class numbers by name. Raises KeyError for a class without one."""
    by_class: dict[int, list[BaseGeometry]] = defaultdict(list)
    ignored: list[BaseGeometry] = []
    for one in annotations:
        name = target_name(one, mapping)
        (ignored if name is None else by_class[ids[name]]).append(one.shape)
    return Drawn({id_: shapely.union_all(shapes) for id_, shapes in by_class.items()}, shapely.union_all(ignored))


def joined_drawings(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Return one drawing per annotator, because a patch has only one label per annotator.

    A joined drawing has the source and reason of its first part, and a model if all its annotations have the same one.
    """
    by_annotator: dict[str, list[Drawing]] = defaultdict(list)
    for one in drawings:
        by_annotator[one.annotator].append(one)
    found = []
    for parts in by_annotator.values():
        models = {one.model for one in parts if one.annotations}
        found.append(
            replace(
                parts[0],
                annotations=[annotation for one in parts for annotation in one.annotations],
                model=models.pop() if len(models) == 1 else None,
                files=tuple(sorted({file for one in parts for file in one.files})),
            )
        )
    return found


def joined_sources(sources: Iterable[ImportSource]) -> list[ImportSource]:
    """Join the sources of each slide. Sources that differ in pixel size are kept apart."""
    by_slide: dict[tuple[str, float | None], list[ImportSource]] = defaultdict(list)
    for one in sources:
        # A slide can have several paths, as on another mount.
        by_slide[one.digest or os.path.realpath(one.slide), one.mpp].append(one)
    return [_joined(parts) for parts in by_slide.values()]


def _joined(parts: Sequence[ImportSource]) -> ImportSource:
    skipped: Counter[str] = Counter()
    for one in parts:
        skipped.update(one.skipped)
    return replace(
        parts[0],
        name=", ".join(dict.fromkeys(one.name for one in parts)),
        drawings=[drawing for one in parts for drawing in one.drawings],
        skipped=skipped,
        classes=tuple(dict.fromkeys(tissue for one in parts for tissue in one.classes)),
    )


def labels_from(
    patches: SlidePatches, drawing: Drawing, mapping: Mapping[str, str], ids: Mapping[str, int]
) -> tuple[list[Labeled], int]:
    """Return the labels of the patches in which a class is present, and how many patches an ignored class covers.

    `ids` are the class numbers by name. Raises KeyError for a class without one.
    """
    shapes = drawn(drawing.annotations, mapping, ids)
    everything = shapely.union_all([*shapes.shapes.values(), shapes.ignored])
    places = _touched(patches, everything)
    boxes_N = [_square(place, patches.side_l0) for place in places]
    cover = {id_: share(boxes_N, area) for id_, area in shapes.shapes.items()}
    ignored_N = share(boxes_N, shapes.ignored) >= PRESENT
    complete_N = share(boxes_N, shapely.union_all(list(shapes.shapes.values()))) >= COMPLETE
    cutters = {id_: Cutter(area) for id_, area in shapes.shapes.items()}

    def areas_in(place: Place, n: int) -> dict[int, str]:
        # A class that covers less than `PRESENT` counts as absent, but its pixels are its own.
        square = (place.x_l0, place.y_l0, patches.side_l0, place.side)
        return {id_: cutter.cut(*square) for id_, cutter in cutters.items() if cover[id_][n] > 0}

    found = []
    for n, place in enumerate(places):
        present = {id_ for id_, share_N in cover.items() if share_N[n] >= PRESENT}
        if present and not ignored_N[n]:
            rest: Answer = "absent" if complete_N[n] else "unknown"
            answers: dict[int, Answer] = {id_: "present" if id_ in present else rest for id_ in ids.values()}
            found.append(
                Labeled(
                    place=place,
                    answers=answers,
                    source=drawing.source,
                    view="import",
                    reason=drawing.reason,
                    model=drawing.model,
                    areas=areas_in(place, n) if complete_N[n] else None,
                    files=drawing.files,
                )
            )
    return found, int(ignored_N.sum())


def count_outside(annotations: Sequence[Annotation], size_l0: tuple[int, int]) -> int:
    """Return how many annotations lie wholly outside a slide of this (width, height)."""
    inside = shapely.intersection([one.shape for one in annotations], shapely.box(0, 0, *size_l0))
    return int((shapely.area(inside) == 0).sum())


def _touched(patches: SlidePatches, area: BaseGeometry) -> list[Place]:
    """Return the patches that the bounding box of an area touches."""
    if area.is_empty:
        return []
    left, top, right, bottom = (value / patches.side_l0 for value in area.bounds)
    columns, rows = patches.cells()
    across = range(max(0, int(left)), min(columns, int(right) + 1))
    down = range(max(0, int(top)), min(rows, int(bottom) + 1))
    return [patches.place(column, row) for row in down for column in across]


def _square(place: Place, side_l0: float) -> BaseGeometry:
    return shapely.box(place.x_l0, place.y_l0, place.x_l0 + side_l0, place.y_l0 + side_l0)


def share(boxes_N: Sequence[BaseGeometry], area: BaseGeometry) -> NDArray[np.float64]:
    """Return the share of each box that an area covers, (N,)."""
    if not boxes_N:
        return np.zeros(0)
    # Cut the area to pieces once, because a large polygon is slow to intersect with each of thousands of boxes.
    tree = shapely.STRtree(shapely.get_parts(area))
    shares_N = np.zeros(len(boxes_N))
    box, part = tree.query(boxes_N, predicate="intersects")
    inside = shapely.area(shapely.intersection(np.asarray(boxes_N)[box], tree.geometries[part]))
    np.add.at(shares_N, box, inside)
    return np.asarray(shares_N / shapely.area(boxes_N))


def import_events(
    labels: Labels, annotator: str, slide: SlideAdded, new: Sequence[Labeled], *, partial: bool
) -> tuple[list[Event], int]:
    """Return the events that add labels, and how many patches keep a label that the annotator made on the page.

    A label that is there already is not added again. Incomplete labels are added only if `partial`, and never replace
    a complete one.
    """
    events: list[Event] = [] if labels.slides.get(slide.digest) == slide else [slide]
    kept = 0
    for label in new:
        incomplete = "unknown" in label.answers.values()
        if incomplete and not partial:
            continue
        own = labels.label(label.place, annotator)
        if own is not None and own.source == "person":
            kept += 1
        elif own is not None and incomplete and labels.is_complete(own):
            continue
        elif own is None or not is_same(own, label):
            events.append(label)
    return events, kept


def outdated(
    labels: Labels, slide: SlideAdded, drawing: Drawing, new: Sequence[Labeled], *, partial: bool
) -> list[Recorded]:
    """Return the labels of earlier imports of a drawing's files that are not in `new`, the drawing's current labels.

    Only labels whose files all belong to the drawing count. A complete label that would now be incomplete is outdated.
    Labels of the page and of other annotators are never outdated.
    """
    now = {one.place: one for one in new}

    def stays(old: Labeled) -> bool:
        one = now.get(old.place)
        if one is None:
            return False
        replaced = "unknown" not in one.answers.values() or (partial and not labels.is_complete(old))
        return replaced or labels.answers(one) == labels.answers(old)

    return [
        record
        for record in labels.labels_of(drawing.annotator)
        if (old := label_of(record)).files
        and old.place.slide == slide.digest
        and set(old.files) <= set(drawing.files)
        and not stays(old)
    ]


def superseded(labels: Labels, drawing: Drawing, new: Sequence[Labeled]) -> list[Recorded]:
    """Return the labels of earlier imports that lie under the same person's label in `new`. `labels` include `new`.

    Without this, they would count again if the new label is removed. Only labels whose files all belong to the drawing
    are superseded, and those of earlier versions, which have no files. Labels of the page never are.
    """
    by_place: dict[Place, list[Recorded]] = defaultdict(list)
    for record in labels.labels_of(drawing.annotator):
        by_place[label_of(record).place].append(record)

    def is_earlier(old: Labeled) -> bool:
        known = set(old.files) <= set(drawing.files) if old.files else old.reason == drawing.reason
        return known and old.source != "person"

    found = []
    for one in new:
        own = by_place[one.place]
        if own and label_of(own[-1]).source != "person" and is_same(label_of(own[-1]), one):
            found += [record for record in own[:-1] if is_earlier(label_of(record))]
    return found


def is_same(one: Labeled, other: Labeled) -> bool:
    """Return whether two imported labels have the same content and come from the same files."""
    return (one.answers, one.areas, one.files) == (other.answers, other.areas, other.files)


def file_label(path: Path) -> str:
    """Return the name by which labels state the file that they come from: its folder and its name."""
    whole = path.absolute()
    return printable_name(f"{whole.parent.name}/{whole.name}")


def annotation_files(inputs: Iterable[Path]) -> list[Path]:
    """Return the files, and the files of folders, sorted, without hidden ones such as macOS adds.

    Raises LabelingError for a folder without annotations.
    """
    found: list[Path] = []
    for path in inputs:
        if not path.is_dir():
            found.append(path)
            continue
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        inside = sorted(file for file in visible if file.name.lower().endswith(ENDINGS))
        if not inside:
            raise LabelingError(f"{path}: contains no annotations (endings: {' '.join(ENDINGS)})")
        found += inside
    return found


def annotation_sources(files: Iterable[Path], slide: Path, annotator: str, mpp: float | None) -> list[ImportSource]:
    """Return the annotations in files and folders. `slide` is their slide, or the folder of their slides.

    Raises LabelingError for a file that cannot be read or that has no slide.
    """
    found = []
    for file in annotation_files(files):
        read = read_annotations(file)
        drawing = Drawing(annotator, read.found, files=(file_label(file),))
        found.append(ImportSource(file.name, slide_of(file, slide), [drawing], read.skipped, mpp))
    return found


def slide_of(file: Path, slide: Path) -> Path:
    """Return the slide of a file of annotations: `slide`, or the file of this name in the folder `slide`.

    "a.svs.geojson" and "a.geojson" belong to "a.svs". Annotations may lie beside their slides. An umlaut may be one
    character or two, because macOS writes two. Raises LabelingError if there is not exactly one such slide.
    """
    if not slide.is_dir():
        return slide
    name = next((file.name[: -len(end)] for end in sorted(ENDINGS, key=len, reverse=True)
                 if file.name.lower().endswith(end)), file.name)  # fmt: skip
    files = [path for path in sorted(slide.iterdir()) if path.is_file() and not path.name.lower().endswith(ENDINGS)]
    found = [path for path in files if _composed(name) in (_composed(path.name), _composed(path.stem))]
    if len(found) != 1:
        raise LabelingError(
            f"{file.name}: {len(found)} slides in {slide} have the name {name}; name the file after its slide, or pass "
            "the slide with --slide"
        )
    return found[0]


def _composed(name: str) -> str:
    return normalize("NFC", name)


def used_names(annotations: Iterable[Annotation], mapping: Mapping[str, str]) -> Iterator[str]:
    """Yield the classes that annotations need."""
    for one in annotations:
        name = target_name(one, mapping)
        if name is not None:
            yield name
