from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.slide.blocks import BlockRecord
from pipeline.slide.journal import Journal, make_durable


def record(index: int, bad: bool = False) -> BlockRecord:
    return BlockRecord(index, {}, [10, 20, 30], 60.0, 5, 3, 1, [], {"read": 0.5}, unreadable=bad)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Journal, list[Path]]:
    journal = Journal(tmp_path, {"slide": "a", "model": "b"})
    files = []
    for index in range(3):
        file = tmp_path / "store" / f"{index}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes([index]) * 100)
        journal.append(make_durable(tmp_path, record(index), [file]))
        files.append(file)
    return journal, files


def test_appended_blocks_are_finished(written: tuple[Journal, list[Path]]) -> None:
    finished = written[0].finished()
    assert sorted(finished) == [0, 1, 2]
    assert finished[1].class_px == [10, 20, 30]
    assert list(finished[1].files) == ["store/1"]


def test_a_block_with_a_changed_or_missing_file_is_not_finished(written: tuple[Journal, list[Path]]) -> None:
    journal, files = written
    files[0].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-1] + b"\x00")
    assert sorted(journal.finished()) == [1]


def test_a_flipped_bit_or_a_cut_costs_at_most_one_block(written: tuple[Journal, list[Path]], tmp_path: Path) -> None:
    journal, _ = written
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        found = journal.finished()
        assert len(found) >= 1
        assert all(found[i].class_px == [10, 20, 30] and found[i].tiles == 5 for i in found)
        ends = [sum(map(len, lines[: n + 1])) for n in range(3)]
        path.write_bytes(whole[:position])
        assert len(journal.finished()) >= sum(end <= position for end in ends)


def test_appending_after_a_cut_line_keeps_all_blocks(written: tuple[Journal, list[Path]], tmp_path: Path) -> None:
    journal, files = written
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert sorted(journal.finished()) == [0, 1]
    journal.append(make_durable(tmp_path, record(2), [files[2]]))
    assert sorted(journal.finished()) == [0, 1, 2]


def test_other_inputs_and_blocks_that_could_not_read_everything_are_computed_again(
    written: tuple[Journal, list[Path]], tmp_path: Path
) -> None:
    journal, files = written
    assert Journal(tmp_path, {"slide": "a", "model": "c"}).finished() == {}
    journal.append(make_durable(tmp_path, record(7, bad=True), files))
    assert 7 not in journal.finished()


def test_an_empty_folder_has_no_finished_blocks(tmp_path: Path) -> None:
    assert Journal(tmp_path, {}).finished() == {}
