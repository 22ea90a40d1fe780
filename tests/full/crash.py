"""Kill runs at random times and steps, resume them, and check that nothing is lost and nothing incomplete is visible.

    python -m tests.full.crash [SLIDE] --kills 100 --seed 0
    python -m tests.full.crash --minutes 2 --seed 0

SIGKILL ends a run at a random time, or at a random step that touches a file or calls a network. A third of the latter
leave random bytes in the file that the step was about to write. Some kills also simulate a power cut: everything that
was not synced is lost. The run is then started again until it finishes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from models.bundle import load_bundle, load_networks, save_bundle
from pipeline.checks.result import broken_rules
from pipeline.results.record import read_run
from pipeline.results.summary import read_summary
from tests.full.disk import Disk, Event
from tests.full.victim import Order, line_of
from tests.pipeline.fakes import published
from tests.pipeline.small_bundle import small_bundle
from tests.repository import REPOSITORY
from tests.slides import PINK, PURPLE, painted, write_slide

FORMER_CANVAS = 256
"""`canvas_m` of the earlier run, whose result `--force` replaces."""

NOTES = "notes.txt"
"""A user's file in a result's folder."""

STEPS = {
    "working folder made": r"> mkdir \.slide\.work",
    "header of the working folder": r"> rename .*identity\.json$",
    "store made": r"> write .*store/",
    "store moved into its place": r"> rename .*/store ",
    "in the middle of a block": r"> predict$",
    "polygons of a block": r"> write .*\.arrow$",
    "chunk begun": r"> write .*ome\.zarr/0/.*\.partial$",
    "chunk written": r"> rename .*ome\.zarr/0/.*\.partial ",
    "chunk synced": r"> sync .*ome\.zarr/0/\d+/\d+/\d+$",
    "folder of chunks synced": r"> sync .*ome\.zarr/0/\d+/\d+$",
    "journal line begun": r"> write .*journal\.jsonl$",
    "journal line written": r"> sync .*journal\.jsonl$",
    "journal line synced": r"> synced .*journal\.jsonl$",
    "join": r"> write .*\.geojson$",
    "pyramid": r"> write .*ome\.zarr/1/.*\.partial$",
    "preview": r"> write .*preview\.png$",
    "page": r"> write .*/index\.html$",
    "run.json": r"> write .*run\.json$",
    "everything synced": r"> sync .*/result/run\.json$",
    "publishing": r"> rename \.slide\.work/result slide$",
    "published": r"> rename \.slide\.work/result slide > sync \.$",
    "working folder cleared": r"> (remove|rmdir) \.slide\.work/(regions|journal)",
    "summary": r"> rename .*summary\.csv$",
    "report": r"> rename .*index\.html$",
}
"""The named steps of a run: patterns of a step and the step before it in a trace."""


@dataclass(frozen=True)
class Bench:
    """What all kills share."""

    starter: Starter
    slide: Path
    work: Path
    """For the outputs."""
    expected: dict[str, bytes]
    """The files of the undisturbed result, but those that tell times."""
    former: Path
    """The output of a run with other settings."""
    seconds: float
    """Duration of the undisturbed run."""
    trace: list[Event]
    """Its steps."""

    def order(self, output: Path, number: int = 0) -> Order:
        """Return an order for a whole run into an output."""
        return Order(str(self.slide), str(output), f"{output}.trace{number}")


@dataclass(frozen=True)
class Kill:
    """How to kill a run: after some seconds, or at a step given by its number or its name in `STEPS`."""

    after_s: float | None = None
    at: int | None = None
    name: str | None = None
    torn: int | None = None
    """Number of random bytes in the file that the step was about to write."""
    power: bool = False
    """Whether everything that was not synced is lost, too."""


class Starter:
    """A process that forks runs. Use it as a context manager."""

    def __init__(self, bundle: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.full.victim", str(bundle)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def run(self, order: Order, after_s: float | None = None) -> int:
        """Run an order and return its exit status: -9 if it was killed, by itself or from here after some seconds."""
        self._say(line_of(order))
        handle = os.pidfd_open(int(self._answer()))
        self._say("watched\n")
        try:
            if after_s is not None:
                time.sleep(after_s)
                # By its handle: its number may be another process's by now.
                with suppress(ProcessLookupError):  # the process has exited
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
        return int(self._answer())

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(timeout=60)


@contextmanager
def open_bench(work: Path, slide: Path | None = None) -> Iterator[Bench]:
    """A starter with small real networks, and what they say of the slide when nobody disturbs them."""
    bundle = crash_bundle(work / "bundle")
    if slide is None:
        grainy_slide(work / "slide.svs")
    else:
        (work / "slide.svs").symlink_to(slide.absolute())
    with Starter(bundle) as starter:
        former = work / "former"
        order = Order(str(work / "slide.svs"), str(former), str(work / "former.trace"), canvas_m=FORMER_CANVAS)
        assert starter.run(order) == 0
        (former / "slide" / NOTES).write_text("mine", encoding="utf-8")
        order = Order(str(work / "slide.svs"), str(work / "undisturbed"), str(work / "undisturbed.trace"))
        start = time.monotonic()
        assert starter.run(order) == 0
        seconds = time.monotonic() - start
        yield Bench(
            starter,
            work / "slide.svs",
            work,
            published(work / "undisturbed" / "slide"),
            former,
            seconds,
            read_trace(Path(order.trace)),
        )


def crash_bundle(folder: Path) -> Path:
    """`small_bundle` with a margin of 16 px, which takes less time."""
    bundle = small_bundle(folder.with_name("large-margin"))
    card = bundle.card.model_copy(update={"margin": 16})
    return save_bundle(folder, card, *load_networks(load_bundle(str(bundle.path)))).path


def grainy_slide(path: Path) -> Path:
    """A tiny slide of two regions with grain, so that no block is like another."""
    rgb_HWC = painted((256, 224), ((32, 32, 192, 160), PINK), ((100, 60, 100, 90), PURPLE))
    grain_HW1 = np.random.default_rng(1).integers(-12, 12, (*rgb_HWC.shape[:2], 1))
    return write_slide(path, np.clip(rgb_HWC + grain_HW1, 0, 255).astype(np.uint8), mpp=1.0)


def read_trace(path: Path) -> list[Event]:
    """The steps of a run."""
    return [tuple(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def random_kill(bench: Bench, rng: random.Random) -> Kill:
    """Half of them by time, half by step."""
    power = rng.random() < 0.3
    if rng.random() < 0.5:
        return Kill(after_s=rng.uniform(0, bench.seconds), power=power)
    torn = rng.randrange(200) if rng.random() < 1 / 3 else None
    return Kill(at=rng.randrange(len(bench.trace)), torn=torn, power=power)


def survive(bench: Bench, output: Path, kills: Sequence[Kill], rng: random.Random, *, replacing: bool = False) -> int:
    """Run into a new output with these kills and then to the end. Return how many kills hit a running process.

    Raises AssertionError if anything is lost, incomplete or left behind.
    """
    if replacing:
        shutil.copytree(bench.former, output)
    disk, tried = Disk(output), 0
    for number, kill in enumerate(kills):
        order = replace(
            bench.order(output, number),
            die_at=kill.at,
            die_on=kill.name and STEPS[kill.name],
            torn=kill.torn,
            force=replacing,
        )
        code = bench.starter.run(order, kill.after_s)
        assert code == -signal.SIGKILL or (code == 0 and not kill.name), (kill, code)
        tried += code != 0
        trace = Path(order.trace)
        # A process that is killed before it opens its trace has taken no step.
        disk.replay(read_trace(trace) if trace.exists() or code == 0 else [])
        if kill.power and code != 0:
            disk.cut_power(rng)
        check_visible(bench, output, replacing=replacing)
    # If the new result is complete already, this run only cleans up.
    order = replace(bench.order(output, len(kills)), force=replacing and not _is_new(output))
    assert bench.starter.run(order) == 0, "does not resume"
    check_end(bench, output, replacing=replacing)
    shutil.rmtree(output)
    return tried


def check_visible(bench: Bench, output: Path, *, replacing: bool) -> None:
    """Check after a kill that everything under the final names is complete."""
    result = output / "slide"
    if result.exists():
        assert not any(broken_rules(result).values()), broken_rules(result)
        same = {name: data for name, data in published(result).items() if name.partition(".kept")[0] != NOTES}
        former = {name: data for name, data in published(bench.former / "slide").items() if name != NOTES}
        assert same == bench.expected or (replacing and same == former), sorted(
            dict(same.items() ^ bench.expected.items())
        )
    elif replacing:
        assert (output / ".slide.old" / "run.json").exists()
    read_summary(output / "summary.csv")


def check_end(bench: Bench, output: Path, *, replacing: bool) -> None:
    """Check at the end that the bytes are those of the undisturbed run, and that nothing else is left."""
    found = published(output / "slide")
    if replacing:
        assert found.pop(NOTES) == b"mine"
    assert found == bench.expected, sorted(dict(found.items() ^ bench.expected.items()))
    assert _facts(output / "slide") == _facts(bench.work / "undisturbed" / "slide"), "run.json"
    assert read_summary(output / "summary.csv")["slide"]["status"] in ("done", "skipped")
    left = sorted(path.name for path in output.iterdir())
    assert left == ["index.html", "slide", "summary.csv"], left


def _facts(result: Path) -> dict[str, Any]:
    """Return the content of `run.json` without its times."""
    run = read_run(result)
    assert run is not None
    return run.model_dump(exclude={"seconds", "resumed_blocks"})


def _is_new(output: Path) -> bool:
    run = read_run(output / "slide")
    return run is not None and run.identity.parameters["canvas_m"] != FORMER_CANVAS


def main() -> None:
    """Print how many runs survived their kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path, nargs="?", help="a small slide; without one, a tiny one is made")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=None, help="in place of --kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    most = options.kills if options.minutes is None else sys.maxsize
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    met: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work, open_bench(Path(work), options.slide) as bench:
        print(f"undisturbed: {bench.seconds:.2f} s, {len(bench.trace)} steps", flush=True)
        trial = 0
        while met["tried"] < most and time.monotonic() < end:
            trial += 1
            kills = [random_kill(bench, rng) for _ in range(rng.choice((1, 1, 2, 3)))]
            replacing = rng.random() < 0.25
            try:
                met["tried"] += survive(bench, Path(work) / f"out{trial}", kills, rng, replacing=replacing)
            except AssertionError as error:
                met["lost"] += 1
                met["tried"] += len(kills)
                print(f"run {trial}, {kills}, replacing={replacing}: {error}", flush=True)
            if trial % 10 == 0:
                print(f"{trial} runs, {met['tried']} kills, {met['lost']} runs with another result", flush=True)
    print(f"runs with the result of an undisturbed run: {trial - met['lost']} of {trial}; kills: {met['tried']}")
    sys.exit(met["lost"] > 0)


if __name__ == "__main__":
    main()
