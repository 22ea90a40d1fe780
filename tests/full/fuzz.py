"""Attack every reader of foreign files with damaged ones: `python -m tests.full.fuzz --minutes 10 --seed 0`.

Each try runs in a child process, so a crash of a native reader ends only that try. A try must end with a result or one
of this project's own errors, within a limit of time and memory. Anything else is a finding. The same target, seed and
number give the same input: `--target slides --seed 0 --first 123 --tries 1` repeats one.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tests.full.fuzz_targets import TARGETS, Attack
from tests.repository import REPOSITORY

MOST_SECONDS = 60.0
"""Limit for one try, on a busy machine."""

MOST_BYTES = 1 << 30
"""Limit for the memory of one try, beyond its process's memory before the try."""

RESULT = "result"
FINDING = "FINDING "


@dataclass
class Tally:
    """The outcomes of a target's tries."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    """The number of the first try with that outcome."""
    traces: dict[str, str] = field(default_factory=dict)
    """The stack of the first try with that outcome."""

    def add(self, number: int, outcome: str, trace: str) -> None:
        self.outcomes[outcome] += 1
        self.first.setdefault(outcome, number)
        self.traces.setdefault(outcome, trace)

    @property
    def tries(self) -> int:
        return self.outcomes.total()

    @property
    def findings(self) -> dict[str, int]:
        """What no try may end with, and the number of the first that did."""
        return {outcome: number for outcome, number in self.first.items() if outcome.startswith(FINDING)}

    def details(self) -> str:
        """The traces of all findings."""
        return "\n".join(
            f"{outcome} (try {number})\n{self.traces[outcome]}" for outcome, number in self.findings.items()
        )

    def __str__(self) -> str:
        lines = [
            f"  {count:7}  {outcome} (first: {self.first[outcome]})" for outcome, count in self.outcomes.most_common()
        ]
        return "\n".join(lines)


def fuzz(target: str, seed: int, numbers: Iterator[int], seconds: float = math.inf) -> Tally:
    """Try the inputs with these numbers until the time ends."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, _child(Path(folder), target) as child:
        end = time.monotonic() + seconds
        for number in numbers:
            if time.monotonic() >= end:
                break
            tally.add(number, *child.run(seed, number))
    return tally


class _Child:
    """A process that runs one try after the other. A crash starts a new process."""

    def __init__(self, folder: Path, target: str) -> None:
        self._folder = folder
        self._target = target
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None

    def run(self, seed: int, number: int) -> tuple[str, str]:
        """Run a try. Return its outcome and its last stack."""
        if self._process is None:
            self._start()
        self._connection.send((seed, number))
        try:
            if self._connection.poll(MOST_SECONDS):
                outcome, trace = self._connection.recv()
                return str(outcome), str(trace)
        except EOFError:
            outcome = self._crashed()
        else:
            self.end()
            outcome = f"longer than {MOST_SECONDS:g} s"
        stack = (self._folder / "fault").read_text(errors="replace")
        return f"{FINDING}{outcome}{_place(stack)}", stack

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(theirs, self._folder, self._target, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()
        self._connection.recv()  # ready; loading may take long on a busy machine

    def _crashed(self) -> str:
        assert self._process is not None
        self._process.join()
        code, self._process = self._process.exitcode or 0, None
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return f"crash: {name}"

    def end(self) -> None:
        if self._process is not None:
            # The signal makes the process write its stack.
            if self._process.is_alive() and self._process.pid:
                os.kill(self._process.pid, signal.SIGUSR1)
                time.sleep(0.2)
            self._process.kill()
            self._process.join()
            self._process = None


@contextmanager
def _child(folder: Path, target: str) -> Iterator[_Child]:
    good = folder / "good"
    good.mkdir()
    TARGETS[target].prepare(good)
    child = _Child(folder, target)
    try:
        yield child
    finally:
        child.end()


def _place(stack: str) -> str:
    """Return this project's innermost line of a stack from faulthandler, which starts with the innermost frame."""
    lines = [line.strip() for line in stack.splitlines() if line.strip().startswith("File ")]
    first = next((line for line in lines if str(REPOSITORY) in line and "tests/full" not in line), "")
    return f" at {first.replace(str(REPOSITORY) + '/', '')}" if first else ""


def _serve(connection: Connection, folder: Path, name: str, parent: int) -> None:
    """Run tries until the parent closes the connection."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # Discard what native readers print.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    target, work = TARGETS[name], folder / "work"
    with (folder / "fault").open("w") as fault:
        faulthandler.enable(fault)
        faulthandler.register(signal.SIGUSR1, fault)
        _warm_up(name, folder, work)
        _bound_memory()
        connection.send("ready")
        while os.getppid() == parent:
            try:
                seed, number = connection.recv()
            except EOFError:
                return
            fault.truncate(0)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            connection.send(_outcome(target.attack, folder / "good", work, random.Random(f"{name}/{seed}/{number}")))


def _warm_up(name: str, folder: Path, work: Path) -> None:
    """Load the libraries before the memory is limited."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    _outcome(TARGETS[name].attack, folder / "good", work, random.Random(0))


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        bytes_now = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (bytes_now + MOST_BYTES, resource.RLIM_INFINITY))


def _outcome(attack: Attack, good: Path, work: Path, chance: random.Random) -> tuple[str, str]:
    from wsi.errors import WsiSegmentError

    try:
        attack(good, work, chance)
    except WsiSegmentError as error:
        return type(error).__name__, str(error)
    except BaseException as error:  # noqa: BLE001 - the fuzzer searches for every exception
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if str(REPOSITORY) in frame.filename and "tests/full" not in frame.filename]
        place = f" at {own[-1].filename.replace(str(REPOSITORY) + '/', '')}:{own[-1].lineno}" if own else ""
        trace = "".join(traceback.format_exception(error, limit=-12))
        return f"{FINDING}{type(error).__name__}{place}", trace[-3000:]
    return RESULT, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="limit for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    parser.add_argument("--tries", type=int, default=None, help="for each target, instead of --minutes")
    options = parser.parse_args()
    targets = options.target or list(TARGETS)
    found = False
    for target in targets:
        start = time.monotonic()
        last = 10**9 if options.tries is None else options.first + options.tries
        seconds = 60 * options.minutes / len(targets) if options.tries is None else math.inf
        tally = fuzz(target, options.seed, iter(range(options.first, last)), seconds)
        print(f"{target}: {tally.tries} inputs in {time.monotonic() - start:.0f} s, {len(tally.findings)} findings")
        print(tally)
        print(tally.details(), flush=True)
        found |= bool(tally.findings)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
