from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.classifier import Classifier
from pipeline.training.dataset import Dataset, load_dataset
from tests.bench import cams
from tests.bench.cam_crops import Crop, choose_examples, draw_crops

BACKBONE = "test_resnet"

CARD = """
name = "squares"
description = "Noise of two colors"
licence = "CC0"
mpp = 0.5
mask_excluded = [9]
classes = [
    { name = "red", color = [200, 0, 0], mask_values = [0] },
    { name = "blue", color = [0, 0, 200], mask_values = [1] },
]
[images]
test = [{ image = "img/*.png", mask = "mask/{name}.png" }]
[labels]
source = "mask-crops"
side = 32
stride = 32
minimum = 0.05
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three images of 96×64: left of a slanting edge red, right of it blue, the topmost row of pixels no class."""
    folder = tmp_path_factory.mktemp("squares")
    (folder / "dataset.toml").write_text(CARD, encoding="utf-8")
    random = np.random.default_rng(2)
    for part in ("img", "mask"):
        (folder / part).mkdir()
    for n in range(3):
        rows, columns = np.mgrid[:64, :96]
        mask_HW = (columns > 30 + 8 * n + rows // 2).astype(np.uint8)
        rgb_HWC = np.where(mask_HW[:, :, None] == 1, (60, 60, 200), (200, 60, 60)) + random.integers(
            -20, 20, (64, 96, 3)
        )
        mask_HW[0] = 9
        Image.fromarray(rgb_HWC.astype(np.uint8)).save(folder / "img" / f"{n}.png")
        Image.fromarray(mask_HW).save(folder / "mask" / f"{n}.png")
    return load_dataset(folder / "dataset.toml")


def subject(head: str = "gap") -> cams.Subject:
    torch.manual_seed(4)
    return cams.Subject("random", head, Classifier(BACKBONE, head, 2).eval(), (0.5,) * 3, (0.5,) * 3, mpp=0.5)


SETTINGS = cams.Settings(steps=4, chunk=16, batch=3, device=torch.device("cpu"))


def test_command_writes_a_row_per_method_a_file_of_numbers_and_a_picture(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(dataset.root / "dataset.toml"), "-o", str(tmp_path / "out"), "--crops", "3"]
    for head in ("gap", "pcam", "lfi"):
        file = tmp_path / f"{head}.safetensors"
        safetensors.torch.save_file(subject(head).classifier.state_dict(), file)
        arguments += ["--classifier", f"net-{head}={file}:{BACKBONE}:{head}:none"]
    cams.main([*arguments, "--steps", "3", "--examples", "2", "--batch", "2"])
    document = json.loads((tmp_path / "out" / "cams.json").read_text())
    named = [(row["method"], row["head"], row["classifier"]) for row in document["rows"]]
    main = [(method, "gap", "net-gap") for method in ("cam", "grad-cam", "grad-cam++", "score-cam")]
    # No classifier with an abn head was named.
    assert named == [*main, ("lfi-cam", "lfi", "net-lfi"), ("pcam", "pcam", "net-pcam")]
    for row in document["rows"]:
        for score in ("miou", "average_drop", "increase", "insertion", "deletion", "energy"):
            assert 0 <= row[score] <= 1
        assert row["ms"] > 0
        assert row["peak_mb"] > 0
    # CAM and Grad-CAM of an average-pooled head differ by a factor, and a ReLU that does not count here.
    cam, grad_cam = document["rows"][:2]
    for score in ("miou", "insertion", "deletion"):
        assert cam[score] == pytest.approx(grad_cam[score], abs=1e-3)
    text = (tmp_path / "out" / "cams.md").read_text(encoding="utf-8")
    assert "| PCAM (pcam head) | net-pcam |" in text
    assert capsys.readouterr().out.strip() == text.strip()
    picture = Image.open(tmp_path / "out" / "cams.png")
    assert picture.width > picture.height
    assert np.asarray(picture.convert("L")).std() > 20


def test_nothing_to_measure_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="name a classifier"):
        cams.main(["--data", str(dataset.root / "dataset.toml"), "-o", str(tmp_path)])


