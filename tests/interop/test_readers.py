"""Other programs' readers agree with each other on what a run has published, on slides with and without bounds."""

from __future__ import annotations

import geopandas
import numpy as np
import ome_types
import ome_zarr_models
import pyarrow.parquet as pq
import pytest
import shapely
import yaozarrs
import zarr
from napari_ome_zarr import napari_get_reader
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter

from tests.interop.conftest import Shown
from tests.pipeline.fakes import run_of

UM2_PER_MM2 = 1e6


def parquet_of(shown: Shown) -> geopandas.GeoDataFrame:
    return geopandas.read_parquet(shown.folder / f"{shown.folder.name}.parquet")


def truth(shown: Shown, shape_HW: tuple[int, ...], l0_per_px: float) -> NDArray[np.uint8]:
    """Return the labels at the centers of a map's pixels."""
    ys, xs = ((np.arange(count) + 0.5) * l0_per_px for count in shape_HW)
    return np.array([[shown.label_at(x, y) for x in xs] for y in ys], np.uint8)


def test_public_validators_accept_the_store_and_its_labels(shown: Shown) -> None:
    yaozarrs.validate_zarr_store(str(shown.store))
    for group, kind in ((shown.store, "Image"), (shown.store / "labels" / "classes", "ImageLabel")):
        model = ome_zarr_models.open_ome_zarr(zarr.open_group(group, mode="r"), version="0.4")
        assert type(model).__name__ == kind


def test_napari_shows_classes_in_their_colors_and_places(shown: Shown) -> None:
    reader = napari_get_reader(str(shown.store))
    assert reader is not None
    layers = {kind: (data, info) for data, info, kind in reader(str(shown.store))}
    assert set(layers) == {"image", "labels"}
    levels, info = layers["image"]
    names = [f"class-{k}" for k in range(len(shown.colors))]
    assert info["name"] == [f"{shown.folder.name}: {name}" for name in names]
    assert info["visible"] == [True] * len(names)
    colors = np.array([colormap.colors[1][:3] for colormap in info["colormap"]])
    np.testing.assert_allclose(colors * 255, shown.colors, atol=0.5)
    # At each level, the pixels of one class alone are the regions that were painted.
    for number, level in enumerate(levels):
        probs_KHW = np.asarray(level)
        um_per_px = info["scale"][0] * 2**number
        expected_HW = truth(shown, probs_KHW.shape[1:], um_per_px / shown.mpp)
        for label in range(len(names) + 1):
            # Border pixels are mixed, and the tissue mask may cut the outer border by a pixel.
            inner_HW = minimum_filter(expected_HW == label, size=3 if number else 5)
            assert inner_HW.sum() > 10
            wanted_K = [255 * (label == k + 1) for k in range(len(names))]
            np.testing.assert_allclose(
                probs_KHW[:, inner_HW].T, np.broadcast_to(wanted_K, (inner_HW.sum(), len(names))), atol=2
            )
    labels, label_info = layers["labels"]
    assert info["scale"] == label_info["scale"]
    assert label_info["properties"]["name"][-len(names) :] == names
    assert [level.shape for level in labels] == [level.shape[1:] for level in levels]
    expected_HW = truth(shown, labels[0].shape, info["scale"][0] / shown.mpp)
    assert (np.asarray(labels[0]) == expected_HW).mean() > 0.98


def test_geopandas_adds_up_to_the_areas_of_the_run(shown: Shown) -> None:
    frame = parquet_of(shown)
    run = run_of(shown.folder)
    assert frame.crs is None
    mm2_per_px = shown.mpp**2 / UM2_PER_MM2
    for measured in (frame.area * mm2_per_px, frame["area_mm2"]):
        # Both are sums of the same numbers in different orders.
        assert measured.groupby(frame["class"]).sum().to_dict() == pytest.approx(run["class_areas_mm2"], rel=1e-9)
    painted = {}
    for label in range(len(shown.colors), 0, -1):
        boxes = {number: shapely.box(x, y, x + w, y + h) for (x, y, w, h), number in shown.regions}
        above = shapely.union_all([box for number, box in boxes.items() if number > label])
        painted[f"class-{label - 1}"] = boxes[label].difference(above).area * mm2_per_px
    # The tissue mask is coarser than the map and may cut its outer border by a pixel.
    assert run["class_areas_mm2"] == pytest.approx(painted, rel=0.02)


def test_polygons_cover_the_pixels_of_their_class(shown: Shown) -> None:
    reader = napari_get_reader(str(shown.store))
    assert reader is not None
    layers = {kind: (data, info) for data, info, kind in reader(str(shown.store))}
    levels, info = layers["labels"]
    labels_HW = np.asarray(levels[0])
    l0_per_px = info["scale"][0] / shown.mpp
    ys, xs = (np.arange(count) + 0.5 for count in labels_HW.shape)
    centers = shapely.points(*np.meshgrid(xs * l0_per_px, ys * l0_per_px))
    frame = parquet_of(shown)
    drawn_HW = np.zeros_like(labels_HW)
    for label, polygon in zip(frame["label"], frame.geometry, strict=True):
        drawn_HW[shapely.contains(polygon, centers)] = label
    np.testing.assert_array_equal(drawn_HW, labels_HW)


def test_geojson_and_geoparquet_contain_the_same_polygons(shown: Shown) -> None:
    frame = parquet_of(shown)
    drawn = geopandas.read_file(shown.folder / f"{shown.folder.name}.geojson", engine="pyogrio")
    assert list(drawn["id"]) == list(frame["id"])
    assert all(drawn.geometry.to_numpy() == frame.geometry.to_numpy())


def test_a_table_of_areas_needs_no_geometry_library(shown: Shown) -> None:
    table = pq.read_table(shown.folder / f"{shown.folder.name}.parquet", columns=["class", "area_mm2"])
    sums = table.group_by("class").aggregate([("area_mm2", "sum")]).to_pylist()
    areas = {row["class"]: row["area_mm2_sum"] for row in sums}
    assert areas == pytest.approx(run_of(shown.folder)["class_areas_mm2"], rel=1e-9)


def test_the_ome_xml_contains_size_pixel_size_names_and_colors(shown: Shown) -> None:
    ome = ome_types.from_xml((shown.store / "OME" / "METADATA.ome.xml").read_bytes())
    (image,) = ome.images
    pixels = image.pixels
    assert pixels is not None
    probs_CYX = zarr.open_array(shown.store, path="0", mode="r")
    assert (pixels.size_c, pixels.size_y, pixels.size_x) == probs_CYX.shape
    assert pixels.type.value == probs_CYX.dtype.name == "uint8"
    # The networks of the tests work at 1 µm per pixel. A map pixel is 4 model pixels wide.
    assert (pixels.physical_size_x, pixels.physical_size_x_unit.value) == (4.0, "µm")
    assert [channel.name for channel in pixels.channels] == [f"class-{k}" for k in range(len(shown.colors))]
    assert [channel.color.as_rgb_tuple(alpha=False) for channel in pixels.channels] == list(shown.colors)
    assert (pixels.size_x * 4.0, pixels.size_y * 4.0) == tuple(side * shown.mpp for side in shown.size_l0)
