"""A result whose right half does not look like the training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.formats.familiarity import CELL_OUT, FamiliarityMap, write_familiarity
from pipeline.results.names import FAMILIARITY
from pipeline.results.record import Familiarity, Run, read_run, write_run

WARNING = "60 % of the tissue of this slide does not look like the model's training data (paint)"
FACTS = {"scope": "paint", "limits": "For tests.", "warnings": (WARNING, "another warning")}


def make_unfamiliar(folder: Path) -> Run:
    """Add the picture and the facts to a result of any model."""
    run = read_run(folder)
    assert run is not None
    width, height = (-(-length // CELL_OUT) for length in run.plan.grid.size_out)
    values_HW = np.ones((height, width), np.uint8)
    values_HW[:, width // 2 :] = 200
    write_familiarity(folder / FAMILIARITY, FamiliarityMap(values_HW, 0.6))
    l0_per_px = run.plan.grid.l0_per_out * CELL_OUT
    familiarity = Familiarity(unfamiliar_share=0.6, share_limit=0.5, l0_per_px=l0_per_px)
    run = run.model_copy(update={"familiarity": familiarity, **FACTS})
    write_run(folder, run)
    return run
