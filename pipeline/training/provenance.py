"""What a training run was made with: versions, commit of the source, and digests of data and initial weights."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from pipeline.results.digests import file_facts
from pipeline.results.record import PACKAGE, package_versions
from pipeline.training.config import TrainConfig
from pipeline.training.inputs import weights_file
from pipeline.training.patches import PatchImages

_VERSIONS = (PACKAGE, "torch", "timm", "segmentation-models-pytorch", "numpy", "pillow", "scipy")
"""Packages whose version can change the trained weights."""


def provenance(training: PatchImages, validation: PatchImages, config: TrainConfig) -> dict[str, str]:
    """Return what the result of a training run depends on, besides its settings.

    Each version has the name of its package as its key. "commit" is present if the source is a git checkout. "data" is
    the `data_digest`, and "images" has the numbers of images. "weights" and "encoder_weights" are the SHA-256 of the
    files that these settings choose. A run that starts from a model does not use these files: its setting `init` has
    the digest of that model. Raises TrainError if a file is missing.
    """
    return (
        package_versions(_VERSIONS)
        | source_commit(Path(__file__).resolve().parent)
        | {"data": data_digest(training, validation), "images": _image_counts(training, validation)}
        | _weights_digests(config)
    )


def _image_counts(training: PatchImages, validation: PatchImages) -> str:
    """Return such as "165 training and 14 validation images (1 unreadable image left out)"."""
    left_out = training.unreadable + validation.unreadable
    noun = "image" if left_out == 1 else "images"
    counts = f"{len(training)} training and {len(validation)} validation images"
    return f"{counts} ({left_out} unreadable {noun} left out)" if left_out else counts


def _weights_digests(config: TrainConfig) -> dict[str, str]:
    if config.init:
        return {}
    files = {
        "weights": weights_file(config.weights, config.backbone),
        "encoder_weights": weights_file(config.encoder_weights or "none", config.encoder_name),
    }
    return {name: file_facts(file).sha256 for name, file in files.items() if file is not None}


def source_commit(folder: Path) -> dict[str, str]:
    """Return {"commit": SHA-1} of the checkout that contains this file in `folder`, with "+" if it was changed.

    Return nothing for an installed package, or if git is missing.
    """

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(folder), *arguments]
            done = subprocess.run(  # noqa: S603 - git of the user's path, with constant arguments
                command, capture_output=True, text=True, check=False, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie in a checkout of something else, which does not track it.
    if not git("ls-files", Path(__file__).name):
        return {}
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": f"{git('rev-parse', 'HEAD')}{'+' if changed else ''}"}


def data_digest(training: PatchImages, validation: PatchImages) -> str:
    """Return a SHA-256 over the files of all images and masks, their names and splits, and their labeled patches.

    The folder of the data does not matter, nor the order in which files are found.
    """
    whole = hashlib.sha256()
    for split, images in (("train", training), ("val", validation)):
        for sample, boxes_B4, present_BK in zip(images.samples, images.boxes, images.present, strict=True):
            files = [sample.image, *([sample.mask] if sample.mask is not None else [])]
            parts = [split, sample.name, sample.group, *(file_facts(file).sha256 for file in files)]
            parts += [boxes_B4.tolist(), present_BK.astype(int).tolist()]
            whole.update(f"{parts}\n".encode())
    return whole.hexdigest()
