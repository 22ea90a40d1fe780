"""The command `wsi-evaluate`: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from models.bundle import load_bundle, save_bundle
from models.card import ClassifierCard, SegmenterCard
from models.classifier import Classifier
from models.predictor import Predictor
from models.segmenter import build_segmenter
from pipeline.cli import evaluate as evaluate_cli
from pipeline.cli.evaluate import app
from pipeline.formats.preview import MARGIN
from pipeline.training import pictures
from pipeline.training.dataset import load_dataset
from pipeline.training.evaluate import evaluate
from tests.models.networks import ConstantClassifier, ConstantSegmenter, make_card
from tests.pipeline.training.stripes import (
    COLORS,
    CornerClassifier,
    bright_corner,
    predictor,
    stripes,
    without_masks,
    write_dataset,
)
from tests.repository import REPOSITORY

OPTIONS = "--data --split --output -o --device --batch-size -b --tta --no-tta --worst --json --verbose -v --quiet -q"
OUTPUTS = {"evaluation.json", "confusion.png", "worst.png"}


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of the color model's card; its weights are those of no network."""
    return save_bundle(tmp_path / "bundle", make_card(COLORS), nn.Linear(2, 2), nn.Linear(2, 2)).path


def hold(monkeypatch: pytest.MonkeyPatch, model: Predictor) -> None:
    """Let this predictor be what every bundle's networks make."""
    monkeypatch.setattr(Predictor, "from_bundle", lambda *_, **__: model)


def document_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return found


