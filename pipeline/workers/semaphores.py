"""The resource tracker of multiprocessing."""

from __future__ import annotations

import os
from multiprocessing import resource_tracker


def start_silent_tracker() -> None:
    """Start the process that removes the semaphores of killed processes, without its warnings about them.

    Call this before any other process starts: it unblocks signals that a child should inherit as blocked.
    """
    former = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join([*filter(None, [former]), "ignore:resource_tracker"])
    try:
        resource_tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if former is not None:
            os.environ["PYTHONWARNINGS"] = former
