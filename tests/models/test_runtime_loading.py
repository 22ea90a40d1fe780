"""How a model is loaded for a runtime, and what happens if that fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import device_networks, openvino_network, predictor, runtimes
from models.backbone import Stages
from models.bundle import DEFAULT_BUNDLE, load_bundle
from models.card import NO_DIGEST
from models.errors import RuntimeUnavailableError, ShortageError
from models.openvino_network import OpenVinoNetwork
from models.predictor import Predictor
from tests.cases import needs_openvino
from tests.models.networks import ConstantSegmenter, PixelClassifier, make_card
from tests.repository import REPOSITORY


class _Unknown(PixelClassifier):
    """Contains an operator that OpenVINO cannot convert."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        unusual_NC: Tensor = torch.special.i1e(x_NCHW.mean(dim=(2, 3)))
        return unusual_NC[:, :2]

    def stages(self, x_NCHW: Tensor) -> Stages:
        unusual_NCHW: Tensor = torch.special.i1e(x_NCHW)
        return Stages(unusual_NCHW, unusual_NCHW, unusual_NCHW)


class _Branching(PixelClassifier):
    """Branches on the image, which a trace of one image does not record."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        sign = 1.0 if float(x_NCHW.std()) > 0.1 else -1.0
        return sign * (1 + x_NCHW.mean(dim=(2, 3)))[:, :2]

    def stages(self, x_NCHW: Tensor) -> Stages:
        signed_NCHW = x_NCHW * (1.0 if float(x_NCHW.std()) > 0.1 else -1.0)
        return Stages(signed_NCHW, signed_NCHW, signed_NCHW)


@needs_openvino
@pytest.mark.parametrize(
    ("classifier", "reason"),
    [(_Unknown(), "No conversion rule found for operations: aten::"), (_Branching(), "differ from those of torch")],
)
def test_a_network_that_openvino_cannot_take_runs_in_torch_with_a_warning(
    classifier: nn.Module, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    networks = classifier, ConstantSegmenter([0.0, 1.0])
    with pytest.raises(RuntimeUnavailableError, match=reason):
        Predictor(make_card(), NO_DIGEST, *networks, device="cpu", runtime="openvino")
    with caplog.at_level(logging.WARNING):
        predictor = Predictor.from_networks(make_card(), NO_DIGEST, *networks, device="cpu", runtime="auto")
    assert predictor.runtime == "torch"
    assert reason in caplog.text
    assert predictor.presence(np.zeros((1, 96, 96, 3), np.uint8), [(0, 0)])[0].shape == (5, 5, 2)


@needs_openvino
@pytest.mark.parametrize(
    ("text", "shortage"),
    [
        (
            "Exception from src/core.cpp:1:\nException from src/plugin.cpp:2:\nstd::bad_alloc\n",
            "memory (std::bad_alloc)",
        ),
        ("Check 'false' failed at src/frontend.cpp:53:\nbad allocation", "memory (bad allocation)"),
        ("Resource temporarily unavailable", "threads (Resource temporarily unavailable)"),
    ],
)
def test_a_model_that_cannot_load_for_lack_of_memory_or_threads_does_not_run_in_torch(
    text: str, shortage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(runtimes.load_openvino(), "convert_model", short)
    networks = PixelClassifier(), ConstantSegmenter([0.0, 1.0])
    with pytest.raises(ShortageError) as raised:
        Predictor.from_networks(make_card(), NO_DIGEST, *networks, device="cpu", runtime="auto")
    assert str(raised.value) == (
        f"the model cannot be loaded: out of {shortage}; end other programs, or raise the limits of this process or "
        f"container"
    )


def test_weights_that_do_not_fit_into_memory_are_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(nn.Module, "load_state_dict", short)
    with pytest.raises(ShortageError, match=r"out of memory \(DefaultCPUAllocator: can't allocate memory\)"):
        Predictor.from_bundle(load_bundle(DEFAULT_BUNDLE), device="cpu")


@pytest.mark.full
@needs_openvino
def test_openvino_opens_no_connection_and_writes_no_file(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from models.openvino_network import OpenVinoNetwork; "
        "OpenVinoNetwork(torch.nn.Conv2d(3, 1, 1).eval(), 32); "
        "assert sys.modules['openvino_telemetry'] is None; assert 'requests' not in sys.modules"
    )
    root = REPOSITORY
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []


@needs_openvino
def test_a_failed_conversion_does_not_change_the_logging() -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers), list(root.filters)
    with pytest.raises(RuntimeUnavailableError):
        OpenVinoNetwork(_Unknown().eval(), 32)
    assert (root.level, list(root.handlers), list(root.filters)) == before


@pytest.mark.full
@needs_openvino
def test_ctrl_c_during_the_conversion_ends_with_keyboard_interrupt() -> None:
    # OpenVINO calls `get_op_type` from C++, where a KeyboardInterrupt becomes an ordinary error.
    program = """
        import signal
        from models.runtimes import load_openvino
        load_openvino()
        from concurrent.futures import ThreadPoolExecutor
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
        from torch import nn
        from models.openvino_network import OpenVinoNetwork

        read, sent = TorchScriptPythonDecoder.get_op_type, []
        def interrupted(decoder):
            if not sent:
                sent.append(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return read(decoder)

        TorchScriptPythonDecoder.get_op_type = interrupted
        former = signal.getsignal(signal.SIGINT)
        try:
            OpenVinoNetwork(nn.Conv2d(3, 1, 1).eval(), 32)
        except KeyboardInterrupt:
            assert sent and signal.getsignal(signal.SIGINT) is former
            with ThreadPoolExecutor(1) as pool:  # a thread that cannot set a handler
                pool.submit(OpenVinoNetwork, nn.Conv2d(3, 1, 1).eval(), 32).result()
            print("interrupted")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "interrupted\n", "")


@needs_openvino
def test_a_model_loads_in_one_thread_and_openvino_then_has_all_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = torch.get_num_threads(), []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            during.append(torch.get_num_threads())
            return function(*args, **kwargs)

        return count

    for module, name in (
        (predictor, "load_networks"),
        (device_networks, "split_networks"),
        (openvino_network, "_compile"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    torch.set_num_threads(2)
    try:
        made = Predictor.from_bundle(load_bundle(DEFAULT_BUNDLE), device="cpu", runtime="openvino")
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    network: Any = made._networks._deep
    request = network._requests.get()._request
    # OpenVINO takes at most one thread per core.
    assert request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == min(2, os.cpu_count() or 1)
    assert (set(during), len(during), made.threads, after) == ({1}, 5, 2, 2)


@needs_openvino
def test_torch_has_its_threads_again_after_a_model_that_openvino_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeUnavailableError("no")

    monkeypatch.setattr(openvino_network, "_compile", refuse)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeUnavailableError, match="no"):
            Predictor.from_bundle(load_bundle(DEFAULT_BUNDLE), device="cpu", runtime="openvino")
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert after == 2