def test_a_saved_bundle_gives_the_numbers_of_the_library_and_its_digest(tmp_path: Path) -> None:
    torch.manual_seed(5)
    card = make_card(COLORS, thresholds=[0.5, 0.5]).model_copy(
        update={
            "classifier": ClassifierCard(backbone="tf_efficientnet_lite0", head="gap"),
            "segmenter": SegmenterCard(encoder="resnet18", depth=4, rates=(1, 2, 4)),
        }
    )
    networks = Classifier("tf_efficientnet_lite0", "gap", 2), build_segmenter("resnet18", 2)
    saved = save_bundle(tmp_path / "bündel", card, *networks)
    file = write_dataset(tmp_path / "data", {"ä": stripes(70, 100), "b": stripes(64, 64)}, background=True)
    out = tmp_path / "out"
    result = invoke(saved.path, file, "-o", out, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    document = document_of(out)
    assert json.loads(result.stdout) == document
    expected = evaluate(Predictor.from_bundle(load_bundle(saved.path), device="cpu"), load_dataset(file))
    for protocol in ("exclude", "include"):
        for name, gate in (("gate_on", True), ("gate_off", False)):
            matrix = expected.matrices[protocol, gate]
            assert document["confusion"][protocol][name] == matrix.tolist()
    assert document["scores"]["exclude"]["gate_off"]["accuracy"] == expected.scores(gate=False).accuracy
    assert document["image_miou"] == pytest.approx(expected.image_miou, nan_ok=True)
    assert document["image_case"] == {"ä": "ä", "b": "b"}
    counted = np.sum(list(document["image_confusion"].values()), axis=0)
    assert counted.tolist() == document["confusion"]["exclude"]["gate_on"]
    assert document["model"] == {"name": "test", "digest": saved.digest, "mpp": 1.0}
    assert {"python", "wsi-segment", "torch"} <= set(document["versions"])


def test_scores_of_a_perfect_model_are_one_and_the_table_says_a_hundred(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, predictor())
    masks = {"a": stripes(64, 96), "b": np.full((64, 64), 255, np.uint8)}
    file = write_dataset(tmp_path / "data", masks, background=True)
    result = invoke(bundle, file, "-o", tmp_path / "out" / "deep")
    assert result.exit_code == 0, result.output
    document = document_of(tmp_path / "out" / "deep")
    perfect = {"iou": {"class-0": 1.0, "class-1": 1.0}, "miou": 1.0, "fwiou": 1.0, "accuracy": 1.0}
    assert document["scores"]["exclude"] == {"gate_on": perfect, "gate_off": perfect}
    assert document["pixels"] == {"counted": 64 * 96, "white": 64 * 64}
    assert document["image_miou"] == {"a": 1.0, "b": None}
    assert (document["images"], document["classes"]) == (2, ["class-0", "class-1"])
    assert document["dataset"] == {"name": "tiny", "mpp": 1.0, "split": "test"}
    assert document["options"] == {"tta": False, "device": "cpu"}
    rows = {
        line.split("│")[1].strip(): re.findall(r"[\d.]+|–", line.split("│", 2)[2])
        for line in result.stdout.splitlines()
        if line.count("│") > 4
    }
    assert rows["IoU class-1"][:2] == rows["mIoU"][:2] == rows["ACC"][:2] == ["100.00", "100.00"]
    assert rows["IoU white"][:2] == ["–", "–"]
    assert rows["IoU white"][2:] == rows["ACC"][2:] == ["100.00", "100.00"]


def test_without_masks_patches_are_scored_and_a_matrix_of_an_earlier_run_is_removed(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, predictor())
    file = write_dataset(tmp_path / "data", {"a[10]": np.zeros((64, 64), np.uint8), "b[10]": stripes(64, 96)})
    assert invoke(bundle, file, "-o", tmp_path / "out").exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS
    result = invoke(bundle, without_masks(file), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS - {"confusion.png"}
    text = " ".join(result.stdout.split())
    assert text.startswith("test on tiny, test 2 labeled patches, gate on, % ")
    assert re.search(r"class-0 │ 2 │ 100.00 │ – │ 100.00", text)
    assert re.search(r"class-1 │ 0 │ – │ 50.00 │ 0.00", text)
    assert "balanced accuracy: –, gate off –" in text
    assert "patches with every class right: 50.00 ± " in text
    assert text.endswith(
        "no scores of pixels, because they require a mask of every image "
        "±: standard deviation over test sets of as many cases"
    )
    document = document_of(tmp_path / "out")
    assert {key for key, value in document.items() if value is None} == {
        "pixels",
        "scores",
        "miou_spread",
        "confusion",
        "image_confusion",
        "image_miou",
    }
    assert (document["images"], document["image_case"]) == (2, {"a[10]": "a[10]", "b[10]": "b[10]"})
    patches = document["patches"]
    assert patches["counted"] == 2
    assert patches["minimum_share"] == 0.05
    assert patches["with_class"] == {"class-0": 2, "class-1": 0}
    assert patches["image_wrong"] == {"a[10]": 0, "b[10]": 1}
    assert patches["scores"]["gate_on"] == {
        "recall": {"class-0": 1.0, "class-1": None},
        "specificity": {"class-0": None, "class-1": 0.5},
        "precision": {"class-0": 1.0, "class-1": 0.0},
        "balanced": None,
        "exact": 0.5,
    }
    assert patches["scores"]["gate_off"] == patches["scores"]["gate_on"]
    # Right in none, one or both of two drawn images.
    assert patches["spread"]["balanced"] is None
    assert patches["spread"]["exact"] == pytest.approx(np.sqrt(1 / 8), rel=0.1)
    with Image.open(tmp_path / "out" / "worst.png") as picture:
        rgb_HWC = np.asarray(picture)
    # Only the image with a wrong class, and its prediction beside it.
    top = MARGIN + pictures.ROW + pictures.GAP + 2 * pictures.ROW
    height = round(64 * pictures.PANEL_PX / 96)
    assert rgb_HWC.shape[0] == top + height + MARGIN
    step = pictures.PANEL_PX + pictures.GAP
    corner = [rgb_HWC[top + 20, MARGIN + x + 20].tolist() for x in (0, step, 2 * step)]
    assert corner == [list(COLORS[1]), list(COLORS[1]), [255] * 3]


def test_a_spread_is_printed_only_if_there_are_two_cases(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, predictor())
    file = write_dataset(tmp_path / "data", {"P1-a": stripes(64, 96), "P1-b": stripes(64, 64)})
    result = invoke(bundle, file, "-o", tmp_path / "out")
    assert "mIoU (exclude, gate on): 100.00 ± 0.00 %" in result.stdout
    assert "100.00 ± 0.00 %, gate off 100.00 %\n" in result.stdout
    assert result.stdout.endswith("\n±: standard deviation over test sets of as many cases\n")
    assert document_of(tmp_path / "out")["miou_spread"] == 0
    file.write_text(file.read_text() + "[group]\npattern = '^(P[0-9])-'\n")
    result = invoke(bundle, file, "-o", tmp_path / "out")
    assert "mIoU (exclude, gate on): 100.00 %\n" in result.stdout
    assert "right: 100.00 %, gate off 100.00 %\n" in result.stdout
    assert result.stdout.endswith("\nno ±, because all images belong to one case\n")
    assert document_of(tmp_path / "out")["miou_spread"] is None


def test_the_table_has_no_column_include_if_nothing_predicts_white(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, predictor())
    file = write_dataset(tmp_path / "data", {"a": stripes(64, 96)})
    result = invoke(bundle, file, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "include" not in result.stdout
    document = document_of(tmp_path / "out")
    assert set(document["scores"]) == set(document["confusion"]) == {"exclude"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not UTF-8")
def test_an_image_whose_name_is_not_utf8_is_evaluated(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, predictor())
    name = os.fsdecode(b"caf\xe9")
    file = write_dataset(tmp_path / "data", {name: stripes(64, 96)})
    result = invoke(bundle, file, "-o", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert list(document_of(tmp_path / "out")["image_miou"]) == [name]


def test_control_characters_of_file_names_are_not_printed(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, predictor())
    file = write_dataset(tmp_path / "data", {"ä\x9b\x7f\u202e": stripes(64, 96)})
    result = invoke(bundle, file, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert r'"ä\u009b\u007f\u202e": 1.0' in result.stdout
    assert json.loads(result.stdout) == document_of(tmp_path / "out")


def test_pictures_show_the_matrix_and_the_worst_images_first(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, predictor(ConstantClassifier([0.9, 0.1]), ConstantSegmenter([0.0, 1.0])))
    quarter_HW = np.zeros((64, 64), np.uint8)
    quarter_HW[32:, 32:] = 1
    masks = {"a": np.zeros((64, 64), np.uint8), "b": quarter_HW, "c": np.ones((64, 64), np.uint8)}
    file = write_dataset(tmp_path / "data", masks)
    assert invoke(bundle, file, "-o", tmp_path / "out", "--worst", "2", "--quiet").stdout == ""
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        rgb_HWC = np.asarray(picture)
    x, y = pictures.matrix_corner(["class-0 (58.3 %)", "class-1 (41.7 %)"])
    cells = [
        [rgb_HWC[y + 4 + row * pictures.CELL_HEIGHT, x + 4 + column * 120].tolist() for column in range(3)]
        for row in range(2)
    ]
    assert cells == [[list(pictures.FULL), [255] * 3, [255] * 3]] * 2
    with Image.open(tmp_path / "out" / "worst.png") as picture:
        rgb_HWC = np.asarray(picture)
    # Two rows, and the image whose truth is all class 1 above the one that is so in a quarter.
    top = MARGIN + pictures.ROW + pictures.GAP + 2 * pictures.ROW
    below = top + pictures.PANEL_PX + MARGIN + 2 * pictures.ROW
    assert rgb_HWC.shape[0] == below + pictures.PANEL_PX + MARGIN
    step = pictures.PANEL_PX + pictures.GAP
    corner = [rgb_HWC[y + 80, MARGIN + step + 80].tolist() for y in (top, below)]
    assert corner == [list(COLORS[1]), list(COLORS[0])]
    prediction = [rgb_HWC[y + 240, MARGIN + 2 * step + 240].tolist() for y in (top, below)]
    mixed = [round(0.55 * g + 0.45 * o) for g, o in zip(COLORS[1], COLORS[0], strict=True)]
    assert prediction == [mixed, mixed]


def test_results_replace_those_of_an_earlier_run_and_leave_nothing_else(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, predictor(CornerClassifier(), ConstantSegmenter([0.0, 2.0])))
    file = write_dataset(tmp_path / "data", {"a": bright_corner()})
    # Class 1 is all but one pixel. Without flips it passes in one window; with flips the gate rejects it everywhere.
    of_axis = np.sin(np.pi * (4 * np.arange(16) + 2) / 64) ** 2 / 2
    odds_hw = torch.from_numpy(np.exp(2.0) * np.outer(of_axis, of_axis))
    probs_HW = F.interpolate((odds_hw / (1 + odds_hw))[None, None], (64, 64), mode="bilinear")[0, 0]
    found = int((probs_HW > 0.5).sum())
    assert 400 < found < 1200
    for tta, right in ((False, (found + 1) / 4096), (True, 1 / 4096)):
        assert invoke(bundle, file, "-o", tmp_path / "out", "--tta" if tta else "--no-tta").exit_code == 0
        assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS
        document = document_of(tmp_path / "out")
        assert document["options"]["tta"] == tta
        assert document["scores"]["exclude"]["gate_on"]["accuracy"] == right
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_cli, "_draw", stop)
    result = invoke(bundle, file, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (130, "wsi-evaluate: interrupted; nothing was written\n")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_folder_of_the_data_can_be_named(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, predictor())
    file = write_dataset(tmp_path / "data", {"a": stripes(64, 96)})
    moved = file.rename(tmp_path / "other.toml")
    assert invoke(bundle, moved, "--data", tmp_path / "data", "-o", tmp_path / "out").exit_code == 0
    assert document_of(tmp_path / "out")["images"] == 1


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ('"class-1"', [], "has the classes class-0, class-1; data set tiny has class-0, stroma"),
        ("", ["--split", "val"], "does not describe split val"),
        ("", ["--data", "nowhere"], "the folder nowhere does not exist"),
        (
            "",
            ["-o", "file/below"],
            "file/below: the folder cannot be created (Not a directory); choose another with -o",
        ),
    ],
)
def test_invalid_inputs_are_one_line_before_networks_are_loaded(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, change: str, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    file = write_dataset(tmp_path / "data", {"a": stripes(64, 64)})
    if change:
        file.write_text(file.read_text().replace(change, '"stroma"'))
    result = invoke(bundle, file, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("wsi-evaluate: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line_before_networks_are_loaded(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)  # root may write into any folder
    file = write_dataset(tmp_path / "data", {"a": stripes(64, 64)})
    result = invoke(bundle, file, "-o", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    message = f"{tmp_path}: cannot be written (Permission denied); choose another folder with -o"
    assert result.stderr == f"wsi-evaluate: {message}\n"


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    result = invoke(tmp_path / "no-bundle", "glas")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no-bundle: neither a shipped model" in result.stderr


def test_wrong_usage_is_exit_status_2(tmp_path: Path) -> None:
    assert invoke(tmp_path, "glas", "--split", "all").exit_code == 2
    assert invoke(tmp_path).exit_code == 2


def test_help_answers_at_once_without_heavy_libraries_and_names_every_option() -> None:
    program = (
        "import sys\nfrom pipeline.cli.evaluate import main\n"
        "try: main()\nfinally: print('modules', *{name.partition('.')[0] for name in sys.modules})"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, "--help"],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    text, _, modules = process.stdout.partition("modules ")
    assert process.stderr == ""
    assert "typer" in modules.split()
    assert not {"torch", "zarr", "numpy", "PIL", "pydantic", "scipy"} & set(modules.split())
    for option in OPTIONS.split():
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), option
    assert "0 done, 1 failed, 2 usage error, 130 interrupted" in " ".join(text.split())
