from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.results.record import read_run
from pipeline.slide.recipe import segment_slide
from tests.bench.areas import Areas, areas_by_class, main
from tests.pipeline.fakes import REGIONS, SMALL, color_predictor
from tests.slides import PURPLE, painted, write_slide

SPECK = ((224, 480, 48, 32), PURPLE)
"""A speck of 1,536 µm² in the pink region, on whole pixels of the map."""


def result_of(tmp_path: Path) -> Path:
    """Return a result whose polygons leave out `SPECK`, which is in the label image."""
    path = write_slide(tmp_path / "slide.svs", painted((1280, 832), *REGIONS, SPECK), mpp=1.0)
    config = replace(SMALL, min_area_um2=2000.0)
    folder = segment_slide(path, tmp_path / "out", color_predictor(), config).folder
    assert folder is not None
    return folder


def found(folder: Path) -> dict[str, Areas]:
    run = read_run(folder)
    assert run is not None
    return areas_by_class(folder, run)


def test_a_speck_counts_for_its_class_in_the_label_image_and_for_its_neighbor_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = result_of(tmp_path)
    pink, purple = found(folder).values()
    purple_mm2, speck_mm2 = 320 * 256 / 1e6, 48 * 32 / 1e6
    assert purple[:3] == pytest.approx([purple_mm2] * 3)
    assert pink[:3] == pytest.approx([960 * 640 / 1e6 - purple_mm2] * 3)
    assert purple.labels == pytest.approx(purple_mm2 + speck_mm2)
    assert pink.labels == pytest.approx(pink.report - speck_mm2)
    assert purple.difference == pytest.approx(0.01875)
    main([str(folder)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "class-0: 0.5325, 0.5325, 0.5325, 0.5309 (-0.3%)",
        "class-1: 0.0819, 0.0819, 0.0819, 0.0835 (+1.9%)",
        "sum: 0.6144, 0.6144, 0.6144, 0.6144 (+0.0%)",
        "tissue: 0.6144",
    ]


def test_a_class_that_only_the_label_image_has_is_printed_without_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_slide(tmp_path / "slide.svs", painted((1280, 832), REGIONS[0], SPECK), mpp=1.0)
    folder = segment_slide(path, tmp_path / "out", color_predictor(), replace(SMALL, min_area_um2=2000.0)).folder
    assert folder is not None
    main([str(folder)])
    assert "class-1: 0.0000, 0.0000, 0.0000, 0.0015 (no polygons)\n" in capsys.readouterr().out


@pytest.mark.full
def test_a_missing_polygon_shows_in_the_areas_of_its_file(tmp_path: Path) -> None:
    folder = result_of(tmp_path)
    path = folder / "slide.geojson"
    collection = json.loads(path.read_text(encoding="utf-8"))
    del collection["features"][0]
    path.write_text(json.dumps(collection), encoding="utf-8")
    assert any(areas.geojson < 0.99 * areas.parquet for areas in found(folder).values())


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not a result of wsi-segment"):
        main([str(tmp_path)])
