"""The flow of many slides."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from prefect import State, flow

from flows.order import BatchRequest, config_from_settings, output_folder
from flows.segmenting import refused, segment_order
from models.bundle import DEFAULT_BUNDLE
from pipeline.batch.collect import collect_jobs
from pipeline.config import RESULTS_FOLDER
from pipeline.errors import ConfigError
from pipeline.workers.base import SlideJob


@flow(name="segment-batch", description="Segment a folder, glob or manifest of whole-slide images into tissue maps.")
def segment_batch(
    source: str,
    output: str = RESULTS_FOLDER,
    model: str = DEFAULT_BUNDLE,
    scheduler: str | None = None,
    slides_at_once: int | None = None,
    recursive: bool = False,
    settings: dict[str, Any] | None = None,
    slide_timeout_s: float | None = None,
    retry_failed: bool = False,
    hide_paths: bool = False,
) -> State[None]:
    """Segment the slides of a source that have no result in `output` yet.

    Args:
        source: A slide, a folder of slides, a glob ("/slides/2026-*/*.svs", `**` for any depth), or a manifest: a CSV
            file with the column `slide` (relative to the file) and the optional columns `mpp`, `model` and `id`.
        output: Folder for the results, with `summary.csv` and `index.html`.
        model: Name of a shipped model, or path of a bundle.
        scheduler: Where the slides are segmented: None for this process, "local" or "local:N" for a pool of processes,
            or the address or scheduler file of a dask.distributed cluster.
        slides_at_once: Largest number of slides in flight; None leaves it to the workers.
        recursive: Whether to search the subfolders of a folder too.
        settings: Settings of `pipeline.config.SegmentConfig` by name, such as {"output_stride": 2}.
        slide_timeout_s: Seconds after which a slide is stopped and fails. It needs a scheduler with processes.
        retry_failed: Whether to retry slides that failed permanently in an earlier run.
        hide_paths: Whether to keep folders out of logs, states and artifacts. Names of files stay.

    The run ends in `Completed` if no slide failed in this run, else in a failed state with the number in its name. It
    also ends in a failed state if rows are missing from `summary.csv`.
    """
    try:
        order = BatchRequest(
            jobs=_jobs(source, recursive=recursive),
            output=output_folder(output),
            model=model,
            config=config_from_settings(settings),
            scheduler=scheduler,
            slides_at_once=slides_at_once,
            slide_timeout_s=slide_timeout_s,
            retry_failed=retry_failed,
            hide_paths=hide_paths,
        )
    except ConfigError as error:
        return refused(error, source, hide_paths=hide_paths)
    return segment_order(order)


def _jobs(source: str, *, recursive: bool) -> list[SlideJob]:
    # os.path.exists is false for a path that is too long, where Path.exists raises.
    if not glob.has_magic(source) or os.path.exists(source):  # noqa: PTH110
        return collect_jobs([Path(source)], recursive=recursive)
    found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - Path.glob does not take absolute patterns
    if not found:
        raise ConfigError(f"{source}: no file matches; check the pattern")
    return collect_jobs([Path(path) for path in found], recursive=recursive)
