from __future__ import annotations

import numpy as np
import torch

from models.familiarity import Statistics
from tests.bench.adenoma import ADENOMA, OTHERS, flagged, row


def test_an_image_is_flagged_if_too_many_of_its_windows_are_beyond_the_limit() -> None:
    beyond_45 = np.repeat([0.5, 1.5], [11, 10])  # 10 of 21 windows, less than half
    assert flagged([beyond_45]) == "100.0 % of 1"
    assert flagged([np.array([0.5, 0.7, 1.5]), np.array([1.5, 2.0]), np.array([1.0, 1.0])]) == "33.3 % of 3"


def test_a_row_compares_adenoma_with_the_other_kinds() -> None:
    statistics = Statistics(torch.zeros(1, 2), torch.eye(2)[None])

    def image(*distances: float) -> torch.Tensor:
        return torch.tensor([[distance, 0.0] for distance in distances])

    tested = {kind: [image(1.0, 1.0, 3.0)] for kind in OTHERS}
    tested |= {ADENOMA[0]: [image(5.0, 5.0), image(1.5, 1.5)], ADENOMA[1]: [image(2.0, 5.0)], "GlaS": [image(0.5)]}
    # The limit is a distance of 2. Adenoma is at 5, 5, 1.5, 1.5, 2 and 5, the others at 1, 1 and 3: of the 6 × 3
    # pairs, those of 1.5, 1.5 and 2 with 3 are in the wrong order.
    expected = "| two sources | 50.0 % of 2 | 100.0 % of 1 | 0.0 % of 4 | 0.0 % of 1 | 0.83 |"
    assert row("two sources", statistics, 2.0, tested) == expected
