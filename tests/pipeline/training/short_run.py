"""A training of a few steps, and what interrupts it."""

from __future__ import annotations

from pipeline.training.config import TrainConfig

CONFIG = TrainConfig(
    weights="none",
    region=64,
    view=128,
    margin=32,
    position_views=4,
    classifier_epochs=2,
    classifier_steps=2,
    classifier_batch=2,
    segmenter_epochs=2,
    segmenter_steps=2,
    segmenter_batch=2,
    confidence=0.0,
)


class Killed(Exception):  # noqa: N818 - not an error of the run's
    pass
