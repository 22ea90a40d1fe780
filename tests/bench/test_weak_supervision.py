from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.training.dataset import Dataset, load_dataset
from pipeline.training.presets import train_config
from tests.bench.weak_supervision import ROWS, comparisons, counts_of, results_of, rows_for, steps_of, table
from tests.textures import write_textures


def write_result(folder: Path, row: str, seed: int, hits: int) -> None:
    """Write the result of a run on two patients, one with two images."""
    images = {
        name: {"case": case, "counts": [[hits, 100 - hits, 0], [20, 80, 0], [0, 0, 5]]}
        for name, case in (("a", "1"), ("b", "2"), ("c", "2"))
    }
    gate = {"miou": 0.6 + hits / 1000, "fwiou": 0.5, "accuracy": 0.7, "gland": 0.6, "other": 0.5}
    (folder / f"{row}-{seed}").mkdir(parents=True)
    result = {"row": row, "seed": seed, "seconds": 60, "gate": gate, "no gate": gate, "images": images}
    result["pseudo"] = {"deep": {"miou": 0.5, "fwiou": 0.6, "accuracy": 0.7}}
    result["steps"] = {"classifier": 496, "segmenter": 540}
    (folder / f"{row}-{seed}" / "result.json").write_text(json.dumps(result))


def test_every_row_has_valid_settings_and_starts_from_a_row_with_the_same_classifier() -> None:
    stages = ("backbone", "depth", "head", "attention", "classifier_epochs", "region")
    for row in ROWS.values():
        config = train_config(row.preset, None, row.settings)
        if row.classifier_of is not None:
            source = ROWS[row.classifier_of]
            of_source = train_config(source.preset, None, source.settings)
            assert [getattr(config, name) for name in stages] == [getattr(of_source, name) for name in stages]


def test_the_table_has_the_spread_over_seeds_and_the_interval_over_patients(tmp_path: Path) -> None:
    for seed, hits in enumerate((70, 80)):
        write_result(tmp_path, "ours", seed, hits)
    head, _, line = table(tmp_path).splitlines()
    assert "95 % over patients" in head
    # All patients have the same shares, so the interval has no width.
    iou = [((h / (100 + 20)) + (80 / (100 + 100 - h))) / 2 for h in (70, 80)]
    assert f"| {100 * np.mean(iou):.1f}–{100 * np.mean(iou):.1f} |" in line
    assert "| 50.0 ± 0.0, 60.0 ± 0.0, 70.0 ± 0.0 |" in line
    assert "| our recipe | 2 | 67.5 ± 0.7 | 67.5 ± 0.7 |" in line
    assert line.endswith("| 496 classifier, 540 segmenter | 1.0 |")


def test_rows_are_compared_on_common_seeds_by_patient(tmp_path: Path) -> None:
    for row, seeds, hits in (("ours", (0, 1, 2), 70), ("ours-ema", (1, 2), 90)):
        for seed in seeds:
            write_result(tmp_path, row, seed, hits)
    lines = comparisons(tmp_path, "ours").splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| … without averaged weights | 2 | +")
    # Two patients allow four exchanges; the observed one and its mirror image are the most extreme.
    assert lines[2].endswith("| 0.500 |")


def test_seeds_and_patients_have_a_fixed_order(tmp_path: Path) -> None:
    for seed, hits in ((1, 60), (0, 50)):
        write_result(tmp_path, "ours", seed, hits)
    counts_SPXX = counts_of(results_of(tmp_path)[::-1])
    assert counts_SPXX.shape == (2, 2, 3, 3)
    assert counts_SPXX[:, 0, 0, 0].tolist() == [50, 60]
    assert counts_SPXX[:, 1, 0, 0].tolist() == [100, 120]


def test_a_folder_without_results_gives_an_empty_table(tmp_path: Path) -> None:
    assert len(table(tmp_path).splitlines()) == 2


@pytest.mark.parametrize("row", ["paper", "paper-raw", "paper-pda"])
def test_the_rows_of_pda_differ_in_nothing_else(row: str) -> None:
    wanted = {"paper": ("pda", True), "paper-raw": ("pda", False), "paper-pda": ("none", True)}
    config = train_config(ROWS[row].preset, None, ROWS[row].settings)
    paper = vars(train_config("paper"))
    assert (config.attention, config.normalize_attention) == wanted[row]
    changed = {name for name, value in vars(config).items() if value != paper[name]}
    assert changed <= {"attention", "normalize_attention"}


def test_steps_are_those_of_the_networks_that_were_trained(tmp_path: Path) -> None:
    (tmp_path / "segmenter.steps.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    assert steps_of(tmp_path) == {"segmenter": 2}
    (tmp_path / "classifier.steps.csv").write_text("step,loss\n1,0.5\n")
    assert steps_of(tmp_path) == {"classifier": 1, "segmenter": 2}


def test_rows_of_a_card_are_for_data_sets_with_settings(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path, train=1, val=1, test=1, size=64))
    with_settings = Dataset(dataset.card.model_copy(update={"settings": {"stain": 0.5}}), dataset.root)
    assert rows_for(with_settings) == ["card", "card-plain", "card-own", "card-deep"]
    assert {"ours", "paper", "full"} <= set(rows_for(dataset))
    assert not set(rows_for(dataset)) & set(rows_for(with_settings))
