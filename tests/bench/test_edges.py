from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely

from models.tissue_class import TissueClass
from pipeline.formats.features import Feature
from pipeline.formats.polygons import block_regions
from pipeline.slide.recipe import segment_slide
from tests.bench.edges import axis_parallel_share, bare_pixels, drawn_labels, print_glass
from tests.pipeline.fakes import SMALL, color_predictor
from tests.slides import PINK, painted, write_slide


def test_the_share_of_axis_parallel_length() -> None:
    triangle = shapely.Polygon([(0, 0), (4, 0), (4, 3)])
    assert axis_parallel_share([triangle]) == pytest.approx(7 / 12)
    assert axis_parallel_share([shapely.LineString([(0, 0), (1, 1)]), shapely.box(0, 0, 1, 1)]) == pytest.approx(
        4 / (4 + 2**0.5)
    )


def test_drawn_labels_are_those_of_the_map() -> None:
    labels_HW = np.zeros((20, 30), np.uint8)
    labels_HW[2:15, 3:28] = 1
    labels_HW[5:9, 6:12] = 2
    labels_HW[10:13, 20:24] = 0

    def scaled(xy: np.ndarray) -> np.ndarray:
        return 8 * xy

    classes = TissueClass("a", (1, 1, 1)), TissueClass("b", (2, 2, 2))
    features = [
        Feature(
            "", region.label, classes[region.label - 1], 0.0, shapely.transform(region.geometry_out, lambda xy: 8 * xy)
        )
        for region in block_regions(labels_HW, (0, 0), 0, 0)
        if region.label
    ]
    np.testing.assert_array_equal(drawn_labels(features, (30, 20), 8.0), labels_HW)


def test_bare_pixels_are_as_bright_as_glass(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.svs", painted((400, 300), ((80, 80, 200, 160), PINK)), mpp=2.0)
    expected_HW = np.ones((150, 200), bool)
    expected_HW[40:120, 40:140] = False
    np.testing.assert_array_equal(bare_pixels(path, 4.0), expected_HW)


@pytest.mark.full
def test_a_class_without_polygons_is_printed_without_a_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_slide(tmp_path / "slide.svs", painted((1280, 832), ((160, 96, 960, 640), PINK)), mpp=1.0)
    folder = segment_slide(path, tmp_path / "out", color_predictor(), SMALL).folder
    assert folder is not None
    print_glass(folder, path)
    assert capsys.readouterr().out.splitlines() == [
        "slide: class-0: 0.0% of the polygons and 0.0% of the labels is glass",
        "slide: class-1: no pixels of the polygons and no pixels of the labels is glass",
    ]
