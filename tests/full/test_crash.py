"""Killed runs, damaged journals and power cuts change no result, and nothing incomplete becomes visible."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.slide.blocks import BlockRecord
from pipeline.slide.journal import Journal
from pipeline.slide.recipe import segment_slide
from tests.full.crash import STEPS, Bench, Kill, open_bench, random_kill, survive
from tests.full.disk import Disk
from tests.pipeline.fakes import SMALL, color_predictor, published, region_slide

COARSE = replace(SMALL, block_out=160)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("crash")) as bench:
        yield bench


@pytest.mark.parametrize("cruel", [False, True], ids=["killed", "torn, without power, replacing a result"])
def test_a_run_killed_at_every_named_step_ends_with_the_bytes_of_an_undisturbed_one(
    bench: Bench, tmp_path: Path, cruel: bool
) -> None:
    # Each run resumes from the files of the last one and gets a step further.
    rng = random.Random(7)
    kills = [Kill(name=name, torn=50 if cruel else None, power=cruel and rng.random() < 0.5) for name in STEPS]
    assert survive(bench, tmp_path / "out", kills, rng, replacing=cruel) == len(STEPS)


def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(bench: Bench, tmp_path: Path) -> None:
    rng = random.Random(11)
    for number in range(5):
        kills = [random_kill(bench, rng) for _ in range(3)]
        survive(bench, tmp_path / f"out{number}", kills, rng, replacing=number % 2 == 1)


def test_every_line_of_the_journal_stands_for_files_that_a_power_cut_leaves(bench: Bench, tmp_path: Path) -> None:
    disk, lines = Disk(tmp_path / "none"), 0
    for event in bench.trace:
        if event[0] == "line":
            lines += 1
            assert len(event) > 2
            assert [name for name in event[1:] if not disk.is_safe(name)] == []
        disk.step(*event)
    assert lines == 16


def test_all_of_a_result_is_on_the_disk_before_it_becomes_visible_and_its_name_before_anything_is_cleared(
    bench: Bench, tmp_path: Path
) -> None:
    disk, published_names, cleared = Disk(tmp_path / "none"), 0, False
    for event in bench.trace:
        if event[0] == "moving" and event[1].startswith(".slide.work/result/"):
            published_names = len(event) - 1
            assert [name for name in event[1:] if not disk.is_safe(name)] == []
        if event[0] in ("remove", "rmdir") and event[1].startswith(".slide.work/regions"):
            cleared = True
            assert disk.has_name("slide")
            assert disk.is_safe("slide/run.json")
        disk.step(*event)
    assert cleared
    assert published_names > 30
    assert disk.is_safe("summary.csv")
    assert disk.is_safe("index.html")


class _StoppedError(Exception):
    pass


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped once all its blocks were done, and no more."""

    slide: Path
    output: Path
    journal: bytes
    identity: dict[str, object]
    records: dict[int, BlockRecord]
    """Of the blocks, in the order of their lines."""
    expected: dict[str, bytes]
    """The files of the undisturbed result."""

    def finished(self, journal: bytes) -> dict[int, BlockRecord]:
        """The blocks that a resume with this journal takes for done."""
        path = self.output / ".slide.work" / "journal.jsonl"
        path.write_bytes(journal)
        try:
            return Journal(self.output / ".slide.work", self.identity).finished()
        finally:
            path.write_bytes(self.journal)  # the tests share this folder

    def resume(self, output: Path, journal: bytes) -> tuple[int, dict[str, bytes]]:
        """Go on with this journal in a copy; returns how many blocks were not done again, and the files."""
        shutil.copytree(self.output, output)
        (output / ".slide.work" / "journal.jsonl").write_bytes(journal)
        result = segment_slide(self.slide, output, color_predictor(), COARSE)
        assert result.folder is not None
        assert [path.name for path in output.iterdir()] == ["slide"]
        return result.resumed_blocks, published(result.folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("journal")
    path = region_slide(folder / "slide.svs")
    undisturbed = segment_slide(path, folder / "undisturbed", color_predictor(), COARSE)
    assert undisturbed.folder is not None

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "joining polygons":
            raise _StoppedError

    with pytest.raises(_StoppedError):
        segment_slide(path, folder / "out", color_predictor(), COARSE, stop)
    work = folder / "out" / ".slide.work"
    identity = json.loads((work / "identity.json").read_text(encoding="utf-8"))
    records = Journal(work, identity).finished()
    assert len(records) == 4
    return Stopped(
        path, folder / "out", (work / "journal.jsonl").read_bytes(), identity, records, published(undisturbed.folder)
    )


def line_ends(journal: bytes) -> list[int]:
    """Return the end of each line, without its newline."""
    return [position for position, byte in enumerate(journal) if byte == ord("\n")]


def test_a_journal_cut_at_any_byte_costs_the_blocks_of_the_lines_that_are_gone_and_no_others(stopped: Stopped) -> None:
    ends, order = line_ends(stopped.journal), list(stopped.records)
    for length in range(len(stopped.journal) + 1):
        whole = order[: sum(end <= length for end in ends)]
        assert stopped.finished(stopped.journal[:length]) == {index: stopped.records[index] for index in whole}


def test_a_flipped_bit_costs_the_block_of_its_line_and_no_other(stopped: Stopped) -> None:
    ends, order = line_ends(stopped.journal), list(stopped.records)
    rng = random.Random(3)
    for position in sorted({*range(0, len(stopped.journal), 2), *ends}):
        damaged = bytearray(stopped.journal)
        damaged[position] ^= 1 << rng.randrange(8)
        line = sum(end < position for end in ends)
        # A newline belongs to the lines on both its sides.
        hit = set(order[line : line + 1 + (position in ends)])
        expected = {index: record for index, record in stopped.records.items() if index not in hit}
        assert stopped.finished(bytes(damaged)) == expected, (position, damaged[position])


def test_lines_in_another_order_or_twice_change_nothing(stopped: Stopped) -> None:
    lines = stopped.journal.splitlines(keepends=True)
    for some in (lines[::-1], lines * 2, [lines[2], *lines, lines[0]]):
        assert stopped.finished(b"".join(some)) == stopped.records
    assert stopped.finished(b"\n\x00\xff\n{}\n[]\nnull\n" + stopped.journal) == stopped.records


def test_lines_of_another_slide_model_or_setting_count_for_nothing(stopped: Stopped) -> None:
    other = Journal(stopped.output / ".slide.work", stopped.identity | {"slide": "0" * 64})
    assert other.finished() == {}


def test_a_resume_with_a_damaged_journal_does_the_blocks_concerned_again_and_ends_with_the_same_bytes(
    stopped: Stopped, tmp_path: Path
) -> None:
    lines = stopped.journal.splitlines(keepends=True)
    flipped = bytearray(stopped.journal)
    flipped[len(lines[0]) // 2] ^= 4
    damages = {
        3: b"".join(lines)[:-30],
        1: lines[2] + lines[0][:50],
        0: b"",
        4: b"".join([*lines[::-1], *lines]),
    }
    for resumed, journal in damages.items():
        assert stopped.resume(tmp_path / str(resumed), journal) == (resumed, stopped.expected)
    assert stopped.resume(tmp_path / "flipped", bytes(flipped)) == (3, stopped.expected)


def test_a_chunk_that_a_power_cut_brought_back_does_not_belong_to_a_block(stopped: Stopped, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(stopped.output, output)
    block = next(r for r in stopped.records.values() if not r.class_px[2])
    chunk = next(Path(name) for name in block.files if "ome.zarr/0/0/" in name)
    stray = output / ".slide.work" / chunk.parents[2] / "1" / Path(*chunk.parts[-2:])
    assert not stray.exists()
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes((output / ".slide.work" / chunk).read_bytes())
    result = segment_slide(stopped.slide, output, color_predictor(), COARSE)
    assert result.resumed_blocks == 4
    assert result.folder is not None
    assert published(result.folder) == stopped.expected


def test_what_a_kill_after_the_publishing_left_is_cleared_by_the_next_run(stopped: Stopped, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(stopped.output, output)
    kept = tmp_path / "kept"
    shutil.copytree(output / ".slide.work", kept)
    segment_slide(stopped.slide, output, color_predictor(), COARSE)
    for work, survives in ((kept, False), (tmp_path / "other", True)):
        if survives:
            # The unfinished run of other settings, with --force, is not this run's to clear away.
            shutil.copytree(kept, work)
            (work / "identity.json").write_text(json.dumps(stopped.identity | {"model": "another"}), encoding="utf-8")
        shutil.copytree(work, output / ".slide.work")
        assert segment_slide(stopped.slide, output, color_predictor(), COARSE).status == "skipped"
        assert (output / ".slide.work").exists() == survives


def test_a_run_of_other_settings_is_refused_by_their_names(stopped: Stopped, tmp_path: Path) -> None:
    output = tmp_path / "out"
    segment_slide(stopped.slide, output, color_predictor(), COARSE)
    with pytest.raises(
        OutputError,
        match=r"another run \(other parameters\); pass --force .*; it was made with canvas_m None instead of 512, "
        r"min_area_um2 0\.0 instead of 9\.0$",
    ):
        segment_slide(stopped.slide, output, color_predictor(), replace(COARSE, canvas_m=512, min_area_um2=9.0))
