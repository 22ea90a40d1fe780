"""Attacks on published results: every change of a byte is noticed, and a repair survives what a run survives."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from models.predictor import Predictor
from pipeline.batch.earlier import EarlierRuns
from pipeline.batch.queue import run_batch
from pipeline.checks.result import broken_rules
from pipeline.config import SegmentConfig
from pipeline.errors import LockedError, OutputError
from pipeline.progress import no_progress
from pipeline.results.digests import changed_files
from pipeline.slide import repair
from pipeline.slide.recipe import segment_slide
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess
from tests.pipeline.fakes import SMALL, color_predictor, published, region_slide
from tests.pipeline.small_bundle import small_bundle
from tests.slides import PINK, painted, write_slide

COARSE = replace(SMALL, block_out=160)
REPAIR = replace(COARSE, repair=True)
MAP = "slide.ome.zarr"


@dataclass(frozen=True)
class Made:
    """A slide and a copy of its result."""

    slide: Path
    out: Path
    expected: dict[str, bytes]
    """The files of the undisturbed result."""

    @property
    def folder(self) -> Path:
        return self.out / "slide"

    def files(self) -> list[Path]:
        """Return all files of the result."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def named(self, *, quick: bool) -> str:
        """Return what the independent check and the check of a rerun find, which must agree whether it is damaged."""
        found = [f"{path}: {text}" for path, wrong in broken_rules(self.folder, quick=quick).items() for text in wrong]
        assert bool(found) == bool(changed_files(self.folder, read=not quick)), found
        return "\n".join(found)

    def repair(self, predictor: Predictor | None = None) -> None:
        """Repair the result, and compare every byte with the undisturbed one."""
        assert segment_slide(self.slide, self.out, predictor or color_predictor(), REPAIR).status == "done"
        assert published(self.folder) == self.expected
        assert [path.name for path in self.out.iterdir()] == ["slide"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("published")
    slide = region_slide(root / "slide.svs")
    segment_slide(slide, root / "out", color_predictor(), COARSE)
    return Made(slide, root / "out", published(root / "out" / "slide"))


@pytest.fixture
def made(undisturbed: Made, tmp_path: Path) -> Made:
    return replace(undisturbed, out=shutil.copytree(undisturbed.out, tmp_path / "out"))


def test_a_flipped_bit_in_any_file_of_a_result_is_found_by_the_name_of_the_file(made: Made) -> None:
    rng, files = random.Random(5), made.files()
    assert len(files) > 30
    for path in files:
        content = path.read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        name = path.relative_to(made.folder / MAP if MAP in path.parts else made.folder).as_posix()
        assert name in made.named(quick=False), path
        path.write_bytes(content)
    assert made.named(quick=False) == ""


def test_a_missing_empty_or_cut_file_is_found_by_its_size_and_by_its_name(made: Made) -> None:
    for path in made.files():
        if path.name == "run.json":
            continue
        content = path.read_bytes()
        for left in (None, b"", content[:-1], content + b"\0"):
            path.unlink(missing_ok=True)
            if left is not None:
                path.write_bytes(left)
            name = path.relative_to(made.folder / MAP if MAP in path.parts else made.folder).as_posix()
            assert name in made.named(quick=True), (path, left)
        path.write_bytes(content)
    assert made.named(quick=True) == ""


def test_chunks_that_were_swapped_are_found(made: Made) -> None:
    chunks = [path for path in made.files() if MAP in path.parts and path.name.isdecimal()]
    pairs = [(a, b) for a in chunks for b in chunks if a < b and a.read_bytes() != b.read_bytes()]
    for a, b in random.Random(6).sample(pairs, 20):
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
        found = made.named(quick=False)
        assert all(path.relative_to(made.folder / MAP).as_posix() in found for path in (a, b))
        a.write_bytes(first)
        b.write_bytes(second)


def test_files_of_another_result_are_found_in_the_place_of_its_own(made: Made, tmp_path: Path) -> None:
    segment_slide(made.slide, tmp_path / "other", color_predictor(), replace(COARSE, simplify_px=3.0, canvas_m=512))
    other = tmp_path / "other" / "slide"
    for name in ("slide.geojson", "slide.parquet", "index.html", "chunks.tsv", "blocks.jsonl"):
        content = (made.folder / name).read_bytes()
        if (other / name).read_bytes() != content:
            shutil.copy(other / name, made.folder / name)
            assert name in made.named(quick=False)
            (made.folder / name).write_bytes(content)
    shutil.copy(other / "run.json", made.folder / "run.json")
    assert made.named(quick=False) != ""


def test_a_chunk_that_is_removed_together_with_its_line_is_found(made: Made) -> None:
    listing = made.folder / "chunks.tsv"
    lines = listing.read_text().splitlines(keepends=True)
    gone = next(line for line in lines if "labels/classes/0/0/0" in line)
    (made.folder / MAP / gone.split("\t")[2].strip()).unlink()
    listing.write_text("".join(line for line in lines if line != gone))
    assert "chunks.tsv" in made.named(quick=True)
    made.repair()


def test_the_clock_and_a_copy_change_nothing(made: Made, tmp_path: Path) -> None:
    for year_s in (0, 4_000_000_000):
        for path in made.files():
            os.utime(path, (year_s, year_s))
        assert made.named(quick=False) == ""
        assert segment_slide(made.slide, made.out, color_predictor(), COARSE).status == "skipped"
    # Only the bytes arrive elsewhere: another name of the folder, other dates, other inodes.
    elsewhere = tmp_path / "other disk" / "results"
    shutil.copytree(made.out, elsewhere, copy_function=shutil.copyfile)
    made = replace(made, out=elsewhere)
    assert published(made.folder) == made.expected
    assert made.named(quick=False) == made.named(quick=True) == ""
    assert segment_slide(made.slide, made.out, color_predictor(), COARSE).status == "skipped"


def test_a_record_that_an_editor_has_written_again_is_unchanged(made: Made) -> None:
    values = json.loads((made.folder / "run.json").read_text(encoding="utf-8"))
    text = json.dumps(dict(sorted(values.items())), indent=8).replace("\n", "\r\n")
    (made.folder / "run.json").write_bytes(text.encode())
    assert made.named(quick=False) == ""


def test_every_value_of_the_record_is_covered(made: Made) -> None:
    def places(value: Any, *path: str) -> list[tuple[str, ...]]:
        if isinstance(value, dict) and value:
            return [place for key, part in value.items() for place in places(part, *path, key)]
        return [path]

    text = (made.folder / "run.json").read_text(encoding="utf-8")
    values = json.loads(text)
    assert len(places(values)) > 60
    for place in places(values):
        changed = json.loads(text)
        part = changed
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = "changed"
        (made.folder / "run.json").write_text(json.dumps(changed))
        found = any(broken_rules(made.folder).values())
        assert found == (place != ("slide", "path")), place  # people may remove it


def test_a_quick_check_opens_no_file_but_the_record_and_the_listing(made: Made) -> None:
    opened: set[str] = set()
    watching = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], (str, Path)):
            path = Path(arguments[0])
            if path.is_relative_to(made.folder):
                opened.add(path.name)

    sys.addaudithook(audit)
    try:
        assert changed_files(made.folder) == []
        assert not any(broken_rules(made.folder, quick=True).values())
    finally:
        watching = False
    assert opened == {"run.json", "chunks.tsv"}


