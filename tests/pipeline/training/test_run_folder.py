from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.errors import LockedError, OutputError, TrainError
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, load_dataset
from pipeline.training.run_folder import claim, recorded_provenance
from tests.textures import write_textures

CONFIG = TrainConfig(region=64)


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_textures(tmp_path_factory.mktemp("textures"), train=1, val=1, test=0, size=16))


def test_a_run_folder_belongs_to_one_configuration_and_data_set(textures: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claim(run, textures, CONFIG, {}):
        written = (run / "run.json").read_bytes()
    with claim(run, textures, CONFIG, {}):
        pass
    changed = dataclasses.replace(CONFIG, seed=3, region=96)
    with (
        pytest.raises(TrainError, match=r"started with other settings \(different: region, seed\).*run\.json"),
        claim(run, textures, changed, {}),
    ):
        pass
    other = Dataset(textures.card.model_copy(update={"mpp": 0.5}), textures.root)
    with pytest.raises(TrainError, match=r"\(different: the data set\)"), claim(run, other, CONFIG, {}):
        pass
    assert (run / "run.json").read_bytes() == written
    assert json.loads(written)["config"] == json.loads(json.dumps(dataclasses.asdict(CONFIG)))


def test_a_run_that_started_before_a_setting_existed_has_its_default(textures: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claim(run, textures, CONFIG, {}):
        pass
    recorded = json.loads((run / "run.json").read_text())
    del recorded["config"]["classifier_mpp"]
    (run / "run.json").write_text(json.dumps(recorded))
    with claim(run, textures, CONFIG, {}):
        pass
    changed = dataclasses.replace(CONFIG, classifier_mpp=(1.0, 2.0))
    with pytest.raises(TrainError, match=r"\(different: classifier_mpp\)"), claim(run, textures, changed, {}):
        pass


def test_a_run_is_not_resumed_with_other_images(textures: Dataset, tmp_path: Path) -> None:
    with claim(tmp_path / "run", textures, CONFIG, {"data": "1", "torch": "2.0"}):
        pass
    with (
        pytest.raises(TrainError, match="the images, masks or labels have changed since the run was started"),
        claim(tmp_path / "run", textures, CONFIG, {"data": "2", "torch": "2.0"}),
    ):
        pass


def test_a_run_is_not_resumed_with_other_initial_weights(textures: Dataset, tmp_path: Path) -> None:
    with claim(tmp_path / "run", textures, CONFIG, {"data": "1", "encoder_weights": "2"}):
        pass
    with (
        pytest.raises(TrainError, match=r"initial weights \(setting encoder_weights\) has changed since the run was"),
        claim(tmp_path / "run", textures, CONFIG, {"data": "1", "encoder_weights": "3"}),
    ):
        pass
    # Runs of older versions recorded no digest.
    with claim(tmp_path / "run", textures, CONFIG, {"data": "1"}):
        pass


def test_a_run_resumed_with_another_version_warns(
    textures: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with claim(tmp_path / "run", textures, CONFIG, {"data": "1", "torch": "2.0", "commit": "a"}):
        pass
    with claim(tmp_path / "run", textures, CONFIG, {"data": "1", "torch": "2.1", "commit": "a"}):
        pass
    assert "the run was started with another torch, see" in caplog.text
    assert recorded_provenance(tmp_path / "run") == {"data": "1", "torch": "2.0", "commit": "a"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"config": {"seed": 0',
        "[]",
        "null",
        '{"slide": "a.svs"}',
        '{"config": []}',
        '{"config": {}, "made_with": 1}',
    ],
)
def test_a_run_file_of_another_command_or_a_damaged_one_is_refused(
    textures: Dataset, tmp_path: Path, text: str
) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with (
        pytest.raises(TrainError, match=r"run\.json: was not written by wsi-train, or is damaged; pass a new folder"),
        claim(tmp_path, textures, CONFIG, {}),
    ):
        pass
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == text


def test_two_runs_cannot_share_a_folder(textures: Dataset, tmp_path: Path) -> None:
    with (
        claim(tmp_path / "run", textures, CONFIG, {}),
        pytest.raises(LockedError, match="another wsi-train is using this folder"),
        claim(tmp_path / "run", textures, CONFIG, {}),
    ):
        pass


def test_the_error_names_a_run_folder_that_cannot_be_created(textures: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OutputError, match="cannot be created"),
        claim(tmp_path / "file", textures, CONFIG, {}),
    ):
        pass


@pytest.mark.usefixtures("without_locks")
def test_a_run_folder_on_a_file_system_without_locks_is_refused_and_not_made(textures: Dataset, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=f"^{tmp_path}: file locks fail on this file system"),
        claim(tmp_path / "run", textures, CONFIG, {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_folder_does_not_stay(textures: Dataset, tmp_path: Path) -> None:
    with claim(tmp_path / "run", textures, CONFIG, {}):
        assert (tmp_path / ".run.lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
