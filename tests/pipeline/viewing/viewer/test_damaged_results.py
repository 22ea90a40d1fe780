"""What wsi-view answers about maps and results that are damaged or incomplete."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.view import _found
from pipeline.errors import ViewError
from pipeline.formats.chunk_files import write_chunk
from pipeline.formats.ome_zarr import LABELS
from pipeline.results.record import read_run, write_run
from pipeline.viewing.viewer.open_results import open_checked
from pipeline.viewing.viewer.results import Result, find_results, load_result, with_slide
from tests.pipeline.viewing.viewer.conftest import UNREADABLE, copied, serving


@pytest.mark.full
@pytest.mark.parametrize(
    ("files", "content", "path"),
    [
        ("0/0/*/*", b"damaged", "class/0/0/0_0.png"),
        ("0/0/*/*", b"damaged", "values/200_100.json"),
        ("0/.zarray", b"{", "class/0/0/0_0.png"),
        (".zattrs", b"{", "facts.json"),
        (".zattrs", b"{}", "facts.json"),
    ],
)
def test_a_damaged_map_is_an_error_that_the_terminal_explains(
    results_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, files: str, content: bytes, path: str
) -> None:
    folder = copied(results_folder, tmp_path, "a")
    result = find_results(folder)[0]
    damaged = [file for file in result.store.glob(files) if file.is_file()]
    assert damaged
    for file in damaged:
        file.write_bytes(content)
    with serving((result,)) as site:
        answer = site.get(path)
        assert (answer.status, answer.body) == UNREADABLE
    assert ".ome.zarr: cannot be read: " in caplog.text


def set_fill_value(result: Result) -> None:
    array = result.store / "0" / ".zarray"
    array.write_text(json.dumps(json.loads(array.read_text()) | {"fill_value": 700}))


def store_another_label(result: Result) -> None:
    plane = result.store / LABELS / "0"
    write_chunk(plane, np.full(json.loads((plane / ".zarray").read_text())["chunks"], 3, np.uint8), 0, 0)


@pytest.mark.parametrize(
    ("damage", "paths", "reason"),
    [
        (set_fill_value, ("class/0/0/0_0.png", "values/0_0.json"), "cannot be read: "),
        (
            store_another_label,
            ("labels/3/0/0_0.png", "values/0_0.json"),
            "cannot be read: it contains the label 3, but the result has 2 classes; segment the slide again",
        ),
    ],
)
def test_a_map_with_impossible_values_is_an_error_that_the_terminal_explains(
    results_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Result], None],
    paths: Sequence[str],
    reason: str,
) -> None:
    result = find_results(copied(results_folder, tmp_path, "a"))[0]
    damage(result)
    with serving((result,)) as site:
        for path in paths:
            caplog.clear()
            answer = site.get(path)
            assert (answer.status, answer.body) == UNREADABLE, path
            assert f"{result.store}: {reason}" in caplog.text


@pytest.mark.parametrize("chunk", ["labels/classes/0/2/4", "0/1/2/4"])
def test_a_map_that_lacks_a_file_is_an_error_that_the_terminal_explains(
    results_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, chunk: str
) -> None:
    result = find_results(copied(results_folder, tmp_path, "a"))[0]
    (result.store / chunk).unlink()
    with serving((result,)) as site:
        for path in ("values/100_100.json", "labels/3/0/0_0.png", "uncertainty"):
            assert (site.get(path).status, site.get(path).body) == UNREADABLE
    name = f"{result.store.name}/{chunk}"
    assert f"1 of its files are missing, such as {name}; segment the slide again with --repair" in caplog.text


def test_files_of_a_map_that_cannot_be_examined_are_not_reported_as_missing(
    results_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = find_results(copied(results_folder, tmp_path, "a"))[0]
    folder = result.store / "labels" / "classes" / "0"
    shutil.rmtree(folder)
    folder.symlink_to(folder)  # fails as a folder without permission does, also for root
    with serving((result,)) as site:
        assert site.get("values/100_100.json").status == 503
    assert "cannot be read" in caplog.text
    assert "missing" not in caplog.text


def test_a_map_is_shown_if_its_list_of_files_is_missing_or_damaged(results_folder: Path, tmp_path: Path) -> None:
    results = find_results(copied(results_folder, tmp_path, "a", "b"))
    (results[0].folder / "chunks.tsv").unlink()
    (results[1].folder / "chunks.tsv").write_bytes(b"damaged")
    for result in results:
        with serving((result,)) as site:
            assert site.get("values/100_100.json").status == 200


@pytest.mark.parametrize("broken", ["run.json", "store", "outputs", "elsewhere"])
def test_incomplete_results_are_refused(results_folder: Path, tmp_path: Path, broken: str) -> None:
    folder = copied(results_folder, tmp_path, "a") / "a"
    run = read_run(folder)
    assert run is not None
    if broken == "run.json":
        (folder / "run.json").write_text("{}")
    elif broken == "store":
        shutil.rmtree(next(folder.glob("*.ome.zarr")))
    else:
        outputs = () if broken == "outputs" else ("../x.ome.zarr", "../x.parquet")
        write_run(folder, run.model_copy(update={"outputs": outputs}))
    with pytest.raises(ViewError, match=str(folder)):
        load_result(folder)
    with pytest.raises(ViewError, match="no such folder"):
        find_results(tmp_path / "none")
    with pytest.raises(ViewError, match="contains no results"):
        find_results(Path(__file__).parent)


def test_incomplete_results_among_several_are_skipped_with_a_warning(
    results_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(results_folder, tmp_path, "a", "b")
    shutil.rmtree(next((folder / "b").glob("*.ome.zarr")))
    assert [result.name for result in find_results(folder)] == ["a"]
    assert "left out:" in caplog.text
    assert str(folder / "b") in caplog.text


def test_results_with_a_damaged_record_are_left_out_with_a_warning(
    results_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(results_folder, tmp_path, "a", "b")
    (folder / "b" / "run.json").write_text("{")
    assert [result.name for result in find_results(folder)] == ["a"]
    reason = (
        "its run.json is damaged or was written by another program; if this is the result of a slide, move the folder "
        "away"
    )
    assert f"left out: {folder / 'b'}: {reason} and segment the slide again" in caplog.text
    with pytest.raises(ViewError, match=f"/b: {reason}"):
        find_results(folder / "b")
    (folder / "a" / "run.json").write_text("{")
    with pytest.raises(ViewError, match="contains no readable results; the warnings above give the reasons"):
        find_results(folder)


@pytest.mark.full
def test_a_path_that_cannot_be_examined_is_an_error_with_the_reason(
    results_folder: Path, tmp_path: Path, unexaminable: Callable[[Path, int], None]
) -> None:
    folder = copied(results_folder, tmp_path, "a")
    (result,) = find_results(folder)
    unexaminable(tmp_path / "private", errno.EACCES)
    private = tmp_path / "private" / "x"
    reason = r"x: cannot be read \(Permission denied\); check the path and its permissions$"
    with pytest.raises(ViewError, match=reason):
        find_results(private)
    with pytest.raises(ViewError, match=reason):
        with_slide(result, private)
    with pytest.raises(ViewError, match=reason):
        open_checked(replace(result, slide=private))
    with pytest.raises(ViewError, match=reason):
        _found(folder, private)
