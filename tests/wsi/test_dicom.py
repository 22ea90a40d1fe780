from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.dicom import EXPLICIT, IMPLICIT, write_instance
from wsi.dicom import group_series, is_dicom, read_instance, series_files
from wsi.slide import slide_digest, slide_stamp


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize("padding", [0, 100_000])
def test_the_facts_of_a_header_are_read_past_nested_series_and_long_values(
    tmp_path: Path, syntax: str, padding: int
) -> None:
    path = write_instance(tmp_path / "a.dcm", "1.2.3", columns=4096, number="7", syntax=syntax, padding=padding)
    instance = read_instance(path)
    assert instance is not None
    assert (instance.series, instance.series_number, instance.is_level, instance.columns) == ("1.2.3", "7", True, 4096)


def test_the_largest_level_is_the_file_of_a_series_whatever_its_name(tmp_path: Path) -> None:
    small = write_instance(tmp_path / "a.dcm", "1.2.3", columns=512)
    label = write_instance(tmp_path / "b.dcm", "1.2.3", columns=9999, kind="LABEL")
    large = write_instance(tmp_path / "c.dcm", "1.2.3", columns=2048)
    other = write_instance(tmp_path / "d.dcm", "1.2.4", columns=64)
    broken = tmp_path / "e.dcm"
    broken.write_bytes(large.read_bytes()[:150])
    series, unreadable = group_series([other, broken, label, large, small])
    assert {one.level: one.files for one in series} == {large: (small, label, large), other: (other,)}
    assert unreadable == [broken]


def test_a_slide_digest_covers_its_own_series_only(tmp_path: Path) -> None:
    first, second = (write_instance(tmp_path / f"{name}.dcm", "1.2.3", columns=name) for name in (1, 2))
    foreign = write_instance(tmp_path / "foreign.dcm", "1.2.4")
    assert series_files(first) == [first, second]
    digest, stamp = slide_digest(first), slide_stamp(first)
    foreign.write_bytes(foreign.read_bytes() + b"\0")
    assert (slide_digest(first), slide_stamp(first)) == (digest, stamp)
    second.write_bytes(second.read_bytes() + b"\0")
    assert slide_digest(first) != digest
    assert slide_stamp(first) != stamp


def test_dicom_is_known_by_its_ending_or_without_one_by_its_content(tmp_path: Path) -> None:
    for name in ("IM0001", "1.2.840.10008", "a.DCM"):
        assert is_dicom(write_instance(tmp_path / name, "1.2.3")), name
    (tmp_path / "README").write_text("no slide")
    os.mkfifo(tmp_path / "pipe")
    assert not is_dicom(tmp_path / "README")
    assert not is_dicom(tmp_path / "pipe")
    assert not is_dicom(tmp_path / "a.svs")


@pytest.mark.parametrize("cut", [0, 100, 131, 140, 160, 300])
def test_a_cut_header_has_no_facts(tmp_path: Path, cut: int) -> None:
    whole = write_instance(tmp_path / "a.dcm", "1.2.3").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:cut])
    assert read_instance(tmp_path / "cut.dcm") is None
    assert read_instance(tmp_path / "gone.dcm") is None
