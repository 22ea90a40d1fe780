"""Search for failures at random for a bounded time: `python -m tests.explore --minutes 9 --seed 123`.

Three searches share the time equally:

1. Hypothesis draws new examples for every property test, round after round (`tests/conftest.py`, profile `explore`).
2. `tests.full.fuzz` reads damaged files.
3. `tests.full.crash` kills runs at random steps and resumes them.

Without `--seed`, the seed is drawn at random. It is printed first; pass it to repeat a search. The exit status is 1 if
a search finds a failure. The time is a limit, not a promise of a number of examples.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.repository import REPOSITORY

PROPERTIES = ("-m", "hypothesis", "--hypothesis-profile", "explore", "-n", "0", "-q", "--durations=0", "-x")


def bounded(command: Sequence[str], seconds: float) -> int | None:
    """Run a command in this project and return its exit status, or None if the time ended first."""
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def explore_properties(seed: int, seconds: float, arguments: Sequence[str] = ()) -> bool:
    """Run the property tests with new examples until the time ends. Return whether all of them passed."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        command = [sys.executable, "-m", "pytest", *PROPERTIES, "--hypothesis-seed", str(seed + number), *arguments]
        print("$", *command[1:], flush=True)
        status = bounded(command, end - time.monotonic())
        if status not in (0, None):
            return False
        number += 1
    return True


def main() -> None:
    """Run the three searches and exit with 1 if one of them found a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="limit for all searches together")
    parser.add_argument("--seed", type=int, default=None, help="drawn at random by default")
    options = parser.parse_args()
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"explore: seed {seed}, {options.minutes:g} minutes", flush=True)
    share = options.minutes / 3
    passed = [explore_properties(seed, 60 * share)]
    for module in ("tests.full.fuzz", "tests.full.crash"):
        command = [sys.executable, "-m", module, "--minutes", f"{share:.2f}", "--seed", str(seed)]
        print("$", *command[1:], flush=True)
        # The limit is for a search that hangs: starting up and finishing its last case take longer than its share.
        passed.append(bounded(command, 60 * share + 300) == 0)
    print(f"explore: {'passed' if all(passed) else 'FAILED'} with seed {seed}", flush=True)
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
