from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import RegionsFileError
from pipeline.formats.polygons import block_regions
from pipeline.formats.region_files import load_regions, save_regions
from tests.pipeline.formats.label_maps import smooth_map


def test_the_same_labels_give_the_same_bytes_and_the_file_is_read_back_unchanged(tmp_path: Path) -> None:
    labels_HW = smooth_map(128, 3)
    regions = block_regions(labels_HW, (1024, 2048), 8, 1)
    save_regions(tmp_path / "a", regions)
    save_regions(tmp_path / "b", block_regions(labels_HW.copy(order="F"), (1024, 2048), 8, 1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = load_regions(tmp_path / "a")
    assert again == regions
    save_regions(tmp_path / "empty", [])
    assert load_regions(tmp_path / "empty") == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_named_in_the_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "block-3.regions"
    save_regions(path, block_regions(smooth_map(32, 3), (0, 0), 0, 0))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-5:]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(b"PAR1 and so on" if damage == "foreign" else b"")
    path.write_bytes(content)
    with pytest.raises(RegionsFileError, match=r"block-3\.regions.*run the same command again"):
        load_regions(path)
