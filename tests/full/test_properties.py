"""What must hold for every slide: the map depends on the tissue, and on nothing that is only a way of getting at it.

The slides are drawn at random: pink and purple boxes on glass, with corners on whole pixels of the map, so that no
pixel of it lies between two colors. Some tests ask networks that know colors, others one whose answers only the
surroundings explain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
import zarr
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from models.card import NO_DIGEST
from models.predictor import Predictor
from models.runtimes import Runtime
from pipeline.config import SegmentConfig, resolve
from pipeline.errors import PipelineError
from pipeline.formats.ome_zarr import CHUNK_OUT, MapSpec, MapStore, create_store
from pipeline.formats.polygons import Region, join_regions
from pipeline.formats.region_files import load_regions
from pipeline.slide.blocks import BlockRecord, BlockWork, regions_file, segment_block
from pipeline.slide.plan import plan_slide
from pipeline.slide.recipe import segment_slide
from tests.models.networks import ColorClassifier, ColorSegmenter, PixelClassifier, make_card
from tests.pipeline.fakes import COLORS, SMALL, color_predictor, labels_of, run_of
from tests.pipeline.features import checked_features
from tests.slides import PINK, PURPLE, painted, write_slide
from wsi.box import Box
from wsi.grid import Grid
from wsi.readers import BackendName
from wsi.resample import area_mean, read_model_pixels
from wsi.slide import Slide
from wsi.tissue import Tissue
from wsi.tissue_edge import fine_tissue, reach_px

RGB = NDArray[np.uint8]

Shape = tuple[tuple[int, int, int, int], tuple[int, int, int]]
"""A box (x, y, width, height) and its color."""

SIDE = 512
"""Of the drawn slides: 4 blocks of 32 map pixels along each side, and a whole number of pixels of the tissue mask."""

NETWORKS: tuple[Runtime, ...] = ("torch", "openvino")

few = settings(
    max_examples=4,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
"""For tests that segment slides for each example: shrinking one that fails would take minutes."""


@st.composite
def slides(draw: st.DrawFn) -> tuple[Shape, ...]:
    """What is painted on a slide: one large pink box, and a few of both colors over it."""
    shapes: list[Shape] = [((draw(st.integers(4, 10)) * 16, draw(st.integers(4, 8)) * 16, 272, 304), PINK)]
    for _ in range(draw(st.integers(1, 4))):
        x, y = draw(st.integers(16, 96)) * 4, draw(st.integers(16, 96)) * 4
        width, height = draw(st.integers(8, 28)) * 4, draw(st.integers(8, 28)) * 4
        shapes.append(((x, y, width, height), draw(st.sampled_from([PINK, PURPLE]))))
    return tuple(shapes)


def grained(rgb_HWC: RGB, seed: int) -> RGB:
    """With grain, so that no two tiles are alike; on the glass, too."""
    grain_HW1 = np.random.default_rng(seed).integers(-9, 10, (*rgb_HWC.shape[:2], 1))
    grained_HWC: RGB = np.clip(rgb_HWC + grain_HW1, 0, 255).astype(np.uint8)
    return grained_HWC


def doubled(rgb_HWC: RGB) -> RGB:
    """At half the pixel size."""
    return rgb_HWC.repeat(2, axis=0).repeat(2, axis=1)


@dataclass(frozen=True)
class Mapped:
    """The blocks of a slide, without what is published of them."""

    labels_HW: RGB
    probs_KHW: RGB
    files: dict[str, bytes]
    regions: list[Region]
    records: list[BlockRecord]
    tissue: Tissue
    tissue_HW: NDArray[np.bool_]
    """The tissue at the map's resolution, from all pixels of the slide at once."""
    mpp_out: float


