"""Tests that need a GPU. They are skipped without one; `test_pretend.py` runs the same code on a pretend one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from models.bundle import DEFAULT_BUNDLE, load_bundle
from models.devices import available_devices
from models.predictor import Predictor

pytestmark = pytest.mark.skipif(available_devices() == ["cpu"], reason="this machine has no GPU that torch can use")


def predictor(device: str) -> Predictor:
    return Predictor.from_bundle(load_bundle(DEFAULT_BUNDLE), device=device, runtime="torch", skip_by_gate=False)


def test_labels_are_those_of_the_cpu() -> None:
    rgb_NHWC = np.random.default_rng(0).integers(0, 256, (6, 512, 512, 3), dtype=np.uint8)
    rgb_NHWC = rgb_NHWC // 2 + np.linspace(0, 127, 512, dtype=np.uint8)[:, None, None]
    corners = [(0, 0)] * 6
    ours, cpus = (predictor(device).predict(rgb_NHWC, corners).probs_NKhw.cpu() for device in ("auto", "cpu"))
    assert float((ours.argmax(1) == cpus.argmax(1)).float().mean()) >= 0.999


def test_copies_are_complete_while_other_copies_and_networks_run() -> None:
    model = predictor("auto")
    canvases = np.random.default_rng(0).integers(0, 256, (16, 2048, 1024, 3), dtype=np.uint8)

    def there_and_back(canvas_HWC: np.ndarray) -> bool:
        copied_HWC = model.on_device(canvas_HWC)
        with model.lock:
            model.predict(copied_HWC[None, :512, :512], [(0, 0)])
        return np.array_equal(copied_HWC.cpu().numpy(), canvas_HWC)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(there_and_back, canvases))


def test_no_convolution_of_a_depthwise_network_uses_cudnn() -> None:
    with torch.profiler.profile() as profile:
        predictor("auto").predict(np.zeros((1, 256, 288, 3), np.uint8), [(0, 0)])
    names = {event.name for event in profile.events() or ()}
    assert "aten::conv2d" in names
    assert not {name for name in names if "cudnn_convolution" in name or "miopen" in name}
