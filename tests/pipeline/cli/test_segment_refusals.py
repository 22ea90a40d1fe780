"""What wsi-segment refuses, each in one line: usage errors, models, places for results."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from models.bundle import SHIPPED_FOLDER
from tests.pipeline.cli.segment_command import invoke
from tests.slides import small_slide


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no slides to segment; pass a slide, a folder, a manifest, or --sample"),
        (["."], "no slides in this folder"),
        (["a.svs", "--simplify", "-1"], "0"),
        (["a.svs", "--simplify", "nan"], "--simplify"),
        (["a.svs", "--simplify", "inf"], "--simplify is inf; it must be a number, 0 or more"),
        (["a.svs", "--min-area", "inf"], "--min-area is inf; it must be a number, 0 or more"),
        (["a.svs", "--mpp", "0"], "--mpp is 0.0; it must be a positive number"),
        (["a.svs", "--mpp", "half"], "--mpp"),
        (["a.svs", "--output-stride", "3"], "--output-stride is 3; it must be 1, 2 or 4"),
        (["a.svs", "--precision", "int8"], "int8"),
        (["a.svs", "--batch-size", "0"], "--batch-size"),
        (["a.svs", "-j", "0"], "--num-workers"),
        (["a.svs", "--simplifyy", "0.5"], "--simplifyy"),
        (
            ["a.svs", "--scheduler", "nowhere"],
            "--scheduler is 'nowhere'; it must be process, local, local:N, the address of a",
        ),
        (["a.svs", "--scheduler", "n" * 300], "n'; it must be process, local, local:N, the address of a"),
        (["a.svs", "--spread", "blocks"], "--spread blocks needs several processes; add --scheduler"),
        (["a.svs", "--slide-timeout", "60"], "--slide-timeout needs processes that can be killed; add --scheduler"),
        (["bad.csv"], "bad.csv, line 3: mpp is 'x'"),
    ],
)
def test_a_usage_error_exits_2_and_names_the_reason(fake: Path, arguments: list[str], message: str) -> None:
    (fake / "bad.csv").write_text("slide,mpp\na.svs,1\nb.svs,x\n", encoding="utf-8")
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert [p.name for p in fake.iterdir()] == ["bad.csv"]


def test_a_model_that_cannot_be_used_is_one_line_and_exit_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_slide(tmp_path / "a.svs")
    shutil.copytree(SHIPPED_FOLDER / "colon-gland", tmp_path / "flipped")
    weights = tmp_path / "flipped" / "segmenter.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "empty").mkdir()
    shutil.copytree(SHIPPED_FOLDER / "colon-gland", tmp_path / "newer")
    card = json.loads((tmp_path / "newer" / "model.json").read_text(encoding="utf-8"))
    (tmp_path / "newer" / "model.json").write_text(json.dumps(card | {"schema_version": 9}), encoding="utf-8")
    for model, message in {
        "colon-glans": "colon-glans: neither a shipped model (colon-gland",
        "no/such/bundle": "no/such/bundle: neither a shipped model",
        "empty": "empty: model.json is missing",
        "newer": "model.json: schema_version is 9, but this version reads 3",
        "flipped": "segmenter.safetensors: the SHA-256 is ",
    }.items():
        result = invoke("a.svs", "-m", model, "--device", "cpu")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("wsi-segment: ")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("output", ["file", "file/out"])
def test_an_output_that_is_a_file_or_below_one_is_refused_in_one_line(fake: Path, output: str) -> None:
    small_slide(fake / "a.svs")
    (fake / "file").write_text("in the way")
    result = invoke("a.svs", "-o", output)
    assert (result.exit_code, result.output) == (
        2,
        f"wsi-segment: --output: {output} cannot be a folder, because file is a file; choose another folder\n",
    )
    assert (fake / "file").read_text() == "in the way"


def test_an_output_that_is_a_link_to_nothing_is_refused_in_one_line(fake: Path) -> None:
    small_slide(fake / "a.svs")
    (fake / "link").symlink_to("gone")
    result = invoke("a.svs", "-o", "link")
    assert (result.exit_code, result.output) == (
        2,
        "wsi-segment: --output: link is a link to a folder that does not exist; choose another folder\n",
    )


def test_an_output_inside_a_result_is_refused_before_anything_is_written(fake: Path) -> None:
    small_slide(fake / "a.svs")
    small_slide(fake / "b.svs")
    assert invoke("a.svs", "-o", "out").exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in fake.rglob("*")}
    for output in ("out/a", "out/a/deep"):
        for options in ([], ["--dry-run"]):
            result = invoke("b.svs", "-o", output, *options)
            assert (result.exit_code, result.output) == (
                2,
                f"wsi-segment: --output: {output} is part of the result a; choose another folder\n",
            )
    assert {path: path.stat().st_mtime_ns for path in fake.rglob("*")} == before
    assert invoke("b.svs", "-o", "out/a/..").exit_code == 0


@pytest.mark.parametrize("extra", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.svs b.svs --slide-timeout nan", "--slide-timeout is nan; it must be a positive number of seconds"),
        ("a.svs b.svs --slide-timeout 0", "--slide-timeout is 0.0; it must be a positive number of seconds"),
        ("a.svs --slide-timeout 9", "--slide-timeout needs processes that can be killed; add --scheduler local"),
        ("a.svs --scheduler=", "--scheduler is ''; it must be process, local, local:N"),
        ("a.svs --scheduler local:0", "--scheduler is 'local:0'; N of local:N must be from 1 to"),
        ("a.svs --scheduler local:99999", "--scheduler is 'local:99999'; N of local:N must be from 1 to"),
        ("a.svs --spread blocks", "--spread blocks needs several processes; add --scheduler local:N"),
        ("a.svs b.svs --spread blocks", "--spread blocks needs several processes; add --scheduler local:N"),
    ],
)
def test_a_run_and_its_dry_run_refuse_the_same_workers(
    fake: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str, extra: list[str]
) -> None:
    monkeypatch.setattr("pipeline.cli.segment.SCHEDULER_OF_SEVERAL", "process")
    (fake / "a.svs").write_bytes(b"never read")
    (fake / "b.svs").write_bytes(b"never read")
    result = invoke(*arguments.split(), *extra)
    assert result.exit_code == 2
    assert result.output.startswith(f"wsi-segment: {message}")
    assert not (fake / "results").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_read_only_output_is_a_clear_line(fake: Path) -> None:
    small_slide(fake / "a.svs")
    (fake / "out").mkdir(mode=0o500)
    result = invoke("a.svs", "-o", "out")
    assert result.exit_code == 1
    assert "failed     a.svs: cannot write out" in result.stderr
    assert "Permission denied" in result.stderr
