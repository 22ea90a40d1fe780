"""The map that both networks start from, computed in windows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import device_networks
from models.backbone_windows import Place
from models.bundle import load_bundle
from models.card import NO_DIGEST
from models.fine_map import fine_map, part_of, spans
from models.predictor import Predictor
from models.shared_stages import split_networks
from tests.models.networks import sharing_networks, timm_networks


@given(
    length=st.integers(1, 60),
    side=st.integers(3, 20),
    context=st.integers(0, 5),
    parts=st.lists(st.tuples(st.integers(-3, 62), st.integers(1, 30)), min_size=1, max_size=4),
)
def test_windows_contain_the_needed_parts_of_an_axis_once_and_with_context(
    length: int, side: int, context: int, parts: list[tuple[int, int]]
) -> None:
    length, side, context = 16 * length, 16 * side, 4 * context
    needed = [slice(16 * start, 16 * (start + size)) for start, size in parts]
    found = spans(needed, length, side, context)
    used = [px for span in found for px in range(span.first, span.last)]
    wanted = {px for part in needed for px in range(max(0, part.start), min(length, part.stop))}
    assert wanted <= set(used)
    assert len(used) == len(set(used))
    for span in found:
        assert span.stop - span.start == min(side, length)
        assert 0 <= span.start <= span.first < span.last <= span.stop <= length
        assert all(end % 4 == 0 for end in span)
        assert span.first - span.start >= context or span.start == 0
        assert span.stop - span.last >= context or span.stop == length
        assert span.first in wanted  # the first used pixel is a needed one


def first_stages() -> Callable[[Tensor], Tensor]:
    """Return the first stages of EfficientNet-Lite0: (N, H, W, 3) bytes -> maps at stride 4."""
    first = split_networks(*timm_networks(), 64).first
    assert first is not None
    return lambda rgb_NHWC: first(rgb_NHWC.permute(0, 3, 1, 2) / 127.5 - 1)


IMAGE_HWC = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (208, 320, 3), dtype=np.uint8))
REACH = 12
"""The padding of the first stages reaches 9 px, rounded up to cells of 4 px."""
PLACES: list[Place] = [(slice(0, 96), slice(0, 96)), (slice(112, 208), slice(144, 304))]


@pytest.mark.parametrize("side", [96, 112, 288])
def test_a_map_in_windows_has_the_values_of_the_whole_image_in_every_place(side: int) -> None:
    first, ran = first_stages(), 0

    def backwards(run: Callable[[Any], None], windows: Sequence[Any]) -> None:
        nonlocal ran
        ran = len(windows)
        list(map(run, reversed(windows)))

    with torch.inference_mode():
        whole_Chw = first(IMAGE_HWC[None])[0]
        found_Chw = fine_map(first, IMAGE_HWC, PLACES, side, REACH, backwards)
    for place in PLACES:
        torch.testing.assert_close(part_of(found_Chw, place), part_of(whole_Chw, place), atol=1e-5, rtol=1e-5)
    # Windows over the whole image would be 15, 12 and 2.
    assert ran + 1 == {96: 10, 112: 3, 288: 2}[side]


def test_less_context_than_the_stages_reach_would_show() -> None:
    first = first_stages()
    with torch.inference_mode():
        whole_Chw = first(IMAGE_HWC[None])[0]
        found_Chw = fine_map(first, IMAGE_HWC, PLACES, 96, REACH - 4)
    assert (part_of(found_Chw, PLACES[1]) - part_of(whole_Chw, PLACES[1])).abs().max() > 1e-3


@pytest.mark.full
@pytest.mark.parametrize(("backbone", "in_windows"), [("tf_efficientnet_lite0", True), ("tf_efficientnet_b0", False)])
def test_stages_that_average_the_whole_canvas_run_on_whole_canvases(backbone: str, in_windows: bool) -> None:
    """Squeeze-and-excitation carries every pixel everywhere, so a part of an image gives other features."""
    card = load_bundle("colon-gland").card
    predictor = Predictor(card, NO_DIGEST, *sharing_networks(backbone=backbone), device="cpu")
    parts: Any = predictor._networks
    with torch.inference_mode():
        starts = parts.starts(IMAGE_HWC, PLACES)
        alone = [parts._fine(IMAGE_HWC[place][None])[0] for place in PLACES]
    near = [torch.allclose(start, own, atol=1e-5) for start, own in zip(starts, alone, strict=True)]
    # In windows, the edges of a canvas have the real pixels around it.
    assert near == [not in_windows] * 2


@pytest.mark.full
@pytest.mark.parametrize("margin", [64, 160])
def test_openvino_computes_windows_that_are_smaller_than_the_smallest_canvas(margin: int) -> None:
    """The smallest canvas has twice the margin and 32 px."""
    pytest.importorskip("openvino")
    card = load_bundle("colon-gland").card
    card = card.model_copy(update={"margin": margin, "familiarity": None})
    rgb_HWC = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (416, 448, 3), dtype=np.uint8))
    core = 416 - 2 * margin
    places = [(slice(0, 416), slice(0, 416)), (slice(0, 416), slice(32, 448))]

    def found(**options: Any) -> Tensor:
        predictor = Predictor(card, NO_DIGEST, *sharing_networks(), device="cpu", **options)
        probs = torch.empty((2, len(card.classes), core // 4, core // 4))
        with predictor.own_threads():
            predictor.predict_into(list(probs), rgb_HWC, places, [(0, 0), (32, 0)])
        return probs

    one_stream = found(runtime="openvino")
    torch.testing.assert_close(one_stream, found(runtime="torch"), atol=1e-4, rtol=1e-3)
    assert torch.equal(found(runtime="openvino", streams=2), one_stream)


def two_streams(margin: int = 64) -> Any:
    """Return the networks of a predictor that computes two canvases at a time."""
    pytest.importorskip("openvino")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        card = load_bundle("colon-gland").card.model_copy(update={"margin": margin})
        return Predictor(card, NO_DIGEST, *sharing_networks(), device="cpu", runtime="openvino", streams=2)._networks
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_stream_ends_the_call_and_cancels_what_has_not_begun() -> None:
    networks, begun = two_streams(), []

    def run(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise MemoryError("item 3")
        if item > 3:
            # The other stream needs 20 s for all items, so the caller can cancel them also on a busy machine.
            time.sleep(0.05)
        return 10 * item

    assert networks.each(run, [0, 1, 2]) == [0, 10, 20]
    with pytest.raises(MemoryError, match="item 3"):
        networks.each(run, range(3, 500))
    assert len(begun) < 400


def test_windows_have_the_context_that_the_first_stages_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device_networks._FINE_SIDE, "cpu", 96)  # several windows in a place
    card = load_bundle("colon-gland").card
    networks: Any = Predictor(card, NO_DIGEST, *sharing_networks(), device="cpu")._networks
    with torch.inference_mode():
        starts = networks.starts(IMAGE_HWC, PLACES)
        whole_Chw = networks._fine(IMAGE_HWC[None])[0]
    for place, start in zip(PLACES, starts, strict=True):
        torch.testing.assert_close(start, part_of(whole_Chw, place), atol=1e-5, rtol=1e-5)
    # The padding of these stages reaches 9 px, rounded up to cells of 4 px.
    assert networks._context == 12


@pytest.mark.parametrize(("margin", "in_parts"), [(64, True), (32, False)])
def test_only_small_items_are_prepared_ahead(margin: int, in_parts: bool) -> None:
    """With a margin of 32 px, the segmenter reads beyond its features, so it runs on whole cores."""
    networks = two_streams(margin)
    waiting = {name: getattr(networks, name)._requests.qsize() for name in ("_first", "_deep", "_segmenter")}
    assert waiting == {"_first": 3, "_deep": 2, "_segmenter": 3 if in_parts else 2}
    assert networks.ahead == in_parts


def test_as_many_items_run_as_there_are_streams_and_items_ahead() -> None:
    networks = two_streams()

    def most_at_once(ahead: int) -> int:
        together = threading.Barrier(2 + ahead, timeout=30)
        running: list[int] = []
        counts: list[int] = []

        def run(item: int) -> int:
            running.append(item)
            counts.append(len(running))
            together.wait()  # fails if fewer items run
            running.remove(item)
            return 10 * item

        assert networks.each(run, range(12), ahead=ahead) == list(range(0, 120, 10))
        return max(counts)

    assert [most_at_once(ahead) for ahead in (0, 1)] == [2, 3]


def test_torch_has_one_thread_beside_openvino_and_its_threads_again_afterwards() -> None:
    networks, before = two_streams(), torch.get_num_threads()
    try:
        with networks.own_threads():
            inside = [torch.get_num_threads(), *networks.each(lambda _: torch.get_num_threads(), range(4))]
        assert inside == [1] * 5
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