STAGES = ["segmenting", "joining polygons", "building the pyramid", "drawing the preview", "publishing"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_repair_that_is_stopped_at_any_stage_keeps_the_damaged_result_and_is_resumed(made: Made, stage: str) -> None:
    (made.folder / MAP / "labels/classes/0/0/1").unlink()
    damaged = published(made.folder)

    def stop(now: str, done: int, total: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="interrupted; run the same command again"):
        segment_slide(made.slide, made.out, color_predictor(), REPAIR, stop)
    assert published(made.folder) == damaged
    made.repair()


def test_a_disk_that_is_full_during_a_repair_keeps_the_damaged_result(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made.folder / MAP / "0/0/1/1").unlink()
    damaged = published(made.folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(repair.shutil, "copyfile", full)  # type: ignore[attr-defined] # the module's own import
        with pytest.raises(OutputError, match=r"the disk of .* is full"):
            segment_slide(made.slide, made.out, color_predictor(), REPAIR)
    assert published(made.folder) == damaged
    made.repair()


def test_a_second_repair_at_the_same_time_is_refused(made: Made) -> None:
    (made.folder / MAP / "0/0/1/1").unlink()
    refused = []

    def second(stage: str, done: int, total: int) -> None:
        if stage == "joining polygons":
            with pytest.raises(LockedError):
                segment_slide(made.slide, made.out, color_predictor(), REPAIR)
            refused.append(stage)

    assert segment_slide(made.slide, made.out, color_predictor(), REPAIR, second).resumed_blocks == 3
    assert refused
    assert published(made.folder) == made.expected


def test_a_result_is_not_repaired_from_a_slide_that_has_changed(made: Made, tmp_path: Path) -> None:
    (made.folder / MAP / "0/0/1/1").unlink()
    slide = write_slide(tmp_path / "slide.svs", painted((1280, 832), ((160, 96, 960, 640), PINK)), mpp=1.0)
    with pytest.raises(OutputError, match="holds the result of another slide"):
        segment_slide(slide, made.out, color_predictor(), REPAIR)


def test_a_result_without_tissue_is_repaired(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "slide.svs", painted((600, 400)), mpp=1.0)
    segment_slide(slide, tmp_path / "out", color_predictor(), COARSE)
    expected = published(tmp_path / "out" / "slide")
    (tmp_path / "out" / "slide" / MAP / "0" / ".zarray").unlink()
    with pytest.raises(OutputError, match=r"0/\.zarray is missing"):
        segment_slide(slide, tmp_path / "out", color_predictor(), COARSE)
    segment_slide(slide, tmp_path / "out", color_predictor(), REPAIR)
    assert published(tmp_path / "out" / "slide") == expected


def test_a_batch_reports_a_damaged_result_each_time_until_it_is_repaired(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle")
    slides = [region_slide(tmp_path / f"{name}.svs") for name in "ab"]
    jobs = [SlideJob(slide) for slide in slides]

    def run(config: SegmentConfig) -> list[str]:
        workers = InProcess(lambda _: Predictor.from_bundle(bundle, device="cpu"), str(bundle.path), config)
        earlier = EarlierRuns(tmp_path / "out", str(bundle.path), config)
        results = run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda _: None, earlier=earlier)
        return [result.status if result.status != "failed" else result.error for result in results]

    config = replace(COARSE, runtime="torch")
    assert run(config) == ["done", "done"]
    expected = published(tmp_path / "out" / "a")
    next((tmp_path / "out" / "a" / "a.ome.zarr" / "labels" / "classes" / "0").rglob("[0-9]/[0-9]")).unlink()
    for _ in range(2):
        error, other = run(config)
        assert "the result was damaged after the run" in error
        assert "pass --repair" in error
        assert other == "skipped"
        assert not list((tmp_path / "out").glob(".*.failed.json"))
    assert run(replace(config, repair=True)) == ["done", "skipped"]
    assert published(tmp_path / "out" / "a") == expected
