"""Tests of the stored map: its values and files, concurrent writers, and other programs' readers."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ome_types
import ome_zarr_models
import pytest
import yaozarrs
import zarr
from hypothesis import given
from hypothesis import strategies as st
from napari_ome_zarr import napari_get_reader

from models.tissue_class import TissueClass
from pipeline.checks.ome_zarr import broken_ome_zarr_rules
from pipeline.formats.chunk_files import UInt8Array, sweep_partial_files
from pipeline.formats.ome_zarr import (
    MapSpec,
    MapStore,
    build_pyramid,
    create_store,
    halve_labels,
    halve_probs,
)
from wsi.box import Box

CLASSES = (
    TissueClass("Tumor", (200, 0, 0)),
    TissueClass("Stroma", (0, 160, 20)),
    TissueClass("Fett & Ödem <5 %", (1, 2, 3)),
)


def make_spec(size_out: tuple[int, int] = (75, 45), chunk: int = 16, name: str = "Schnitt 7 🔬") -> MapSpec:
    return MapSpec(name=name, size_out=size_out, classes=CLASSES, mpp_out=2.012, chunk=chunk)


def random_map(spec: MapSpec, seed: int = 0) -> tuple[UInt8Array, UInt8Array]:
    """Return probabilities and labels of the padded map; both are 0 outside the slide."""
    rng = np.random.default_rng(seed)
    (width, height), (padded_width, padded_height) = spec.size_out, spec.padded_size_out
    probs_KHW = np.zeros((len(CLASSES), padded_height, padded_width), np.uint8)
    labels_HW = np.zeros((padded_height, padded_width), np.uint8)
    probs_KHW[:, :height, :width] = rng.integers(0, 256, (len(CLASSES), height, width))
    labels_HW[:height, :width] = rng.integers(0, len(CLASSES) + 1, (height, width))
    return probs_KHW, labels_HW


def blocks(spec: MapSpec, side: int) -> list[Box]:
    return [Box(x, y, side, side) for y in range(0, spec.size_out[1], side) for x in range(0, spec.size_out[0], side)]


def cut(array: UInt8Array, box: Box, fill: int = 0) -> UInt8Array:
    """Return the values in a box, with `fill` beyond the edge of the array."""
    part = array[..., box.y : box.bottom, box.x : box.right]
    missing = [(0, 0)] * (array.ndim - 2) + [(0, box.height - part.shape[-2]), (0, box.width - part.shape[-1])]
    return np.pad(part, missing, constant_values=fill)


def write_map(path: Path, spec: MapSpec, probs_KHW: UInt8Array, labels_HW: UInt8Array, side: int = 32) -> MapStore:
    create_store(path, spec)
    store = MapStore(path, spec)
    for box in blocks(spec, side):
        store.write_block(box, cut(probs_KHW, box), cut(labels_HW, box))
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read(path: Path, name: str) -> npt.NDArray[Any]:
    return np.asarray(zarr.open_array(path, path=name, mode="r")[...])


def slow_mean(array_HW: UInt8Array) -> UInt8Array:
    height, width = array_HW.shape
    total = [
        [sum(int(array_HW[2 * y + j, 2 * x + i]) for j in (0, 1) for i in (0, 1)) for x in range(width // 2)]
        for y in range(height // 2)
    ]
    return np.floor(np.array(total) / 4 + 0.5).astype(np.uint8)


def slow_majority(array_HW: UInt8Array) -> UInt8Array:
    def majority(y: int, x: int) -> int:
        counts = Counter(int(v) for v in array_HW[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel())
        return min(counts, key=lambda v: (-counts[v], v == 0, v))

    height, width = array_HW.shape
    return np.array([[majority(y, x) for x in range(width // 2)] for y in range(height // 2)], np.uint8)


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([16, 256, 512]))
def test_every_level_is_exactly_half_and_the_last_one_is_one_chunk(width: int, height: int, chunk: int) -> None:
    spec = make_spec((width, height), chunk)
    sizes = spec.level_sizes
    assert sizes[0] == spec.padded_size_out
    assert all(fine == (2 * coarse[0], 2 * coarse[1]) for fine, coarse in itertools.pairwise(sizes))
    assert max(sizes[-1]) <= chunk
    assert spec.levels == 1 or max(sizes[-2]) > chunk
    added = sizes[0][0] - width, sizes[0][1] - height
    assert all(0 <= n < 2 ** (spec.levels - 1) for n in added)


def test_a_small_map_has_one_level_of_its_own_size() -> None:
    assert make_spec((7, 3), 512).level_sizes == ((7, 3),)


def test_an_impossible_spec_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5 px"):
        make_spec((0, 5))
    with pytest.raises(ValueError, match="chunks of 15 px"):
        make_spec(chunk=15)
    with pytest.raises(ValueError, match="0 classes"):
        MapSpec("a", (5, 5), (), 1.0)
    with pytest.raises(ValueError, match="nan µm/px"):
        MapSpec("a", (5, 5), CLASSES, float("nan"))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    spec = make_spec()
    probs_KHW, labels_HW = random_map(spec)
    store = write_map(tmp_path / "a.ome.zarr", spec, probs_KHW, labels_HW)
    np.testing.assert_array_equal(read(store.path, "0"), probs_KHW)
    np.testing.assert_array_equal(read(store.path, "labels/classes/0"), labels_HW)


def test_pyramid_equals_a_slow_reference(tmp_path: Path) -> None:
    spec = make_spec((75, 45))
    probs_KHW, labels_HW = random_map(spec)
    path = write_map(tmp_path / "a.ome.zarr", spec, probs_KHW, labels_HW).path
    build_pyramid(path, spec)
    assert spec.levels == 4
    for level in range(1, spec.levels):
        probs_KHW = np.stack([slow_mean(channel_HW) for channel_HW in probs_KHW])
        labels_HW = slow_majority(labels_HW)
        np.testing.assert_array_equal(read(path, f"{level}"), probs_KHW)
        np.testing.assert_array_equal(read(path, f"labels/classes/{level}"), labels_HW)


def test_the_chunks_of_the_pyramid_are_those_that_zarr_writes(tmp_path: Path) -> None:
    spec = make_spec((75, 45))
    probs_KHW, labels_HW = random_map(spec)
    probs_KHW[1, :, :40] = labels_HW[:, :40] = 0  # so that some chunks have no file
    ours = write_map(tmp_path / "ours.ome.zarr", spec, probs_KHW, labels_HW).path
    by_zarr = write_map(tmp_path / "zarr.ome.zarr", spec, probs_KHW, labels_HW).path
    build_pyramid(ours, spec)
    for level in range(1, spec.levels):
        for name in (f"{level}", f"labels/classes/{level}"):
            zarr.open_array(by_zarr, path=name, mode="r+")[...] = read(ours, name)
    assert contents(ours) == contents(by_zarr)
    assert not (ours / "1" / "1" / "0" / "0").exists()


def test_means_round_half_up_and_do_not_overflow() -> None:
    quads = np.array([[255, 255, 0, 1, 0, 0], [255, 255, 1, 0, 1, 0]], np.uint8)
    assert halve_probs(quads).tolist() == [[255, 1, 0]]


def test_majority_breaks_ties_towards_the_smallest_class_and_background_last() -> None:
    quads = np.array([[0, 0, 3, 2, 0, 0, 4, 0, 255, 0], [1, 1, 2, 3, 0, 5, 2, 0, 254, 0]], np.uint8)
    assert halve_labels(quads).tolist() == [[1, 2, 0, 0, 0]]
    assert halve_labels(np.array([[255, 0], [255, 0]], np.uint8)).tolist() == [[255]]


def test_a_block_returns_its_files_and_changes_no_others(tmp_path: Path) -> None:
    spec = make_spec((64, 32))
    create_store(tmp_path / "a.ome.zarr", spec)
    store = MapStore(tmp_path / "a.ome.zarr", spec)
    before = contents(store.path)
    probs_KHW, labels_HW = np.zeros((3, 32, 32), np.uint8), np.zeros((32, 32), np.uint8)
    probs_KHW[1, 0, 31] = 7
    labels_HW[20, 2] = 2
    files = store.write_block(Box(32, 0, 32, 32), probs_KHW, labels_HW)
    assert files == (Path("0/1/0/3"), Path("labels/classes/0/1/2"))
    after = contents(store.path)
    assert set(after) - set(before) == {str(file) for file in files}
    assert all(after[name] == before[name] for name in before)
    assert set(files) < set(store.block_files(Box(32, 0, 32, 32)))
    assert len(store.block_files(Box(32, 0, 32, 32))) == 4 * (len(CLASSES) + 1)


def test_a_chunk_that_became_empty_is_removed_from_every_level(tmp_path: Path) -> None:
    spec = make_spec((64, 32))
    store = write_map(tmp_path / "a.ome.zarr", spec, *random_map(spec))
    build_pyramid(store.path, spec)
    for box in blocks(spec, 32):
        assert store.write_block(box, np.zeros((3, 32, 32), np.uint8), np.zeros((32, 32), np.uint8)) == ()
    build_pyramid(store.path, spec)
    create_store(tmp_path / "empty.ome.zarr", spec)
    assert contents(store.path) == contents(tmp_path / "empty.ome.zarr")


def test_pixels_beyond_the_slide_are_stored_as_zero(tmp_path: Path) -> None:
    spec = make_spec((75, 45))
    probs_KHW, labels_HW = random_map(spec)
    create_store(tmp_path / "a.ome.zarr", spec)
    store = MapStore(tmp_path / "a.ome.zarr", spec)
    for box in blocks(spec, 32):
        inside = np.zeros((box.height, box.width), bool)
        inside[: max(0, 45 - box.y), : max(0, 75 - box.x)] = True
        probs = np.where(inside, cut(probs_KHW, box), np.uint8(99))
        store.write_block(box, probs, np.where(inside, cut(labels_HW, box), np.uint8(3)))
    np.testing.assert_array_equal(read(store.path, "0"), probs_KHW)
    np.testing.assert_array_equal(read(store.path, "labels/classes/0"), labels_HW)


@pytest.mark.parametrize(
    "box", [Box(8, 0, 16, 16), Box(0, 0, 20, 16), Box(0, 0, 16, 44), Box(-16, 0, 32, 16), Box(80, 0, 16, 16)]
)
def test_a_block_of_partial_chunks_is_refused_with_its_position(tmp_path: Path, box: Box) -> None:
    spec = make_spec((75, 45))
    create_store(tmp_path / "a.ome.zarr", spec)
    store = MapStore(tmp_path / "a.ome.zarr", spec)
    probs_KHW = np.ones((3, box.height, box.width), np.uint8)
    with pytest.raises(ValueError, match=rf"x={box.x}, .*chunks of 16 px.*75 x 45 px"):
        store.write_block(box, probs_KHW, probs_KHW[0])
    assert not (store.path / "0" / "0").exists()


def test_a_block_may_end_at_the_maps_edge(tmp_path: Path) -> None:
    spec = make_spec((75, 45))
    create_store(tmp_path / "a.ome.zarr", spec)
    box = Box(64, 32, 11, 13)
    store = MapStore(tmp_path / "a.ome.zarr", spec)
    files = store.write_block(box, np.full((3, 13, 11), 5, np.uint8), np.ones((13, 11), np.uint8))
    assert [str(file) for file in files] == ["0/0/2/4", "0/1/2/4", "0/2/2/4", "labels/classes/0/2/4"]
    assert (read(store.path, "0") == 5).sum() == 3 * 13 * 11


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    spec = make_spec((64, 32))
    create_store(tmp_path / "a.ome.zarr", spec)
    store, box = MapStore(tmp_path / "a.ome.zarr", spec), Box(0, 0, 16, 16)
    probs_KHW, labels_HW = np.zeros((3, 16, 16), np.uint8), np.zeros((16, 16), np.uint8)
    with pytest.raises(ValueError, match=r"probs_KHW is uint8 \(2, 16, 16\)"):
        store.write_block(box, probs_KHW[:2], labels_HW)
    with pytest.raises(ValueError, match="labels_HW is int64"):
        store.write_block(box, probs_KHW, labels_HW.astype(np.int64))
    with pytest.raises(ValueError, match="label 4 in a map of 3 classes"):
        store.write_block(box, probs_KHW, labels_HW + 4)
    with pytest.raises(ValueError, match="remove the working folder"):
        MapStore(store.path, make_spec((128, 32))).write_block(box, probs_KHW, labels_HW)


def test_the_files_are_those_that_zarr_writes(tmp_path: Path) -> None:
    spec = make_spec((75, 45))
    probs_KHW, labels_HW = random_map(spec)
    probs_KHW[1, :32, :48] = 0
    labels_HW[16:] = 0
    store = write_map(tmp_path / "a.ome.zarr", spec, probs_KHW, labels_HW)
    create_store(tmp_path / "b.ome.zarr", spec)
    zarr.open_array(tmp_path / "b.ome.zarr", path="0", mode="r+")[...] = probs_KHW
    zarr.open_array(tmp_path / "b.ome.zarr", path="labels/classes/0", mode="r+")[...] = labels_HW
    assert contents(store.path) == contents(tmp_path / "b.ome.zarr")


def test_an_existing_store_is_not_overwritten(tmp_path: Path) -> None:
    create_store(tmp_path / "a.ome.zarr", make_spec())
    with pytest.raises(FileExistsError, match=r"a\.ome\.zarr: already exists"):
        create_store(tmp_path / "a.ome.zarr", make_spec())


def test_bytes_do_not_depend_on_order_or_threads(tmp_path: Path) -> None:
    spec = make_spec((300, 200), 32)
    probs_KHW, labels_HW = random_map(spec)
    first = write_map(tmp_path / "a.ome.zarr", spec, probs_KHW, labels_HW, side=64)
    create_store(tmp_path / "b.ome.zarr", spec)
    second = pickle.loads(pickle.dumps(MapStore(tmp_path / "b.ome.zarr", spec)))
    with ThreadPoolExecutor(4) as pool:
        boxes = blocks(spec, 64)[::-1]
        list(pool.map(lambda box: second.write_block(box, cut(probs_KHW, box), cut(labels_HW, box)), boxes))
    build_pyramid(first.path, spec)
    build_pyramid(second.path, spec)
    np.testing.assert_array_equal(read(second.path, "0"), probs_KHW)
    assert contents(first.path) == contents(second.path)
    build_pyramid(second.path, spec)
    assert contents(first.path) == contents(second.path)


def test_leftover_partial_files_are_removed(tmp_path: Path) -> None:
    spec = make_spec((64, 32))
    store = write_map(tmp_path / "a.ome.zarr", spec, *random_map(spec))
    before = contents(store.path)
    (store.path / "0" / "1" / "0" / ".2.0a1b.partial").write_bytes(b"half")
    (store.path / "labels" / "classes" / "0" / "1" / ".0.77.partial").write_bytes(b"half")
    assert sorted(broken_ome_zarr_rules(store.path)) == [
        "0/1/0/.2.0a1b.partial: is a partly written file",
        "labels/classes/0/1/.0.77.partial: is a partly written file",
    ]
    sweep_partial_files(store.path)
    assert contents(store.path) == before


def finished(path: Path, size_out: tuple[int, int], empty: bool = False, chunk: int = 16) -> Path:
    spec = make_spec(size_out, chunk)
    probs_KHW, labels_HW = random_map(spec)
    write_map(path, spec, probs_KHW * (not empty), labels_HW * (not empty), side=2 * chunk)
    build_pyramid(path, spec)
    return path


@pytest.mark.parametrize(
    ("size_out", "empty"),
    [((75, 45), False), ((75, 45), True), ((16, 16), False), ((5, 3), False), ((300, 1), False)],
)
def test_a_map_follows_every_rule_of_the_viewers(tmp_path: Path, size_out: tuple[int, int], empty: bool) -> None:
    path = finished(tmp_path / "a.ome.zarr", size_out, empty)
    assert broken_ome_zarr_rules(path) == []
    yaozarrs.validate_zarr_store(str(path))
    model = ome_zarr_models.open_ome_zarr(zarr.open_group(path, mode="r"), version="0.4")
    assert type(model).__name__ == "Image"
    labels = ome_zarr_models.open_ome_zarr(zarr.open_group(path / "labels" / "classes", mode="r"), version="0.4")
    assert type(labels).__name__ == "ImageLabel"


def test_the_rules_detect_what_breaks_viewers(tmp_path: Path) -> None:
    path = finished(tmp_path / "a.ome.zarr", (75, 45))
    zarray = path / "1" / ".zarray"
    good = zarray.read_text()
    for old, new in (('"shuffle": 1', '"shuffle": -1'), ('"zstd"', '"lz4"'), ('separator": "/"', 'separator": "."')):
        assert old in good
        zarray.write_text(good.replace(old, new))
        assert len(broken_ome_zarr_rules(path)) == 1
    zarray.write_text(good)
    xml = path / "OME" / "METADATA.ome.xml"
    xml.write_text(xml.read_text(encoding="utf-8").replace('SizeX="80"', 'SizeX="75"'), encoding="utf-8")
    assert broken_ome_zarr_rules(path) == [
        "OME-XML has the sizes CYXZT [3, 48, 75, 1, 1], but the array has [3, 48, 80]"
    ]
    xml.write_text(xml.read_text(encoding="utf-8").replace('SizeX="75"', 'SizeX="80"'), encoding="utf-8")
    zattrs = path / ".zattrs"
    attributes = json.loads(zattrs.read_text(encoding="utf-8"))
    attributes["omero"]["rdefs"] = {"model": "color"}
    zattrs.write_text(json.dumps(attributes), encoding="utf-8")
    assert broken_ome_zarr_rules(path) == [
        "omero.rdefs.model is color, which makes Vitessce show three classes as red, green and blue"
    ]


def test_the_ome_xml_contains_pixel_size_and_names_for_qupath(tmp_path: Path) -> None:
    path = finished(tmp_path / "a.ome.zarr", (75, 45))
    ome = ome_types.from_xml((path / "OME" / "METADATA.ome.xml").read_text(encoding="utf-8"))
    pixels = ome.images[0].pixels
    assert ome.images[0].name == "Schnitt 7 🔬"
    assert (pixels.physical_size_x, pixels.physical_size_y) == (2.012, 2.012)
    assert pixels.physical_size_x_quantity.units == "micrometer"
    assert [channel.name for channel in pixels.channels] == [one.name for one in CLASSES]
    # Two casts in Bio-Formats fail on JSON numbers without a decimal point.
    window = json.loads((path / ".zattrs").read_text())["omero"]["channels"][0]["window"]
    assert all(isinstance(value, float) for value in window.values())


def test_characters_that_xml_cannot_contain_are_replaced_in_the_slide_name(tmp_path: Path) -> None:
    create_store(tmp_path / "a.ome.zarr", make_spec(name="a\udcff\x07b"))
    assert broken_ome_zarr_rules(tmp_path / "a.ome.zarr") == []
    xml = (tmp_path / "a.ome.zarr" / "OME" / "METADATA.ome.xml").read_text(encoding="utf-8")
    assert ome_types.from_xml(xml).images[0].name == "a??b"


def write_row_in_process(path: Path, spec: MapSpec, y: int) -> None:
    probs_KHW, labels_HW = random_map(spec)
    store = MapStore(path, spec)
    for box in blocks(spec, 32):
        if box.y == y:
            store.write_block(box, cut(probs_KHW, box), cut(labels_HW, box))


@pytest.mark.full
def test_processes_write_disjoint_blocks_at_once(tmp_path: Path) -> None:
    spec = make_spec((75, 60))
    create_store(tmp_path / "a.ome.zarr", spec)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_row_in_process, args=(tmp_path / "a.ome.zarr", spec, y)) for y in (0, 32)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    whole = write_map(tmp_path / "b.ome.zarr", spec, *random_map(spec))
    assert contents(tmp_path / "a.ome.zarr") == contents(whole.path)


def test_napari_shows_one_layer_per_class_and_the_labels_in_micrometers(tmp_path: Path) -> None:
    path = finished(tmp_path / "a.ome.zarr", (75, 45))
    reader = napari_get_reader(str(path))
    assert reader is not None
    layers = {kind: (data, info) for data, info, kind in reader(str(path)) if kind in ("image", "labels")}
    data, info = layers["image"]
    assert [level.shape for level in data] == [(3, 48, 80), (3, 24, 40), (3, 12, 20), (3, 6, 10)]
    np.testing.assert_array_equal(np.asarray(data[0]), random_map(make_spec((75, 45)))[0])
    assert info["name"] == [f"Schnitt 7 🔬: {one.name}" for one in CLASSES]
    assert info["scale"] == [2.012, 2.012]
    assert info["units"] == ("micrometer", "micrometer")
    assert info["contrast_limits"] == [[0, 255]] * 3
    np.testing.assert_allclose(
        [cmap.colors[1][:3] for cmap in info["colormap"]], np.array([one.color for one in CLASSES]) / 255
    )
    labels, info = layers["labels"]
    assert [level.shape for level in labels] == [(48, 80), (24, 40), (12, 20), (6, 10)]
    assert info["properties"]["name"] == [one.name for one in CLASSES]
    assert info["scale"] == [2.012, 2.012]
