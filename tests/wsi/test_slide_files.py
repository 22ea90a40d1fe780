"""Stamps and digests cover all files of a slide."""

from __future__ import annotations

from pathlib import Path

from wsi.slide import slide_digest, slide_stamp


def test_stamp_and_digest_of_a_hamamatsu_slide_cover_the_files_that_its_key_file_lists(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    path = folder / "a.vms"
    path.write_bytes(
        b"[Virtual Microscope Specimen]\r\nNoLayers=1\r\nImageFile=a-0.jpg\r\nImageFile(1,0) = a 1.jpg \r\n"
        b"MapFile=a_map.jpg\r\nOptimisationFile=../outside.jpg\r\nMacroImage=a_macro.jpg\r\nSourceLens=20\r\n"
    )
    stamps, digests = [slide_stamp(path)], [slide_digest(path)]
    for name in ("a-0.jpg", "a 1.jpg", "a_map.jpg", "a_macro.jpg"):
        for content in (b"part", b"whole"):
            (folder / name).write_bytes(content)
            stamps.append(slide_stamp(path))
            digests.append(slide_digest(path))
    (folder / "SourceLens").write_bytes(b"of another slide")
    (tmp_path / "outside.jpg").write_bytes(b"not a file of this folder")
    assert len(set(stamps)) == len(set(digests)) == 9
    assert (slide_stamp(path), slide_digest(path)) == (stamps[-1], digests[-1])
