"""Damage to the results of two slides, a and b, that `wsi-export check` must find."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.results.record import record_digest


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def change(path: Path, act: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    act(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def first_ring(document: Any) -> list[list[float]]:
    ring: list[list[float]] = document["features"][0]["geometry"]["coordinates"][0]
    return ring


def rewrite_parquet(path: Path, act: Callable[[pa.Table], pa.Table]) -> None:
    table = act(pq.read_table(path))
    path.unlink()
    pq.write_table(table, path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def drop_label_level(labels: Path) -> None:
    shutil.rmtree(labels / "4")
    change(labels / ".zattrs", lambda d: d["multiscales"][0]["datasets"].pop())


def add_pen(result: Path) -> None:
    """Add an area of pen that the run did not find."""
    document = json.loads((result / f"{result.name}.geojson").read_text(encoding="utf-8"))
    del document["features"][1:]
    document["features"][0]["properties"]["classification"]["name"] = "pen*"
    content = json.dumps(document).encode()
    (result / "left-out.geojson").write_bytes(content)
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_record(result, lambda d: d["digests"].update({"left-out.geojson": facts}))


def edit_record(result: Path, edit: Callable[[Any], object]) -> None:
    """Change the record, and its digest too."""
    change(result / "run.json", edit)
    values = json.loads((result / "run.json").read_text(encoding="utf-8"))
    change(result / "run.json", lambda d: d.update(sha256=record_digest(values)))


GEOJSON, STORE, XML = "a/a.geojson", "a/a.ome.zarr", "a/a.ome.zarr/OME/METADATA.ome.xml"
TILES = "qupath/maps/a/a.tiles.geojson"

FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # the damage, the file that the check names, and the message
    "no preview": (lambda r: (r / "a/preview.png").unlink(), "a/preview.png", "is missing"),
    "empty preview": (lambda r: (r / "a/preview.png").write_bytes(b""), "a/preview.png", "is empty"),
    "no map": (lambda r: shutil.rmtree(r / STORE), STORE, "is missing"),
    "no polygons": (lambda r: (r / GEOJSON).unlink(), GEOJSON, "is missing"),
    "run.json cut": (lambda r: (r / "a/run.json").write_text("{"), "a/run.json", "does not list the outputs"),
    "run.json of others": (lambda r: (r / "a/run.json").write_text("{}"), "a/run.json", "does not list the outputs"),
    "areas of pen that no float holds": (
        lambda r: edit_record(r / "a", lambda d: d.update(left_out=[{"name": "pen", "pieces": 10**400}])),
        "a/left-out.geojson",
        "has 0 areas of pen, but run.json has 1000",
    ),
    "infinitely many areas of pen": (
        lambda r: edit_record(r / "a", lambda d: d.update(left_out=[{"name": "pen", "pieces": float("inf")}])),
        "a/left-out.geojson",
        "whose left_out is damaged (OverflowError",
    ),
    "no result of a slide": (lambda r: shutil.rmtree(r / "b"), "summary.csv", "b is done but has no result"),
    "other summary": (lambda r: (r / "summary.csv").write_text("x\n1\n"), "summary.csv", "is not a summary of results"),
    "a feature less": (
        lambda r: change(r / GEOJSON, lambda d: d["features"].pop()),
        GEOJSON,
        "has 1 features, but run.json has 2 polygons",
    ),
    "cut GeoJSON": (
        lambda r: (r / GEOJSON).write_bytes((r / GEOJSON).read_bytes()[:-8]),
        GEOJSON,
        "not one JSON document",
    ),
    "no UTF-8": (lambda r: (r / GEOJSON).write_bytes(b'{"\xff":1}'), GEOJSON, "cannot be read"),
    "newline-delimited": (
        lambda r: (r / GEOJSON).write_text('{"type":"FeatureCollection","features":[]}\n{"type":"Feature"}'),
        GEOJSON,
        "text after the end",
    ),
    "comma too many": (lambda r: edit(r / GEOJSON, "\n]}", ",\n]}"), GEOJSON, "not one JSON document"),
    "unclosed ring": (
        lambda r: change(r / GEOJSON, lambda d: first_ring(d).pop()),
        GEOJSON,
        "feature 0: ring is not closed",
    ),
    "null name": (
        lambda r: change(r / GEOJSON, lambda d: d["features"][1]["properties"].update(name=None)),
        GEOJSON,
        "feature 1: value is null",
    ),
    "color as hex": (
        lambda r: change(
            r / GEOJSON, lambda d: d["features"][0]["properties"]["classification"].update(color="#ff0000")
        ),
        GEOJSON,
        "color is not a list of three",
    ),
    "same id": (
        lambda r: change(r / GEOJSON, lambda d: d["features"][1].update(id=d["features"][0]["id"])),
        GEOJSON,
        "occurs twice",
    ),
    "NaN": (lambda r: edit(r / GEOJSON, '"Area mm^2":', '"x":NaN,"Area mm^2":'), GEOJSON, "NaN is not valid JSON"),
    "a number of 5,000 digits": (
        lambda r: edit(r / GEOJSON, '"Area mm^2":', f'"x":{"9" * 5000},"Area mm^2":'),
        GEOJSON,
        "not one JSON document",
    ),
    "tile without measurements": (
        lambda r: change(r / TILES, lambda d: d["features"][3]["properties"].pop("measurements")),
        TILES,
        "feature 3: a property is missing",
    ),
    "tile off the grid": (
        lambda r: change(r / TILES, lambda d: first_ring(d)[1].__setitem__(0, 0.001)),
        TILES,
        "is not a multiple of 0.01",
    ),
    "cut Parquet": (
        lambda r: (r / "a/a.parquet").write_bytes((r / "a/a.parquet").read_bytes()[:99]),
        "a/a.parquet",
        "cannot be read",
    ),
    "a row less": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.slice(1)),
        "a/a.parquet",
        "has 1 rows, but run.json has 2 polygons",
    ),
    "another area": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.set_column(3, "area_mm2", [[9.0, 9.0]])),
        "a/a.parquet",
        "has 9 mm² of class-",
    ),
    "areas as text": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.set_column(3, "area_mm2", [["9", "9"]])),
        "a/a.parquet",
        "areas that are not numbers",
    ),
    "no geometry": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.drop_columns(["geometry"])),
        "a/a.parquet",
        "lacks the columns geometry",
    ),
    "plain Parquet": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.replace_schema_metadata(None)),
        "a/a.parquet",
        "has no GeoParquet metadata",
    ),
    "zarr 3": (lambda r: (r / STORE / ".zgroup").unlink(), STORE, ".zgroup: No such file"),
    "no omero": (
        lambda r: change(r / STORE / ".zattrs", lambda d: d.pop("omero")),
        STORE,
        "metadata lacks the key 'omero'",
    ),
    "attributes cut": (lambda r: (r / STORE / ".zattrs").write_text("{"), STORE, "metadata is malformed"),
    "uncompressed": (
        lambda r: change(r / STORE / "0/.zarray", lambda d: d.update(compressor=None)),
        STORE,
        "0: codec is None",
    ),
    "bare zstd": (
        lambda r: change(r / STORE / "1/.zarray", lambda d: d.update(compressor={"id": "zstd", "level": 3})),
        STORE,
        "1: codec is {'id': 'zstd'",
    ),
    "float": (lambda r: change(r / STORE / "0/.zarray", lambda d: d.update(dtype="<f4")), STORE, "dtype is '<f4'"),
    "a level less": (
        lambda r: shutil.rmtree(r / STORE / "2"),
        STORE,
        "lists the levels ['0', '1', '2', '3', '4'], but the disk has",
    ),
    "labels of fewer levels": (
        lambda r: drop_label_level(r / STORE / "labels/classes"),
        STORE,
        "labels have the levels",
    ),
    "translation": (
        lambda r: change(
            r / STORE / ".zattrs",
            lambda d: d["multiscales"][0]["datasets"][0]["coordinateTransformations"].append(
                {"type": "translation", "translation": [0, 1, 1]}
            ),
        ),
        STORE,
        "support only a scale",
    ),
    "other pixel size": (
        lambda r: edit(r / XML, 'PhysicalSizeX="4.0"', 'PhysicalSizeX="0.5"'),
        STORE,
        "OME-XML has the pixel size",
    ),
    "cut OME-XML": (lambda r: r.joinpath(XML).write_text("<OME"), STORE, "metadata is malformed"),
    "half-written chunk": (
        lambda r: (r / STORE / "0/0/0/0.5.partial").write_bytes(b""),
        STORE,
        "0/0/0/0.5.partial: is a partly written file",
    ),
    "an area that the run did not find": (
        lambda r: add_pen(r / "a"),
        "a/left-out.geojson",
        "has 1 areas of pen, but run.json has 0",
    ),
    "other areas": (
        lambda r: change(r / "a/run.json", lambda d: d.update(tissue_mm2=9.0)),
        "a/run.json",
        "other values than the run",
    ),
    "no digests": (
        lambda r: change(r / "a/run.json", lambda d: d.pop("digests")),
        "a/run.json",
        "does not have the digests",
    ),
    "other pixels": (lambda r: flip(r / "a/preview.png"), "a/preview.png", "has other content than the run wrote"),
    "a chunk flipped": (lambda r: flip(r / STORE / "0/0/1/2"), STORE, "0/0/1/2 has other content"),
    "a chunk cut": (lambda r: cut(r / STORE / "0/0/1/2"), STORE, "0/0/1/2 has"),
    "no chunk of labels": (
        lambda r: (r / STORE / "labels/classes/0/1/2").unlink(),
        STORE,
        "labels/classes/0/1/2 is missing",
    ),
    "two chunks swapped": (lambda r: swap(r / STORE / "0/0/1/1", r / STORE / "0/0/1/2"), STORE, "0/0/1/1 has"),
    "a changed listing": (lambda r: edit(r / "a/chunks.tsv", "0", "1"), "a/chunks.tsv", "has other content"),
    "consolidated metadata": (lambda r: (r / STORE / ".zmetadata").write_text("{}"), STORE, ".zmetadata is not a file"),
    "stray chunk": (lambda r: shutil.copytree(r / STORE / "0/0", r / STORE / "0/7"), STORE, "is not a chunk of shape"),
}
