"""Times what comes before the first block: the interpreter, `--help`, imports, the model.

    python -m tests.bench.startup [-m MODEL] [--slide SLIDE] [--times 5]

Every line is a fresh process, the fastest of a few. With a slide, it is segmented once and the time until its first
block is begun and done is told (`python -m tests.bench.slide` measures the same).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.bundle import DEFAULT_BUNDLE
from tests.repository import REPOSITORY

LIBRARIES = (
    "numpy",
    "torch",
    "timm",
    "segmentation_models_pytorch",
    "openslide",
    "tiffslide",
    "zarr",
    "shapely",
    "pyarrow",
)
"""Imported each alone."""

WITH_TORCHVISION = ("timm", "segmentation_models_pytorch")


class Start(NamedTuple):
    """One kind of process."""

    what: str
    wall_s: float
    cpu_s: float


def processes(model: str) -> dict[str, list[str]]:
    """Arguments of the interpreter, by what they stand for."""
    declare = "from models.torchvision_ops import declare_missing_ops as d; d(); "
    load = (
        "import pipeline.slide.recipe; from pipeline.workers.in_process import load_predictor; "
        f"from pipeline.config import SegmentConfig; load_predictor({model!r}, SegmentConfig())"
    )
    return {
        "python": ["-c", "pass"],
        "wsi-segment --help": ["-m", "pipeline.cli.segment", "--help"],
        **{
            f"import {name}": ["-c", (declare if name in WITH_TORCHVISION else "") + f"import {name}"]
            for name in LIBRARIES
        },
        "import pipeline.slide.recipe": ["-c", "import pipeline.slide.recipe"],
        "all imports and the model": ["-c", load],
    }


def fastest(what: str, arguments: Sequence[str], times: int) -> Start:
    """Return the fastest of `times` processes. Raises CalledProcessError if one fails."""
    wall_s, cpu_s = [], []
    for _ in range(times):
        before, begun = os.times(), time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, capture_output=True)
        wall_s.append(time.perf_counter() - begun)
        after = os.times()
        cpu_s.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return Start(what, min(wall_s), min(cpu_s))


def import_shares(module: str) -> dict[str, float]:
    """Seconds that a module's import spends in each top-level package, the largest first."""
    child = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    shares: dict[str, float] = collections.defaultdict(float)
    for line in child.stderr.splitlines():
        own, _, name = line.removeprefix("import time:").split("|") if line.count("|") == 2 else ("", "", "")
        if own.strip().isdigit():
            shares[name.strip().split(".")[0]] += int(own) / 1e6
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def first_block(slide: Path, model: str) -> dict[str, Any]:
    """Seconds from the start of a process that segments the slide until each step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.one_run", str(slide.absolute()), folder, model, "{}"]
        child = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    times: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])["times"]
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.startup")
    parser.add_argument("-m", "--model", default=DEFAULT_BUNDLE, help="name or folder of a bundle")
    parser.add_argument("--slide", type=Path, help="tell when its first block is begun and done, too")
    parser.add_argument("--times", type=int, default=5, help="processes of each kind")
    options = parser.parse_args(arguments)
    print("| process | wall s | CPU s |\n|---|---|---|")
    for what, command in processes(options.model).items():
        start = fastest(what, command, options.times)
        print(f"| {start.what} | {start.wall_s:.2f} | {start.cpu_s:.2f} |", flush=True)
    shares = import_shares("pipeline.slide.recipe")
    print(
        f"\nimport pipeline.slide.recipe: {sum(shares.values()):.2f} s, of which by package:\n\n"
        "| package | s |\n|---|---|"
    )
    for name, seconds in list(shares.items())[:12]:
        print(f"| {name} | {seconds:.2f} |")
    if options.slide is not None:
        print("\n| since the start of the process | s |\n|---|---|")
        for step, seconds in first_block(options.slide, options.model).items():
            print(f"| {step.removesuffix('_s').replace('_', ' ')} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
