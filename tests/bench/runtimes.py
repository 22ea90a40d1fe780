"""Times both networks of a bundle under different runtimes, on the same tiles.

    python -m venv --system-site-packages runtimes
    runtimes/bin/pip install onnx onnxruntime openvino nncf
    runtimes/bin/python -m tests.bench.runtimes SLIDE [-m MODEL] [--batches 1 8 32] [--threads 1 2] [--only eager jit]
    python -m tests.bench.runtimes SLIDE --device cuda --batches 8 32 64 --threads 1

Prints CPU and wall time per tile and what becomes of the results against eager float32: of the segmenter the share of
other labels, of the classifier the share of other gate decisions, and the largest difference of a probability of both.
A runtime that is not installed or does not support a network is reported and skipped. Both networks are whole; a run
computes less (docs/decisions/0007-runtimes.md), which `tests.bench.one_run` times.

Shape suffixes: N tiles, K classes, H and W the tile, h and w the map.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.backbone import Stages
from models.bundle import DEFAULT_BUNDLE, load_bundle, load_networks
from models.openvino_network import OpenVinoNetwork
from models.runtimes import load_openvino
from models.shared_stages import DeepFeatures
from pipeline.config import SegmentConfig
from pipeline.slide.plan import plan_slide
from pipeline.workers.malloc import keep_freed_memory
from tests.bench.floors import sample_tiles

TILES = 64
"""Tiles that every figure is measured on."""

Run = Callable[[Tensor], Tensor]
Make = Callable[[nn.Module, Tensor, int], Run]
"""Prepares a network in eval mode for inputs like the example, on so many threads."""


class Row(NamedTuple):
    """One runtime's figures for one network."""

    network: str
    runtime: str
    threads: int
    batch: int
    cpu_ms: float
    """Per tile, best of the passes."""
    wall_ms: float
    other_share: float
    """Labels, or gate decisions, that are not eager float32's."""
    most: float
    """Largest difference of a probability."""
    ready_s: float
    """Conversion or compilation and the first call."""


def eager(network: nn.Module, _: Tensor, __: int) -> Run:
    """PyTorch as it is used now: channels-last."""
    placed: Any = network
    last: nn.Module = placed.to(memory_format=torch.channels_last)
    return last


def eager_bf16(network: nn.Module, example: Tensor, threads: int) -> Run:
    """The same under autocast, which is `--precision bf16`."""
    return _autocast(eager(network, example, threads), torch.bfloat16)


def eager_fp16(network: nn.Module, example: Tensor, threads: int) -> Run:
    """The same under autocast, which is `--precision fp16`."""
    return _autocast(eager(network, example, threads), torch.float16)


def whole_bf16(network: nn.Module, example: Tensor, threads: int) -> Run:
    """Weights and inputs in bfloat16: no casts in between."""
    run = eager(network.to(torch.bfloat16), example, threads)
    return lambda x_NCHW: run(x_NCHW.to(torch.bfloat16))


def jit(network: nn.Module, example: Tensor, threads: int) -> Run:
    """Traced and frozen, which folds batch normalization into the convolutions; needs nothing but torch."""
    run: Any = eager(network, example, threads)
    traced: Run = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(run, example, check_trace=False)))
    return traced


def jit_bf16(network: nn.Module, example: Tensor, threads: int) -> Run:
    """The frozen network in bfloat16 throughout."""
    run = jit(network.to(torch.bfloat16), example.to(torch.bfloat16), threads)
    return lambda x_NCHW: run(x_NCHW.to(torch.bfloat16))


def compiled(network: nn.Module, example: Tensor, threads: int) -> Run:
    """torch.compile with Inductor, which needs a C++ compiler; each shape of input is compiled anew."""
    run: Any = eager(network, example, threads)
    built: Run = torch.compile(run, dynamic=False)
    return built


def compiled_bf16(network: nn.Module, example: Tensor, threads: int) -> Run:
    """The compiled network under autocast."""
    return _autocast(compiled(network, example, threads), torch.bfloat16)


