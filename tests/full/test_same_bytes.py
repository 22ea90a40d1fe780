"""Attacks on the promise of equal bytes: other numbers of threads, other batches, and a changed computation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.bundle import DEFAULT_BUNDLE, load_bundle, load_networks
from models.first_stages import split_networks
from models.openvino_network import OpenVinoNetwork
from models.padding import pad_before_expansion
from models.segmenter import CoreSegmenter


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(x: Tensor) -> Tensor:
    """Return the bits of float32 values."""
    return x.contiguous().view(torch.int32)


def test_openvino_returns_the_same_bits_with_any_number_of_threads_and_any_batch() -> None:
    pytest.importorskip("openvino")
    bundle = load_bundle(DEFAULT_BUNDLE)
    side = 224
    x_NCHW = torch.rand((8, 3, side, side), generator=torch.Generator().manual_seed(1)) * 4 - 2
    classifier, segmenter = (pad_before_expansion(network) for network in load_networks(bundle))
    split = split_networks(classifier, segmenter, bundle.card.margin)
    assert split.first is not None
    with torch.inference_mode():
        features_NChw = split.first.eval()(x_NCHW)
    for network, inputs_NCHW in (
        (split.first, x_NCHW),
        (split.deep.eval(), features_NChw),
        (CoreSegmenter(split.segmenter, bundle.card.margin).eval(), features_NChw),
    ):
        channels, height = inputs_NCHW.shape[1:3]
        expected: Tensor | None = None
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            made = OpenVinoNetwork(network, height, channels=channels, step=32 * height // side)
            for batch in (8, 3, 1):
                with torch.inference_mode():
                    found = bits(torch.cat([made(part).clone() for part in inputs_NCHW.split(batch)]))
                expected = found if expected is None else expected
                assert torch.equal(found, expected), (threads, batch)
