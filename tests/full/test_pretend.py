"""`wsi-segment` on a pretend accelerator (`tests.pretend`), in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.bundle import load_networks
from models.shared_stages import split_networks
from tests.pipeline.fakes import REGIONS, data_of
from tests.pipeline.small_bundle import familiar_bundle, speckled_slide, stages_bundle
from tests.pretend_runs import in_own_process
from tests.slides import painted


@pytest.mark.parametrize("shared", ["nothing", "stages", "backbone"])
def test_the_command_writes_the_bytes_of_the_cpu_with_one_upload_and_no_wait_within_a_network(
    tmp_path: Path, shared: str
) -> None:
    model: str | Path = "colorectal-tissue"
    if shared == "nothing":
        model = familiar_bundle(tmp_path / "bundle", painted((1280, 832), *REGIONS)).path
    elif shared == "stages":
        bundle = stages_bundle(tmp_path / "bundle")
        parts = split_networks(*load_networks(bundle), bundle.card.margin)
        assert parts.first is not None
        assert parts.shared_deep is None
        model = bundle.path
    slide = speckled_slide(tmp_path / "slide.svs")
    found = in_own_process("command", model, slide, tmp_path)
    assert [found["status"][device][0] for device in ("cpu", "auto")] == [0, 0], found["status"]
    ours, cpus = (tmp_path / device / "slide" for device in ("auto", "cpu"))
    assert data_of(ours) == data_of(cpus)
    record = json.loads((ours / "run.json").read_text(encoding="utf-8"))
    assert record["identity"]["parameters"]["runtime"] == "torch"
    assert "pretend" in (ours / "run.json").read_text(encoding="utf-8")
    # In: the pixels, and the windows of all canvases. Out: what the gate decides, whether the segmenter's output is
    # finite, and the map. The number of canvases does not matter.
    assert len(found["blocks"]["auto"]) == record["plan"]["blocks"] == 2
    assert record["plan"]["canvases"] > 2
    assert found["blocks"]["auto"] == 2 * [["in", "in", "out", "out", "out"]]
    assert found["blocks"]["cpu"] == [[], []]


@pytest.mark.parametrize("model", ["colon-gland", "colorectal-tissue"])
def test_few_operations_of_a_batch_are_outside_of_the_networks(sample_slide: Path, model: str) -> None:
    """Each operation is a launch on a GPU."""
    found = in_own_process("operations", model, sample_slide)
    assert found["segmented canvases"] == 4
    assert found["in the networks"] > 150
    assert 60 < found["outside"] <= 106
