"""The process that multiprocessing counts semaphores with."""

from __future__ import annotations

import os
from multiprocessing import resource_tracker


def start_silent_tracker() -> None:
    """Start it, and tell it to be silent: processes that are killed leave semaphores behind, which it removes.

    Before any other process: starting it unblocks signals that a child is meant to inherit as blocked.
    """
    former = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join([*filter(None, [former]), "ignore:resource_tracker"])
    try:
        resource_tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if former is not None:
            os.environ["PYTHONWARNINGS"] = former
