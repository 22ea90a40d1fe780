from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from pipeline.errors import OutputError, TrainError
from pipeline.training import train as recipe
from pipeline.training.fit import Processes
from tests.pipeline.training.line import CONFIG, CPU, line_task, weights

ALONE = Processes(0, 1)


def run_stage(folder: Path) -> torch.Tensor:
    """Run the stage "line", or load its product, and return its weights."""
    task = line_task()
    recipe._stage(folder, task, CONFIG, CPU, ALONE, None, None)
    return weights(task)


def test_the_product_is_on_the_disk_before_the_checkpoint_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr("pipeline.files.sync", lambda path: events.append(path.name))
    monkeypatch.setattr("pipeline.training.train.remove_checkpoint", lambda *_: events.append("removed"))
    trained = run_stage(tmp_path)
    assert [name.split(".")[1] for name in events[-3:-2]] == ["line"]
    assert events[-2:] == [tmp_path.name, "removed"]
    assert torch.equal(run_stage(tmp_path), trained)


@pytest.mark.parametrize("damage", ["empty", "cut", "other tensors"])
def test_the_error_names_a_damaged_product_and_without_it_the_stage_is_repeated(tmp_path: Path, damage: str) -> None:
    trained = run_stage(tmp_path)
    file = tmp_path / "line.safetensors"
    if damage == "other tensors":
        safetensors.torch.save_file({"other": torch.zeros(1)}, file)
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-7])
    with pytest.raises(TrainError, match=r"line\.safetensors: cannot be read \(.*\); delete it to repeat the stage$"):
        run_stage(tmp_path)
    file.unlink()
    assert torch.equal(run_stage(tmp_path), trained)


def test_the_error_names_a_product_that_a_full_disk_cuts_and_the_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = safetensors.torch.save_file

    def full(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None) -> None:
        if file.name.startswith(".line.safetensors."):
            file.write_bytes(b"the first bytes")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(
            OutputError, match=r"line\.safetensors: cannot be written \(I/O error: No space .*run the same command"
        ):
            run_stage(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"line.checkpoint.safetensors", "line.csv", "line.png"}
    resumed = run_stage(tmp_path)
    (tmp_path / "whole").mkdir()
    assert torch.equal(resumed, run_stage(tmp_path / "whole"))
