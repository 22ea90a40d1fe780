"""The stored map of one slide: OME-Zarr 0.4 for QuPath, napari, Vitessce and Fiji.

    <name>.ome.zarr/
        0, 1, …              probabilities per class, uint8 cyx (0–255 = probability × 255), each level half the last
        labels/classes/0, …  classes, uint8 yx (0 background, 1..K in the order of `MapSpec.classes`), same levels
        OME/METADATA.ome.xml pixel size, channel names and colors for QuPath

Independent tasks write blocks of whole chunks, then `build_pyramid` adds the coarser levels. The map avoids what
QuPath's reader does not open: other codecs, floats, Zarr 3.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import zarr
from zarr.storage import LocalStore

from models.tissue_class import TissueClass
from pipeline.errors import MapFileError
from pipeline.formats.chunk_files import CODEC, UInt8Array, chunk_positions, read_chunk, write_chunk
from wsi.box import Box

LABELS = "labels/classes"
_OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"
MAX_CLASSES = 255

CHUNK_OUT = 512
"""Side of a chunk of the stored map, in map pixels. A block is a whole number of chunks."""


@dataclass(frozen=True)
class MapSpec:
    """The layout of a stored map. The same spec gives the same metadata bytes."""

    name: str
    size_out: tuple[int, int]
    """(width, height) of the slide, in pixels of the map."""
    classes: tuple[TissueClass, ...]
    """Channel k and label k + 1 stand for class k."""
    mpp_out: float
    """Micrometers per pixel of level 0 of the map."""
    chunk: int = CHUNK_OUT

    def __post_init__(self) -> None:
        if min(self.size_out) < 1:
            raise ValueError(f"{self.name}: a map of {self.size_out[0]} x {self.size_out[1]} px cannot be stored")
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"{self.name}: {len(self.classes)} classes; a uint8 map holds 1 to {MAX_CLASSES}")
        if not self.mpp_out > 0:
            raise ValueError(f"{self.name}: {self.mpp_out} µm/px is not a positive pixel size")
        if self.chunk < 1 or self.chunk % 2:
            raise ValueError(
                f"{self.name}: chunks of {self.chunk} px; the side must be even, for levels of exactly half"
            )

    @property
    def levels(self) -> int:
        """Return the number of pyramid levels: the fewest for which the coarsest level fits into one chunk."""
        return (_ceil_div(max(self.size_out), self.chunk) - 1).bit_length() + 1

    @property
    def padded_size_out(self) -> tuple[int, int]:
        """Return the stored (width, height) of level 0: the smallest that halves without remainder on every level."""
        step = 2 ** (self.levels - 1)
        width, height = self.size_out
        return _ceil_div(width, step) * step, _ceil_div(height, step) * step

    @property
    def level_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the (width, height) of each stored level."""
        width, height = self.padded_size_out
        return tuple((width >> level, height >> level) for level in range(self.levels))

    def probs_shape(self, level: int) -> tuple[int, int, int]:
        """Return the shape (class, y, x) of the probabilities of one level."""
        width, height = self.level_sizes[level]
        return len(self.classes), height, width

    def labels_shape(self, level: int) -> tuple[int, int]:
        """Return the shape (y, x) of the labels of one level."""
        return self.probs_shape(level)[1:]


def create_store(path: Path, spec: MapSpec) -> None:
    """Create an empty map with all metadata and no chunks. The bytes depend only on the spec.

    Raises FileExistsError if `path` exists; open an existing store with `MapStore`.
    """
    if path.exists():
        raise FileExistsError(f"{path}: already exists; open it with MapStore, or remove it first")
    store = LocalStore(path)
    zarr.create_group(store, zarr_format=2, attributes=_image_attributes(spec))
    zarr.create_group(store, path="labels", zarr_format=2, attributes={"labels": ["classes"]})
    zarr.create_group(store, path=LABELS, zarr_format=2, attributes=_label_attributes(spec))
    for level in range(spec.levels):
        _create_array(store, f"{level}", spec.probs_shape(level), (1, spec.chunk, spec.chunk))
        _create_array(store, f"{LABELS}/{level}", spec.labels_shape(level), (spec.chunk, spec.chunk))
    # No `bioformats2raw.layout` on the root: napari and ome-zarr would look for images in sub-groups.
    # Bio-Formats finds the file by its path.
    zarr.create_group(store, path="OME", zarr_format=2)
    (path / "OME" / "METADATA.ome.xml").write_text(_ome_xml(spec), encoding="utf-8")