def test_maps_that_are_the_truth_score_fully(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the others what covers less than the labels' minimum is absent, and the map of the rest is flat.
    crops = [crop for crop in draw_crops(dataset, "test", 100, seed=0) if crop.present_K.all()]
    assert len(crops) >= 4
    by_input: dict[bytes, NDArray[np.uint8]] = {}

    def as_input(_: cams.Subject, batch: list[Crop], *__: object) -> Tensor:
        rgb_NHWC = np.stack([crop.rgb_HWC for crop in batch])
        by_input.update({crop.rgb_HWC.tobytes(): crop.truth_HW for crop in batch})
        return torch.from_numpy(rgb_NHWC).permute(0, 3, 1, 2).float()

    def truth_maps(_: str, __: Classifier, x_NCHW: Tensor, *, chunk: int) -> Tensor:
        del chunk
        keys = [x_HWC.astype(np.uint8).tobytes() for x_HWC in x_NCHW.permute(0, 2, 3, 1).numpy()]
        truth_NHW = torch.from_numpy(np.stack([by_input[key] for key in keys]))
        return torch.stack([truth_NHW == k for k in range(2)], dim=1).float()

    monkeypatch.setattr(cams, "as_input", as_input)
    monkeypatch.setattr(cams, "cam_maps", truth_maps)
    row = cams.measure("cam", subject(), crops, dataset, SETTINGS)
    assert row.miou == 1.0
    assert row.energy == pytest.approx(1.0)


def test_absent_class_has_no_pixel_however_high_its_map() -> None:
    map_NKhw = torch.tensor([[[[5.0, 7.0]], [[-1.0, -9.0]]], [[[5.0, 1.0]], [[0.0, 2.0]]]])
    present_NK = torch.tensor([[False, True], [True, True]])
    assert cams.labels_of(map_NKhw, present_NK, (1, 2)).tolist() == [[[1, 1]], [[0, 1]]]


def test_crops_are_the_labeled_boxes_of_the_images_and_the_same_for_a_seed(dataset: Dataset) -> None:
    everything = draw_crops(dataset, "test", 100, seed=0)
    assert len(everything) == 3 * 6
    for crop in everything:
        counted = crop.truth_HW[crop.truth_HW < 2]
        assert [bool((counted == k).sum() > 0.05 * 32 * 32) for k in range(2)] == crop.present_K.tolist()
        # Blue pixels are of class 1.
        assert ((crop.rgb_HWC[:, :, 2] > 128) == (crop.truth_HW == 1))[crop.truth_HW < 2].all()
    some, again, other = (draw_crops(dataset, "test", 5, seed=seed) for seed in (1, 1, 2))
    assert len(some) == 5
    assert all((a.rgb_HWC == b.rgb_HWC).all() for a, b in zip(some, again, strict=True))
    assert any((a.rgb_HWC != b.rgb_HWC).any() for a, b in zip(some, other, strict=True))


def test_crops_are_scaled_to_the_pixel_size_of_the_classifier(dataset: Dataset) -> None:
    crops = draw_crops(dataset, "test", 2, seed=0)
    same = cams.as_input(subject(), crops, 0.5, SETTINGS.device)
    expected = (crops[1].rgb_HWC.transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(same[1].numpy(), expected, atol=1e-6)
    finer = cams.as_input(subject()._replace(mpp=0.25), crops, 0.5, SETTINGS.device)
    assert finer.shape == (2, 3, 64, 64)
    assert float(finer.mean()) == pytest.approx(float(same.mean()), abs=1e-2)


def test_examples_are_crops_of_which_a_class_covers_about_half_the_classes_in_turn(dataset: Dataset) -> None:
    crops = draw_crops(dataset, "test", 100, seed=0)
    chosen = choose_examples(crops, 4)
    assert [k for _, k in chosen] == [0, 1, 0, 1]
    assert len({index for index, _ in chosen}) == 4
    index, k = chosen[0]
    distances = [abs(float((crop.truth_HW == k).mean()) - 0.5) for crop in crops if crop.present_K[k]]
    assert abs(float((crops[index].truth_HW == k).mean()) - 0.5) == min(distances)


def test_only_cam_is_shown_without_a_relu() -> None:
    map_1111 = torch.tensor([[[[-4.0, 0.0, 4.0]]]])
    assert cams.explained("cam", map_1111, (1, 3)).flatten().tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert cams.explained("grad-cam", map_1111, (1, 3)).flatten().tolist() == pytest.approx([0.0, 0.0, 1.0])


def test_peak_memory_is_what_lives_at_once_and_not_the_sum() -> None:
    def work() -> Tensor:
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        return second * 2

    # Of three tensors of 4 MB two live at once.
    assert cams.peak_bytes(work, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)
