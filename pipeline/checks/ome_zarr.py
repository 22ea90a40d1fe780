"""Rules for QuPath, napari and Vitessce to open a stored map, beyond those of the public validators.

The checks read JSON, XML and folders directly and share no code with the writer on purpose. Shapes are (c, y, x) and
(y, x).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from pipeline.checks.digests import is_of_desktop

OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
METADATA_FILES = {".zgroup", ".zattrs", ".zarray"}


def broken_ome_zarr_rules(root: Path) -> list[str]:
    """Return a sentence per rule that the store at `root` breaks.

    If metadata is missing or malformed, the list ends with that problem.
    """
    broken: list[str] = []
    try:
        _check_store(root, broken)
    except KeyError as error:
        broken.append(f"metadata lacks the key {error}")
    except OSError as error:
        broken.append(f"{error.filename or 'a file'}: {error.strerror or error}")
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        broken.append(f"metadata is malformed: {error}")
    except ET.ParseError as error:
        broken.append(f"metadata is malformed: {error}")
    return [text.replace(f"{root}/", "") for text in broken]


def _check_store(root: Path, broken: list[str]) -> None:
    image, labels = attributes(root), attributes(root / "labels" / "classes")
    channels = image["omero"]["channels"]
    image_shapes = _multiscale(root, image, "cyx", broken)
    label_shapes = _multiscale(root / "labels" / "classes", labels, "yx", broken)
    if [shape[1:] for shape in image_shapes] != label_shapes:
        broken.append(f"labels have the levels {label_shapes}, but the image has {image_shapes}")
    if attributes(root / "labels") != {"labels": ["classes"]}:
        broken.append("labels/.zattrs does not list exactly ['classes']")
    if "bioformats2raw.layout" in image:
        broken.append("the root has bioformats2raw.layout, which makes napari look for images in subgroups")
    if image["omero"].get("rdefs", {}).get("model") == "color":
        broken.append("omero.rdefs.model is color, which makes Vitessce show three classes as red, green and blue")
    if len(channels) != image_shapes[0][0]:
        broken.append(f"{len(channels)} omero channels for {image_shapes[0][0]} channels")
    broken += [
        f"omero channel {channel['label']}: window or active has another value"
        for channel in channels
        if channel["window"] != {"min": 0, "max": 255, "start": 0, "end": 255} or channel["active"] is not True
    ]
    values = list(range(1, len(channels) + 1))
    names = [channel["label"] for channel in channels]
    colors = [[int(channel["color"][i : i + 2], 16) for i in (0, 2, 4)] + [255] for channel in channels]
    label = labels["image-label"]
    if label["colors"] != [{"label-value": v, "rgba": c} for v, c in zip(values, colors, strict=True)]:
        broken.append("label colors differ from the channel colors")
    if label["properties"] != [{"label-value": v, "name": n} for v, n in zip(values, names, strict=True)]:
        broken.append("label names differ from the channel names")
    if label["source"] != {"image": "../../"}:
        broken.append("image-label.source does not point to the image")
    _ome_xml(root, image, image_shapes[0], names, colors, broken)
    broken += [f"{file.relative_to(root)}: is a partly written file" for file in root.rglob("*.partial")]


def attributes(group: Path) -> dict[str, Any]:
    """Return the attributes of a Zarr 2 group. Raises OSError or ValueError if there is no such group."""
    if json.loads((group / ".zgroup").read_text(encoding="utf-8")) != {"zarr_format": 2}:
        raise ValueError(f"{group.name}/.zgroup is not from Zarr 2")
    content: dict[str, Any] = json.loads((group / ".zattrs").read_text(encoding="utf-8"))
    return content


def _multiscale(group: Path, attrs: dict[str, Any], axes: str, broken: list[str]) -> list[list[int]]:
    """Check one pyramid and return the shapes of its levels."""
    (multiscale,) = attrs["multiscales"]
    if multiscale["version"] != "0.4":
        broken.append(f"{group.name}: version is {multiscale['version']}, not 0.4")
    if "".join(axis["name"] for axis in multiscale["axes"]) != axes:
        broken.append(f"{group.name}: axes are {multiscale['axes']}")
    if any(axis.get("unit") != "micrometer" for axis in multiscale["axes"] if axis["name"] in "yx"):
        broken.append(f"{group.name}: unit is not micrometer")
    paths = [dataset["path"] for dataset in multiscale["datasets"]]
    on_disk = sorted(file.parent.name for file in group.glob("*/.zarray"))
    if paths != [str(i) for i in range(len(paths))] or sorted(paths) != on_disk:
        broken.append(f"{group.name}: lists the levels {paths}, but the disk has {on_disk}")
    shapes = [_array(group / path, broken) for path in paths]
    scales = [dataset["coordinateTransformations"][0]["scale"] for dataset in multiscale["datasets"]]
    broken += [
        f"{group.name}/{dataset['path']}: QuPath and napari support only a scale"
        for dataset in multiscale["datasets"]
        if [step["type"] for step in dataset["coordinateTransformations"]] != ["scale"]
    ]
    for fine, coarse in itertools.pairwise(shapes):
        if fine[-2:] != [2 * n for n in coarse[-2:]] or fine[:-2] != coarse[:-2]:
            broken.append(f"{group.name}: a level of shape {coarse} follows one of {fine}")
    for level, scale in enumerate(scales):
        expected = scales[0][:-2] + [value * 2**level for value in scales[0][-2:]]
        if scale != expected or scale[:-2] != [1] * (len(axes) - 2) or scale[-1] != scale[-2]:
            broken.append(f"{group.name}/{level}: scale is {scale}")
    return shapes


def _array(folder: Path, broken: list[str]) -> list[int]:
    """Check the encoding and chunk files of one level, and return its shape."""
    meta = json.loads((folder / ".zarray").read_text(encoding="utf-8"))
    compressor = meta["compressor"] or {}
    codec = {key: compressor.get(key) for key in ("id", "cname", "shuffle")}
    if codec != {"id": "blosc", "cname": "zstd", "shuffle": 1} or meta["filters"] is not None:
        broken.append(f"{folder}: codec is {meta['compressor']} with filters {meta['filters']}")
    fixed = {"zarr_format": 2, "dtype": "|u1", "order": "C", "fill_value": 0, "dimension_separator": "/"}
    broken += [f"{folder}: {key} is {meta[key]!r}" for key, value in fixed.items() if meta[key] != value]
    shape, chunks = meta["shape"], meta["chunks"]
    if chunks[:-2] != [1] * (len(shape) - 2):
        broken.append(f"{folder}: chunks are {chunks}")
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in METADATA_FILES and not is_of_desktop(file.name):
            position = [int(part) for part in file.relative_to(folder).parts if part.isdecimal()]
            inside = all(i * chunk < side for i, chunk, side in zip(position, chunks, shape, strict=False))
            if len(position) != len(shape) or not inside:
                broken.append(f"{file}: is not a chunk of shape {shape} with chunks {chunks}")
    result: list[int] = shape
    return result


def _ome_xml(
    root: Path, image: dict[str, Any], shape: list[int], names: list[str], colors: list[list[int]], broken: list[str]
) -> None:
    ome = ET.parse(root / "OME" / "METADATA.ome.xml").getroot()  # noqa: S314 - the store is a local file
    (pixels,) = ome.findall(f"{OME}Image/{OME}Pixels")
    sizes = [int(pixels.attrib[f"Size{axis}"]) for axis in "CYXZT"]
    if sizes != [*shape, 1, 1]:
        broken.append(f"OME-XML has the sizes CYXZT {sizes}, but the array has {shape}")
    if pixels.attrib["Type"] != "uint8":
        broken.append(f"OME-XML has the type {pixels.attrib['Type']}")
    scale = image["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    if [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "YX"] != scale[-2:]:
        broken.append(f"OME-XML has the pixel size {pixels.attrib}, but the scale is {scale}")
    # The schema defaults to µm.
    if any(pixels.attrib.get(f"PhysicalSize{axis}Unit", "µm") != "µm" for axis in "YX"):
        broken.append("OME-XML unit is not µm")
    channels = pixels.findall(f"{OME}Channel")
    if [channel.attrib["Name"] for channel in channels] != names:
        broken.append("OME-XML channel names differ from those of omero")
    packed = [int(channel.attrib["Color"]).to_bytes(4, "big", signed=True) for channel in channels]
    if [list(color) for color in packed] != colors:
        broken.append("OME-XML colors differ from those of omero")
    if pixels.find(f"{OME}MetadataOnly") is None:
        broken.append("OME-XML has no MetadataOnly element")