def mapped(
    folder: Path,
    rgb_HWC: RGB,
    predictor: Predictor,
    config: SegmentConfig = SMALL,
    *,
    levels: Sequence[int] = (1,),
    mpp: float = 1.0,
    order: int | None = None,
    threads: int = 1,
) -> Mapped:
    """Segment the blocks of a slide with these pixels: in the grid's order or one drawn by chance, on some threads."""
    number = len(list(folder.iterdir()))
    work_folder = folder / str(number)
    (work_folder / "regions").mkdir(parents=True)
    path = write_slide(folder / f"{number}.svs", rgb_HWC, mpp=mpp, levels=levels)
    _, slide, tissue, plan = plan_slide(path, predictor.card, config)
    spec = MapSpec(
        "slide", plan.grid.size_out, predictor.card.classes, plan.grid.mpp_out, chunk=min(CHUNK_OUT, config.block_out)
    )
    create_store(work_folder / "store", spec)
    settings = resolve(config, predictor.compute)
    work = BlockWork(slide.info, plan.grid, tissue, settings, MapStore(work_folder / "store", spec), work_folder)
    blocks = list(plan.blocks)
    if order is not None:
        random.Random(order).shuffle(blocks)
    with slide, ThreadPoolExecutor(threads) as pool:
        tissue_HW = _tissue_of_whole(slide, plan.grid, tissue)
        done = list(pool.map(lambda block: segment_block(work, slide, predictor, block, lambda: False)[0], blocks))
    width, height = plan.grid.size_out
    return Mapped(
        labels_HW=np.asarray(work.store.labels[:height, :width]),
        probs_KHW=np.asarray(zarr.open_array(work.store.path, path="0", mode="r")[:, :height, :width]),
        files={p.relative_to(work_folder).as_posix(): p.read_bytes() for p in work_folder.rglob("*") if p.is_file()},
        regions=list(join_regions((r for b in plan.blocks for r in load_regions(regions_file(work_folder, b))), 0.0)),
        records=sorted(done, key=lambda record: record.index),
        tissue=tissue,
        tissue_HW=tissue_HW,
        mpp_out=plan.grid.mpp_out,
    )


def _tissue_of_whole(slide: Slide, grid: Grid, tissue: Tissue) -> NDArray[np.bool_]:
    (width, height), around = grid.size_out, reach_px(grid.mpp_out)
    outer = Box(-around, -around, width + 2 * around, height + 2 * around)
    rgb_HWC = read_model_pixels(slide, grid, grid.box_m(outer)).rgb_HWC
    scale = grid.m_per_out
    out_HWC = area_mean(rgb_HWC, (0, 0), Box(0, 0, outer.width, outer.height), scale)
    return fine_tissue(tissue, out_HWC, outer, grid.l0_per_out, grid.mpp_out)[around:-around, around:-around]


class _Surroundings(nn.Module):
    """Convolutions with arbitrary weights: a pixel's answer depends on all around it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Conv2d(3, 6, 9, stride=4, padding=4, bias=False)
        self.last = nn.Conv2d(6, 2, 7, padding=3, bias=False)
        with torch.no_grad():
            self.first.weight.uniform_(-0.4, 0.4, generator=generator)
            self.last.weight.uniform_(-0.7, 0.7, generator=generator)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NKhw: Tensor = self.last(self.first(x_NCHW - 0.5).tanh())
        return logits_NKhw


class _SeesBoth(PixelClassifier):
    """Lets both classes pass, with probabilities that come from the pixels."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.mean(dim=(2, 3))[:, :2] + 2


@pytest.fixture(scope="module")
def convolving() -> dict[Runtime, Predictor]:
    """Predictors whose answers nothing but the pixels explains, on each runtime."""
    networks = _SeesBoth(), _Surroundings()
    return {name: Predictor(make_card(COLORS), NO_DIGEST, *networks, device="cpu", runtime=name) for name in NETWORKS}


def is_varied(found: Mapped) -> bool:
    """Whether the map is worth a comparison."""
    return len(np.unique(found.probs_KHW)) > 100 and set(np.unique(found.labels_HW)) == {0, 1, 2}


@few
@given(slides(), st.integers(1, 3))
def test_a_turned_slide_gives_turned_labels(tmp_path: Path, shapes: tuple[Shape, ...], quarters: int) -> None:
    rgb_HWC = painted((SIDE, SIDE), *shapes)
    upright = mapped(tmp_path, rgb_HWC, color_predictor())
    turned = mapped(tmp_path, np.ascontiguousarray(np.rot90(rgb_HWC, quarters)), color_predictor())
    np.testing.assert_array_equal(turned.labels_HW, np.rot90(upright.labels_HW, quarters))
    np.testing.assert_array_equal(turned.probs_KHW, np.rot90(upright.probs_KHW, quarters, axes=(1, 2)))
    assert set(np.unique(upright.labels_HW)) >= {0, 1}


