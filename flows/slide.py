"""The flow of one slide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import State, flow

from flows.order import Order, config_of, output_folder
from flows.segmenting import refused, segment_order
from models.bundle import DEFAULT_BUNDLE
from pipeline.batch import SlideJob
from pipeline.errors import ConfigError


@flow(name="segment-slide", description="Segment one whole-slide image into a tissue map.")
def segment_slide_flow(
    slide: str,
    output: str = "results",
    model: str = DEFAULT_BUNDLE,
    mpp: float | None = None,
    scheduler: str | None = None,
    settings: dict[str, Any] | None = None,
    slide_timeout_s: float | None = None,
    hide_paths: bool = False,
) -> State[None]:
    """Segment one slide into `output`; a result of the same slide, model and settings is left as it is.

    Args:
        slide: The slide's file.
        output: Folder for the results.
        model: Name of a shipped model, or path of a bundle.
        mpp: Micrometres per level-0 pixel, in place of what the slide says.
        scheduler: As in `flows.batch.segment_batch`.
        settings: As in `flows.batch.segment_batch`.
        slide_timeout_s: As in `flows.batch.segment_batch`.
        hide_paths: As in `flows.batch.segment_batch`.

    Ends `Completed` or in a failed state.
    """
    try:
        order = Order(
            jobs=[SlideJob(Path(slide), mpp)],
            output=output_folder(output),
            model=model,
            config=config_of(settings),
            scheduler=scheduler,
            slide_timeout_s=slide_timeout_s,
            hide_paths=hide_paths,
        )
    except ConfigError as error:
        return refused(error, slide, hide_paths=hide_paths)
    return segment_order(order)
