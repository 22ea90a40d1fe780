"""The training recipe: classifier, pseudo masks, segmenter, gate and bundle, from presence labels of patches only.

With `head_epochs`, the classifier's head is trained once more, on the backbone that the segmenter trained.

Each stage writes its product to the run folder and is skipped if the product already exists. A stage that was killed
resumes from its checkpoint.

Shape suffixes: B patches of an image, M labeled patches, K classes, D distances from the edge.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed
from torch import nn

from models.bundle import Bundle, load_bundle, load_networks, load_statistics, replace_card, save_bundle
from models.card import NO_DIGEST
from models.classifier import Classifier
from models.depthwise import speed_up_depthwise
from models.devices import choose_device, compiles_sizes, native_convolutions
from models.predictor import Predictor
from models.segmenter import share_backbone, take_backbone
from pipeline.errors import TrainError
from pipeline.progress import Progress
from pipeline.training.calibration import calibrate_temperature, write_reliability
from pipeline.training.classifier import classifier_task, head_task
from pipeline.training.compose import composed, without_whole
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, samples
from pipeline.training.evaluate import evaluate, evaluate_samples
from pipeline.training.familiarity import Source, fit_familiarity
from pipeline.training.fit import Processes, Task, fit, join_processes, remove_checkpoint, training_device
from pipeline.training.gate_calibration import (
    UNCALIBRATED,
    calibrate_gate,
    gate_window,
    patch_presence,
)
from pipeline.training.model_card import make_card, score_metrics
from pipeline.training.patches import PatchImages
from pipeline.training.pieces import other_datasets
from pipeline.training.position import edge_profile, measures_position, position_metrics
from pipeline.training.prepare import prepare, training_images
from pipeline.training.provenance import provenance
from pipeline.training.pseudo_masks import read_pseudo_masks, write_pseudo_masks
from pipeline.training.pseudo_scores import write_pseudo_scores
from pipeline.training.run_folder import claim, recorded_provenance
from pipeline.training.segmenter import segmenter_task, start_from_classifier
from pipeline.training.step_log import StepLog, open_step_log
from pipeline.training.tensor_files import reading, write_tensors

logger = logging.getLogger(__name__)

PSEUDO_SCORES = "pseudo-masks.csv"
"""File of a run folder with the scores of the pseudo masks of validation images."""


def train(
    dataset: Dataset,
    run: Path,
    config: TrainConfig,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    test: bool = False,
    tensorboard: bool = False,
    init: Bundle | None = None,
    familiarity: bool = True,
) -> Bundle:
    """Run all stages that have no product yet and return the bundle in `run`/bundle.

    With `init`, both networks start from those of a bundle, see `pipeline.training.start`. With `test`, the bundle also
    gets the scores of the test split, see `add_test_scores`. Without `familiarity`, a new bundle has no statistics for
    the check for unfamiliar tissue. Computing these statistics takes minutes and changes no score. Every step is
    logged as in `open_step_log`, with `tensorboard` also for TensorBoard. Raises TrainError if `run` was started with
    another configuration or data set, or has a damaged file, OutputError if weights cannot be written, DatasetError
    for bad data, and ModelError if a network cannot be built.
    """
    place = training_device(device)
    processes = join_processes(place)
    for name, size in (("classifier_batch", config.classifier_batch), ("segmenter_batch", config.segmenter_batch)):
        if size % processes.world:
            raise TrainError(
                f"{name} is {size}, which is not a multiple of the {processes.world} processes; set it to a multiple"
            )
    source, others = dataset, other_datasets(dataset)
    dataset = composed(source, run)
    if test:
        samples(dataset, "test")
    config, training, by_size, validation, classifier, segmenter = prepare(dataset, config, init)
    logger.info("%d training and %d validation images", len(training), len(validation))
    sources: list[Source] | None = [] if familiarity else None
    if sources is not None and processes.rank == 0 and not (run / "bundle").exists():
        assert config.mpp is not None
        # Not cached: reading images twice takes less time than the networks. Caches of all sources need gigabytes.
        own = without_whole(source, dataset)
        sources = [(training, validation)] if own is dataset else [training_images(own, config.mpp, cache_bytes=0)]
        sources += [training_images(other, config.mpp, cache_bytes=0) for other in others]
    # Claimed after every check of the settings, so that the same folder can be used again after a wrong setting.
    held = ExitStack()
    if processes.rank == 0:
        held.enter_context(claim(run, dataset, config, provenance(training, validation, config)))
    _wait(processes)
    with held:
        log = held.enter_context(open_step_log(run, tensorboard=tensorboard)) if processes.rank == 0 else None
        classifier.to(place)
        task = classifier_task(classifier, by_size, validation, config, place, processes)
        _stage(run, task, config, place, processes, progress, log)
        del task, by_size  # their caches of images

        masks = run / "pseudo-masks"
        with native_convolutions(compiles_sizes(place, classifier)):
            write_pseudo_masks(masks, classifier, training, config, place, processes, progress)
            if processes.rank == 0:
                write_pseudo_scores(run / PSEUDO_SCORES, classifier, validation, config, place)
        _wait(processes)

        segmenter.to(place)
        if config.shared_backbone:
            share_backbone(segmenter, classifier)
        elif config.encoder_starts and init is None:
            start_from_classifier(segmenter, classifier)
        pseudo = partial(read_pseudo_masks, masks, training, config=config)
        task = segmenter_task(segmenter, training, validation, pseudo, config, place, processes)
        _stage(run, task, config, place, processes, progress, log)

        if config.head_epochs:
            classifier.layer_heads.clear()  # pseudo masks only
            take_backbone(classifier, segmenter)
            task = head_task(classifier, training, validation, config, place, processes)
            _stage(run, task, config, place, processes, progress, log)

        if processes.rank == 0:
            window = gate_window(training)
            with native_convolutions(compiles_sizes(place, classifier, segmenter)):
                export(run, classifier.eval(), segmenter.eval(), validation, window, sources, config, device)
            if test:
                add_test_scores(load_bundle((run / "bundle").absolute()), dataset, device)
        _wait(processes)
        return load_bundle((run / "bundle").absolute())


def _stage(
    run: Path,
    task: Task,
    config: TrainConfig,
    device: torch.device,
    processes: Processes,
    progress: Progress | None,
    log: StepLog | None,
) -> None:
    """Load the network's weights from the stage's product, or train the network and write the product."""
    file = run / f"{task.name}.safetensors"
    if file.exists():
        with reading(file):
            task.network.load_state_dict(safetensors.torch.load_file(file))
        if device.type == "cpu":
            # `fit` does the same. Without it, the maps of Grad-CAM would differ in bits from those of a whole run.
            speed_up_depthwise(task.network)
        logger.info("%s exists: stage skipped", file.name)
    else:
        started = time.monotonic()
        fit(task, run, config, device, processes, progress, log)
        if processes.rank == 0:
            write_tensors(file, task.network.state_dict())
            remove_checkpoint(run, task.name)
        logger.info("%s done in %.0f s", task.name, time.monotonic() - started)
    _wait(processes)
    task.network.eval()


def _wait(processes: Processes) -> None:
    if processes.world > 1:
        torch.distributed.barrier()


def export(
    run: Path,
    classifier: Classifier,
    segmenter: nn.Module,
    validation: PatchImages,
    window: int,
    sources: Sequence[Source] | None,
    config: TrainConfig,
    device: str,
) -> None:
    """Calibrate gate, temperature and familiarity, measure the validation split, and write the bundle.

    The gate is calibrated on the labeled patches of the validation images, and the temperature on those images with
    masks. The validation images show whether the map depends on the position in a view. The heads of single layers do
    not become part of the bundle. `window` is the `gate_window` of the training images, whose patches all have one
    size. `sources` are those of `fit_familiarity`; if None, the bundle has no statistics.
    """
    folder, torch_device = run / "bundle", choose_device(device)
    if folder.exists():
        logger.info("%s exists: nothing to do", folder)
        return
    dataset = validation.dataset
    classifier.layer_heads.clear()
    draft = make_card(dataset, config, window, (UNCALIBRATED,) * len(dataset.class_names))
    # A bundle stores rounded weights. Calibrate and measure the rounded ones.
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=run) as work:
        rounded = load_networks(save_bundle(Path(work) / "bundle", draft, classifier, segmenter))
    uncalibrated = Predictor.from_networks(draft, NO_DIGEST, *rounded, device=device)
    logger.info("calibrating and measuring with %d validation images", len(validation))
    presence_MK, held_MK = patch_presence(rounded[0].to(torch_device), validation, config, torch_device)
    thresholds = calibrate_gate(presence_MK, held_MK, config.gate_recall)
    calibration = calibrate_temperature(uncalibrated, validation)
    write_reliability(run / "calibration.png", calibration)
    card = draft.model_copy(update={"gate_thresholds": thresholds, "temperature": calibration.temperature})
    metrics = calibration.metrics()
    calibrated = Predictor.from_networks(card, NO_DIGEST, *rounded, device=device, output_stride=1)
    metrics |= score_metrics("val", evaluate_samples(calibrated, dataset, validation.samples))
    if measures_position(config):
        profile_KD = edge_profile(rounded[1].to(torch_device), validation, config, torch_device)
        metrics |= position_metrics(profile_KD, config.margin)
    logger.info("gate thresholds %s, temperature %s, %s", thresholds, calibration.temperature, metrics)
    statistics, familiarity = None, None
    if sources is not None:
        statistics, familiarity = fit_familiarity(rounded[0], sources, config, device)
    made_with = recorded_provenance(run)
    card = card.model_copy(update={"metrics": metrics, "familiarity": familiarity, "made_with": made_with})
    save_bundle(folder, card, classifier, segmenter, statistics)


def add_test_scores(bundle: Bundle, dataset: Dataset, device: str) -> Bundle:
    """Measure a bundle on the test split, and store the scores in its card. A bundle that has them stays as it is.

    Raises the errors of `evaluate`.
    """
    if any(name.startswith("test_") for name in bundle.card.metrics):
        logger.info("the bundle has the scores of the test split: nothing to measure")
        return bundle
    predictor = Predictor.from_bundle(bundle, device=device, output_stride=1)
    found = score_metrics("test", evaluate(predictor, dataset, "test"))
    logger.info("test split: %s", found)
    card = bundle.card.model_copy(update={"metrics": bundle.card.metrics | found})
    return replace_card(bundle, card, load_statistics(bundle))
