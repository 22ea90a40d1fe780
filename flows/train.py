"""The flow of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows.artifacts import StageProgress, show_metrics
from flows.order import output_folder
from flows.privacy import as_it_is, pipeline_log
from models.bundle import Bundle
from pipeline.training.dataset import load_dataset
from pipeline.training.presets import train_config
from pipeline.training.train import train
from wsi.errors import WsiSegmentError


@flow(name="train", description="Train a model bundle from patch labels.")
def train_flow(
    dataset: str,
    output: str,
    data: str | None = None,
    preset: str = "default",
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    test: bool = False,
) -> State[None]:
    """Run those stages of a training whose product is missing: classifier, pseudo masks, segmenter, head, bundle.

    Args:
        dataset: A dataset.toml, or the name of a shipped one.
        output: Run folder. An unfinished run in it resumes from its last checkpoint.
        data: Folder of the images, instead of the folder in the TOML.
        preset: Recipe, a key of `pipeline.training.presets.PRESETS`.
        settings: Settings of `pipeline.training.config.TrainConfig` by name, instead of those of the recipe.
        device: auto, or a name in torch, such as cpu, cuda or cuda:1.
        test: Measure the finished bundle on the test split.

    The run ends in `Completed`, or in `Failed` with the next step.
    """
    with pipeline_log(as_it_is):
        try:
            bundle = train_bundle(dataset, output_folder(output), data, preset, settings or {}, device, test)
        except WsiSegmentError as error:
            return Failed(message=str(error))
    show_metrics(Path(output), bundle.card.metrics)
    return Completed(message=f"bundle in {bundle.path}")


# All stages are one task: they pass networks on in memory under one lock of the run folder, and a killed run resumes
# without Prefect. The page shows a progress bar for each stage.
@task(name="train", cache_policy=NO_CACHE, persist_result=False)
def train_bundle(
    dataset: str, output: Path, data: str | None, preset: str, settings: dict[str, Any], device: str, test: bool
) -> Bundle:
    """Train as `wsi-train` does, with the same exceptions. None of them is transient."""
    images = load_dataset(dataset, None if data is None else Path(data))
    config = train_config(preset, None, settings, images.card.settings)
    return train(images, output, config, device=device, progress=StageProgress(), test=test)
