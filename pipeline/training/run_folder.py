"""Claim the folder of a training run: one process at a time, and one configuration and data set."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from pipeline.errors import LockedError, OutputError, TrainError
from pipeline.files import file_lock
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
"""File of a run folder that records how the run was started."""


@contextmanager
def claim(run: Path, dataset: Dataset, config: TrainConfig, made_with: Mapping[str, str]) -> Iterator[None]:
    """Lock a run folder and record its configuration and data set, or check that they match the recorded ones.

    `made_with` is the `provenance`; the one of the first start stays recorded. Raises OutputError if the folder cannot
    be created, LockedError if another process trains in it, and TrainError if the run was started with another
    configuration, data set, content of the images, or file of initial weights, or if its record cannot be read.
    """
    with ExitStack() as stack:
        try:
            run.absolute().parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(run.absolute().parent / f".{run.name}.lock", wait_s=0))
            run.mkdir(exist_ok=True)
        except Timeout as error:
            raise LockedError(
                f"{run}: another wsi-train is using this folder; wait for it, or pass another -o"
            ) from error
        except OSError as error:
            raise OutputError(
                f"{run}: {error.filename or run} cannot be created: {error.strerror}; pass another -o"
            ) from error
        _write_or_compare(run, dataset, config, made_with)
        yield


def recorded_provenance(run: Path) -> dict[str, str]:
    """Return the `provenance` of the first start of a run. It is empty if the start did not record one."""
    made_with: dict[str, str] = _recorded(run / RUN_FILE)["made_with"]
    return made_with


def _recorded(file: Path) -> dict[str, Any]:
    """Return how a run was started. Raises TrainError for a file that `claim` did not write."""
    try:
        recorded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        # Settings added after a run started take their default values.
        recorded["config"] = json.loads(json.dumps(dataclasses.asdict(TrainConfig()))) | recorded["config"]
        recorded["made_with"] = dict(recorded.get("made_with", {}))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise TrainError(f"{file}: was not written by wsi-train, or is damaged; pass a new folder") from error
    return recorded


def _write_or_compare(run: Path, dataset: Dataset, config: TrainConfig, made_with: Mapping[str, str]) -> None:
    file = run / RUN_FILE
    wanted = {
        "config": dataclasses.asdict(config),
        "dataset": dataset.card.model_dump(mode="json"),
        "made_with": dict(made_with),
    }
    text = json.dumps(wanted, indent=2) + "\n"
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
        return
    recorded, wanted = _recorded(file), json.loads(text)
    before, after = recorded.pop("made_with"), wanted.pop("made_with")
    if recorded != wanted:
        now, then = wanted["config"], recorded["config"]
        differing = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        raise TrainError(
            f"{run}: the run was started with other settings (different: {', '.join(differing) or 'the data set'}); "
            f"pass a new folder, or use the settings in {file}"
        )
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    if "data" in changed:
        raise TrainError(
            f"{run}: the images, masks or labels have changed since the run was started, or an earlier version held "
            "out other images for validation; restore them, or pass a new folder"
        )
    if files := {"weights", "encoder_weights"} & set(changed):
        raise TrainError(
            f"{run}: the file of initial weights (setting {', '.join(sorted(files))}) has changed since the run was "
            "started; restore it, or pass a new folder"
        )
    if changed:
        logger.warning("%s: the run was started with another %s, see %s", run, ", ".join(changed), file)