@few
@given(slides(), st.sampled_from(NETWORKS), st.tuples(st.integers(0, 10), st.integers(0, 10)))
def test_tissue_shifted_by_quarter_gate_windows_changes_its_place_alone(
    tmp_path: Path,
    convolving: dict[Runtime, Predictor],
    shapes: tuple[Shape, ...],
    runtime: Runtime,
    windows: tuple[int, int],
) -> None:
    # Gate windows of 64 px start at every 16th pixel. Blocks have 128 px, so most shifts move the tissue in its block.
    shift = 16 * np.array(windows)
    rgb_HWC = grained(painted((SIDE, SIDE), *shapes), 5)
    wider_HWC = grained(painted((SIDE + int(shift[0]), SIDE + int(shift[1]))), 6)
    wider_HWC[shift[1] :, shift[0] :] = rgb_HWC
    before = mapped(tmp_path, rgb_HWC, convolving[runtime])
    after = mapped(tmp_path, wider_HWC, convolving[runtime])
    x, y = shift // 4
    assert not after.labels_HW[:y].any()
    assert not after.labels_HW[:, :x].any()
    np.testing.assert_array_equal(after.labels_HW[y:, x:], before.labels_HW)
    assert np.abs(after.probs_KHW[:, y:, x:].astype(int) - before.probs_KHW).max() <= 1
    assert is_varied(before)


@few
@given(slides(), st.sampled_from(NETWORKS), st.sampled_from([16, 48, 64, 144]))
def test_other_blocks_give_the_same_map(
    tmp_path: Path, convolving: dict[Runtime, Predictor], shapes: tuple[Shape, ...], runtime: Runtime, block_out: int
) -> None:
    rgb_HWC = grained(painted((SIDE, SIDE), *shapes), 4)
    small = mapped(tmp_path, rgb_HWC, convolving[runtime])
    other = mapped(tmp_path, rgb_HWC, convolving[runtime], replace(SMALL, block_out=block_out))
    np.testing.assert_array_equal(other.labels_HW, small.labels_HW)
    assert np.abs(other.probs_KHW.astype(int) - small.probs_KHW).max() <= 1
    assert is_varied(small)
    pixels = [np.sum([record.class_px for record in one.records], axis=0)[1:] for one in (small, other)]
    np.testing.assert_array_equal(*pixels)


@few
@given(slides(), st.sampled_from(NETWORKS), st.sampled_from([128, 160, 256]))
def test_other_canvases_give_the_same_map(
    tmp_path: Path, convolving: dict[Runtime, Predictor], shapes: tuple[Shape, ...], runtime: Runtime, canvas_m: int
) -> None:
    # The network sees 16 px around a pixel, which is less than the margin of 32 px.
    rgb_HWC = grained(painted((SIDE, SIDE), *shapes), 7)
    config = replace(SMALL, block_out=128)
    large = mapped(tmp_path, rgb_HWC, convolving[runtime], config)
    other = mapped(tmp_path, rgb_HWC, convolving[runtime], replace(config, canvas_m=canvas_m))
    np.testing.assert_array_equal(other.labels_HW, large.labels_HW)
    assert np.abs(other.probs_KHW.astype(int) - large.probs_KHW).max() <= 1
    assert is_varied(large)


@few
@given(slides(), st.integers(0, 2**32 - 1))
def test_neither_the_level_nor_the_reader_changes_the_map(
    tmp_path: Path, convolving: dict[Runtime, Predictor], shapes: tuple[Shape, ...], seed: int
) -> None:
    fine_HWC = grained(doubled(painted((SIDE, SIDE), *shapes)), seed)
    averaged = mapped(tmp_path, fine_HWC, convolving["torch"], mpp=0.5)
    cases: list[tuple[tuple[int, ...], BackendName]] = [
        ((1, 2), "openslide"),
        ((1, 2), "tiffslide"),
        ((1,), "tiffslide"),
    ]
    for levels, backend in cases:
        config = replace(SMALL, backend=backend)
        other = mapped(tmp_path, fine_HWC, convolving["torch"], config, levels=levels, mpp=0.5)
        np.testing.assert_array_equal(other.labels_HW, averaged.labels_HW)
        np.testing.assert_array_equal(other.probs_KHW, averaged.probs_KHW)


