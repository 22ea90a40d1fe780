from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from models import runtimes
from models.bundle import DEFAULT_BUNDLE
from models.errors import RuntimeUnavailableError
from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError
from pipeline.slide.recipe import segment_slide
from pipeline.workers.in_process import load_predictor
from tests.pipeline.fakes import SMALL, colour_predictor, region_slide, run_of


@pytest.mark.parametrize(
    ("settings", "installed", "chosen"),
    [
        ({"device": "cpu"}, True, "openvino"),
        ({"device": "cpu"}, False, "torch"),
        ({"device": "cpu", "precision": "bf16"}, True, "openvino"),
        ({"device": "cpu", "precision": "fp16"}, True, "torch"),
        ({"device": "cpu", "precision": "bf16"}, False, "torch"),
        ({"device": "cuda"}, True, "torch"),
        ({"device": "cpu", "runtime": "torch"}, True, "torch"),
        ({"device": "cpu", "runtime": "openvino"}, False, "openvino"),
    ],
)
def test_the_identity_names_the_runtime_and_never_auto(
    settings: dict[str, str], installed: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: object() if installed else None)
    # A processor that computes in bfloat16 and not in float16.
    core = SimpleNamespace(get_property=lambda *_: ["FP32", "BF16"])
    monkeypatch.setattr(runtimes, "load_openvino", lambda: SimpleNamespace(Core=lambda: core))
    assert SegmentConfig(**settings).parameters()["runtime"] == chosen  # type: ignore[arg-type]


def test_a_result_names_the_runtime_of_its_predictor_whatever_auto_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: object())
    folder = segment_slide(region_slide(tmp_path / "a.svs"), tmp_path / "out", colour_predictor(), SMALL).folder
    assert folder is not None
    assert run_of(folder)["identity"]["parameters"]["runtime"] == "torch"


def test_a_predictor_of_another_runtime_than_the_settings_name_is_refused(tmp_path: Path) -> None:
    config = SegmentConfig(device="cpu", runtime="openvino")
    said = re.escape("the predictor was made with runtime torch, the settings say openvino")
    with pytest.raises(ConfigError, match=said):
        segment_slide(region_slide(tmp_path / "a.svs"), tmp_path / "out", colour_predictor(), config)


def test_a_runtime_that_is_not_installed_ends_the_run_before_the_first_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)
    with pytest.raises(RuntimeUnavailableError, match="pip install"):
        load_predictor(DEFAULT_BUNDLE, SegmentConfig(device="cpu", runtime="openvino"))
