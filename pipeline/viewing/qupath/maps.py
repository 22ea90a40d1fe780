"""The probabilities of one result for QuPath: a picture per class over the slide, and a grid of tile objects.

QuPath opens the OME-Zarr only as a separate image. Over the slide it draws pictures from a script, and it colors tile
objects by their measurements (*Measure → Show measurement maps*). Coordinates are those of the polygons.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.files import replacing
from pipeline.formats.familiarity import CELL_OUT
from pipeline.formats.ome_zarr import CHUNK_OUT, reading_map
from wsi.box import Box

OVERLAY_PX = 2048
"""Largest side of a picture, which is a level of the map."""

UNFAMILIAR_FILE = "unfamiliar.png"
"""Overlay of the tissue unlike the model's training data."""

TILE_OUT = 64
"""Side of a tile, in pixels of the map."""

_WINDOW_OUT = CHUNK_OUT  # read at a time: whole tiles, about a chunk
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "wsi-segment/tile")


@dataclass(frozen=True)
class ProbabilityMap:
    """The map of one result, and its position on the slide. Reading a damaged map raises MapFileError."""

    store: Path
    classes: tuple[TissueClass, ...]
    size_out: tuple[int, int]
    """(width, height) without the padding of the store."""
    l0_per_out: float
    size_l0: tuple[int, int]
    """(width, height) of the slide's bounds."""
    slide_digest: str
    familiarity: Path | None = None
    """The picture of the tissue unlike the model's training data, if there is one."""

    @property
    def levels(self) -> int:
        """Return the number of levels of the stored pyramid."""
        return sum(1 for _ in self.store.glob("[0-9]*/.zarray"))

    def probs(self, level: int) -> zarr.Array[Any]:
        """Return the probabilities of one level, uint8 (class, y, x)."""
        with reading_map(self.store):
            return zarr.open_array(self.store / str(level), mode="r")


def write_overlays(folder: Path, probability: ProbabilityMap) -> tuple[int, int]:
    """Write `<k>.png` for each class into `folder`: the class's color with its probability as opacity.

    Return (width, height) of the pictures in level-0 pixels. They begin at the origin of the polygons' frame.
    """
    level = next(
        (i for i in range(probability.levels) if max(probability.probs(i).shape[1:]) <= OVERLAY_PX),
        probability.levels - 1,
    )
    probs_KHW = probability.probs(level)
    folder.mkdir(parents=True, exist_ok=True)
    for k, one in enumerate(probability.classes):
        with reading_map(probability.store):
            picture = Image.fromarray(np.asarray(probs_KHW[k], np.uint8))
        # A palette of one color whose opacity is the value: QuPath draws it without a copy in four channels.
        picture.putpalette(one.color * 256)
        with replacing(folder / f"{k}.png") as partial:
            picture.save(partial, "PNG", transparency=bytes(range(256)))
    l0_per_px = probability.l0_per_out * 2**level
    _, height, width = probs_KHW.shape
    if probability.familiarity is not None:
        with replacing(folder / UNFAMILIAR_FILE) as partial:
            _over_the_slide(probability.familiarity, (width, height), 2**level).save(partial, "PNG")
    return round(width * l0_per_px), round(height * l0_per_px)


def _over_the_slide(familiarity: Path, size: tuple[int, int], out_per_px: int) -> Image.Image:
    """Return the picture of the unfamiliar tissue at the size and the pixel size of the other overlays."""
    with Image.open(familiarity) as picture:
        # Cells beyond the picture are beyond the slide. In PIL, a transform fills them with 0, which is transparent.
        scale = out_per_px / CELL_OUT
        return picture.transform(size, Image.Transform.AFFINE, (scale, 0, 0, 0, scale, 0), Image.Resampling.NEAREST)


def write_tiles(path: Path, probability: ProbabilityMap, tile_out: int = TILE_OUT) -> int:
    """Write the tiles as GeoJSON in QuPath's dialect and return their number. Memory does not grow with the slide.

    A tile's measurement `Probability <class>` is the mean over its pixels inside the map, in [0, 1]. Tiles on glass,
    with zero probability everywhere, are omitted. The same map gives the same ids.
    """
    count = 0
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for box_out, means_K in _tiles(probability, tile_out):
            file.write(",\n" if count else "\n")
            file.write(_feature(probability, box_out, means_K))
            count += 1
        file.write("\n]}\n")
    return count


def _tiles(probability: ProbabilityMap, tile_out: int) -> Iterator[tuple[Box, npt.NDArray[np.float64]]]:
    """Yield the box and the classes' means of every tile that is not glass."""
    probs_KHW, (width, height) = probability.probs(0), probability.size_out
    window = tile_out * max(1, _WINDOW_OUT // tile_out)
    for y in range(0, height, window):
        for x in range(0, width, window):
            with reading_map(probability.store):
                part_KHW = np.asarray(probs_KHW[:, y : min(y + window, height), x : min(x + window, width)])
            if not part_KHW.any():
                continue
            for top in range(0, part_KHW.shape[1], tile_out):
                for left in range(0, part_KHW.shape[2], tile_out):
                    tile_KHW = part_KHW[:, top : top + tile_out, left : left + tile_out]
                    if tile_KHW.any():
                        _, rows, columns = tile_KHW.shape
                        yield Box(x + left, y + top, columns, rows), tile_KHW.mean(axis=(1, 2)) / 255


def _feature(probability: ProbabilityMap, box_out: Box, means_K: npt.NDArray[np.float64]) -> str:
    corners_out = (box_out.x, box_out.y, box_out.right, box_out.bottom)
    # The last pixels of the map can pass the edge of the slide.
    left, top, right, bottom = (
        min(round(value * probability.l0_per_out, 2), size)
        for value, size in zip(corners_out, probability.size_l0 * 2, strict=True)
    )
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    feature = {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, json.dumps([probability.slide_digest, left, top, right, bottom]))),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "objectType": "tile",
            "measurements": {
                # QuPath stores float32, and five digits are more than the map's 8 bits.
                f"Probability {one.name}": round(float(mean), 5)
                for one, mean in zip(probability.classes, means_K, strict=True)
            },
        },
    }
    return json.dumps(feature, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
