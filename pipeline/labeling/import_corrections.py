"""What people changed about results, as annotations from which labels are made.

Only changes count. A region that nobody changed is a prediction, and a model must not learn from its own predictions.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.errors import LabelingError
from pipeline.formats.features import read_features
from pipeline.labeling.annotations import Annotation, read_annotations
from pipeline.labeling.corrections import Relabeled, corrections_file, current, read_entries, sent_file
from pipeline.labeling.import_annotations import Drawing, ImportSource, file_label
from pipeline.labeling.published_map import PublishedMap
from pipeline.results.find import result_folders
from pipeline.results.names import GEOPARQUET_END, RUN
from pipeline.results.record import read_run


def corrected_sources(path: Path, moved: Path | None, annotator: str) -> list[ImportSource]:
    """Return what people changed about the results at `path`: a result, or a folder of results.

    `moved` is the slide, or the folder with the slides, if they have moved since. Corrections of
    wsi-view keep their authors. Those of QuPath get the `annotator`. Raises LabelingError if there are none, and the
    errors of a damaged file.
    """
    whole = path.absolute()
    folders = [whole] if (whole / RUN).is_file() else result_folders(whole) if whole.is_dir() else []
    found = [one for one in (_corrected(folder, moved, annotator) for folder in folders) if one is not None]
    if not found:
        raise LabelingError(
            f"{path}: contains no corrections of a result; correct regions in wsi-view, or run the script "
            "send_corrections in QuPath"
        )
    return found


def result_label(folder: Path, model: str) -> str:
    """Return the name by which labels state the corrected result: `file_label` and the start of the model's digest.

    Results of two models for one slide often have the same folder and name, as in `a/results/x` and `b/results/x`.
    """
    return f"{file_label(folder)} (model {model[:12]})"


def _corrected(folder: Path, moved: Path | None, annotator: str) -> ImportSource | None:
    run = read_run(folder)
    if run is None or not (corrections_file(folder).exists() or sent_file(folder).exists()):
        return None
    by_author: dict[tuple[str, str], list[Annotation]] = {}
    skipped: Counter[str] = Counter()
    entries = read_entries(folder)
    for one in current(entries):
        if one.event.slide == run.identity.slide:
            made = Annotation((one.event.after,), one.event.polygon_l0)
            by_author.setdefault((one.annotator, one.event.model), []).append(made)
        else:
            skipped["corrections of another slide, which had a result of this name before"] += 1
    # Without a drawing, the labels of a person whose corrections were all undone would stay.
    for entry in entries:
        if isinstance(entry.event, Relabeled):
            by_author.setdefault((entry.annotator, entry.event.model), [])
    drawings = [
        Drawing(who, made, "viewer", "correction", model, (result_label(folder, model),))
        for (who, model), made in by_author.items()
    ]
    if sent_file(folder).exists():
        parquet = folder / next(name for name in run.outputs if name.endswith(GEOPARQUET_END))
        read = read_annotations(sent_file(folder), PublishedMap(read_features(parquet, run.classes)))
        files = (result_label(folder, run.identity.model),)
        drawings.append(Drawing(annotator, read.found, "qupath", "correction", run.identity.model, files))
        skipped.update(read.skipped)
    slide = run.slide.path or folder.parent / run.slide.name
    if moved is not None:
        slide = moved / slide.name if moved.is_dir() else moved
    return ImportSource(folder.name, slide, drawings, skipped, run.slide.mpp, run.identity.slide, run.classes)
