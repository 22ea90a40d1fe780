from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.training.dataset import load_dataset, samples
from pipeline.training.patches import PatchImages
from pipeline.training.provenance import data_digest, source_commit
from tests.textures import write_crops


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
