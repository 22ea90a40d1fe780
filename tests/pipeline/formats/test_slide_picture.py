from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.formats import slide_picture
from pipeline.formats.features import read_features
from pipeline.formats.ome_zarr import MapSpec
from pipeline.formats.slide_picture import SlidePicture, picture_slide
from pipeline.slide.plan import plan_slide
from pipeline.slide.recipe import segment_slide
from tests.pipeline.fakes import COLORS, CORNER, REGIONS, SMALL, color_predictor, labels_of, run_of, stating_bounds
from tests.slides import GLASS, painted, write_slide
from wsi.readers import READERS

CLASSES = tuple(TissueClass(f"class-{i}", color) for i, color in enumerate(COLORS))


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a slide with bounds and segment it."""
    folder = tmp_path_factory.mktemp("picture")
    shapes = [((x + CORNER[0], y + CORNER[1], w, h), color) for (x, y, w, h), color in REGIONS]
    path = write_slide(folder / "slide.svs", painted((1280 + 128, 832 + 64), *shapes), mpp=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "openslide", stating_bounds(READERS["openslide"]))
        segment_slide(path, folder, color_predictor(), SMALL)
    return path


def picture_of(path: Path, monkeypatch: pytest.MonkeyPatch, longest_px: int) -> SlidePicture:
    monkeypatch.setitem(READERS, "openslide", stating_bounds(READERS["openslide"]))
    monkeypatch.setattr(slide_picture, "LONGEST_PX", longest_px)
    _, slide, tissue, plan = plan_slide(path, color_predictor().card, SMALL)
    with slide:
        spec = MapSpec("slide", plan.grid.size_out, CLASSES, plan.grid.mpp_out, chunk=32)
        features = read_features(path.parent / "slide" / "slide.parquet", CLASSES)
        return picture_slide(slide, tissue, plan.grid, spec, features)


@pytest.mark.parametrize(
    ("longest_px", "size"),
    # The reader reduces by whole factors: 1, 6 and then to 200, 7, 13, 32.
    [(1600, (1280, 832)), (200, (200, 130)), (190, (183, 119)), (100, (99, 64)), (40, (40, 26))],
)
def test_each_pixel_has_the_class_of_what_is_there(
    slide_path: Path, monkeypatch: pytest.MonkeyPatch, longest_px: int, size: tuple[int, int]
) -> None:
    picture = picture_of(slide_path, monkeypatch, longest_px)
    height, width = picture.labels_HW.shape
    assert (width, height) == size
    assert picture.rgb_HWC.shape == (height, width, 3)
    assert picture.um_per_px == pytest.approx(1280 / width, rel=0.01)
    palette_KC = np.array([GLASS, *COLORS], dtype=float)
    distance_KHW = np.abs(palette_KC[:, None, None] - picture.rgb_HWC).sum(axis=3)
    # Compare only pixels of one color. Border pixels mix two.
    clear_HW = distance_KHW.min(axis=0) < 6
    assert clear_HW.mean() > 0.7
    wrong_HW = clear_HW & (distance_KHW.argmin(axis=0) != picture.labels_HW)
    # The border of the tissue is as coarse as the tissue mask.
    assert wrong_HW.mean() < 0.03
    inside_HW = (picture.labels_HW == 2) ^ (distance_KHW.argmin(axis=0) == 2)
    assert not (inside_HW & clear_HW).any()


def test_a_picture_has_the_classes_of_its_map(slide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = picture_of(slide_path, monkeypatch, 1600)
    assert picture.classes == CLASSES
    assert np.unique(picture.labels_HW).tolist() == [0, 1, 2]
    assert (picture.labels_HW == 2).sum() == 320 * 256


@pytest.mark.full
def test_a_picture_shows_no_region_that_is_too_small_for_a_polygon(tmp_path: Path) -> None:
    """The label image has the specks, and the polygons, areas and legend do not."""
    specks = [((200 + 40 * i, 480, 12, 12), COLORS[1]) for i in range(20)]
    path = write_slide(tmp_path / "slide.svs", painted((1280, 832), REGIONS[0], *specks), mpp=1.0)
    config = replace(SMALL, min_area_um2=2000.0)
    result = segment_slide(path, tmp_path / "out", color_predictor(), config)
    assert result.folder is not None
    assert np.unique(labels_of(result.folder)).tolist() == [0, 1, 2]
    assert run_of(result.folder)["class_areas_mm2"]["class-1"] == 0
    _, slide, tissue, plan = plan_slide(path, color_predictor().card, config)
    with slide:
        spec = MapSpec("slide", plan.grid.size_out, CLASSES, plan.grid.mpp_out, chunk=32)
        features = read_features(result.folder / "slide.parquet", CLASSES)
        picture = picture_slide(slide, tissue, plan.grid, spec, features)
    assert np.unique(picture.labels_HW).tolist() == [0, 1]
    with Image.open(result.folder / "preview.png") as preview:
        purple_HW = (np.asarray(preview.convert("RGB")) == COLORS[1]).all(axis=2)
    panel_HW = purple_HW[:, purple_HW.shape[1] // 2 :]
    assert purple_HW.any(), "the slide on the left has the specks"
    assert not panel_HW.any(), "its classes on the right do not"
