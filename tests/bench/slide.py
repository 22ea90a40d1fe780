"""Measures a run against its floors, on one slide and in one go.

    python -m tests.bench.slide SLIDE [-m MODEL] [--device cpu] [-j 2] [--repeat 3] [--json FILE]

The decode floor is the time to read and decode the boxes that the run reads, with its reader and as many workers. The
network floor is the time of as many classifier and segmenter tiles as the run had, from memory, at the best batch
size. The larger one is what the wall time of everything is held against: start of the process, imports, model, plan,
blocks, polygons, pyramid, publishing.

Floors are measured before, between and after the runs. Other work on the machine slows runs and floors down: the
efficiency takes the fastest floor that was seen, "floors beside the run" the mean of those before and after it. CPU
seconds depend least on what else is running.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.bundle import DEFAULT_BUNDLE, load_bundle
from models.predictor import Predictor
from pipeline.config import ResolvedSettings, SegmentConfig, resolve
from pipeline.results.record import versions
from pipeline.slide.plan import Plan, plan_slide
from pipeline.workers.in_process import load_predictor
from pipeline.workers.malloc import keep_freed_memory
from tests.bench.floors import (
    NetworkFloor,
    Reads,
    Took,
    best_batch,
    decode,
    per_tile,
    planned_reads,
    readable_backends,
    sample_tiles,
)
from tests.repository import REPOSITORY
from wsi.readers import BackendName
from wsi.slide import SlideInfo

STAGES = ("plan", "blocks", "join", "preview")
"""Of run.json's `seconds`, those that follow one another. The pyramid is built beside the last two."""


@dataclass(frozen=True)
class Subject:
    """What both floors are measured on."""

    info: SlideInfo
    plan: Plan
    reads: Reads
    backends: list[BackendName]
    predictor: Predictor
    rgb_NHWC: Any
    batches: tuple[int, int]
    """Best batch size of the classifier and of the segmenter."""
    settings: ResolvedSettings


@dataclass(frozen=True)
class Floors:
    """One measurement of both."""

    decode: dict[str, Took]
    """Per reader."""
    network: NetworkFloor

    def network_took(self, tiles: float, segmented: float) -> Took:
        """For as many tiles' pixels as a run computed."""
        a, b = self.network
        return Took(a.wall_s * tiles + b.wall_s * segmented, a.cpu_s * tiles + b.cpu_s * segmented)


def measure(path: Path, model: str, config: SegmentConfig, repeat: int = 1) -> dict[str, Any]:
    """Run the slide `repeat` times between floors; returns plain values for the table and for JSON.

    Raises RuntimeError with the process's output if a run fails or the slide has no tissue.
    """
    keep_freed_memory()
    load_before = os.getloadavg()[0]
    _say("planning, and looking for the best batch size")
    subject = _subject(path, model, config)
    _say("floors")
    floors = [_floors(subject)]
    runs = []
    for number in range(repeat):
        _say(f"run {number + 1} of {repeat}")
        runs.append(_run(path, model, config))
        _say("floors")
        floors.append(_floors(subject))
    return {
        "slide": {"name": path.name, "size": list(subject.info.size_l0), "mpp": subject.info.mpp},
        "model": model,
        "settings": _settings(config),
        "machine": _machine(subject.predictor, load_before),
        "plan": {
            "tiles": subject.plan.tiles,
            "blocks": len(subject.plan.blocks),
            "tissue_mm2": subject.plan.tissue_um2 / 1e6,
            "memory_bytes": subject.plan.memory_bytes(subject.settings),
            "read_level": subject.reads.level,
            "lv_per_m": subject.plan.grid.lv_per_m,
            "read_megapixels": subject.reads.pixels / 1e6,
            "distinct_share": subject.reads.distinct_share,
            "best_batches": dict(zip(("classifier", "segmenter"), subject.batches, strict=True)),
        },
        "runs": [_judged(run, subject, floors, floors[i : i + 2]) for i, run in enumerate(runs)],
        "floors": [
            {
                "decode": {name: took._asdict() for name, took in found.decode.items()},
                "classifier_per_tile": found.network.classifier._asdict(),
                "segmenter_per_tile": found.network.segmenter._asdict(),
            }
            for found in floors
        ],
    }


