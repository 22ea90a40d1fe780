"""The presets: published recipes beside our own, and how presets, files and options make the settings of a run."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.config import misplaced_bool
from pipeline.errors import TrainConfigError
from pipeline.training.config import TrainConfig

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Han et al. 2022 with the changes of methods.md: multi-layer Grad-CAM, PDA, one labeled patch per image.
    "paper": {
        "depth": None,
        "head": "gap",
        "attention": "pda",
        "region": None,
        "balance": False,
        "stain": 0.0,
        "cam": "grad-cam",
        "layer_weights": (0.2, 0.2, 0.6),
        "overlap_labels": False,
        "backbone_rate": 3e-4,
        "patience": 20,
        "gate_stride": 8,
        "classifier_epochs": 20,
        "segmenter_epochs": 20,
        "classifier_batch": 20,
        "segmenter_batch": 20,
        "ema": 0.0,
    },
    # The paper's optimizer too.
    "paper-sgd": {
        "optimizer": "sgd",
        "schedule": "poly",
        "backbone_rate": 0.01,
        "new_rate": 0.1,
        "bias_factor": 2.0,
        "weight_decay": 5e-4,
        "warm_up": 0,
    },
}
PRESETS["paper-sgd"] = PRESETS["paper"] | PRESETS["paper-sgd"]
# The code of Han et al. 2022 (ChuHan89/WSSS-Tissue, 1_train_stage1.py at eb7ccb8, 3_train_stage2.py at 3227f40), with
# its networks, whose weights are files.
PRESETS["release"] = PRESETS["paper-sgd"] | {
    "backbone": "resnet38d",
    "encoder": "resnet101",
    "encoder_depth": 5,
    "rates": (6, 12, 18),
    # Its images are only scaled to 0–1.
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "xavier_head": True,
    "normalize_attention": False,
    "pda_schedule": "release",
    "classifier_moves": "flips",
    "segmenter_moves": "mirror",
    "blur": 0.5,
    "decay_biases": False,
    # Its optimizer passes the weight decay in the place of the momentum.
    "momentum": 5e-4,
    "clip": 0.0,
    # A trusted part of 224 px, the side of its patches.
    "view": 288,
    "margin": 32,
    "segmenter_epochs": 30,
    "patience": 30,
}


def train_config(
    preset: str = "default",
    file: Path | None = None,
    settings: Sequence[str] | Mapping[str, Any] = (),
    of_dataset: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Return a preset changed by the settings of a data set, then by a TOML file, then by `settings`.

    `settings` maps names to values, or lists strings ``name=value`` whose values are TOML (``ema=0``, ``head="gap"``; a
    bare word is a string). Raises TrainConfigError naming the setting.
    """
    if preset not in PRESETS:
        raise TrainConfigError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    values = PRESETS[preset] | dict(of_dataset or {})
    if file is not None:
        try:
            values |= tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # file, encoding or TOML syntax
            raise TrainConfigError(f"{file}: cannot be read as TOML: {error}") from error
    values |= settings if isinstance(settings, Mapping) else dict(map(_setting, settings))
    for name in ("region", "mpp", "depth"):
        if values.get(name) == "none":  # TOML has no null
            values[name] = None
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in known:
            raise TrainConfigError(f"unknown setting {name!r}; choose one of {', '.join(known)}")
        if _is_long(values[name]):  # Python does not print thousands of digits, so the messages below could not either
            raise TrainConfigError(f"setting {name} has an integer of more than 64 bits; use a smaller number")
    if wrong := misplaced_bool(TrainConfig, values):
        raise TrainConfigError(f"setting {wrong} is {values[wrong]!r}; it cannot be true or false")
    try:
        config: TrainConfig = TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TrainConfigError(f"setting {first['loc'][0]}: {first['msg']}, not {first['input']!r}") from error
    return config


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise TrainConfigError(f"setting {text!r} must have the form name=value")
    return name.strip(), _value(name.strip(), value.strip())


def _value(name: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise TrainConfigError(
            f"setting {name}: a value of {len(text):,} characters is too long; use a shorter one"
        ) from error


def _is_long(value: object) -> bool:
    """Return whether a value is or contains an integer that needs more than 64 bits."""
    if isinstance(value, dict):
        return _is_long(list(value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_long, value))
    return isinstance(value, int) and value.bit_length() > 64
