"""Run the device code on the pretend accelerator, in this process, and print what happened as JSON.

python -m tests.pretend_runs predictor
python -m tests.pretend_runs command BUNDLE SLIDE OUTPUT
python -m tests.pretend_runs operations BUNDLE SLIDE
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def in_own_process(*arguments: object) -> dict[str, Any]:
    """Return what a run in another process printed."""
    command = [sys.executable, "-m", "tests.pretend_runs", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def run_predictor() -> dict[str, Any]:
    """Predict canvases of two sizes on both devices."""
    import torch

    from models.card import NO_DIGEST
    from models.devices import available_devices, choose_device
    from models.predictor import Predictor
    from tests.models.networks import ColorClassifier, ColorSegmenter, make_card
    from tests.pretend import Record, recorded

    rng = np.random.default_rng(0)
    canvases = [np.full((96, 96, 3), COLORS[n % 3], np.uint8) for n in range(6)]
    canvases += [np.repeat(rng.choice(COLORS, (1, 128)), 96, axis=0).astype(np.uint8) for _ in range(6)]
    corners = [(32 * n, 64) for n in range(len(canvases))]

    def predictor(device: str, batch_size: int) -> Predictor:
        networks = ColorClassifier(COLORS), ColorSegmenter(COLORS)
        return Predictor(make_card(COLORS), NO_DIGEST, *networks, device=device, batch_size=batch_size)

    def predicted(model: Predictor, chosen: Sequence[int]) -> tuple[list[torch.Tensor], list[bool], Record]:
        there = model.on_device(np.concatenate([canvases[n] for n in chosen], axis=1))
        stops = np.cumsum([canvases[n].shape[1] for n in chosen])
        places = [
            (slice(0, 96), slice(stop - canvases[n].shape[1], stop)) for n, stop in zip(chosen, stops, strict=True)
        ]
        probs = [torch.empty((3, 8, (canvases[n].shape[1] - 64) // 4), device=model.device) for n in chosen]
        with recorded() as record:
            segmented, _ = model.predict_into(probs, there, places, [corners[n] for n in chosen])
        return [one.cpu() for one in probs], [bool(parts) for parts in segmented], record

    found: dict[str, Any] = {"devices": available_devices(), "auto": str(choose_device("auto")), "predictions": []}
    for chosen, batch_size in product(([7], range(6, 10), range(12)), (1, 4)):
        ours, theirs = (predicted(predictor(name, batch_size), chosen) for name in ("auto", "cpu"))
        equal = all(torch.equal(one, other) for one, other in zip(ours[0], theirs[0], strict=True))
        prediction = {"canvases": len(chosen), "batch": batch_size, "equal": equal, "segmented": [ours[1], theirs[1]]}
        found["predictions"].append(prediction | asdict(ours[2]))
    found["one network moved"] = str(_predictor_of_a_moved_classifier().device)
    return found | {"operations": {name: _moves_or_error(run) for name, run in _operations().items()}}


def _predictor_of_a_moved_classifier() -> Any:
    """Return a predictor of networks that start alike, made after only one of them was moved to the device."""
    from models.bundle import load_bundle, load_networks
    from models.predictor import Predictor

    bundle = load_bundle("colon-gland")
    classifier, segmenter = load_networks(bundle)
    return Predictor(bundle.card, bundle.digest, classifier.to("pretend"), segmenter, device="pretend")


def _operations() -> dict[str, Callable[[], object]]:
    """Return operations that a GPU refuses, or that let the host wait."""
    import torch

    there, here = torch.arange(4.0).to("pretend"), torch.arange(4)
    return {
        "sum of two devices": lambda: there + here,
        "index on another device": lambda: there[here],
        "copy to the device": lambda: here.to("pretend"),
        "copy to the host": there.cpu,
        "number": lambda: there.sum().item(),
        "condition": lambda: bool((there > 1).all()),
        "mask": lambda: there[there > 1],
        "product": lambda: there * 2,
    }


def _moves_or_error(run: Callable[[], object]) -> list[str]:
    from tests.pretend import recorded

    with recorded() as record:
        try:
            run()
        except RuntimeError as error:
            return [str(error)]
    return record.moves


def run_command(bundle: str, slide: str, output: str) -> dict[str, Any]:
    """Run `wsi-segment` on both devices and record the moves of each block on the pretend one."""
    from typer.testing import CliRunner

    from pipeline.cli.segment import app
    from pipeline.slide.blocks import segment_block
    from tests.pretend import recorded

    blocks: list[list[str]] = []

    def recording(*arguments: Any) -> Any:
        with recorded() as record:
            finished = segment_block(*arguments)
        blocks.append(record.moves)
        return finished

    options = ["-m", bundle, "--output-stride", "1", "--runtime", "torch", "-b", "2", "-j", "2"]
    status, counts = {}, {}
    for device in ("cpu", "auto"):
        blocks.clear()
        # So small that a block has several canvases.
        small = patch("pipeline.slide.canvases.SHARED_CANVAS_M", 384)
        with small, patch("pipeline.slide.engine.segment_block", recording):
            result = CliRunner().invoke(app, [slide, "-o", str(Path(output) / device), "--device", device, *options])
        status[device] = [result.exit_code, result.output]
        counts[device] = list(blocks)
    return {"status": status, "blocks": counts}


def run_operations(bundle: str, slide: str) -> dict[str, int]:
    """Count the operations on the device for one batch of four neighboring canvases of 256 px in the middle of a slide.

    They are divided into those of the networks' modules and all others: input, pooling in the gate windows, gate,
    upsampling of the logits, familiarity and output.
    """
    import torch
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    from models.bundle import load_bundle
    from models.predictor import Predictor
    from tests.pretend import recorded
    from wsi.box import Box
    from wsi.grid import make_grid
    from wsi.resample import read_model_pixels
    from wsi.slide import open_slide

    side = 256
    predictor = Predictor.from_bundle(load_bundle(bundle), device="pretend", runtime="torch", batch_size=4)
    margin = predictor.card.margin
    core = side - 2 * margin
    with open_slide(Path(slide)) as opened:
        grid = make_grid(opened.info, model_mpp=predictor.card.mpp, output_stride=4, block_out=256)
        x0, y0 = (length // 2 // 16 * 16 for length in grid.size_m)
        rgb_HWC = read_model_pixels(opened, grid, Box(x0, y0, core + side, core + side)).rgb_HWC
    corners = [(x, y) for y in (0, core) for x in (0, core)]
    places = [(slice(y, y + side), slice(x, x + side)) for x, y in corners]
    there = predictor.on_device(rgb_HWC)
    probs = list(torch.empty((4, len(predictor.card.classes), core // 4, core // 4), device=predictor.device))
    outermost: list[int] = []
    in_networks = 0
    with recorded() as record:

        def enter(*_: Any) -> None:
            outermost.append(record.kernels)

        def leave(*_: Any) -> None:
            nonlocal in_networks
            started = outermost.pop()
            if not outermost:
                in_networks += record.kernels - started

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
        cores = [(x0 + x + margin, y0 + y + margin) for x, y in corners]
        segmented, _ = predictor.predict_into(probs, there, places, cores)
        for hook in hooks:
            hook.remove()
    outside = record.kernels - in_networks
    return {"segmented canvases": sum(map(bool, segmented)), "in the networks": in_networks, "outside": outside}


if __name__ == "__main__":
    runs: dict[str, Callable[..., dict[str, Any]]] = {
        "predictor": run_predictor,
        "command": run_command,
        "operations": run_operations,
    }
    print(json.dumps(runs[sys.argv[1]](*sys.argv[2:])))
