"""DICOM series as slides: one job for all files of a series."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.workers.base import SlideJob
from wsi.dicom import Series, group_series, is_dicom


class DicomFolders:
    """The series of the folders of DICOM files that were named by themselves. Each folder is read once."""

    def __init__(self) -> None:
        self._folders: dict[Path, list[Series]] = {}

    def whole_series(self, job: SlideJob) -> SlideJob:
        """Return the job of the series that the job's file belongs to, or the job itself if it is not of a series."""
        if not is_dicom(job.path):
            return job
        folder = job.path.parent
        all_series = self._series(folder)
        series = next((one for one in all_series if job.path in one.files), None)
        if series is None:
            return job
        found = series_job(series, folder, folder.absolute().parent, all_series)
        if job.name is not None:
            return replace(job, path=found.path)
        return replace(found, mpp=job.mpp, model=job.model)

    def _series(self, folder: Path) -> list[Series]:
        if folder not in self._folders:
            try:
                visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
            except OSError:
                visible = []  # the attempt reports the error
            self._folders[folder] = group_series(path for path in visible if is_dicom(path))[0]
        return self._folders[folder]


def series_job(series: Series, folder: Path, root: Path, all_series: Sequence[Series]) -> SlideJob:
    """Return the job of one of the series in `folder`, which lies in `root` or is `root`.

    It is named after the folder, with the number of the series if there are several, or with the name of its file if
    others have the same number. A series of one file is named after the file, like every other slide.
    """
    beside, file = folder.absolute().relative_to(root.absolute()), _file_title(series.level)
    if len(series.files) == 1:
        name = None if file == series.level.stem else file
        return SlideJob(series.level, name=name, place=(beside / file).as_posix())
    # The last part of a path such as "..", which is not a name.
    title = os.path.basename(os.path.abspath(folder))  # noqa: PTH100, PTH119 - Path.resolve would follow links
    same = [one for one in all_series if len(one.files) > 1 and one.number == series.number]
    number = series.number if len(same) == 1 else ""
    name = title if len(all_series) == 1 else f"{title} series {number or file}"
    return SlideJob(series.level, name=name, place=(beside.parent / name).as_posix())


def _file_title(path: Path) -> str:
    """Return the name of a file without .dcm. The last number of a UID is not an ending."""
    return path.name if path.suffix[1:].isdecimal() else path.stem


def place_below(root: Path, path: Path) -> str:
    """Return the place of a slide below a folder: see `SlideJob.place`."""
    return path.absolute().relative_to(root.absolute()).with_name(path.stem).as_posix()