def _say(step: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {step}", file=sys.stderr, flush=True)


def _subject(path: Path, model: str, config: SegmentConfig) -> Subject:
    card = load_bundle(model).card
    _, slide, tissue, plan = plan_slide(path, card, config)
    with slide:
        if not plan.blocks:
            raise RuntimeError(f"{path.name}: no tissue was found, there is nothing to measure")
        predictor = load_predictor(model, config)
        rgb_NHWC = sample_tiles(slide, tissue, plan)
        return Subject(
            info=slide.info,
            plan=plan,
            reads=planned_reads(slide.info, tissue, plan, card, config.canvas_m),
            backends=readable_backends(slide.info, plan.grid.level),
            predictor=predictor,
            rgb_NHWC=rgb_NHWC,
            batches=(
                best_batch(predictor, rgb_NHWC, partial(_presence, predictor)),
                best_batch(predictor, rgb_NHWC, predictor.logits),
            ),
            settings=resolve(config, predictor.compute),
        )


def _floors(subject: Subject) -> Floors:
    predictor, rgb_NHWC = subject.predictor, subject.rgb_NHWC
    tiles = round(_computed_tiles(subject.plan))
    return Floors(
        {name: decode(subject.info, subject.reads, name, subject.settings.num_workers) for name in subject.backends},
        NetworkFloor(
            per_tile(predictor, rgb_NHWC, partial(_presence, predictor), subject.batches[0], tiles),
            per_tile(predictor, rgb_NHWC, predictor.logits, subject.batches[1], tiles),
        ),
    )


def _presence(predictor: Predictor, rgb_NHWC: Any) -> object:
    return predictor.presence(rgb_NHWC, [(0, 0)] * len(rgb_NHWC))


def _computed_tiles(plan: Plan) -> float:
    """The pixels that a run computes, margins included, in tiles."""
    return plan.computed_px / plan.grid.tile_m**2


def _settings(config: SegmentConfig) -> dict[str, Any]:
    names = ("mpp", "backend", "device", "precision", "batch_size", "num_workers", "canvas_m", "output_stride")
    return {name: getattr(config, name) for name in names}


def _run(path: Path, model: str, config: SegmentConfig) -> dict[str, Any]:
    """Segment the slide in a new process. Return its output, values of its run.json and the wall time."""
    # A bundle's path may be relative to the benchmark's working folder.
    model = str(Path(model).absolute()) if Path(model).is_dir() else model
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.one_run", str(path.absolute()), folder, model]
        begun = time.perf_counter()
        child = subprocess.run(
            [*command, json.dumps(_settings(config))], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        wall_s = time.perf_counter() - begun
        if child.returncode != 0:
            raise RuntimeError(f"the run of {path.name} failed:\n{child.stderr}")
        run = json.loads((Path(folder) / path.stem / "run.json").read_text(encoding="utf-8"))
        kept = {key: run[key] for key in ("tiles", "seconds", "tissue_mm2", "polygons", "class_areas_mm2", "warnings")}
        results: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return results | kept | {"wall_s": wall_s}


def _judged(run: dict[str, Any], subject: Subject, floors: list[Floors], beside: list[Floors]) -> dict[str, Any]:
    tiles = _computed_tiles(subject.plan)
    segmented = tiles * run["tiles"]["segmented"] / run["tiles"]["run"]
    own = subject.info.backend
    decode_s = min(found.decode[own].wall_s for found in floors)
    network_s = min(found.network_took(tiles, segmented).wall_s for found in floors)
    beside_s = max(
        sum(found.decode[own].wall_s for found in beside) / len(beside),
        sum(found.network_took(tiles, segmented).wall_s for found in beside) / len(beside),
    )
    network_cpu_s = min(found.network_took(tiles, segmented).cpu_s for found in floors)
    decode_cpu_s = min(found.decode[own].cpu_s for found in floors)
    seconds = run["seconds"]
    shares = {stage: seconds.get(stage, 0.0) / run["wall_s"] for stage in STAGES}
    return run | {
        "floor_s": {"decode": decode_s, "network": network_s},
        "floor_cpu_s": {"decode": decode_cpu_s, "network": network_cpu_s},
        "efficiency": max(decode_s, network_s) / run["wall_s"],
        "efficiency_beside": beside_s / run["wall_s"],
        "efficiency_without_start": max(decode_s, network_s) / run["segment_s"],
        # Of the CPU time that the run took, what both floors need.
        "cpu_efficiency": (network_cpu_s + decode_cpu_s) / run["cpu_s"],
        "computed_per_tissue": subject.plan.computed_px * subject.plan.grid.mpp_m**2 / subject.plan.tissue_um2,
        "tiles_per_s": tiles / run["wall_s"],
        "mm2_per_s": run["tissue_mm2"] / run["wall_s"],
        # What is in no stage: writing run.json, syncing and renaming the result, the end of the process.
        "shares": {"start": run["times"]["model_s"] / run["wall_s"]}
        | shares
        | {"digest, publishing, exit": 1 - sum(shares.values()) - run["times"]["model_s"] / run["wall_s"]},
        "networks_share_of_blocks": seconds["blocks: network"] / seconds["blocks"],
    }


def _machine(predictor: Predictor, load_before: float) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu" if predictor.device.type == "cpu" else predictor.processor,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "load": [load_before, os.getloadavg()[0]],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown, a column per run."""
    plan, machine, runs = found["plan"], found["machine"], found["runs"]
    rows: list[tuple[str, list[str]]] = [
        ("tiles, of which segmented", [f"{r['tiles']['run']}, {r['tiles']['segmented']}" for r in runs]),
        ("pixels computed per pixel of tissue", [f"{r['computed_per_tissue']:.2f}" for r in runs]),
        ("decode floor, s", [f"{r['floor_s']['decode']:.2f}" for r in runs]),
        ("network floor, s", [f"{r['floor_s']['network']:.2f}" for r in runs]),
        ("whole process, s", [f"{r['wall_s']:.2f}" for r in runs]),
        ("· from slide to result, s", [f"{r['segment_s']:.2f}" for r in runs]),
        ("**efficiency**", [f"**{r['efficiency']:.2f}**" for r in runs]),
        ("· floors beside the run", [f"{r['efficiency_beside']:.2f}" for r in runs]),
        ("· without start-up", [f"{r['efficiency_without_start']:.2f}" for r in runs]),
        ("· floors' share of CPU time", [f"{r['cpu_efficiency']:.2f}" for r in runs]),
        ("CPU time, of which system, s", [f"{r['cpu_s']:.1f}, {r['system_s']:.1f}" for r in runs]),
        ("peak memory, MB", [f"{r['peak_bytes'] / 1e6:.0f}" for r in runs]),
        ("· once model is loaded, MB", [f"{r['started_bytes'] / 1e6:.0f}" for r in runs]),
        ("tiles/s", [f"{r['tiles_per_s']:.1f}" for r in runs]),
        ("tissue, mm²/s", [f"{r['mm2_per_s']:.3f}" for r in runs]),
        ("first block begun / done, s", [_first_block(r) for r in runs]),
        *((f"share: {name}", [f"{r['shares'][name]:.1%}" for r in runs]) for name in runs[0]["shares"]),
        ("networks, of the blocks' time", [f"{r['networks_share_of_blocks']:.1%}" for r in runs]),
        ("reading, summed over blocks, s", [f"{r['seconds']['blocks: read']:.1f}" for r in runs]),
        ("polygons, summed, s", [f"{r['seconds']['blocks: polygons']:.1f}" for r in runs]),
        ("writing, summed, s", [f"{r['seconds']['blocks: write']:.1f}" for r in runs]),
    ]
    head = [
        f"{found['slide']['name']}: {found['slide']['size'][0]}×{found['slide']['size'][1]}, {plan['blocks']} blocks, "
        f"{plan['tissue_mm2']:.2f} mm² of tissue, {plan['read_megapixels']:.1f} megapixels read from level "
        f"{plan['read_level']} ({plan['distinct_share']:.0%} of them once), {plan['lv_per_m']:g} per model pixel",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['device']}, load "
        f"{machine['load'][0]:.1f} before and {machine['load'][1]:.1f} after; best batches {plan['best_batches']}",
        "",
        "| |" + "".join(f" run {i + 1} |" for i in range(len(runs))),
        "|---|" + "---|" * len(runs),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
        "",
        "Floors, in the order they were measured:",
        "",
        *(f"- {_floor_line(floor, plan['read_megapixels'])}" for floor in found["floors"]),
    ]
    return "\n".join(head)


def _first_block(run: dict[str, Any]) -> str:
    return f"{run['times']['first_block_begun_s']:.2f} / {run['times']['first_block_s']:.2f}"


def _floor_line(floor: dict[str, Any], megapixels: float) -> str:
    readers = [
        f"{name} {took['wall_s']:.2f} s ({took['cpu_s']:.2f} s CPU, {megapixels / took['cpu_s']:.0f} megapixels/CPU s)"
        for name, took in floor["decode"].items()
    ]
    networks = [f"{name} {1000 * floor[f'{name}_per_tile']['wall_s']:.1f} ms" for name in ("classifier", "segmenter")]
    return "; ".join((*readers, ", ".join(networks) + " per tile"))


def slide_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments of a benchmark that segments one slide: all but its own."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(description or "").split("\n", 1)[0])
    parser.add_argument("slide", type=Path)
    parser.add_argument("-m", "--model", default=DEFAULT_BUNDLE, help="name or folder of a bundle")
    parser.add_argument("--mpp", type=float, help="µm per level-0 pixel, if the slide does not contain it")
    parser.add_argument("--backend", choices=("auto", "openslide", "tiffslide"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("float32", "bf16", "fp16"), default="float32")
    parser.add_argument("-b", "--batch-size", type=int, default=SegmentConfig.batch_size)
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the JSON if `--json` is given."""
    parser = slide_parser("tests.bench.slide", __doc__)
    parser.add_argument("-j", "--num-workers", type=int, default=SegmentConfig.num_workers)
    parser.add_argument("--repeat", type=int, default=1, help="runs; floors are measured around each")
    options = vars(parser.parse_args(arguments))
    path, model, repeat, file = (options.pop(name) for name in ("slide", "model", "repeat", "json"))
    found = measure(path, model, SegmentConfig(**options), repeat)
    print(table(found))
    if file is not None:
        file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
