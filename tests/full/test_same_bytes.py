"""Attacks on the promise of equal bytes: other numbers of threads, other batches, and a changed computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from models.backbone_windows import RING
from models.bundle import load_bundle, load_networks, shipped_bundles
from models.normalize import OfBytes
from models.openvino_network import IMAGE, MapSize, OpenVinoNetwork
from models.padding import pad_before_expansion
from models.segmenter import AROUND, NATIVE_STRIDE
from models.shared_stages import split_networks


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(x: Tensor) -> Tensor:
    """Return the bits of float32 values."""
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("model", shipped_bundles())
def test_openvino_returns_the_same_bits_with_any_number_of_threads_and_any_batch(model: str) -> None:
    pytest.importorskip("openvino")
    bundle = load_bundle(model)
    side = 224
    rgb_NHWC = torch.randint(256, (8, side, side, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    classifier, segmenter = (pad_before_expansion(network) for network in load_networks(bundle))
    split = split_networks(classifier, segmenter, bundle.card.margin, textured=True)
    assert split.first is not None
    first = OfBytes(split.first.eval(), torch.tensor(bundle.card.mean), torch.tensor(bundle.card.std))
    with torch.inference_mode():
        fine_NChw: Tensor = first(rgb_NHWC)
        deep_NDhw = split.deep.eval()(fine_NChw)[0]
    start = MapSize(*split.start)
    prepared: list[tuple[nn.Module, tuple[Tensor, ...], Sequence[MapSize]]] = [
        (first, (rgb_NHWC,), (IMAGE,)),
        (split.deep, (fine_NChw,), (start,)),
    ]
    if split.shared_deep is None:
        prepared.append((split.segmenter.eval(), (fine_NChw,), (start,)))
    else:
        # The decoder reads fewer of the fine features.
        less = bundle.card.margin + RING - AROUND
        inner = slice(less // NATIVE_STRIDE, -less // NATIVE_STRIDE)
        both = start._replace(beyond=-less), MapSize(*split.shared_deep)
        prepared.append((split.segmenter.eval(), (fine_NChw[:, :, inner, inner], deep_NDhw), both))
    for network, inputs, maps in prepared:
        expected: Tensor | None = None
        for threads, streams in ((1, 1), (2, 1), (2, 2), (3, 2), (4, 1)):
            torch.set_num_threads(threads)
            made = OpenVinoNetwork(network, side, maps=maps, streams=streams)
            for batch in (8, 3, 1):
                parts = zip(*(one.split(batch) for one in inputs), strict=True)
                with torch.inference_mode():
                    outputs = [made(*part) for part in parts]
                # The classifier's network returns deep features and textures.
                by_output = zip(*outputs, strict=True) if isinstance(outputs[0], tuple) else [outputs]
                found = torch.cat([bits(torch.cat(ones)).flatten() for ones in by_output])
                expected = found if expected is None else expected
                assert torch.equal(found, expected), (threads, streams, batch)
