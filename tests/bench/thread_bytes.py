"""Count what changes in the outputs of both networks with the number of threads and the size of a batch.

    python -m tests.bench.thread_bytes SLIDE [-m MODEL] [--threads 1 2 3 4 8] [--batches 1 8 32]

Prints, for each runtime, how many float32 outputs have other bits than with one thread and batches of 8, how many
probabilities differ after rounding to bytes, and the layers of PyTorch in which a difference begins. Both networks are
whole. A run computes shared stages once and leaves out margins; tests/full/test_same_bytes.py tests those parts.

Shape suffixes: N tiles, K classes, H and W the tile, h and w the map.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.bundle import DEFAULT_BUNDLE, load_bundle, load_networks
from models.normalize import normalized
from models.openvino_network import OpenVinoNetwork
from models.shared_stages import DeepFeatures
from pipeline.config import SegmentConfig
from pipeline.slide.plan import plan_slide
from tests.bench.floors import sample_tiles

TILES = 32
Network = Callable[[Tensor], Tensor]


def outputs(network: Network, x_NCHW: Tensor, batch: int) -> Tensor:
    """Return the outputs for all images, computed in batches."""
    with torch.inference_mode():
        return torch.cat([network(part).clone() for part in x_NCHW.split(batch)])


def other_bits(a: Tensor, b: Tensor) -> int:
    """Return how many float32 values have other bits."""
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


def other_bytes(a_NKhw: Tensor, b_NKhw: Tensor) -> int:
    """Return how many probabilities differ as the bytes that a map stores."""
    a, b = ((x.softmax(dim=1) * 255).round() for x in (a_NKhw, b_NKhw))
    return int((a != b).sum())


def first_differences(network: nn.Module, x_NCHW: Tensor, threads: tuple[int, int]) -> list[str]:
    """Return the layers whose output differs between two numbers of threads although their input is the same."""
    inputs: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if arguments:
                inputs[name] = (arguments[0].clone(), output.clone())

        return hook

    leaves = {name: module for name, module in network.named_modules() if not list(module.children())}
    handles = [module.register_forward_hook(keep(name)) for name, module in leaves.items()]
    torch.set_num_threads(threads[0])
    outputs(network, x_NCHW, len(x_NCHW))
    for handle in handles:
        handle.remove()
    torch.set_num_threads(threads[1])
    found = []
    with torch.inference_mode():
        for name, (x, y) in inputs.items():
            count = other_bits(leaves[name](x.clone()).contiguous(), y.contiguous())
            if count:
                found.append(f"{name} ({leaves[name]}): {count} of {y.numel()}")
    return found


def main() -> None:
    """Print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("-m", "--model", default=DEFAULT_BUNDLE)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--layers", action="store_true", help="also find the layers of PyTorch that differ")
    options = parser.parse_args()
    bundle = load_bundle(options.model)
    card = bundle.card
    _, slide, tissue, plan = plan_slide(options.slide, card, SegmentConfig())
    with slide:
        tiles_NHWC = torch.from_numpy(sample_tiles(slide, tissue, plan, TILES))
    x_NCHW = normalized(tiles_NHWC, torch.tensor(card.mean), torch.tensor(card.std))
    x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
    classifier, segmenter = load_networks(bundle)
    networks = {"classifier": DeepFeatures(classifier), "segmenter": segmenter}
    for name, network in networks.items():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in torch's stubs
        for runtime in ("torch", "openvino"):
            expected: Tensor | None = None
            for threads in options.threads:
                torch.set_num_threads(threads)
                made: Network = network if runtime == "torch" else OpenVinoNetwork(network, 192)
                for batch in sorted(options.batches, key=lambda size: size != 8):
                    found = outputs(made, x_NCHW, batch)
                    expected = found if expected is None else expected
                    text = f"{name} {runtime} threads {threads} batch {batch}: {other_bits(found, expected)} of "
                    text += f"{found.numel()} values have other bits, at most {(found - expected).abs().max():.1e}"
                    if name == "segmenter":
                        text += f", {other_bytes(found, expected)} bytes"
                    print(text, flush=True)
        if options.layers:
            for other in options.threads[1:]:
                print(
                    f"{name}, 1 and {other} threads:", *first_differences(network, x_NCHW[:8], (1, other)), sep="\n  "
                )


if __name__ == "__main__":
    main()
