"""Prepares EBHI-Seg for the question whether patch labels teach the grade of glands: classes other, low and high.

    python -m tests.bench.gland_types FOLDER -o types          # FOLDER: the data set as `wsi-train ebhi-seg` takes it
    wsi-train types/types.toml -o types/run -s backbone_rate=5e-4 -s classifier_epochs=8 -s classifier_steps=60 \
        -s segmenter_epochs=6 -s segmenter_steps=50

Low: normal, polyp, serrated adenoma, low-grade neoplasia; high: high-grade neoplasia, adenocarcinoma. The data set
names one kind for the glands of a whole patch. Images are linked to; masks and description are written anew.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.training.dataset import SHIPPED

LABELS = {
    "normal": 1,
    "polyp": 1,
    "serrated-adenoma": 1,
    "low-grade-in": 1,
    "high-grade-in": 2,
    "adenocarcinoma": 2,
}
"""Mask value of a patch's glands by its kind."""

GLAND = '    { name = "gland", color = [0, 158, 115], mask_values = [1] },'
TYPES = """    { name = "low", color = [0, 158, 115], mask_values = [1] },
    { name = "high", color = [213, 94, 0], mask_values = [2] },"""


def prepare(data: Path, output: Path) -> Path:
    """Write images, masks, table and description into a new folder; returns the description."""
    description = (SHIPPED / "ebhi-seg.toml").read_text(encoding="utf-8")
    if GLAND not in description:
        raise SystemExit("ebhi-seg.toml describes its gland class otherwise than this script expects")
    (output / "mask").mkdir(parents=True)
    (output / "img").symlink_to((data / "img").absolute())
    shutil.copy(data / "meta.csv", output)
    with (data / "meta.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            with Image.open(data / "mask" / f"{row['name']}.png") as image:
                gland_HW = np.asarray(image) == 1
            Image.fromarray(gland_HW.astype(np.uint8) * LABELS[row["gland_class"]]).save(
                output / "mask" / f"{row['name']}.png"
            )
    types = output / "types.toml"
    description = description.replace(GLAND, TYPES).replace('name = "ebhi-seg"', 'name = "ebhi-types"')
    types.write_text(description, encoding="utf-8")
    return types


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the folder and print the description's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    print(prepare(options.data, options.output))


if __name__ == "__main__":
    main()
