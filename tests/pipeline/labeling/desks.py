"""Slides to label, and desks at which to label them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile

from models.bundle import Bundle
from pipeline.labeling.desk import Desk, open_desk
from pipeline.labeling.events import Answer
from pipeline.labeling.folder import Wishes
from pipeline.labeling.session import NewLabel, Patch
from pipeline.labeling.slides import SlideFile
from tests.pipeline.fakes import REGIONS
from tests.slides import TILE, painted, write_slide

SIDE = 64


def label_slide(path: Path, seed: int = 1) -> Path:
    """Write a slide of 1280×832 pixels of 1 µm with a pink and a purple region and grain. Return the path."""
    rgb_HWC = painted((1280, 832), *REGIONS).astype(np.int16)
    grain_HW1 = np.random.default_rng(seed).integers(-6, 6, (*rgb_HWC.shape[:2], 1))
    return write_slide(path, np.clip(rgb_HWC + grain_HW1, 0, 255).astype(np.uint8), mpp=1.0, levels=(1, 4))


def damage(path: Path, x: int, y: int) -> Path:
    """Overwrite the tile of level 0 that contains a pixel. Return the path."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        tile = y // TILE * -(-page.shape[1] // TILE) + x // TILE
        start, size = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    return path


@contextmanager
def desk(
    folder: Path,
    slides: Sequence[Path],
    shipped: Bundle,
    *,
    annotator: str = "ann",
    classes: Sequence[str] = ("class-0", "class-1"),
    model: Bundle | None = None,
    wishes: Wishes = Wishes(side=SIDE, blind_share=0.25),  # noqa: B008 - frozen
) -> Iterator[Desk]:
    """Open a labels folder with slides whose patients are their names."""
    files = [SlideFile(path, path.stem) for path in slides]
    with open_desk(folder, files, annotator, wishes=wishes, classes=classes, model=model, shipped=shipped) as opened:
        while opened.slides.opened() < len(files):  # until then, the next patches are those of the open slides
            time.sleep(0.01)
        yield opened


def save(at: Desk, patch: Patch, *present: int, view: str = "single") -> None:
    """Save a label with these classes present."""
    new = NewLabel(patch.place, answers(at, *present), "none", view, 1.5)  # type: ignore[arg-type]  # a view
    at.session.save([new], {patch.place: patch.reason})


def answers(at: Desk, *present: int) -> dict[int, Answer]:
    """Return what the page sends if it shows all classes and these are marked."""
    return {one.id: "present" if one.id in present else "absent" for one in at.session.classes()}