def onnx_runtime(network: nn.Module, example: Tensor, threads: int) -> Run:
    """ONNX Runtime's CPU provider."""
    import onnxruntime  # type: ignore[import-not-found]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_as_onnx(network, example), options, providers=["CPUExecutionProvider"])
    return lambda x_NCHW: torch.from_numpy(session.run(None, {"x": x_NCHW.contiguous().numpy()})[0])


def openvino_f32(network: nn.Module, example: Tensor, _: int) -> Run:
    """OpenVINO as it is used by `--runtime openvino`, in float32."""
    return OpenVinoNetwork(network, example.shape[-1])


def openvino_bf16(network: nn.Module, example: Tensor, _: int) -> Run:
    """OpenVINO with `--precision bf16`, which it chooses by itself if the processor supports it."""
    return OpenVinoNetwork(network, example.shape[-1], "bf16")


def openvino_fp16(network: nn.Module, example: Tensor, _: int) -> Run:
    """OpenVINO with `--precision fp16`."""
    return OpenVinoNetwork(network, example.shape[-1], "fp16")


def openvino_int8(network: nn.Module, example: Tensor, threads: int) -> Run:
    """OpenVINO after NNCF has quantized the network; the tiles of the example calibrate it."""
    import nncf  # type: ignore[import-not-found]

    openvino = load_openvino()
    network.requires_grad_(requires_grad=False)
    model = openvino.convert_model(
        torch.jit.trace(network, example[:1], check_trace=False), input=[-1, *example.shape[1:]]
    )
    tiles = [tile_CHW[None].contiguous().numpy() for tile_CHW in example]
    # The slower and more precise of NNCF's settings: asymmetric activations, and biases corrected layer by layer.
    quantized = nncf.quantize(
        model, nncf.Dataset(tiles), preset=nncf.QuantizationPreset.MIXED, fast_bias_correction=False
    )
    run = openvino.Core().compile_model(quantized, "CPU", {"INFERENCE_NUM_THREADS": threads})
    return lambda x_NCHW: torch.from_numpy(run(x_NCHW.contiguous().numpy())[0])


RUNTIMES: dict[str, Make] = {
    "eager": eager,
    "eager bf16": eager_bf16,
    "eager fp16": eager_fp16,
    "whole bf16": whole_bf16,
    "jit": jit,
    "jit bf16": jit_bf16,
    "compile": compiled,
    "compile bf16": compiled_bf16,
    "onnxruntime": onnx_runtime,
    "openvino": openvino_f32,
    "openvino bf16": openvino_bf16,
    "openvino fp16": openvino_fp16,
    "openvino int8": openvino_int8,
}


def _autocast(run: Run, dtype: torch.dtype) -> Run:
    def cast(x_NCHW: Tensor) -> Tensor:
        with torch.autocast(x_NCHW.device.type, dtype=dtype):
            return run(x_NCHW)

    return cast


def _as_onnx(network: nn.Module, example: Tensor) -> bytes:
    # Any: torch's annotations know paths only.
    file: Any = io.BytesIO()
    contiguous = example.contiguous()
    torch.onnx.export(network, (contiguous,), file, input_names=["x"], dynamo=False, dynamic_axes={"x": {0: "N"}})
    content: bytes = file.getvalue()
    return content


def measure(run: Run, x_NCHW: Tensor, batch: int, passes: int) -> tuple[float, float, Tensor]:
    """CPU and wall seconds per tile, the best of the passes each, and the outputs."""
    cpu_s, wall_s = [], []
    outputs: list[Tensor] = []
    for _ in range(passes):
        outputs = []
        cpu, wall = time.process_time(), time.perf_counter()
        for start in range(0, len(x_NCHW), batch):
            outputs.append(run(x_NCHW[start : start + batch]))
        if x_NCHW.is_cuda:
            torch.cuda.synchronize()
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
    return min(cpu_s) / len(x_NCHW), min(wall_s) / len(x_NCHW), torch.cat(outputs).float().cpu()


