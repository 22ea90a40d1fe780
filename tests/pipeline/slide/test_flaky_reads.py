"""A place of a slide that cannot be read at first, but later can, as on a network drive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.predictor import Predictor
from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled
from pipeline.results.folder import ResultFolder
from pipeline.slide.recipe import segment_slide
from tests.models.networks import ColorClassifier, ColorSegmenter
from tests.pipeline.fakes import COLORS, SMALL, color_predictor, predictor, published, run_of
from tests.slides import PINK, PURPLE, painted, write_slide
from wsi.box import Box
from wsi.readers import READERS, OpenSlideReader

CONFIG = replace(SMALL, backend="openslide", block_out=256)


class Place:
    """Where reads fail: boxes that touch `box` on a level and are narrower than `below`, while it is `broken`."""

    def __init__(self, level: int, box: Box, below: int) -> None:
        self.level, self.box, self.below, self.broken = level, box, below, True

    def fails(self, level: int, box_lv: Box) -> bool:
        common = box_lv.intersect(self.box)
        touched = level == self.level and common.width > 0 and common.height > 0
        return self.broken and touched and box_lv.width < self.below


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    found: Place = request.param

    class Flaky(OpenSlideReader):
        def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
            if found.fails(level, box_lv):
                raise OSError("timed out")
            return super().read(level, box_lv)

    monkeypatch.setitem(READERS, "openslide", Flaky)
    found.broken = True
    return found


def stopped(path: Path, output: Path, network: Predictor, config: SegmentConfig = CONFIG) -> None:
    """Segment a slide up to its last block, and stop."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "segmenting" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(Cancelled):
        segment_slide(path, output, network, config, stop)


def two_levels(folder: Path) -> Path:
    """Write a slide whose thumbnail is read from level 1, and its tiles from level 0."""
    rgb_HWC = painted((2600, 2100), ((100, 100, 600, 300), PINK), ((2060, 1800, 540, 300), PURPLE))
    return write_slide(folder / "slide.svs", rgb_HWC, mpp=1.0, levels=(1, 2))


# At the lower edge, where the abandoned cells are 26 px high: less than the allowed share of the thumbnail.
THUMBNAIL = Place(level=1, box=Box(1030, 1040, 265, 5), below=1 << 30)


@pytest.mark.parametrize("place", [THUMBNAIL], indirect=True)
def test_a_run_that_finds_other_tissue_than_before_does_not_take_its_blocks(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, network = two_levels(tmp_path), color_predictor()
    stopped(path, tmp_path / "out", network, replace(CONFIG, max_bad_share=0.5))
    place.broken = False
    result = segment_slide(path, tmp_path / "out", network, replace(CONFIG, max_bad_share=0.5))
    assert "the unfinished run in this folder found other tissue" in caplog.text
    undisturbed = segment_slide(path, tmp_path / "clean", network, replace(CONFIG, max_bad_share=0.5))
    assert result.folder is not None
    assert undisturbed.folder is not None
    assert published(result.folder) == published(undisturbed.folder)
    assert run_of(result.folder)["resumed_blocks"] == 0


@pytest.mark.full
@pytest.mark.parametrize("place", [THUMBNAIL], indirect=True)
def test_a_repair_that_finds_other_tissue_than_before_does_not_take_its_blocks(place: Place, tmp_path: Path) -> None:
    path, network = two_levels(tmp_path), color_predictor()
    first = segment_slide(path, tmp_path / "out", network, CONFIG)
    assert "mm² could not be read when the tissue was searched for" in first.warnings[0]
    assert first.folder is not None
    place.broken = False
    next(chunk for chunk in sorted(first.folder.rglob("slide.ome.zarr/0/*/*/*")) if chunk.is_file()).unlink()
    repaired = segment_slide(path, tmp_path / "out", network, replace(CONFIG, repair=True))
    undisturbed = segment_slide(path, tmp_path / "clean", network, CONFIG)
    assert repaired.warnings == ()
    assert repaired.areas_mm2 == undisturbed.areas_mm2 != first.areas_mm2
    assert published(tmp_path / "out" / "slide") == published(tmp_path / "clean" / "slide")


class _Blurred(ColorSegmenter):
    """A segmenter whose output depends on the pixels around."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(F.avg_pool2d(x_NCHW, 17, 1, 8))


# The thumbnail is read in one box that is as wide as the slide. The place lies just right of the border of two blocks.
@pytest.mark.full
@pytest.mark.parametrize("place", [Place(level=0, box=Box(1030, 200, 100, 100), below=3072)], indirect=True)
def test_a_block_that_could_not_read_its_margin_is_computed_again(place: Place, tmp_path: Path) -> None:
    rgb_HWC = painted((3072, 512), ((100, 50, 2800, 400), PINK), ((900, 100, 300, 250), PURPLE))
    path = write_slide(tmp_path / "slide.svs", rgb_HWC, mpp=1.0)
    network = predictor(ColorClassifier(COLORS), _Blurred(COLORS, sharpness=4.0))
    config = replace(CONFIG, max_bad_share=0.5)
    stopped(path, tmp_path / "out", network, config)
    place.broken = False
    segment_slide(path, tmp_path / "out", network, config)
    segment_slide(path, tmp_path / "clean", network, config)
    assert published(tmp_path / "out" / "slide") == published(tmp_path / "clean" / "slide")
    assert run_of(tmp_path / "out" / "slide")["resumed_blocks"] > 0


@pytest.mark.full
def test_a_run_that_does_not_record_its_tissue_starts_from_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one of an earlier version."""
    path, network = two_levels(tmp_path), color_predictor()
    stopped(path, tmp_path / "out", network)
    (tmp_path / "out" / ".slide.work" / "tissue.txt").unlink()
    result = segment_slide(path, tmp_path / "out", network, CONFIG)
    assert "does not record its tissue; starting from the beginning" in caplog.text
    assert result.folder is not None
    assert run_of(result.folder)["resumed_blocks"] == 0


@pytest.mark.full
def test_a_run_that_is_killed_while_it_removes_blocks_continues_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, network = two_levels(tmp_path), color_predictor()
    stopped(path, tmp_path / "out", network)

    class KilledError(Exception):
        pass

    def rmtree(folder: Path) -> None:
        raise KilledError(folder)

    folder = ResultFolder(tmp_path / "out" / "slide", tmp_path / "out" / ".slide.work", {})
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("pipeline.results.folder.shutil.rmtree", rmtree)
        folder.resume_only("the digest of other tissue")
    assert not (folder.work / "journal.jsonl").exists()
    (folder.result / "slide.ome.zarr" / ".zattrs").unlink()
    # The tissue is that of the first run again.
    segment_slide(path, tmp_path / "out", network, CONFIG)
    segment_slide(path, tmp_path / "clean", network, CONFIG)
    assert published(tmp_path / "out" / "slide") == published(tmp_path / "clean" / "slide")
