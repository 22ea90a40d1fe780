"""The data set that a labels folder is: patches, labels.csv and dataset.toml, made from the events.

wsi-train takes the folder as it is. A patch is part of the data set if its annotators answered for every class.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import shlex
import shutil
import threading
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import LabelingError, OutputError
from pipeline.files import file_lock, replacing, write_atomically
from pipeline.labeling.counts import count
from pipeline.labeling.events import Place
from pipeline.labeling.labels import Labels
from pipeline.labeling.masks import UNKNOWN, Outlined, classes_in, write_masks
from pipeline.labeling.store import EventStore
from pipeline.training.dataset_sections import Split
from pipeline.training.splits import hash_split
from wsi.errors import SlideReadError, WsiSegmentError

log = logging.getLogger(__name__)

PATCHES, MASKS, LEFT_OUT, TABLE, CARD = "patches", "masks", "left-out", "labels.csv", "dataset.toml"

VAL_SHARE = 0.2
_ANY_PATCH = -1
"""Stands among class indices for a patch of any class: a split without patches lacks it."""

FEW_LABELS = 50
FEW_OF_A_CLASS = 10
NAMED = 20
"""Most patches that a warning names."""

OWN_KEYS = {
    "name": "my-labels",
    "description": "H&E patches labeled with wsi-label.",
    "licence": "Not stated: fill in the license of the slides and labels.",
    "attribution": "Not stated: fill in who made the slides and the labels.",
    "limits": "Not for diagnosis or any clinical use.",
    "scope": "",
}
"""Keys of dataset.toml that belong to the user, and their first values."""

Read = Callable[[Place], NDArray[np.uint8] | None]
"""Returns the pixels of a patch, rgb_HWC; None if its slide is not open. Raises SlideReadError if it is unreadable."""


@dataclass(frozen=True)
class Row:
    """A patch of the data set."""

    place: Place
    patient: str
    split: str
    present: tuple[bool, ...]
    """For each current class."""


def write_dataset(folder: Path, labels: Labels, read: Read) -> int:
    """Bring the files of a labels folder up to date. Return how many patches are missing.

    A patch is missing if its slide is not open. Patches that cannot be read are left out, and a warning names them. The
    next call reads them again.

    Raises LabelingError if a file cannot be written.
    """
    try:
        # Another annotator's program may write the same folder.
        with file_lock(folder / ".dataset.lock"):
            missing = _write(folder, labels, read)
    except OutputError as error:
        raise LabelingError(str(error)) from error
    except OSError as error:
        raise LabelingError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); check the space on the disk "
            "and the permissions"
        ) from error
    return missing


def _write(folder: Path, labels: Labels, read: Read) -> int:
    for name in (PATCHES, LEFT_OUT):
        (folder / name).mkdir(exist_ok=True)
    missing, unreadable = set(), set()
    for place in labels.places():
        try:
            if not _has_pixels(folder, place, read):
                missing.add(place)
        except SlideReadError:
            unreadable.add(place)
    rows = [row for row in rows_of(labels) if row.place not in missing]
    _warn_of_unreadable([row.place for row in rows if row.place in unreadable], labels)
    rows = [row for row in rows if row.place not in unreadable]
    _sort_patches(folder, {row.place.id for row in rows})
    write_atomically(folder / TABLE, table_text(rows, labels))
    masks = masks_of(rows, labels)
    if masks:
        write_masks(folder / MASKS, masks)
    if len(labels.classes) >= 2:
        write_atomically(folder / CARD, card_text(folder / CARD, labels, masks=bool(masks)))
    if not masks and (folder / MASKS).is_dir():
        shutil.rmtree(folder / MASKS)
    return len(missing)


def _warn_of_unreadable(places: Sequence[Place], labels: Labels) -> None:
    if not places:
        return
    names = [f"{_slide_name(place, labels)} at ({place.x_l0:g}, {place.y_l0:g})" for place in places[:NAMED]]
    more = ", ..." if len(places) > NAMED else ""
    log.warning(
        "%d labeled patches are left out of the data set because they cannot be read: %s%s; check the disk, or copy or "
        "scan the slide again",
        len(places), ", ".join(names), more,
    )  # fmt: skip


def _slide_name(place: Place, labels: Labels) -> str:
    slide = labels.slides.get(place.slide)
    return place.slide if slide is None else slide.name


def masks_of(rows: Sequence[Row], labels: Labels) -> list[Outlined]:
    """Return what was outlined in each patch. Empty unless the masks of the validation split show every class."""
    patches = [Outlined(row.place.id, labels.areas(row.place), row.place.side) for row in rows]
    shown = {k for row, one in zip(rows, patches, strict=True) if row.split == "val" for k in classes_in(*one[1:])}
    return patches if len(shown) == len(labels.classes) else []


def _has_pixels(folder: Path, place: Place, read: Read) -> bool:
    """Write a patch that has no file yet. Return whether it has one."""
    name = f"{place.id}.png"
    if (folder / PATCHES / name).exists() or (folder / LEFT_OUT / name).exists():
        return True
    rgb_HWC = read(place)
    if rgb_HWC is None:
        return False
    with replacing(folder / LEFT_OUT / name) as partial:
        Image.fromarray(rgb_HWC).save(partial, "PNG")
    return True


def _sort_patches(folder: Path, used: set[str]) -> None:
    """Move the patches of the data set into one folder, and all others into the other."""
    for file in (folder / LEFT_OUT).glob("*.png"):
        if file.stem in used:
            file.replace(folder / PATCHES / file.name)
    for file in (folder / PATCHES).glob("*.png"):
        if file.stem not in used and not file.name.startswith("."):
            file.replace(folder / LEFT_OUT / file.name)


def rows_of(labels: Labels) -> list[Row]:
    """Return the patches of the data set, sorted by slide and place.

    The split is that of `split_by_patient`, or, if it finds none, that of a hash of the patch. New labels do not move
    old ones while the split is made by hashes alone. They can move old ones if patients had to be moved, and when the
    data set changes between the two kinds of split.
    """
    usable = list(_usable(labels))
    chosen = split_by_patient([(patient, present) for _, patient, present in usable])
    chosen = chosen or _split_by_patch([place.id for place, _, _ in usable])
    rows = [Row(place, patient, split, present)
            for (place, patient, present), split in zip(usable, chosen, strict=True)]  # fmt: skip
    return sorted(rows, key=lambda row: (row.place.slide, row.place.y_l0, row.place.x_l0))


def split_by_patient(patches: Sequence[tuple[str, tuple[bool, ...]]]) -> list[Split] | None:
    """Return the split of each patch (patient, classes present) so that no patient is in both splits.

    A hash of the patient decides. If a split then lacks a class, patients with this class move to it in the order of
    their hash, unless the other split would lose a class. Return None if a class is still missing.
    """
    has: dict[str, set[int]] = defaultdict(set)
    for patient, present in patches:
        has[patient] |= {_ANY_PATCH, *(k for k, there in enumerate(present) if there)}
    train_first = sorted(has, key=lambda patient: hashlib.sha256(patient.encode()).digest())
    split_of = {patient: hash_split(patient, 1 - VAL_SHARE, VAL_SHARE) for patient in train_first}

    def classes(split: Split, without: str = "") -> set[int]:
        return set().union(*(own for who, own in has.items() if split_of[who] == split and who != without))

    ways: tuple[tuple[Split, Split], ...] = (("train", "val"), ("val", "train"))
    for source, target in ways:
        missing = set().union(*has.values()) - classes(target)
        for patient in train_first[::-1] if target == "val" else train_first:
            helps = split_of[patient] == source and has[patient] & missing
            if helps and classes(source, patient) == classes(source):
                split_of[patient] = target
                missing -= has[patient]
    if classes("train") != classes("val"):
        return None
    return [split_of[patient] for patient, _ in patches]


def _split_by_patch(ids: Sequence[str]) -> list[Split]:
    """Return the split of each patch by a hash. Two patches or more are never all in one split."""
    splits = [hash_split(patch_id, 1 - VAL_SHARE, VAL_SHARE) for patch_id in ids]
    if len(splits) > 1 and len(set(splits)) == 1:
        splits[ids.index(max(ids))] = "train" if splits[0] == "val" else "val"
    return splits


def _usable(labels: Labels) -> Iterator[tuple[Place, str, tuple[bool, ...]]]:
    for place in labels.places():
        verdict = labels.verdict(place)
        if verdict.mark == "none" and "unknown" not in verdict.answers.values():
            slide = labels.slides.get(place.slide)
            patient = place.slide if slide is None else slide.patient
            yield place, patient, tuple(answer == "present" for answer in verdict.answers.values())


def is_split_by_patient(rows: list[Row]) -> bool:
    """Return whether no patient has patches in both splits."""
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.patient, set()).add(row.split)
    return all(len(found) == 1 for found in splits.values())


def table_text(rows: list[Row], labels: Labels) -> str:
    """Return labels.csv: one row per patch. The frequency of a class can be estimated from those with `blind` = 1."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = class_columns(labels)
    writer.writerow(["file", "slide", "patient", "split", "x_l0", "y_l0", "blind", *columns])
    for row in rows:
        facts = [f"{row.place.id}.png", _slide_name(row.place, labels), row.patient, row.split]
        place = [f"{row.place.x_l0:g}", f"{row.place.y_l0:g}", int(labels.is_sampled(row.place))]
        writer.writerow([*facts, *place, *(int(there) for there in row.present)])
    return stream.getvalue()