@pytest.mark.parametrize("runtime", NETWORKS)
def test_order_and_threads_do_not_change_a_byte(
    tmp_path: Path, convolving: dict[Runtime, Predictor], runtime: Runtime
) -> None:
    shapes = (((96, 64, 320, 352), PINK), ((160, 128, 96, 200), PURPLE))
    rgb_HWC = grained(painted((SIDE, SIDE), *shapes), 3)
    network = convolving[runtime]
    once = mapped(tmp_path, rgb_HWC, network)
    assert len(once.files) > 3 * len(once.records) >= 27
    for order, threads in ((None, 1), (1, 1), (2, 2), (3, 4)):
        again = mapped(tmp_path, rgb_HWC, network, order=order, threads=threads)
        assert again.files == once.files
        assert again.regions == once.regions
        assert [replace(r, seconds={}) for r in again.records] == [replace(r, seconds={}) for r in once.records]


class _SeesPurple(ColorClassifier):
    """Knows the second class only: tiles without it have no class."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(x_NCHW) - torch.tensor([100.0, 0.0])


MASK_OFF_THE_MAP = (
    ((96, 112, 272, 304), PINK),
    ((252, 88, 56, 112), PINK),
    ((380, 360, 68, 48), PINK),
    ((308, 344, 96, 56), PINK),
)
"""At 0.7 µm/px a pixel of the tissue mask is 11 px of the slide, and one of the map is 4: their borders differ by 1.4 %
of the area.
"""


@few
@example(MASK_OFF_THE_MAP, 0.7)
@given(slides(), st.sampled_from([0.5, 0.7, 1.0]))
def test_areas_of_the_classes_and_of_no_class_add_up_to_the_tissue(
    tmp_path: Path, shapes: tuple[Shape, ...], mpp: float
) -> None:
    card = make_card(COLORS, mpp=mpp)
    sees_purple = Predictor(card, NO_DIGEST, _SeesPurple(COLORS), ColorSegmenter(COLORS), device="cpu")
    found = mapped(tmp_path, painted((SIDE, SIDE), *shapes), sees_purple, mpp=mpp)
    height, width = found.labels_HW.shape
    no_class_px = np.count_nonzero(found.tissue_HW & (found.labels_HW == 0))
    class_px = np.sum([record.class_px for record in found.records], axis=0)[1:]
    assert class_px.sum() + no_class_px == found.tissue_HW.sum()
    assert sum(record.tissue_area_px for record in found.records) == found.tissue_HW.sum()
    tissue_HW = found.tissue.sample(Box(0, 0, width, height), 4.0)
    assert class_px.tolist() == [np.count_nonzero(found.labels_HW == k) for k in (1, 2)]
    # The mask's border follows the mask's pixels of about 8 µm; the map rounds that border to its own whole pixels.
    mask_HW = np.pad(found.tissue.mask_HW, 1)
    border_um = sum(np.count_nonzero(np.diff(mask_HW, axis=axis)) for axis in (0, 1)) * found.tissue.mpp
    rounding_um2 = border_um * found.mpp_out / 2
    assert tissue_HW.sum() * found.mpp_out**2 == pytest.approx(found.tissue.area_um2, abs=rounding_um2)
    # Sampled at every pixel of the slide, the mask keeps its area but for the corners, which interpolation rounds off.
    fine_HW = found.tissue.sample(Box(0, 0, SIDE, SIDE), 1.0)
    assert fine_HW.sum() * mpp**2 == pytest.approx(found.tissue.area_um2, rel=0.005)


@settings(few, max_examples=3)
@given(slides(), st.sampled_from([0.5, 1.0]))
def test_published_polygons_and_areas_are_those_of_the_label_map(
    tmp_path: Path, shapes: tuple[Shape, ...], mpp: float
) -> None:
    number = len(list(tmp_path.iterdir()))
    path = write_slide(tmp_path / f"{number}.svs", doubled(painted((SIDE, SIDE), *shapes)), mpp=mpp / 2)
    card = make_card(COLORS, mpp=mpp)
    colors = Predictor(card, NO_DIGEST, ColorClassifier(COLORS), ColorSegmenter(COLORS, 400.0), device="cpu")
    folder = segment_slide(path, tmp_path / f"{number}.out", colors, SMALL).folder
    assert folder is not None
    labels_HW, run = labels_of(folder), run_of(folder)
    assert run["plan"]["map_mpp"] == 4 * mpp
    features = checked_features((folder / f"{number}.geojson").read_text(encoding="utf-8"))
    rasterised_HW = np.zeros_like(labels_HW)
    rows_HW, columns_HW = np.mgrid[: labels_HW.shape[0], : labels_HW.shape[1]]
    polygons_mm2 = {"class-0": 0.0, "class-1": 0.0}
    for feature in features:
        name = feature["properties"]["classification"]["name"]
        polygon = shapely.geometry.shape(feature["geometry"])
        inside_HW = shapely.contains_xy(polygon, columns_HW * 8 + 4, rows_HW * 8 + 4)
        assert not rasterised_HW[inside_HW].any()
        rasterised_HW[inside_HW] = int(name[-1]) + 1
        polygons_mm2[name] += polygon.area * (mpp / 2) ** 2 / 1e6
    np.testing.assert_array_equal(rasterised_HW, labels_HW)
    counted_mm2 = {f"class-{k}": np.count_nonzero(labels_HW == k + 1) * (4 * mpp) ** 2 / 1e6 for k in (0, 1)}
    assert run["class_areas_mm2"] == pytest.approx(counted_mm2)
    assert polygons_mm2 == pytest.approx(counted_mm2)
    assert sum(counted_mm2.values()) == pytest.approx(run["tissue_mm2"])


class _Poisoned(PixelClassifier):
    """Adds NaN or infinity to the output for images that hold a white pixel, by arithmetic that any runtime has."""

    def __init__(self, network: nn.Module, value: str) -> None:
        super().__init__()
        self.network = network
        self.value = value

    def forward(self, x_NCHW: Tensor) -> Tensor:
        whitest_N = x_NCHW.amin(dim=1).flatten(1).amax(dim=1)
        poison_N = {
            "NaN": (254.5 / 255 - whitest_N).sqrt(),
            "infinity": 1 / (1 - whitest_N),
            "minus infinity": (1 - whitest_N).log(),
        }[self.value]
        output: Tensor = self.network(x_NCHW)
        return output + poison_N.view(-1, *[1] * (output.ndim - 1))


@pytest.mark.parametrize("runtime", NETWORKS)
@pytest.mark.parametrize("value", ["NaN", "infinity", "minus infinity"])
@pytest.mark.parametrize("network", ["classifier", "segmenter"])
def test_a_canvas_for_which_a_network_gives_no_number_is_named(
    tmp_path: Path, network: str, value: str, runtime: Runtime
) -> None:
    shapes = (((64, 64, 384, 384), PINK), ((128, 128, 200, 220), PURPLE))
    rgb_HWC = painted((SIDE, SIDE), *shapes)
    rgb_HWC[330, 200] = 255
    networks: dict[str, nn.Module] = {"classifier": ColorClassifier(COLORS), "segmenter": ColorSegmenter(COLORS)}
    networks[network] = _Poisoned(networks[network], value)
    options = {"device": "cpu", "runtime": runtime, "batch_size": 3, "skip_by_gate": False}
    poisoned = Predictor(make_card(COLORS), NO_DIGEST, **networks, **options)  # type: ignore[arg-type]
    assert poisoned.runtime == runtime
    # The canvases have margins of 32 px, so the white pixel lies in the canvas of one block of 128 px.
    message = (
        rf"^0\.svs: the {network}'s output is NaN or infinite for 1 image\(s\).*"
        rf"at level-0 \(x, y, width, height\) \(128, 256, 128, 128\)"
    )
    with pytest.raises(PipelineError, match=message):
        mapped(tmp_path, rgb_HWC, poisoned, SMALL)
    rgb_HWC[330, 200] = PINK
    assert mapped(tmp_path, rgb_HWC, poisoned, SMALL).labels_HW.any()