def compared(network: str, logits: Tensor, truth: Tensor, thresholds: Sequence[float]) -> tuple[float, float]:
    """Share of other labels (segmenter) or gate decisions (classifier), and the largest difference of a probability."""
    if network == "segmenter":
        other = logits.argmax(1) != truth.argmax(1)
        return float(other.float().mean()), float((logits.softmax(1) - truth.softmax(1)).abs().max())
    probs, true_probs, least = logits.sigmoid(), truth.sigmoid(), torch.tensor(thresholds)
    other = (probs > least) != (true_probs > least)
    return float(other.float().mean()), float((probs - true_probs).abs().max())


def tiles_of(path: Path, model: str) -> NDArray[np.uint8]:
    """Real tiles of the slide, as rgb_NHWC."""
    _, slide, tissue, plan = plan_slide(path, load_bundle(model).card, SegmentConfig())
    with slide:
        rgb_NHWC = sample_tiles(slide, tissue, plan, TILES)
    return rgb_NHWC[np.arange(TILES) % len(rgb_NHWC)]


def rows_of(
    rgb_NHWC: NDArray[np.uint8],
    model: str,
    runtimes: Sequence[str],
    batches: Sequence[int],
    threads: Sequence[int],
    passes: int = 3,
    device: str = "cpu",
) -> list[Row]:
    """All figures; rows are printed as they come."""
    bundle = load_bundle(model)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (bundle.card.mean, bundle.card.std))
    x_NCHW = (torch.from_numpy(rgb_NHWC).permute(0, 3, 1, 2).float() / 255 - mean) / std
    rows = []
    classifier, segmenter = load_networks(bundle)

    def logits_of(name: str, output: Tensor) -> Tensor:
        # As in a run, the head of the classifier reads the features with torch.
        whole = Stages(output, output, output)
        return output if name == "segmenter" else classifier.head_output(whole, x_NCHW).logits_NK

    for name, network in {"classifier": DeepFeatures(classifier), "segmenter": segmenter}.items():
        truth = torch.cat([network(x_NCHW[i : i + 8]) for i in range(0, len(x_NCHW), 8)])
        for runtime in runtimes:
            for count in threads:
                torch.set_num_threads(count)
                for batch in batches:
                    begun = time.perf_counter()
                    try:
                        example = x_NCHW[:batch].to(device)
                        run = RUNTIMES[runtime](copy.deepcopy(network).to(device), example, count)
                        run(example)
                    except Exception as error:  # noqa: BLE001 - each runtime has its own errors
                        print(f"{name}, {runtime}, batch {batch}: {type(error).__name__}: {error}"[:300], flush=True)
                        break
                    ready_s = time.perf_counter() - begun
                    cpu_s, wall_s, output = measure(run, x_NCHW.to(device), batch, passes)
                    other, most = compared(
                        name, logits_of(name, output), logits_of(name, truth), bundle.card.gate_thresholds
                    )
                    rows.append(Row(name, runtime, count, batch, 1000 * cpu_s, 1000 * wall_s, other, most, ready_s))
                    print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """A row of the Markdown table."""
    return (
        f"| {row.network} | {row.runtime} | {row.threads} | {row.batch} | {row.cpu_ms:.1f} | {row.wall_ms:.1f} | "
        f"{row.other_share:.4%} | {row.most:.2g} | {row.ready_s:.1f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.runtimes")
    parser.add_argument("slide", type=Path)
    parser.add_argument("-m", "--model", default=DEFAULT_BUNDLE, help="name or folder of a bundle")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    options = parser.parse_args(arguments)
    keep_freed_memory()
    print(f"torch {torch.__version__}, {TILES} tiles", file=sys.stderr)
    print(
        "| network | runtime | threads | batch | CPU ms per tile | wall ms | other labels or gates | most | ready, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        rows_of(
            tiles_of(options.slide, options.model),
            options.model,
            options.only,
            options.batches,
            options.threads,
            device=options.device,
        )


if __name__ == "__main__":
    main()