def class_columns(labels: Labels) -> list[str]:
    """Return the columns of the classes. The prefix keeps them apart from the other columns."""
    return [f"class {one.name}" for one in labels.classes.values()]


def card_text(file: Path, labels: Labels, *, masks: bool) -> str:
    """Return dataset.toml. The user's own keys (`OWN_KEYS`) and the roles of the classes in `file` are kept.

    `masks`: whether patches have pixel masks. Raises LabelingError for a damaged file.
    """
    assert labels.settings is not None
    content = _content(file)
    own, roles = OWN_KEYS | _kept_keys(content), _kept_roles(content, labels)
    lines = [
        "# Written by wsi-label after each label. Fill in the next six keys. They are kept, and so is the role of each",
        '# class: add role = "background" to a class that is not tissue, such as glass. Other changes are lost.',
    ]
    lines += [f"{key} = {_toml(own[key])}" for key in OWN_KEYS]
    lines += [f"mpp = {labels.settings.mpp!r}", "classes = ["]
    for k, one in enumerate(labels.classes.values()):
        role = roles.get(one.id, one.role)
        more = f", role = {_toml(role)}" if role != "tissue" else ""
        more += f", mask_values = [{k}]" if masks else ""
        lines.append(f"    {{ name = {_toml(one.name)}, color = {list(one.color)}{more} }},")
    mask = f', mask = "{MASKS}/{{name}}.png"' if masks else ""
    lines += ["]", *([f"mask_excluded = [{UNKNOWN}]"] if masks else []), ""]
    lines += ["[images]", f'all = [{{ image = "{PATCHES}/*.png"{mask} }}]', ""]
    lines += ["[table]", f'files = ["{TABLE}"]', 'name_column = "file"', "", "[group]", 'column = "patient"', ""]
    lines += ["[split]", 'by = "table"', "test = []", "", "[labels]", 'source = "csv"']
    lines += [f"columns = [{', '.join(map(_toml, class_columns(labels)))}]", ""]
    return "\n".join(lines)


