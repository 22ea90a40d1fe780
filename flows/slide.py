"""The flow of one slide."""

from __future__ import annotations

from typing import Any

from prefect import State, flow

from flows.batch import segment_batch
from models.bundle import DEFAULT_BUNDLE
from pipeline.config import RESULTS_FOLDER


@flow(name="segment-slide", description="Segment one whole-slide image into a tissue map.")
def segment_slide_flow(
    slide: str,
    output: str = RESULTS_FOLDER,
    model: str = DEFAULT_BUNDLE,
    mpp: float | None = None,
    scheduler: str | None = None,
    settings: dict[str, Any] | None = None,
    slide_timeout_s: float | None = None,
    retry_failed: bool = False,
    hide_paths: bool = False,
) -> State[None]:
    """Segment one slide into `output`. An existing result of the same slide, model and settings is kept.

    Args:
        slide: The slide's file.
        output: Folder for the results.
        model: Name of a shipped model, or path of a bundle.
        mpp: Micrometers per level-0 pixel, instead of the value in the slide.
        scheduler: As in `flows.batch.segment_batch`.
        settings: As in `flows.batch.segment_batch`.
        slide_timeout_s: As in `flows.batch.segment_batch`.
        retry_failed: As in `flows.batch.segment_batch`.
        hide_paths: As in `flows.batch.segment_batch`.

    The run ends in `Completed` or in a failed state.
    """
    chosen = settings if mpp is None else {**(settings or {}), "mpp": mpp}
    return segment_batch.fn(
        slide,
        output,
        model,
        scheduler=scheduler,
        settings=chosen,
        slide_timeout_s=slide_timeout_s,
        retry_failed=retry_failed,
        hide_paths=hide_paths,
    )
