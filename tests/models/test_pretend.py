"""The code of accelerators runs on a pretend one (`tests.pretend`), in a process of its own."""

from __future__ import annotations

from itertools import product

import pytest

from tests.pretend_runs import in_own_process


@pytest.mark.full
def test_predictions_on_an_accelerator_are_those_of_the_cpu_and_wait_twice_however_many_canvases() -> None:
    found = in_own_process("predictor")
    assert (found["devices"], found["auto"]) == (["cpu", "pretend:0"], "pretend")
    assert [(one["canvases"], one["batch"]) for one in found["predictions"]] == list(product((1, 4, 12), (1, 4)))
    for prediction in found["predictions"]:
        # In: the windows of all canvases. Out: what the gate decides, and whether the segmenter's output is finite.
        assert prediction["moves"] == ["in", "out", "out"]
        assert prediction["equal"]
        assert prediction["segmented"][0] == prediction["segmented"][1]
    assert found["predictions"][-1]["segmented"][0] == 6 * [False] + 6 * [True]
    # Four canvases in one batch need as many operations as one, join the starts of both networks, and write three
    # results more.
    kernels = {(one["canvases"], one["batch"]): one["kernels"] for one in found["predictions"]}
    assert kernels[4, 4] == kernels[1, 4] + 2 + 3 < kernels[4, 1]
    assert found["one network moved"] == "pretend"
    # The device would notice what a GPU refuses or waits for.
    operations = found["operations"]
    assert "expects its tensors on one device, but found pretend and cpu" in operations["sum of two devices"][0]
    assert "expects its tensors on one device, but found pretend and cpu" in operations["index on another device"][0]
    assert (operations["copy to the device"], operations["copy to the host"]) == (["in"], ["out"])
    assert operations["number"] == operations["condition"] == ["item, bool, int or float of a tensor"]
    assert operations["mask"] == ["nonzero, or an index by a mask"]
    assert operations["product"] == []
