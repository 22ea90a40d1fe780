from __future__ import annotations

import re
import threading

import numpy as np
import pytest
import torch
from torch import nn

from models.devices import (
    Uploads,
    available_devices,
    choose_device,
    compiles_sizes,
    memory_bytes,
    native_convolutions,
    processor_name,
    to_host,
)
from models.errors import DeviceUnavailableError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)


@pytest.mark.usefixtures("two_gpus")
def test_a_device_is_named_as_in_torch() -> None:
    assert available_devices() == ["cpu", "cuda:0", "cuda:1"]
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_without_an_accelerator() -> None:
    assert available_devices() == ["cpu"]
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "mps", "xpu:0", "meta", "cpu:0", "quantum", "", "cuda:"])
def test_a_device_that_the_machine_lacks_is_refused_with_those_that_it_has(name: str) -> None:
    message = f"device {name!r} is not available: torch {torch.__version__} finds cpu, cuda:0, cuda:1 on this machine"
    with pytest.raises(DeviceUnavailableError, match=re.escape(message)):
        choose_device(name)


def test_the_processor_of_the_cpu_has_its_instruction_set() -> None:
    assert processor_name(torch.device("cpu")).endswith(f" {torch.backends.cpu.get_cpu_capability()}")
    assert memory_bytes(torch.device("cpu")) is None


def test_nothing_is_copied_on_the_cpu() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    there = Uploads(torch.device("cpu"))(array)
    (back,) = to_host([there])
    back[1, 2] = 99
    assert array[1, 2] == 99


@pytest.mark.parametrize(
    ("device", "groups", "compiles"), [("cuda", 4, True), ("cuda:1", 4, True), ("cuda", 1, False), ("cpu", 4, False)]
)
def test_depthwise_networks_compile_sizes_on_cuda_alone(device: str, groups: int, compiles: bool) -> None:
    plain, network = nn.Conv2d(4, 4, 3, groups=2), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=groups))
    assert compiles_sizes(torch.device(device), plain, network) is compiles
    assert not compiles_sizes(torch.device(device), plain)


def test_cudnn_is_off_until_the_last_thread_leaves() -> None:
    def enabled() -> bool:
        return bool(torch.backends.cudnn.enabled)

    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with native_convolutions(True):
            entered.set()
            assert leave.wait(60)

    assert enabled()
    with native_convolutions(False):
        assert enabled()
    other = threading.Thread(target=stay)
    with pytest.raises(ValueError, match="inside"), native_convolutions(True):
        other.start()
        assert entered.wait(60)
        raise ValueError("inside")
    assert not enabled()
    leave.set()
    other.join()
    assert enabled()
    torch.backends.cudnn.enabled = False  # by a caller
    try:
        with native_convolutions(True), native_convolutions(True):
            assert not enabled()
        assert not enabled()
    finally:
        torch.backends.cudnn.enabled = True
