"""The headers of DICOM files: enough of them to tell which files are one slide.

A scanner writes one file per level, and more for the label and the overview. Files of one slide have the same
SeriesInstanceUID. OpenSlide opens any of the levels and finds the others in the folder of the file.

Nothing here reads pixels, and no value that may name a patient leaves this module.
"""

from __future__ import annotations

import io
import stat
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

_Tag = tuple[int, int]

_IMAGE_TYPE, _SERIES, _SERIES_NUMBER, _COLUMNS = (0x0008, 0x0008), (0x0020, 0x000E), (0x0020, 0x0011), (0x0048, 0x0006)
_WANTED = frozenset({_IMAGE_TYPE, _SERIES, _SERIES_NUMBER, _COLUMNS})
_TRANSFER_SYNTAX = (0x0002, 0x0010)
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_IMPLICIT, _BIG_ENDIAN, _DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
_LONG_FORMS = frozenset(["OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"])
"""Value representations whose length has four bytes, see DICOM part 5, section 7.1.2."""
_UNDEFINED = 0xFFFFFFFF
_HEADER_BYTES = (1 << 16, 1 << 22)
"""Bytes that are read of a file: enough for most headers, and enough for all."""
_DEEPEST = 16
"""Sequences inside each other; a file with more of them is not a slide."""


@dataclass(frozen=True)
class Instance:
    """What the header of one DICOM file states about its place in a slide."""

    path: Path
    series: str
    """SeriesInstanceUID: the same in all files of a slide."""
    series_number: str
    is_level: bool
    """Whether the file holds a level of the slide, and not its label or overview."""
    columns: int
    """Width in pixels of the whole level; 0 if the file does not state it."""


@dataclass(frozen=True)
class Series:
    """The DICOM files of one slide, in one folder."""

    level: Path
    """The file to open: the largest level."""
    files: tuple[Path, ...]
    """All files, by name."""
    number: str
    """SeriesNumber; empty if the files do not state it."""


def is_dicom(path: Path) -> bool:
    """Return whether a file is a DICOM file: by the ending .dcm, or without an ending by its first bytes.

    Scanners and archives name files after UIDs, whose last number looks like an ending. DICOMDIR, the directory of a
    medium, is not a slide.
    """
    if path.name.upper() == "DICOMDIR":
        return False
    ending = path.suffix[1:]
    if ending and not ending.isdecimal():
        return ending.lower() == "dcm"
    try:
        if not path.is_file():  # to open a named pipe would block
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def group_series(paths: Iterable[Path]) -> tuple[list[Series], list[Path]]:
    """Return the series of DICOM files of one folder, and the files whose headers cannot be read."""
    groups: dict[str, list[Instance]] = defaultdict(list)
    unreadable: list[Path] = []
    for path in paths:
        instance = read_instance(path)
        if instance is None:
            unreadable.append(path)
        else:
            groups[instance.series].append(instance)
    return [_series(instances) for instances in groups.values()], unreadable


def series_files(path: Path) -> list[Path]:
    """Return the files in the folder of a DICOM file that are the same slide, by name; only itself if unreadable."""
    own = read_instance(path)
    if own is None:
        return [path]
    return sorted(p for p in path.parent.iterdir() if p == path or _is_of(p, own.series))


def _is_of(path: Path, series: str) -> bool:
    if path.name.startswith(".") or not is_dicom(path):
        return False
    instance = read_instance(path)
    return instance is not None and instance.series == series


def _series(instances: list[Instance]) -> Series:
    # A level before a label, then the largest, then the first by name: the same in any order of the files.
    level = min(instances, key=lambda one: (not one.is_level, -one.columns, one.path))
    return Series(level.path, tuple(sorted(one.path for one in instances)), level.series_number)


def read_instance(path: Path) -> Instance | None:
    """Return the facts of a DICOM file; None if it is not one, is damaged, or has no series."""
    try:
        facts = path.stat()
    except OSError:
        return None
    # To open a named pipe would block.
    return _read(path, facts.st_size, facts.st_mtime_ns) if stat.S_ISREG(facts.st_mode) else None


