from __future__ import annotations

import pickle
import re
from dataclasses import astuple, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from models import runtimes
from models.bundle import DEFAULT_BUNDLE
from models.compute import choose_compute
from models.errors import DeviceUnavailableError, RuntimeUnavailableError
from models.runtimes import ACCELERATOR_BATCH_SIZE, BATCH_SIZE, RUNTIME_FACTS, Runtime, default_batch_size
from pipeline.config import MapSettings, ResolvedSettings, SegmentConfig, resolve
from pipeline.errors import ConfigError
from pipeline.slide.recipe import segment_slide
from pipeline.workers.in_process import load_predictor
from tests.pipeline.fakes import CPU, SMALL, color_predictor, region_slide, run_of

IN_THE_PLAN = {"mpp", "backend", "canvas_m"}
"""Settings that are resolved for each slide and model; `SlideInfo` and `Plan` hold the results."""


@pytest.fixture(params=[True, False], ids=["with openvino", "without openvino"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A machine without a GPU whose processor computes in bfloat16 and not in float16."""
    here = bool(request.param)
    core = SimpleNamespace(get_property=lambda *_: ["FP32", "BF16"])
    monkeypatch.setattr(runtimes, "find_spec", lambda _: object() if here else None)
    monkeypatch.setattr(runtimes, "load_openvino", lambda: SimpleNamespace(Core=lambda: core))
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    return here


def resolved_here(**settings: Any) -> ResolvedSettings:
    """Return what `resolve` makes of settings on this machine."""
    config = SegmentConfig(**settings)
    names = ("device", "precision", "runtime", "batch_size")
    return resolve(config, choose_compute(**{name: getattr(config, name) for name in names}))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("settings", [{}, {"device": "cpu"}, {"runtime": "torch"}, {"precision": "bf16"}])
def test_resolved_settings_contain_neither_auto_nor_none(settings: dict[str, Any]) -> None:
    resolved = resolved_here(**settings)
    for field in fields(resolved):
        if field.name not in IN_THE_PLAN:
            assert getattr(resolved, field.name) not in ("auto", None), field.name
    assert pickle.loads(pickle.dumps(resolved)) == resolved


def test_the_types_of_resolved_settings_allow_neither_auto_nor_none() -> None:
    hints = get_type_hints(ResolvedSettings)
    open_ended = {name for name, hint in hints.items() if {"auto", type(None)} & set(get_args(hint))}
    assert open_ended == IN_THE_PLAN - {"backend"}  # "auto" or any reader's name, a str
    assert hints["runtime"] == Runtime


@pytest.mark.parametrize(
    ("settings", "runtime_with_openvino"),
    [
        ({}, "openvino"),
        ({"device": "cpu"}, "openvino"),
        ({"precision": "bf16"}, "openvino"),
        ({"precision": "fp16"}, "torch"),
        ({"runtime": "torch"}, "torch"),
    ],
)
def test_auto_is_resolved_for_the_machine(
    settings: dict[str, Any], runtime_with_openvino: str, installed: bool
) -> None:
    resolved = resolved_here(**settings)
    assert resolved.runtime == (runtime_with_openvino if installed else "torch")
    assert (resolved.device, resolved.batch_size) == ("cpu", BATCH_SIZE)
    assert resolved.runtime_requested == ("runtime" in settings)
    assert 1 <= resolved.num_workers <= 8
    assert resolved.threads >= 1


@pytest.mark.usefixtures("installed")
def test_cuda_is_refused_on_a_machine_without_it() -> None:
    with pytest.raises(DeviceUnavailableError, match=r"device 'cuda' is not available: torch \S+ finds cpu on this"):
        resolved_here(device="cuda")


def test_named_values_are_kept(installed: bool) -> None:
    resolved = resolved_here(batch_size=3, num_workers=5, runtime="openvino" if installed else "torch")
    assert (resolved.batch_size, resolved.num_workers, resolved.in_flight) == (3, 5, 6)
    assert resolved.runtime_requested


def test_the_default_batch_size_depends_on_the_device() -> None:
    assert default_batch_size("cpu") == BATCH_SIZE
    assert {default_batch_size(device) for device in ("mps", "xpu", "cuda", "cuda:1")} == {ACCELERATOR_BATCH_SIZE}


def test_every_runtime_has_memory_figures() -> None:
    assert set(RUNTIME_FACTS) == set(get_args(Runtime))
    assert all(value > 0 for facts in RUNTIME_FACTS.values() for value in astuple(facts))


def test_the_default_parameters_stay_the_same() -> None:
    # If a default changes, a run into a folder with earlier results is refused. The changelog must mention this.
    assert MapSettings().parameters("torch") == {
        "mpp": None,
        "backend": "auto",
        "canvas_m": None,
        "output_stride": 4,
        "min_area_um2": 2000.0,
        "simplify_px": 1.0,
        "keep_ungated": False,
        "precision": "float32",
        "runtime": "torch",
        "block_out": 1024,
    }
    assert resolve(SMALL, CPU).parameters("torch") == SMALL.parameters("torch")


@pytest.mark.parametrize("share", [-1.0, 1.5, float("nan")])
def test_the_share_of_bad_tiles_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ConfigError, match=rf"max_bad_share is {share}; it must be between 0 and 1"):
        SegmentConfig(max_bad_share=share)
    assert [SegmentConfig(max_bad_share=edge).max_bad_share for edge in (0, 1)] == [0, 1]


@pytest.mark.parametrize("side", [10**12, 16416, 16, 1000])
def test_the_side_of_a_block_has_bounds(side: int) -> None:
    with pytest.raises(ConfigError, match=rf"^block_out is {side}; it must be a multiple of 32 up to 16384$"):
        SegmentConfig(output_stride=1, block_out=side)
    assert [SegmentConfig(output_stride=1, block_out=edge).block_out for edge in (32, 16384)] == [32, 16384]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "openvino"}, "the predictor was made with runtime torch, the settings request openvino"),
        ({"device": "cuda"}, "the predictor was made with device cpu, the settings request cuda"),
        ({"batch_size": 9}, "the predictor was made with batch_size 1, the settings request 9"),
        ({"precision": "bf16"}, "the predictor was made with precision float32, the settings request bf16"),
    ],
)
def test_a_predictor_made_with_other_settings_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(replace(SMALL, **change), CPU)


def test_a_result_names_the_runtime_of_its_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: object())
    folder = segment_slide(region_slide(tmp_path / "a.svs"), tmp_path / "out", color_predictor(), SMALL).folder
    assert folder is not None
    assert run_of(folder)["identity"]["parameters"]["runtime"] == "torch"


def test_a_runtime_that_is_not_installed_ends_the_run_before_the_first_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)
    with pytest.raises(RuntimeUnavailableError, match="pip install"):
        load_predictor(DEFAULT_BUNDLE, SegmentConfig(device="cpu", runtime="openvino"))
