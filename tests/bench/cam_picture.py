"""The picture of `tests.bench.cams`: maps of all methods on a few crops.

Shape suffixes: H and W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.training.dataset import Dataset
from tests.bench.cam_crops import Crop


def write_picture(
    path_png: Path,
    examples: Sequence[tuple[Crop, int]],
    columns: dict[str, list[NDArray[np.float32]]],
    dataset: Dataset,
) -> None:
    """Draw a row per example crop: the image, the truth, and each method's map of the class that the row names."""
    titles = ["image", "truth", *columns]
    figure = Figure(figsize=(1.7 * len(titles), 1.8 * len(examples) + 0.3), layout="constrained", dpi=110)
    axes = figure.subplots(len(examples), len(titles), squeeze=False)
    for row, (crop, k) in enumerate(examples):
        panels: list[NDArray[Any]] = [
            crop.rgb_HWC,
            truth_rgb(crop.truth_HW, dataset),
            *(maps[row] for maps in columns.values()),
        ]
        for column, panel in enumerate(panels):
            axis = axes[row, column]
            axis.set_xticks([])
            axis.set_yticks([])
            if panel.ndim == 3:
                axis.imshow(panel)
            else:
                axis.imshow(crop.rgb_HWC)
                axis.imshow(panel, cmap="inferno", vmin=0, vmax=1, alpha=0.6)
            if row == 0:
                axis.set_title(titles[column], fontsize=8)
        axes[row, 0].set_ylabel(dataset.class_names[k], fontsize=8)
    figure.savefig(path_png)


def truth_rgb(truth_HW: NDArray[np.uint8], dataset: Dataset) -> NDArray[np.uint8]:
    """Return a mask in the classes' colors, with white for pixels without a class."""
    palette = np.full((256, 3), 255, dtype=np.uint8)
    palette[: len(dataset.classes)] = [one.color for one in dataset.classes]
    colored_HWC: NDArray[np.uint8] = palette[truth_HW]
    return colored_HWC
