"""A result with missing or changed files is not kept, and a repair computes the damaged blocks alone again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.checks.result import broken_rules
from pipeline.errors import ConfigError, OutputError
from pipeline.formats.familiarity import FamiliarityMap, read_familiarity, write_familiarity
from pipeline.results.digests import changed_files
from pipeline.slide.recipe import segment_slide
from tests.cases import full
from tests.pipeline.fakes import SMALL, color_predictor, published, region_slide, run_of

COARSE = replace(SMALL, block_out=160)
"""Four blocks, each with one chunk per class."""

REPAIR = replace(COARSE, repair=True)

MAP = "slide.ome.zarr"


@dataclass(frozen=True)
class Made:
    """A slide and its result."""

    slide: Path
    out: Path

    @property
    def folder(self) -> Path:
        """Return the folder of the result."""
        return self.out / "slide"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("repair")
    made = Made(region_slide(root / "slide.svs"), root / "out")
    segment_slide(made.slide, made.out, color_predictor(), COARSE)
    return made


@pytest.fixture
def made(undisturbed: Made, tmp_path: Path) -> Made:
    return Made(undisturbed.slide, shutil.copytree(undisturbed.out, tmp_path / "out"))


def flip(*paths: Path) -> None:
    for path in paths:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 8
        path.write_bytes(content)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def edit_record(folder: Path) -> None:
    run = run_of(folder)
    run["class_areas_mm2"]["class-0"] += 1
    (folder / "run.json").write_text(json.dumps(run))


DAMAGES: dict[str, tuple[Callable[[Path], object], int, bool]] = {
    # the damage, the blocks that need not be computed again, and whether a comparison of sizes finds it
    "no chunk of labels": (lambda r: (r / MAP / "labels/classes/0/0/1").unlink(), 3, True),
    "a flipped chunk": (lambda r: flip(r / MAP / "0/0/1/1"), 3, False),
    "two chunks of two blocks": (lambda r: flip(r / MAP / "0/0/0/0", r / MAP / "0/0/1/0"), 2, False),
    "no chunk of a coarse level": (lambda r: (r / MAP / "1/0/0/0").unlink(), 4, True),
    "a stray chunk": (lambda r: shutil.copytree(r / MAP / "0/0/1", r / MAP / "0/1/1"), 4, True),
    "no map": (lambda r: shutil.rmtree(r / MAP), 0, True),
    "changed polygons": (lambda r: flip(r / "slide.geojson"), 4, False),
    "no listing": (lambda r: (r / "chunks.tsv").unlink(), 4, True),
    "a changed line of a block": (lambda r: flip(r / "blocks.jsonl"), 3, False),
    "a folder in place of the lines of blocks": (lambda r: to_folder(r / "blocks.jsonl"), 0, True),
    "no lines of blocks": (lambda r: (r / "blocks.jsonl").unlink(), 0, True),
    "changed areas": (edit_record, 4, True),
}


@pytest.mark.parametrize("damage", [full(name) if k % 2 else name for k, name in enumerate(DAMAGES)])
def test_a_repair_computes_the_damaged_blocks_alone_and_restores_every_byte(
    undisturbed: Made, made: Made, damage: str
) -> None:
    act, kept, seen_by_size = DAMAGES[damage]
    act(made.folder)
    (made.folder / "notes.txt").write_text("mine")
    changed = changed_files(made.folder)
    assert bool(changed) == seen_by_size
    assert changed_files(made.folder, read=True)
    assert any(broken_rules(made.folder).values())
    if changed:
        with pytest.raises(OutputError, match=r"damaged after the run: .*; pass --repair .*, or --force"):
            segment_slide(made.slide, made.out, color_predictor(), COARSE)
    repaired = segment_slide(made.slide, made.out, color_predictor(), REPAIR)
    assert (repaired.status, repaired.resumed_blocks) == ("done", kept)
    assert (made.folder / "notes.txt").read_text() == "mine"
    (made.folder / "notes.txt").unlink()
    assert published(made.folder) == published(undisturbed.folder)
    assert changed_files(made.folder, read=True) == []
    assert [path.name for path in made.out.iterdir()] == ["slide"]


def test_an_intact_result_is_kept_by_a_repair(made: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    assert segment_slide(made.slide, made.out, color_predictor(), REPAIR).status == "skipped"
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before


def test_blocks_that_were_computed_in_another_way_are_not_mixed_with_new_ones(undisturbed: Made, made: Made) -> None:
    (made.folder / MAP / "labels/classes/0/0/1").unlink()
    other = color_predictor()
    other.threads += 1
    repaired = segment_slide(made.slide, made.out, other, REPAIR)
    assert repaired.resumed_blocks == 0
    threads = [run_of(made_folder)["computed_with"]["threads"] for made_folder in (undisturbed.folder, made.folder)]
    assert threads[1] == threads[0] + 1


def test_an_unfinished_run_that_was_computed_in_another_way_starts_from_the_beginning(
    undisturbed: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "joining polygons":
            raise RuntimeError("stop here")

    for threads, resumed in ((1, 4), (3, 0)):
        out = tmp_path / str(threads)
        first, second = color_predictor(), color_predictor()
        first.threads, second.threads = 1, threads
        with pytest.raises(RuntimeError):
            segment_slide(undisturbed.slide, out, first, COARSE, interrupt)
        assert segment_slide(undisturbed.slide, out, second, COARSE).resumed_blocks == resumed
    assert "threads 1 instead of 3); starting from the beginning" in caplog.text


def test_a_repair_with_another_runtime_is_refused(made: Made) -> None:
    run = run_of(made.folder)
    run["identity"]["parameters"]["runtime"] = "openvino"
    (made.folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(OutputError, match=r"computed with openvino, .* pass --runtime openvino"):
        segment_slide(made.slide, made.out, color_predictor(), REPAIR)


def test_a_chunk_that_changes_before_the_result_is_published_ends_the_run(undisturbed: Made, tmp_path: Path) -> None:
    def spoil(stage: str, done: int, total: int) -> None:
        if stage == "drawing the preview":
            flip(tmp_path / ".slide.work" / "result" / MAP / "0/0/0/0")

    with pytest.raises(OutputError, match=r"slide\.svs: .*0/0/0/0 changed after it was written; check the disk"):
        segment_slide(undisturbed.slide, tmp_path, color_predictor(), COARSE, spoil)
    again = segment_slide(undisturbed.slide, tmp_path, color_predictor(), COARSE)
    assert again.resumed_blocks == 3
    assert published(tmp_path / "slide") == published(undisturbed.folder)


def test_repair_and_force_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="pass only one"):
        replace(COARSE, repair=True, force=True)


def test_the_picture_of_the_familiarity_gives_its_values_back_and_a_damaged_one_gives_none(tmp_path: Path) -> None:
    values_hw = np.random.default_rng(2).integers(0, 256, (13, 7), np.uint8)
    path = tmp_path / "familiarity.png"
    write_familiarity(path, FamiliarityMap(values_hw, 0.5))
    assert np.array_equal(read_familiarity(path), values_hw)  # type: ignore[arg-type] # the picture is there
    for damaged in (path.read_bytes()[:40], b"", b"no picture"):
        path.write_bytes(damaged)
        assert read_familiarity(path) is None
    path.unlink()
    assert read_familiarity(path) is None


def test_a_picture_of_the_familiarity_that_an_image_program_saved_in_another_mode_counts_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "familiarity.png"
    for mode in ("RGB", "RGBA", "LA", "1", "I;16"):
        Image.new(mode, (30, 20)).save(path)
        assert read_familiarity(path) is None
    Image.new("L", (30, 20), 200).save(path)
    assert np.array_equal(read_familiarity(path), np.full((20, 30), 200))  # type: ignore[arg-type] # the picture is there
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 30 // 3)  # Pillow raises an error above twice this number
    assert read_familiarity(path) is None