def _content(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LabelingError(f"{file}: is not valid TOML ({error}); repair it or move it away") from error


def _kept_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in OWN_KEYS if isinstance(content.get(key), str) and content[key]}


def _kept_roles(content: Mapping[str, Any], labels: Labels) -> dict[int, str]:
    """Return the roles in a dataset.toml by class number. Users may have changed them: wsi-train refuses wrong ones.

    A class that was renamed since the file was written is there by a former name, which another class may have now. The
    classes of the file are in the order of their numbers, so each entry belongs to one class at most.
    """
    classes = content.get("classes")
    tables = [one for one in classes if isinstance(one, dict)] if isinstance(classes, list) else []
    rest = [(one["name"], str(one.get("role", "tissue"))) for one in tables if isinstance(one.get("name"), str)]
    roles = {}
    for one in labels.classes.values():
        place = next((n for n, (name, _) in enumerate(rest) if name in (one.name, *one.former_names)), None)
        if place is not None:
            roles[one.id] = rest[place][1]
            del rest[: place + 1]
    return roles


def _toml(text: str) -> str:
    # A JSON string is a TOML basic string, except for the surrogates of characters beyond 16 bits.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def warnings_of(labels: Labels) -> list[str]:
    """Return what limits a model trained on these labels, and what to do about it."""
    counts = count(labels)
    found = []
    if counts.labeled < FEW_LABELS:
        found.append(
            f"labeled patches: {counts.labeled}; label at least {FEW_LABELS} before you train, and preferably 200"
        )
    for one in labels.classes.values():
        if counts.present[one.id] < FEW_OF_A_CLASS:
            # A folder keeps two classes, and a class that an incomplete label shows.
            removable = len(labels.classes) > 2 and not labels.places_with(one.id)
            found.append(
                f"class {one.name} is present in {counts.present[one.id]} patches; label at least {FEW_OF_A_CLASS} "
                "with it, in the grid or on slides that contain more of it"
                + (
                    f", or remove the class: wsi-label classes FOLDER --remove {shlex.quote(one.name)}"
                    if removable
                    else ""
                )
            )
    rows = rows_of(labels)
    if len({row.patient for row in rows}) == 1:
        found.append(
            "all labels come from one slide or patient, so the model may fail on others, and the validation does not "
            "show this; add slides of other patients"
        )
    elif rows and not is_split_by_patient(rows):
        found.append(
            "patches of one patient are in both splits, because no split by patient with every class on both sides was "
            "found; scores will be too high; label every class on slides of more patients"
        )
    if counts.incomplete:
        found.append(
            f"{counts.incomplete} patches are left out because a class has no answer or annotators disagree; the "
            "page shows again the patches that you have not answered completely"
        )
    return found


class DatasetWriter:
    """Keeps the files of a labels folder up to date while labels are saved, on a thread of its own."""

    def __init__(self, folder: Path, store: EventStore, read: Read) -> None:
        self._folder, self._store, self._read = folder, store, read
        self._unreadable: set[Place] = set()
        self._changed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="dataset", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Write the files soon."""
        self._changed.set()

    def close(self) -> None:
        """Write the files and stop. The slides must still be open."""
        self._ended = True
        self._changed.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            last = self._ended
            if last:
                self._unreadable.clear()
            try:
                write_dataset(self._folder, Labels(self._store.read()), self._read_once)
            except (WsiSegmentError, OSError, MemoryError) as error:
                log.error("the labels are saved, but the data set cannot be written: %s", error)
            if last:
                return

    def _read_once(self, place: Place) -> NDArray[np.uint8] | None:
        """Read a patch. Try an unreadable one again only at the end, because failed reads are slow."""
        if place in self._unreadable:
            return None
        try:
            return self._read(place)
        except SlideReadError:
            self._unreadable.add(place)
            raise
