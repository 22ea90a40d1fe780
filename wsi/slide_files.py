"""The files of one slide: the named one and those that belong to it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from wsi.dicom import is_dicom, series_files
from wsi.paths import kind_of

_LISTED = re.compile(
    rb"^[ \t]*(?:ImageFile|MapFile|OptimisationFile|MacroImage)[^=\r\n]*=[ \t]*([^\r\n\0]*[^\s\0])", re.MULTILINE
)
"""A line of a key file of Hamamatsu that names another file of the slide: "ImageFile(1,0)=a-2.jpg"."""

_KEY_FILE_BYTES = 1 << 16
"""OpenSlide refuses longer key files."""


def slide_files(path: Path) -> list[Path]:
    """Return the file and its companions: the folder of MIRAX, the series of DICOM, the list of Hamamatsu.

    A listed file may be missing, for instance while the slide is being copied.
    """
    companions: list[Path] = []
    if path.suffix.lower() == ".mrxs" and kind_of(path.with_suffix("")) == "folder":
        companions = sorted(p for p in path.with_suffix("").iterdir() if kind_of(p) == "file")
    elif is_dicom(path):
        companions = [p for p in series_files(path) if p != path]
    elif path.suffix.lower() in (".vms", ".vmu"):
        companions = _listed_files(path)
    return [path, *companions]


def _listed_files(path: Path) -> list[Path]:
    with path.open("rb") as file:
        names = dict.fromkeys(map(os.fsdecode, _LISTED.findall(file.read(_KEY_FILE_BYTES))))
    # A key file must not lead to files of other folders.
    return [path.parent / name for name in names if Path(name).name == name]
