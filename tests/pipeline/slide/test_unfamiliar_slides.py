"""A slide that does not look like the training data has a warning in every output; one that does has none."""

from __future__ import annotations

import csv
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.predictor import Predictor
from pipeline.checks.result import broken_rules
from pipeline.formats.familiarity import LIMIT
from pipeline.results.record import read_run
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary
from pipeline.slide.recipe import segment_slide
from tests.pipeline.fakes import SMALL, published
from tests.pipeline.small_bundle import familiar_bundle, small_bundle
from tests.slides import PINK, painted, write_slide

WARNING = " % of the tissue of this slide does not look like the model's training data (paint, on glass)"


def grainy(strength: int) -> NDArray[np.uint8]:
    """Return tissue of 448×320 pixels on glass, with noise of this strength."""
    rgb_HWC = painted((576, 448), ((64, 64, 448, 320), PINK))
    grain_HW1 = np.random.default_rng(1).integers(-strength, strength + 1, (*rgb_HWC.shape[:2], 1))
    on_tissue_HW1 = (rgb_HWC != rgb_HWC[0, 0]).any(axis=2, keepdims=True)
    return np.asarray(np.clip(rgb_HWC + grain_HW1 * on_tissue_HW1, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Return a predictor for which slides with weak noise are familiar."""
    return Predictor.from_bundle(familiar_bundle(tmp_path_factory.mktemp("bundle") / "b", grainy(6)), runtime="torch")


def segmented(folder: Path, predictor: Predictor, strength: int, block_out: int) -> SlideResult:
    slide = write_slide(folder / "slide.svs", grainy(strength), mpp=1.0)
    result = segment_slide(slide, folder / "results", predictor, replace(SMALL, block_out=block_out))
    assert result.folder is not None
    assert not [text for wrong in broken_rules(result.folder).values() for text in wrong]
    return result


@pytest.fixture(scope="module")
def familiar(tmp_path_factory: pytest.TempPathFactory, predictor: Predictor) -> SlideResult:
    return segmented(tmp_path_factory.mktemp("familiar"), predictor, 6, block_out=256)


@pytest.fixture(scope="module")
def unfamiliar(tmp_path_factory: pytest.TempPathFactory, predictor: Predictor) -> SlideResult:
    return segmented(tmp_path_factory.mktemp("unfamiliar"), predictor, 90, block_out=64)


def test_an_unfamiliar_slide_has_a_warning_in_every_output(tmp_path: Path, unfamiliar: SlideResult) -> None:
    result = unfamiliar
    assert result.folder is not None
    run = read_run(result.folder)
    assert run is not None
    assert run.familiarity is not None
    assert run.familiarity.unfamiliar_share > 0.9
    assert run.familiarity.l0_per_px == 32
    warning = f"{100 * run.familiarity.unfamiliar_share:.0f}{WARNING}"
    assert result.warnings == run.warnings == (warning,)
    assert (run.scope, run.limits) == ("paint, on glass", "For tests.")
    with Image.open(result.folder / "familiarity.png") as picture:
        values_HW = np.asarray(picture)
    assert values_HW.shape == (14, 18)
    assert (values_HW[4:10, 4:14] > LIMIT).all()
    assert (values_HW[:, 16:] == 0).all()
    page = (result.folder / "index.html").read_text(encoding="utf-8")
    assert f"Warning:</b> {warning.partition(' look')[0]}" in page
    assert "For tests." in page
    write_summary(tmp_path, [result])
    with (tmp_path / "summary.csv").open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["unfamiliar_share"]) == pytest.approx(run.familiarity.unfamiliar_share, abs=1e-4)
    assert row["warnings"] == warning


def test_a_picture_that_an_image_program_saved_again_is_repaired(
    tmp_path: Path, predictor: Predictor, unfamiliar: SlideResult
) -> None:
    assert unfamiliar.folder is not None
    output = shutil.copytree(unfamiliar.folder.parent, tmp_path / "results")
    picture = output / "slide" / "familiarity.png"
    with Image.open(picture) as image:
        image.convert("RGBA").save(picture)
    slide = unfamiliar.folder.parents[1] / "slide.svs"
    repaired = segment_slide(slide, output, predictor, replace(SMALL, block_out=64, repair=True))
    assert repaired.status == "done"
    assert published(output / "slide") == published(unfamiliar.folder)


def test_a_familiar_slide_has_no_warning(familiar: SlideResult) -> None:
    assert familiar.warnings == ()
    assert familiar.columns["unfamiliar_share"] == 0
    assert familiar.folder is not None
    assert "this slide does not look like" not in (familiar.folder / "index.html").read_text("utf-8")


def test_a_warning_takes_room_in_the_preview(familiar: SlideResult, unfamiliar: SlideResult) -> None:
    heights = []
    for folder in (familiar.folder, unfamiliar.folder):
        assert folder is not None
        with Image.open(folder / "preview.png") as preview:
            heights.append(preview.height)
    assert heights[1] > heights[0]


def test_a_model_without_statistics_says_once_that_it_cannot_tell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        predictor = Predictor.from_bundle(small_bundle(tmp_path / "b"), runtime="torch")
        result = segmented(tmp_path, predictor, 90, block_out=256)
    told = [record.getMessage() for record in caplog.records if "no statistics of its" in record.getMessage()]
    assert told == [
        "test: this model has no statistics of its training data, so slides that differ get no warning; add them "
        "with wsi-familiarity"
    ]
    assert result.warnings == ()
    assert result.columns["unfamiliar_share"] is None
    assert result.folder is not None
    assert not (result.folder / "familiarity.png").exists()
    assert "It is not known whether this slide resembles" in (result.folder / "index.html").read_text("utf-8")
