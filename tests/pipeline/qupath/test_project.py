from __future__ import annotations

import ctypes
import json
import logging
import shutil
import tracemalloc
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest
from PIL import Image

from pipeline.checks.geojson import check_geojson
from pipeline.errors import OutputError
from pipeline.qupath.maps import ProbabilityMap, write_overlays, write_tiles
from pipeline.qupath.project import packed_argb, write_project
from pipeline.segment import segment_slide
from pipeline.store import MapSpec, MapStore, build_pyramid, create_store
from tests.pipeline.fakes import (
    CORNER,
    REGIONS,
    SMALL,
    colour_predictor,
    constant_predictor,
    probs_of,
    region_slide,
    run_of,
    stating_bounds,
)
from tests.slides import PINK, PURPLE, painted, write_slide
from wsi.grid import Box
from wsi.readers import READERS

NAMES = ("Fall 1 + ü%20#.svs", "b.svs")
OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `slides` and their `results`."""
    root = tmp_path_factory.mktemp("a b ü")
    (root / "slides").mkdir()
    for name in NAMES:
        region_slide(root / "slides" / name, levels=(1,) if name == NAMES[0] else (1, 4))
        segment_slide(root / "slides" / name, root / "results", colour_predictor(), SMALL)
    return root


@pytest.fixture
def root(segmented: Path, tmp_path: Path) -> Path:
    """A copy of the segmented slides that says where its own slides are."""
    root = tmp_path / "a b ü"
    shutil.copytree(segmented, root)
    for name in NAMES:
        say_where(root / "results" / Path(name).stem, root / "slides" / name)
    return root


def say_where(folder: Path, slide: Path) -> None:
    run = run_of(folder)
    run["slide"]["path"] = str(slide)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")


def project_of(root: Path) -> dict[str, Any]:
    project: dict[str, Any] = json.loads((root / "results" / "qupath" / "project.qpproj").read_text(encoding="utf-8"))
    return project


def file_of(uri: str) -> Path:
    """The file a URI stands for, by the standard library."""
    assert urlsplit(uri).scheme == "file"
    assert uri.isascii()
    return Path(unquote(urlsplit(uri).path))


def slides_of(root: Path) -> dict[int, Path]:
    return {image["entryID"]: file_of(image["serverBuilder"]["uri"]) for image in project_of(root)["images"]}


def rows_of(root: Path) -> list[dict[str, str]]:
    lines = (root / "results" / "qupath" / "results.tsv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def map_of(folder: Path) -> ProbabilityMap:
    run = run_of(folder)
    classes = (("pink", PINK), ("purple", PURPLE))
    size_out = (run["plan"]["map_size"][0], run["plan"]["map_size"][1])
    return ProbabilityMap(folder / f"{folder.name}.ome.zarr", classes, size_out, 4.0, "digest")


def test_the_project_names_every_slide_and_the_reader_that_has_the_polygons_origin(root: Path) -> None:
    path = write_project(root / "results")
    assert path == root / "results" / "qupath" / "project.qpproj"
    project = project_of(root)
    assert slides_of(root) == {1: root / "slides" / NAMES[0], 2: root / "slides" / NAMES[1]}
    assert [image["imageName"] for image in project["images"]] == list(NAMES)
    for image in project["images"]:
        builder = image["serverBuilder"]
        assert (builder["builderType"], builder["providerClassName"], builder["args"]) == ("uri", OPENSLIDE, [])
        assert builder["uri"].startswith("file:/")
        assert (image["metadata"], image["tags"]) == ({}, [])
    assert "Fall%201%20%2B%20%C3%BC%2520%23.svs" in project["images"][0]["serverBuilder"]["uri"]
    assert project["lastID"] == 2
    assert file_of(project["uri"]) == path
    assert project["createTimestamp"] <= project["modifyTimestamp"]


def test_the_scripts_find_the_files_of_each_image_relative_to_the_project(root: Path) -> None:
    path = write_project(root / "results", tiles=True)
    rows = rows_of(root)
    assert [(row["entryID"], unquote(row["name"])) for row in rows] == [("1", NAMES[0]), ("2", NAMES[1])]
    for row, name in zip(rows, NAMES, strict=True):
        folder = root / "results" / Path(name).stem
        maps = path.parent / "maps" / folder.name
        base = "file:" + path.as_uri().removeprefix("file://")
        assert file_of(urljoin(base, row["geojson"])).resolve() == folder / f"{folder.name}.geojson"
        assert file_of(urljoin(base, row["tiles"])).resolve() == maps / f"{folder.name}.tiles.geojson"
        assert file_of(urljoin(base, row["overlays"])).resolve() == maps
        assert row["classes"] == "class-0,class-1"
        assert (int(row["width"]), int(row["height"])) == (1280, 832)
        assert not any(cell.startswith("/") for cell in row.values())
    readme = (path.parent / "README.txt").read_text(encoding="utf-8")
    assert len(readme.splitlines()) == 2
    assert "import_results" in readme
    assert {p.name for p in (path.parent / "scripts").iterdir()} == {"import_results.groovy", "show_probability.groovy"}


def test_classes_have_the_colours_of_the_model(root: Path) -> None:
    write_project(root / "results")
    classes = json.loads((root / "results" / "qupath" / "classifiers" / "classes.json").read_text(encoding="utf-8"))
    java = [ctypes.c_int32(255 << 24 | r << 16 | g << 8 | b).value for r, g, b in (PINK, PURPLE)]
    assert classes == {"pathClasses": [{"name": "class-0", "color": java[0]}, {"name": "class-1", "color": java[1]}]}
    assert packed_argb((0, 0, 0)) == -16777216
    assert packed_argb((255, 255, 255)) == -1
    assert packed_argb((255, 0, 0)) == -65536


def test_writing_again_changes_nothing_that_is_not_new(root: Path) -> None:
    path = write_project(root / "results", tiles=True)
    before = files_in(path.parent)
    write_project(root / "results", tiles=True)
    after = files_in(path.parent)
    assert {name: content for name, (content, _) in after.items()} == {name: c for name, (c, _) in before.items()}
    kept = [name for name in before if name.startswith("maps/") or name == "project.qpproj"]
    assert all(after[name][1] == before[name][1] for name in kept)
    assert not list((root / "results").rglob("*.partial"))
    assert not (root / "results" / ".qupath.lock").exists()


def test_what_a_user_saved_in_the_project_stays_and_new_slides_are_added(root: Path) -> None:
    late = root / "results" / Path(NAMES[0]).stem
    late.rename(root / "late")
    path = write_project(root / "results")
    assert list(slides_of(root)) == [1]
    project = project_of(root)
    # As QuPath writes it: other form of URI, metadata, a turned image, images of the user's own, ids given away.
    plain = (root / "slides" / NAMES[1]).as_uri()
    turned = {"builderType": "rotated", "builder": project["images"][0]["serverBuilder"] | {"uri": plain}}
    project["images"][0] |= {"serverBuilder": turned, "imageName": "renamed", "description": "mine"}
    web = {"builderType": "uri", "uri": "https://example.org/slide", "providerClassName": "X", "args": []}
    project["images"].append({"serverBuilder": web, "entryID": 7, "imageName": "web", "metadata": {"a": "b"}})
    project["lastID"] = 9
    project["version"] = "0.7.0"
    path.write_text(json.dumps(project), encoding="utf-8")
    saved = path.parent / "data" / "1" / "data.qpdata"
    saved.parent.mkdir(parents=True)
    saved.write_bytes(b"drawn by hand")
    classes_path = path.parent / "classifiers" / "classes.json"
    classes_path.write_text(
        json.dumps({"pathClasses": [{"name": "class-1", "color": -5}, {"name": "Mine", "color": 7}]})
    )
    own_script = path.parent / "scripts" / "mine.groovy"
    own_script.write_text("print 1")

    (root / "late").rename(late)
    write_project(root / "results")
    merged = project_of(root)
    assert merged["images"][:2] == project["images"]
    assert merged["images"][2]["entryID"] == merged["lastID"] == 10
    assert file_of(merged["images"][2]["serverBuilder"]["uri"]) == root / "slides" / NAMES[0]
    assert len(merged["images"]) == 3
    assert merged["version"] == "0.7.0"
    assert merged["createTimestamp"] == project["createTimestamp"]
    assert {unquote(row["name"]): row["entryID"] for row in rows_of(root)} == {NAMES[0]: "10", NAMES[1]: "1"}
    classes = json.loads(classes_path.read_text())["pathClasses"]
    assert classes[:2] == [{"name": "class-1", "color": -5}, {"name": "Mine", "color": 7}]
    assert [entry["name"] for entry in classes] == ["class-1", "Mine", "class-0"]
    assert saved.read_bytes() == b"drawn by hand"
    assert own_script.read_text() == "print 1"


def test_slides_that_moved_with_the_project_are_found_and_keep_their_ids(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_project(root / "results")
    before = project_of(root)
    moved = root.rename(root.with_name("moved & more"))
    write_project(moved / "results")
    assert slides_of(moved) == {1: moved / "slides" / NAMES[0], 2: moved / "slides" / NAMES[1]}
    assert file_of(project_of(moved)["uri"]) == moved / "results" / "qupath" / "project.qpproj"
    assert [i["entryID"] for i in project_of(moved)["images"]] == [i["entryID"] for i in before["images"]]
    assert caplog.records == []


def test_a_missing_slide_is_entered_with_a_warning_that_says_what_to_do(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = root / "slides" / NAMES[1]
    place.rename(root / "elsewhere.svs")
    with caplog.at_level(logging.WARNING):
        write_project(root / "results")
    (warning,) = caplog.messages
    assert f"b: the slide is not at {place}" in warning
    assert "--slides" in warning
    assert slides_of(root)[2] == place


def test_a_slide_that_moved_is_found_by_its_content_and_not_by_its_name_alone(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_project(root / "results")
    archive = root / "archive"
    for number, content in enumerate([b"another patient's", (root / "slides" / NAMES[1]).read_bytes()]):
        (archive / str(number)).mkdir(parents=True)
        (archive / str(number) / NAMES[1]).write_bytes(content)
    (root / "slides" / NAMES[1]).unlink()
    write_project(root / "results", slides=archive)
    assert slides_of(root) == {1: root / "slides" / NAMES[0], 2: archive / "1" / NAMES[1]}
    assert caplog.records == []

    (archive / "1" / NAMES[1]).unlink()
    with caplog.at_level(logging.WARNING):
        write_project(root / "results", slides=archive)
    assert "1 found by that name hold something else" in caplog.text


def test_results_that_do_not_say_where_their_slide_was_need_the_folder_of_slides(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = root / "results" / "b"
    run = run_of(folder)
    del run["slide"]["path"]
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    write_project(root / "results", slides=root / "slides")
    assert slides_of(root)[2] == root / "slides" / "b.svs"
    assert caplog.records == []
    write_project(root / "results")
    assert "--slides" in caplog.text
    assert len(project_of(root)["images"]) == 2 + 1  # no way to tell that it is the same slide


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"images":[{"entryID":"1"}]}', '{"images":[7]}'])
def test_a_project_that_cannot_be_read_is_left_as_it_is(root: Path, text: str) -> None:
    path = root / "results" / "qupath" / "project.qpproj"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(OutputError, match=r"project\.qpproj: is no project that QuPath could read"):
        write_project(root / "results")
    assert [p.name for p in path.parent.iterdir()] == ["project.qpproj"]
    assert path.read_text() == text


def test_a_folder_without_results_and_a_result_in_the_projects_place_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no results of wsi-segment"):
        write_project(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (root / "results" / "b").rename(root / "results" / "qupath")
    with pytest.raises(OutputError, match="rename the slide"):
        write_project(root / "results")


def test_a_result_without_its_map_is_left_out_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(root / "results" / "b" / "b.ome.zarr")
    write_project(root / "results")
    assert slides_of(root) == {1: root / "slides" / NAMES[0]}
    assert f"{root / 'results' / 'b'}: left out" in caplog.text
    assert not (root / "results" / "qupath" / "maps" / "b").exists()


def test_pictures_and_tiles_of_a_former_result_are_replaced(root: Path) -> None:
    path = write_project(root / "results", tiles=True)
    maps = path.parent / "maps" / "b"
    before = (maps / "0.png").read_bytes()
    shutil.rmtree(root / "results" / "b")
    segment_slide(root / "slides" / "b.svs", root / "results", constant_predictor([1.0, 0.0]), SMALL)
    write_project(root / "results")
    assert (maps / "0.png").read_bytes() != before
    assert not list(maps.glob("*.geojson"))
    assert [row["tiles"] for row in rows_of(root)][1] == ""
    write_project(root / "results", tiles=True)
    assert len(check_geojson(next(maps.glob("*.geojson")).read_text(encoding="utf-8"))) > 0


def test_tiles_say_the_mean_of_the_map(root: Path, tmp_path: Path) -> None:
    folder = root / "results" / "b"
    path = tmp_path / "t.geojson"
    count = write_tiles(path, map_of(folder), tile_out=20)
    features = check_geojson(path.read_text(encoding="utf-8"))
    probs_KHW = probs_of(folder)[:, :208, :320].astype(float)
    expected = {}
    for y in range(0, 208, 20):
        for x in range(0, 320, 20):
            tile_KHW = probs_KHW[:, y : min(y + 20, 208), x : min(x + 20, 320)]
            if tile_KHW.max() > 0:
                corner = (4.0 * x, 4.0 * y, 4.0 * min(x + 20, 320), 4.0 * min(y + 20, 208))
                expected[corner] = [tile_KHW[k].sum() / tile_KHW[k].size / 255 for k in range(2)]
    found = {}
    for feature in features:
        (ring,) = feature["geometry"]["coordinates"]
        assert feature["properties"]["objectType"] == "tile"
        assert list(feature["properties"]["measurements"]) == ["Probability pink", "Probability purple"]
        found[*ring[0], *ring[2]] = list(feature["properties"]["measurements"].values())
    assert found.keys() == expected.keys()
    assert 20 < len(expected) < 16 * 11
    for corner, means in expected.items():
        assert found[corner] == pytest.approx(means, abs=6e-6)
    assert len({feature["id"] for feature in features}) == count == len(features)
    assert all(uuid.UUID(feature["id"]).version == 5 for feature in features)
    again = tmp_path / "again.geojson"
    write_tiles(again, map_of(folder), tile_out=20)
    assert again.read_bytes() == path.read_bytes()


def test_the_last_tiles_end_with_the_map_and_not_with_its_padding(tmp_path: Path) -> None:
    probability = wide_map(tmp_path / "wide.ome.zarr", (701, 601))
    assert probability.probs(0).shape == (1, 602, 702)
    write_tiles(tmp_path / "t.geojson", probability, tile_out=256)
    *_, last = check_geojson((tmp_path / "t.geojson").read_text(encoding="utf-8"))
    (ring,) = last["geometry"]["coordinates"]
    assert (ring[0], ring[2]) == ([512 * 4.0, 512 * 4.0], [701 * 4.0, 601 * 4.0])
    mean = np.asarray(probability.probs(0)[0, 512:601, 512:701]).astype(float).sum() / (89 * 189) / 255
    assert last["properties"]["measurements"] == {"Probability a": pytest.approx(mean, abs=6e-6)}


def test_tiles_and_pictures_lie_in_qupaths_frame_on_a_slide_with_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = CORNER
    shapes = [((left + x, top + y, w, h), colour) for (left, top, w, h), colour in REGIONS]
    slide = write_slide(tmp_path / "mirax.svs", painted((1280 + 128, 832 + 64), *shapes), mpp=1.0)
    monkeypatch.setitem(READERS, "openslide", stating_bounds(READERS["openslide"]))
    result = segment_slide(slide, tmp_path / "results", colour_predictor(), SMALL)
    assert result.folder is not None
    assert run_of(result.folder)["slide"]["qupath_offset"] == list(CORNER)
    project = write_project(tmp_path / "results")
    path = tmp_path / "t.geojson"
    write_tiles(path, map_of(result.folder), tile_out=8)
    left, top, width, height = REGIONS[1][0]
    inside: list[float] = []
    outside: list[float] = []
    for feature in check_geojson(path.read_text(encoding="utf-8")):
        (ring,) = feature["geometry"]["coordinates"]
        (x0, y0), (x1, y1) = ring[0], ring[2]
        within = left <= x0 and x1 <= left + width and top <= y0 and y1 <= top + height
        apart = x1 <= left or x0 >= left + width or y1 <= top or y0 >= top + height
        if within or apart:
            (inside if within else outside).append(feature["properties"]["measurements"]["Probability purple"])
    assert len(inside) == (320 // 32) * (256 // 32)
    assert min(inside) > 0.95
    assert max(outside) < 0.05
    picture = np.asarray(Image.open(project.parent / "maps" / "mirax" / "1.png").convert("RGBA"))
    rows, columns = np.nonzero(picture[..., 3] > 128)
    assert (columns.min() * 4, rows.min() * 4) == (left, top)
    assert ((columns.max() + 1) * 4, (rows.max() + 1) * 4) == (left + width, top + height)


def test_a_picture_is_the_class_colour_as_opaque_as_the_class_is_probable(root: Path, tmp_path: Path) -> None:
    size_l0 = write_overlays(tmp_path / "maps", map_of(root / "results" / "b"))
    probs_KHW = probs_of(root / "results" / "b")
    assert size_l0 == (probs_KHW.shape[2] * 4, probs_KHW.shape[1] * 4)
    for k, color in enumerate((PINK, PURPLE)):
        rgba_HWC = np.asarray(Image.open(tmp_path / "maps" / f"{k}.png").convert("RGBA"))
        np.testing.assert_array_equal(rgba_HWC[..., 3], probs_KHW[k])
        assert np.unique(rgba_HWC[..., :3].reshape(-1, 3), axis=0).tolist() == [list(color)]


def test_the_picture_of_a_large_map_comes_from_a_coarser_level(tmp_path: Path) -> None:
    probability = wide_map(tmp_path / "wide.ome.zarr", (4200, 600))
    # Stored with a width and height that halve to the last of five levels.
    assert write_overlays(tmp_path / "maps", probability) == (4208 * 4, 608 * 4)
    with Image.open(tmp_path / "maps" / "0.png") as picture:
        assert picture.size == (4208 // 4, 608 // 4)


def wide_map(path: Path, size_out: tuple[int, int]) -> ProbabilityMap:
    spec = MapSpec("wide", size_out, (("a", (1, 2, 3)),), 4.0)
    create_store(path, spec)
    store = MapStore(path, spec)
    rng = np.random.default_rng(5)
    for y in range(0, size_out[1], 512):
        for x in range(0, size_out[0], 512):
            box = Box(x, y, 512, 512)
            values = rng.integers(1, 255, (1, 512, 512), dtype=np.uint8)
            store.write_block(box, values, np.ones((512, 512), np.uint8))
    build_pyramid(path, spec)
    return ProbabilityMap(path, spec.classes, size_out, 4.0, "digest")


def test_memory_does_not_grow_with_the_number_of_tiles(tmp_path: Path) -> None:
    peaks = []
    for size in (512, 1024):
        probability = wide_map(tmp_path / f"{size}.ome.zarr", (size, size))
        write_tiles(tmp_path / "warm.geojson", probability, tile_out=256)
        tracemalloc.start()
        count = write_tiles(tmp_path / "t.geojson", probability, tile_out=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == (size // 16) ** 2
    assert peaks[1] < peaks[0] + 300_000
    assert (tmp_path / "t.geojson").stat().st_size > 1_000_000