@dataclass(frozen=True)
class MapStore:
    """A map to write blocks to. Cheap to open and picklable.

    Threads and processes may write blocks at the same time if the blocks do not overlap.
    """

    path: Path
    spec: MapSpec

    @functools.cached_property
    def labels(self) -> zarr.Array[Any]:
        """Return the labels of level 0, uint8 (y, x)."""
        return self._open(f"{LABELS}/0", self.spec.labels_shape(0))

    def write_block(self, box_out: Box, probs_KHW: UInt8Array, labels_HW: UInt8Array) -> tuple[Path, ...]:
        """Write one block. Return its chunk files, relative to the store, sorted.

        The arrays have the box's width and height. Pixels beyond the slide (`MapSpec.size_out`) are stored as 0. Chunks
        of zeros have no file; a file of an earlier run is removed.

        Raises ValueError if the box does not consist of whole chunks, or if an array does not fit the box or the spec.
        """
        self._check_box(box_out)
        self._check_array("probs_KHW", probs_KHW, (len(self.spec.classes), box_out.height, box_out.width))
        self._check_array("labels_HW", labels_HW, (box_out.height, box_out.width))
        stored, side = self._stored(box_out), self.spec.chunk
        inside = stored.intersect(Box(0, 0, *self.spec.size_out))
        for plane, plane_HW in zip(self._level_0, (*probs_KHW, labels_HW), strict=True):
            for y in range(0, stored.height, side):
                for x in range(0, stored.width, side):
                    chunk_HW = np.zeros((side, side), np.uint8)
                    part_HW = plane_HW[y : min(y + side, inside.height), x : min(x + side, inside.width)]
                    chunk_HW[: part_HW.shape[0], : part_HW.shape[1]] = part_HW
                    write_chunk(plane, chunk_HW, (stored.y + y) // side, (stored.x + x) // side)
        return tuple(file for file in self.block_files(box_out) if (self.path / file).exists())

    def block_files(self, box_out: Box) -> tuple[Path, ...]:
        """Return all chunk files that a block can have, relative to the store, sorted. Empty chunks have no file.

        Raises ValueError if the box does not consist of whole chunks.
        """
        self._check_box(box_out)
        stored, side = self._stored(box_out), self.spec.chunk
        rows = range(stored.y // side, _ceil_div(stored.bottom, side))
        columns = range(stored.x // side, _ceil_div(stored.right, side))
        planes = [Path("0", str(k)) for k in range(len(self.spec.classes))] + [Path(LABELS, "0")]
        return tuple(sorted(plane / str(row) / str(column) for plane in planes for row in rows for column in columns))

    def sweep_block(self, box_out: Box, kept: Collection[Path]) -> None:
        """Remove the chunk files of a block except `kept`, which are paths relative to the store."""
        for file in self.block_files(box_out):
            if file not in kept:
                (self.path / file).unlink(missing_ok=True)

    @functools.cached_property
    def _level_0(self) -> list[Path]:
        """Return the folders with the chunks of level 0: one for each class, and one for the labels.

        Raises ValueError if the stored arrays do not have the shapes of the spec.
        """
        self._open("0", self.spec.probs_shape(0))
        self._open(f"{LABELS}/0", self.spec.labels_shape(0))
        return _planes(self.path, self.spec, 0)

    def _open(self, name: str, shape: tuple[int, ...]) -> zarr.Array[Any]:
        array = _open_array(self.path, name)
        if array.shape != shape:
            raise ValueError(
                f"{self.path.name}: array {name} has shape {array.shape}, the plan needs {shape}; "
                "remove the working folder and start again"
            )
        return array

    def _stored(self, box_out: Box) -> Box:
        """Return the part of a block that lies inside the stored arrays."""
        return box_out.intersect(Box(0, 0, *self.spec.padded_size_out))

    def _check_box(self, box_out: Box) -> None:
        spec, side = self.spec, self.spec.chunk
        ends = ((box_out.right, 0), (box_out.bottom, 1))
        whole = box_out.x % side == 0 and box_out.y % side == 0
        whole &= all(end % side == 0 or end in (spec.size_out[i], spec.padded_size_out[i]) for end, i in ends)
        inside = 0 <= box_out.x < spec.size_out[0] and 0 <= box_out.y < spec.size_out[1]
        if not (whole and inside and box_out.width > 0 and box_out.height > 0):
            raise ValueError(
                f"{spec.name}: {box_out} does not consist of whole chunks of {side} px of a map of "
                f"{spec.size_out[0]} x {spec.size_out[1]} px (stored as {spec.padded_size_out[0]} x "
                f"{spec.padded_size_out[1]}); "
                "a block must begin and end at multiples of the chunk's side, or end at the map's edge"
            )

    def _check_array(self, name: str, array: UInt8Array, shape: tuple[int, ...]) -> None:
        if array.dtype != np.uint8 or array.shape != shape:
            raise ValueError(f"{self.spec.name}: {name} is {array.dtype} {array.shape}; the block needs uint8 {shape}")
        if name == "labels_HW" and array.max() > len(self.spec.classes):
            raise ValueError(f"{self.spec.name}: label {array.max()} in a map of {len(self.spec.classes)} classes")


def build_pyramid(path: Path, spec: MapSpec) -> None:
    """Compute every level above 0 from the level below it, chunk by chunk. Areas without chunks stay 0.

    It needs the memory of a few chunks for a map of any size. The result depends only on level 0, so it can be repeated
    after a crash. Probabilities are 2 x 2 means, labels 2 x 2 majorities (`halve_probs`, `halve_labels`).
    """
    for level in range(1, spec.levels):
        for source, target in zip(_planes(path, spec, level - 1), _planes(path, spec, level), strict=True):
            halve = halve_labels if target.parent == path / LABELS else halve_probs
            filled = {(row // 2, column // 2) for row, column in chunk_positions(source)}
            # A chunk of an earlier run is computed again too: if level 0 is empty now, the chunk is removed.
            for row, column in sorted(filled.union(chunk_positions(target))):
                quads_HW = np.block(
                    [[read_chunk(source, spec.chunk, 2 * row + y, 2 * column + x) for x in (0, 1)] for y in (0, 1)]
                )
                write_chunk(target, halve(quads_HW), row, column)


def halve_probs(probs_KHW: UInt8Array) -> UInt8Array:
    """Return the mean of each 2 x 2 square, halves rounded up. Height and width must be even."""
    pairs_KhW = np.add(probs_KHW[..., ::2, :], probs_KHW[..., 1::2, :], dtype=np.uint16)
    return ((pairs_KhW[..., ::2] + pairs_KhW[..., 1::2] + 2) >> 2).astype(np.uint8)


def halve_labels(labels_HW: UInt8Array) -> UInt8Array:
    """Return the most frequent label of each 2 x 2 square. Height and width must be even.

    Among equally frequent labels the smallest class wins, and any class wins over background (0), so that thin
    structures fade as slowly as possible.
    """
    quarters = _quarters(labels_HW)
    half_hw = quarters[0].copy()
    # Few squares have several labels, and only these need a vote.
    mixed_hw = np.logical_or.reduce([half_hw != other for other in quarters[1:]])
    half_hw[mixed_hw] = _most_frequent([quarter[mixed_hw] for quarter in quarters])
    return half_hw


def _most_frequent(labels_4N: Sequence[UInt8Array]) -> UInt8Array:
    best_N = np.zeros(labels_4N[0].shape, np.uint16)
    for label_N in labels_4N:
        count_N = sum((label_N == other_N).astype(np.uint16) for other_N in labels_4N)
        # As uint8, -label puts class 1 highest and background lowest. Negating it again restores the label.
        np.maximum(best_N, (count_N << 8) | np.negative(label_N), out=best_N)
    return np.negative((best_N & 0xFF).astype(np.uint8))


def _quarters(array: UInt8Array) -> list[UInt8Array]:
    return [array[..., y::2, x::2] for y in (0, 1) for x in (0, 1)]


def _planes(path: Path, spec: MapSpec, level: int) -> list[Path]:
    """Return the folders with the chunks of one level: one for each class, and one for the labels."""
    return [*(path / f"{level}" / f"{k}" for k in range(len(spec.classes))), path / LABELS / f"{level}"]


def _create_array(store: LocalStore, path: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
    zarr.create_array(
        store,
        name=path,
        shape=shape,
        chunks=chunks,
        dtype="uint8",
        fill_value=0,
        zarr_format=2,
        compressors=CODEC,
        filters=None,
        chunk_key_encoding={"name": "v2", "separator": "/"},
    )


@contextmanager
def reading_map(path: Path) -> Iterator[None]:
    """Raise MapFileError for each error that zarr and its codecs raise if files of the map are damaged or missing."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        lost = not isinstance(error, OSError) or isinstance(error, FileNotFoundError)
        step = "segment the slide again with --force" if lost else "check the disk and the permissions"
        raise MapFileError(f"{path}: cannot be read: {error}; {step}") from error


def _open_array(path: Path, name: str) -> zarr.Array[Any]:
    return zarr.open_array(LocalStore(path), path=name, mode="r+", zarr_format=2)


def _image_attributes(spec: MapSpec) -> dict[str, Any]:
    channel = {"name": "c", "type": "channel"}
    window = {"min": 0.0, "max": 255.0, "start": 0.0, "end": 255.0}
    return {
        "multiscales": [_multiscale(spec, _text(spec.name), [channel], "mean")],
        "omero": {
            "version": "0.4",
            "name": _text(spec.name),
            # No `rdefs`: for its model "color", Vitessce shows the first three channels as an RGB picture.
            "channels": [
                {"label": one.name, "color": bytes(one.color).hex().upper(), "window": window, "active": True}
                for one in spec.classes
            ],
        },
    }


def _label_attributes(spec: MapSpec) -> dict[str, Any]:
    return {
        "multiscales": [_multiscale(spec, "classes", [], "mode")],
        "image-label": {
            "version": "0.4",
            "colors": [
                {"label-value": value, "rgba": [*one.color, 255]} for value, one in enumerate(spec.classes, start=1)
            ],
            "properties": [{"label-value": value, "name": one.name} for value, one in enumerate(spec.classes, start=1)],
            "source": {"image": "../../"},
        },
    }


def _multiscale(spec: MapSpec, name: str, leading: list[dict[str, str]], method: str) -> dict[str, Any]:
    scales = [[1.0] * len(leading) + [spec.mpp_out * 2.0**level] * 2 for level in range(spec.levels)]
    return {
        "version": "0.4",
        "name": name,
        "axes": [*leading, *({"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx")],
        "datasets": [
            {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
            for level, scale in enumerate(scales)
        ],
        "type": method,
    }


def _ome_xml(spec: MapSpec) -> str:
    """Return OME-XML 2016-06 of one image without pixels; µm is the schema's unit of length.

    ome-types could write it, but its import would delay the first block of every run by a second.
    """
    width, height = spec.padded_size_out
    ome = ET.Element("OME", {"xmlns": _OME, "xmlns:xsi": _XSI, "xsi:schemaLocation": f"{_OME} {_OME}/ome.xsd"})
    ome.set("Creator", "wsi-segment")
    image = ET.SubElement(ome, "Image", {"ID": "Image:0", "Name": _text(spec.name)})
    form = {"DimensionOrder": "XYZCT", "Type": "uint8", "SignificantBits": 8, "Interleaved": "false"}
    sizes = {"SizeX": width, "SizeY": height, "SizeZ": 1, "SizeC": len(spec.classes), "SizeT": 1}
    scale = {"PhysicalSizeX": spec.mpp_out, "PhysicalSizeY": spec.mpp_out}
    attributes = {"ID": "Pixels:0", **form, "BigEndian": "false", **sizes, **scale}
    pixels = ET.SubElement(image, "Pixels", {name: str(value) for name, value in attributes.items()})
    for i, one in enumerate(spec.classes):
        # Red, green, blue and alpha in the bytes of a signed number.
        number = int.from_bytes(bytes((*one.color, 255)), "big", signed=True)
        channel = {"ID": f"Channel:0:{i}", "Name": one.name, "SamplesPerPixel": "1", "Color": str(number)}
        ET.SubElement(pixels, "Channel", channel)
    ET.SubElement(pixels, "MetadataOnly")
    ET.indent(ome)
    return ET.tostring(ome, encoding="unicode") + "\n"


def _text(name: str) -> str:
    """Return a file's name with "?" for every character that XML or UTF-8 cannot hold."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