@lru_cache(maxsize=65536)
def _read(path: Path, size: int, mtime_ns: int) -> Instance | None:  # noqa: ARG001 - the key of the cache
    # Cached, because a run examines the files of its slide after every block.
    values = _values(path, size)
    series = _text(values.get(_SERIES, b""))
    if not series:
        return None
    columns = values.get(_COLUMNS, b"")
    return Instance(
        path=path,
        series=series,
        series_number=_text(values.get(_SERIES_NUMBER, b"")),
        is_level="VOLUME" in _text(values.get(_IMAGE_TYPE, b"")).split("\\"),
        columns=struct.unpack("<I", columns)[0] if len(columns) == 4 else 0,
    )


def _values(path: Path, size: int) -> dict[_Tag, bytes]:
    """Return the wanted values; none if the header is damaged or longer than the last of `_HEADER_BYTES`."""
    for limit in _HEADER_BYTES:
        try:
            with path.open("rb") as file:
                content = file.read(limit)
            return {tag: value for tag, value in _elements(content) if tag in _WANTED}
        except (ValueError, struct.error):
            if limit >= size:
                break  # the whole file was read
        except OSError:
            break
    return {}


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace").strip(" \0")


def _elements(content: bytes) -> Iterator[tuple[_Tag, bytes]]:
    """Yield the elements up to `_COLUMNS`, without sequences.

    Raises ValueError or struct.error if the content ends before, is not valid DICOM, or is big-endian or deflated,
    which no slide is (DICOM part 5, annex A).
    """
    file = io.BytesIO(content)
    file.seek(128)
    if file.read(4) != b"DICM":
        raise ValueError("not a DICOM file")
    syntax = ""
    while True:
        start = file.tell()
        tag, _, length = _header(file, explicit=True)
        if tag[0] != 0x0002:  # the file's own group ends; the others have the syntax that it names
            file.seek(start)
            break
        value = _value(file, length)
        if tag == _TRANSFER_SYNTAX:
            syntax = _text(value)
    if syntax in (_BIG_ENDIAN, _DEFLATED):
        raise ValueError(f"transfer syntax {syntax}")
    explicit = syntax != _IMPLICIT
    while True:
        tag, representation, length = _header(file, explicit=explicit)
        if tag > _COLUMNS:
            return  # tags ascend
        if representation == "SQ" or length == _UNDEFINED:
            _skip_sequence(file, length, explicit=explicit and representation != "UN", depth=0)
        else:
            yield tag, _value(file, length)


def _header(file: BinaryIO, *, explicit: bool) -> tuple[_Tag, str, int]:
    """Return the tag, the value representation ("" if it is implicit) and the length of the next element."""
    group, element = struct.unpack("<HH", file.read(4))
    if not explicit or group == 0xFFFE:
        return (group, element), "", struct.unpack("<I", file.read(4))[0]
    representation = file.read(2).decode("ascii", "replace")
    if representation in _LONG_FORMS:
        return (group, element), representation, struct.unpack("<2xI", file.read(6))[0]
    return (group, element), representation, struct.unpack("<H", file.read(2))[0]


def _value(file: BinaryIO, length: int) -> bytes:
    value = file.read(length)
    if len(value) < length:
        raise ValueError("a value reaches beyond the end of the header")
    return value


def _skip_sequence(file: BinaryIO, length: int, *, explicit: bool, depth: int) -> None:
    """Skip a sequence. In a "UN" element of undefined length, items have implicit VR (DICOM part 5, 6.2.2, note)."""
    if length != _UNDEFINED:
        file.seek(length, 1)
        return
    if depth > _DEEPEST:
        raise ValueError("sequences are nested too deeply")
    while True:
        tag, _, item_length = _header(file, explicit=explicit)
        if tag == _SEQUENCE_END:
            return
        if tag != _ITEM:
            raise ValueError("a sequence contains something other than items")
        if item_length == _UNDEFINED:
            _skip_item(file, explicit=explicit, depth=depth)
        else:
            file.seek(item_length, 1)


def _skip_item(file: BinaryIO, *, explicit: bool, depth: int) -> None:
    while True:
        tag, representation, length = _header(file, explicit=explicit)
        if tag == _ITEM_END:
            return
        if representation == "SQ" or length == _UNDEFINED:
            _skip_sequence(file, length, explicit=explicit and representation != "UN", depth=depth + 1)
        else:
            file.seek(length, 1)
