from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from torch import nn

from models import runtimes
from models.bundle import DEFAULT_BUNDLE, load_bundle, load_networks
from models.card import NO_DIGEST
from models.classifier import Classifier
from models.errors import NonFiniteOutputError, RuntimeUnavailableError
from models.heads import HEADS
from models.openvino_network import OpenVinoNetwork
from models.predictor import Predictor
from models.runtimes import choose_runtime
from models.segmenter import build_segmenter
from models.shared_stages import DeepFeatures
from tests.cases import full, needs_openvino
from tests.models.networks import ConstantClassifier, ConstantSegmenter, make_card


def computes(precision: str) -> bool:
    return find_spec("openvino") is not None and choose_runtime("auto", "cpu", precision) == "openvino"


needs_fp16 = pytest.mark.skipif(not computes("fp16"), reason="no openvino, or no float16 in this processor")
needs_bf16 = pytest.mark.skipif(not computes("bf16"), reason="no openvino, or no bfloat16 in this processor")


def corners_of(rgb_NHWC: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Return a corner for each canvas, all at the origin."""
    return [(0, 0)] * len(rgb_NHWC)


def stained_canvases(count: int) -> NDArray[np.uint8]:
    """Return different canvases of 224 pixels with purple gland walls, pink stroma and glass, as rgb_NHWC."""
    random = np.random.default_rng(0)
    y_HW, x_HW = np.mgrid[:224, :224]
    canvases = []
    for number in range(count):
        rgb_HWC = np.full((224, 224, 3), (225, 165, 200), np.float64)
        for x, y, radius in random.uniform((0, 0, 15), (224, 224, 60), (2 + number % 4, 3)):
            distance_HW = np.hypot(x_HW - x, y_HW - y) / radius
            rgb_HWC[distance_HW < 1] = (110, 60, 140)
            rgb_HWC[distance_HW < 0.5] = (240, 235, 240)
        canvases.append(rgb_HWC + random.normal(0, 12, (224, 224, 3)))
    return np.clip(canvases, 0, 255).astype(np.uint8)


def default_predictor(runtime: Any, **options: Any) -> Predictor:
    return Predictor.from_bundle(load_bundle(DEFAULT_BUNDLE), device="cpu", runtime=runtime, **options)


def real_canvases(slide: Path) -> NDArray[np.uint8]:
    """Return every other square of 224 px of the sample slide at about 1 µm per pixel, as rgb_NHWC."""
    rgb_HWC = tifffile.imread(slide, key=0)
    rows, columns = (side // 448 for side in rgb_HWC.shape[:2])
    cut = rgb_HWC[: rows * 448, : columns * 448].reshape(rows, 224, 2, columns, 224, 2, 3).mean(axis=(2, 5))
    rgb_NHWC: NDArray[np.uint8] = cut.swapaxes(1, 2).reshape(-1, 224, 224, 3)[::2].astype(np.uint8)
    return rgb_NHWC


@needs_openvino
def test_openvino_gives_the_probabilities_and_labels_of_torch(sample_slide: Path) -> None:
    rgb_NHWC = real_canvases(sample_slide)
    assert len(rgb_NHWC) > 10
    predictors = [default_predictor(name, skip_by_gate=False) for name in ("openvino", "torch")]
    corners = corners_of(rgb_NHWC)
    presences = [torch.stack(predictor.presence(rgb_NHWC, corners)) for predictor in predictors]
    assert (presences[0] - presences[1]).abs().max() < 1e-5
    ours, torchs = (predictor.predict(rgb_NHWC, corners) for predictor in predictors)
    assert np.array_equal(ours.segmented_N, torchs.segmented_N)
    assert (ours.probs_NKhw - torchs.probs_NKhw).abs().max() < 1e-5
    assert torch.equal(ours.probs_NKhw.argmax(dim=1), torchs.probs_NKhw.argmax(dim=1))
    # The comparison is meaningful: several classes have pixels.
    assert len(ours.probs_NKhw.argmax(dim=1).unique()) > 2


@needs_fp16
def test_float16_on_the_cpu_gives_nearly_the_same(sample_slide: Path) -> None:
    rgb_NHWC = real_canvases(sample_slide)
    halved, torchs = (
        default_predictor(runtime, precision=precision, skip_by_gate=False).predict(rgb_NHWC, corners_of(rgb_NHWC))
        for runtime, precision in (("auto", "fp16"), ("torch", "float32"))
    )
    # The arithmetic differs, the result hardly.
    assert 1e-5 < (halved.probs_NKhw - torchs.probs_NKhw).abs().max() < 0.03
    # On whole slides at least 99.9 % (docs/benchmarks/speed.md). These canvases contain hardly any border.
    same = halved.probs_NKhw.argmax(dim=1) == torchs.probs_NKhw.argmax(dim=1)
    assert float(same.float().mean()) >= 0.998


@needs_fp16
def test_an_overflow_of_float16_is_an_error() -> None:
    huge = nn.Conv2d(3, 2, 4, stride=4, bias=False).requires_grad_(False)
    huge.weight.fill_(3e4)
    networks = ConstantClassifier([0.9, 0.9]), huge
    predictor = Predictor.from_networks(
        make_card(), NO_DIGEST, *networks, device="cpu", runtime="auto", precision="fp16"
    )
    with pytest.raises(NonFiniteOutputError, match="segmenter"):
        predictor.predict(np.full((1, 96, 96, 3), 255, np.uint8), [(0, 0)])


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("float32", marks=[needs_openvino, pytest.mark.full]),
        pytest.param("fp16", marks=[needs_fp16, pytest.mark.full]),
        pytest.param("bf16", marks=[needs_bf16, pytest.mark.full]),
    ],
)
def test_openvino_gives_a_canvas_the_same_bytes_in_any_batch_and_any_run(precision: Any) -> None:
    rgb_NHWC = stained_canvases(7)
    predictor = default_predictor("openvino", batch_size=4, precision=precision)
    corners = corners_of(rgb_NHWC)
    presence_NRCK = torch.stack(predictor.presence(rgb_NHWC, corners))
    logits_NKhw = predictor.logits(rgb_NHWC)
    order = np.random.default_rng(1).permutation(7)
    again = default_predictor("openvino", batch_size=4, precision=precision)
    for batch_size in (4, 1, 3, 16):
        again.batch_size = batch_size
        assert torch.equal(torch.stack(again.presence(rgb_NHWC[order], corners)), presence_NRCK[order])
        assert torch.equal(again.logits(rgb_NHWC[order]), logits_NKhw[order])


@pytest.mark.full
@needs_openvino
def test_openvino_takes_canvases_of_other_sizes() -> None:
    rgb_NHWC = stained_canvases(2)[:, :160, :192]
    card = load_bundle(DEFAULT_BUNDLE).card
    ours, torchs = (
        default_predictor(name, output_stride=2).predict(rgb_NHWC, corners_of(rgb_NHWC))
        for name in ("openvino", "torch")
    )
    assert ours.probs_NKhw.shape == (2, len(card.classes), 80 - card.margin, 96 - card.margin)
    assert (ours.probs_NKhw - torchs.probs_NKhw).abs().max() < 1e-5


@pytest.mark.full
@needs_openvino
def test_canvases_of_many_sizes_do_not_add_memory() -> None:
    """OpenVINO can keep kernels for each size. With 115 sizes of canvases, a slide then needed 400 MB more."""
    network = OpenVinoNetwork(load_networks(load_bundle(DEFAULT_BUNDLE))[1], 128)
    process = psutil.Process()
    sizes = [(height, width) for height in range(128, 512, 32) for width in range(128, 512, 32)]
    network(torch.zeros(1, 3, 480, 480))
    before = process.memory_info().rss
    for height, width in sizes[:-1]:
        network(torch.zeros(1, 3, height, width))
    # 459 MB with kernels for each size, 74 without; the rest are holes in the heap.
    assert process.memory_info().rss - before < 150 << 20


@pytest.mark.full
def test_canvases_of_many_sizes_do_not_add_memory_with_torch_either() -> None:
    """oneDNN keeps kernels for each size. On CMU-1, a run with torch needed 4.9 GB."""
    script = textwrap.dedent("""
        import psutil, torch
        from models.bundle import DEFAULT_BUNDLE, load_bundle, load_networks
        from pipeline.workers.malloc import keep_freed_memory

        keep_freed_memory("torch")
        torch.set_num_threads(2)
        network = load_networks(load_bundle(DEFAULT_BUNDLE))[1].eval().to(memory_format=torch.channels_last)
        process = psutil.Process()
        with torch.inference_mode():
            network(torch.zeros(1, 3, 480, 480))
            before = process.memory_info().rss
            for height in range(128, 512, 32):
                for width in range(128, 512, 32):
                    network(torch.zeros(1, 3, height, width))
        print((process.memory_info().rss - before) >> 20)
    """)
    grown = {
        capacity: int(
            subprocess.run(
                [sys.executable, "-c", script],
                env=os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": capacity} if capacity else None,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for capacity in ("", "1024")
    }
    assert grown[""] < 400
    assert grown["1024"] > 400  # otherwise the test could not fail


@needs_openvino
def test_a_call_leaves_the_images_of_earlier_calls_alone() -> None:
    network = OpenVinoNetwork(nn.Conv2d(3, 1, 1).eval(), 32)
    first_NCHW, second_NCHW = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    kept_NCHW = first_NCHW.clone()
    output_NCHW = network(first_NCHW)
    kept_output_NCHW = output_NCHW.clone()
    network(second_NCHW)
    assert torch.equal(first_NCHW, kept_NCHW)
    assert torch.equal(output_NCHW, kept_output_NCHW)


@needs_openvino
@pytest.mark.parametrize("ahead", [0, 1])
def test_calls_that_overlap_share_the_streams_and_return_their_own_outputs(ahead: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1)).eval()
    streams = OpenVinoNetwork(network, 32, streams=2, ahead=ahead)
    images = [torch.randn(1, 3, 32 * (1 + n % 3), 64) for n in range(40)]
    with ThreadPoolExecutor(4) as pool:  # more callers than streams
        found = list(pool.map(streams, images))
    alone = OpenVinoNetwork(network, 32)
    assert all(torch.equal(one, alone(image)) for one, image in zip(found, images, strict=True))


@needs_openvino
def test_openvino_takes_every_size_from_the_smallest_one() -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter("tu-tf_efficientnet_lite0", 2).eval()
    network = OpenVinoNetwork(segmenter, 96)
    for size in ((96, 96), (96, 256), (224, 96)):
        x_NCHW = torch.randn(1, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(network(x_NCHW), segmenter(x_NCHW), rtol=1e-3, atol=1e-3)
    # Padding of 4 cells mirrors no image of 4 cells, and OpenVINO would return the last output.
    with pytest.raises(ValueError, match=r"images have \(64, 704\) px; the smallest side is 96"):
        network(torch.zeros(1, 3, 64, 704))


@needs_openvino
@pytest.mark.parametrize("backbone", ["resnet18", full("resnet38d"), "convnext_atto"])
def test_openvino_takes_backbones_of_other_families(backbone: str) -> None:
    torch.manual_seed(0)
    network = DeepFeatures(Classifier(backbone, "gap", 3)).eval()
    x_NCHW = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected_NChw = network(x_NCHW)
        assert torch.allclose(OpenVinoNetwork(network, 64)(x_NCHW), expected_NChw, rtol=1e-4, atol=1e-4)


@needs_openvino
@pytest.mark.parametrize("encoder", ["resnet18", full("tu-convnext_atto"), full("efficientnet-b0")])
def test_openvino_takes_segmenters_with_other_encoders(encoder: str) -> None:
    torch.manual_seed(0)
    network = build_segmenter(encoder, 3).eval()
    x_NCHW = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected_NKhw = network(x_NCHW)
        assert torch.allclose(OpenVinoNetwork(network, 96)(x_NCHW), expected_NKhw, rtol=1e-4, atol=1e-4)


@needs_openvino
def test_openvino_refuses_a_network_that_pads_small_and_large_canvases_differently() -> None:
    """A map of 4 cells is too small to mirror 4 cells, so its edge is repeated. The trace does so at every size."""
    torch.manual_seed(0)
    network = build_segmenter("resnet18", 3).eval()
    head: Any = network.get_submodule("segmentation_head.0")
    torch.nn.init.normal_(head.weight)  # differences as large as after training
    reason = r"than its smallest image \(64 px\) contains; use runtime torch, or train the model with a larger margin"
    with pytest.raises(RuntimeUnavailableError, match=reason):
        OpenVinoNetwork(network, 64)
    OpenVinoNetwork(network, 96)


def without_openvino(name: str) -> None:
    assert name == "openvino"


def test_without_the_package_auto_is_torch_and_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", without_openvino)
    assert choose_runtime("auto", "cpu", "float32") == "torch"
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'wsi-segment\[openvino\]'"):
        choose_runtime("openvino", "cpu", "float32")


def test_auto_is_openvino_on_a_cpu_that_computes_in_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: object())
    # A processor that computes in bfloat16 and not in float16.
    core = SimpleNamespace(get_property=lambda *_: ["FP32", "BF16"])
    monkeypatch.setattr(runtimes, "load_openvino", lambda: SimpleNamespace(Core=lambda: core))
    assert choose_runtime("auto", "cpu", "float32") == "openvino"
    assert choose_runtime("auto", "cpu", "bf16") == choose_runtime("openvino", "cpu", "bf16") == "openvino"
    assert choose_runtime("auto", "cpu", "fp16") == "torch"
    for flags, message in (
        ({"avx512_fp16"}, r"does not compute in fp16; use precision float32, or runtime torch$"),
        ({"avx512_bf16"}, r"has no instructions for it .*; use float32 or bf16$"),
    ):
        monkeypatch.setattr(runtimes, "processor_flags", lambda flags=frozenset(flags): flags)
        with pytest.raises(RuntimeUnavailableError, match=message):
            choose_runtime("openvino", "cpu", "fp16")
    for device, precision in (("cuda", "float32"), ("cuda:1", "bf16"), ("mps", "float32")):
        assert choose_runtime("auto", device, precision) == "torch"
        assert choose_runtime("torch", device, precision) == "torch"
        with pytest.raises(RuntimeUnavailableError, match=f"runs on the CPU only and the device is {device}"):
            choose_runtime("openvino", device, precision)
    with pytest.raises(RuntimeUnavailableError, match="use auto, torch or openvino"):
        choose_runtime("onnx", "cpu", "float32")  # type: ignore[arg-type]


def test_a_predictor_uses_torch_by_default() -> None:
    networks = ConstantClassifier([0.9, 0.9]), ConstantSegmenter([0.0, 1.0])
    assert Predictor(make_card(), NO_DIGEST, *networks, device="cpu").runtime == "torch"


def test_the_logit_of_the_area_head_has_the_same_bits_as_with_torch() -> None:
    head: Any = HEADS["area"](4, 3).eval()
    deep_NChw = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 300
    with torch.inference_mode():
        head.bias_K[2] = -40.0
        output = head(deep_NChw, deep_NChw)
        probs_NKs = output.map_NKhw.softmax(dim=1).flatten(2)
        covered_NK = probs_NKs.topk(13, dim=2).values.mean(dim=2)
    assert covered_NK.min() < 1e-6
    assert torch.equal(output.logits_NK, torch.logit(covered_NK, eps=1e-6))
