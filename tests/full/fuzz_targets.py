"""What the fuzzer attacks: for each kind of foreign file some good ones, how to spoil them, and what then reads them.

An attack passes if it returns or raises a `WsiSegmentError`.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from tests.full.mutations import mutated, mutated_json, mutated_tiff
from tests.pipeline.fakes import REGIONS
from tests.slides import painted, reduce, write_slide

Attack = Callable[[Path, Path, random.Random], None]


@dataclass(frozen=True)
class Target:
    """A kind of file. `prepare` writes good ones into a folder; `attack` spoils one of them in a folder of its own."""

    prepare: Callable[[Path], None]
    attack: Attack


def speckled() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Tissue with grain on glass: 640×416."""
    rgb_HWC = reduce(painted((1280, 832), *REGIONS), 2)
    grain_HW1 = np.random.default_rng(1).integers(-12, 12, (*rgb_HWC.shape[:2], 1))
    clipped: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.clip(rgb_HWC + grain_HW1, 0, 255).astype(np.uint8)
    return clipped


def good_slides(folder: Path) -> None:
    """Write small slides of several kinds, and the sample slide if it is available."""
    from pipeline.cli.sample import sample_slide
    from pipeline.errors import SampleError

    rgb_HWC = speckled()
    write_slide(folder / "aperio.svs", rgb_HWC, mpp=1.0, levels=(1, 4))
    per_cm: dict[str, Any] = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER", "photometric": "rgb"}
    tifffile.imwrite(folder / "jpeg.tif", rgb_HWC, tile=(128, 128), compression="jpeg", metadata=None, **per_cm)
    tifffile.imwrite(folder / "big.tif", rgb_HWC, tile=(128, 128), bigtiff=True, compression="lzw", **per_cm)
    tifffile.imwrite(folder / "strips.tif", rgb_HWC, rowsperstrip=32, metadata=None, **per_cm)
    tifffile.imwrite(
        folder / "ome.ome.tif",
        rgb_HWC,
        tile=(128, 128),
        photometric="rgb",
        metadata={"axes": "YXS", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0},
    )
    try:
        shutil.copy(sample_slide(), folder / "sample.svs")
    except SampleError:
        print("slides: without the sample slide, which is not to be had")


def attack_slide(good: Path, work: Path, chance: random.Random) -> None:
    """Open, find the tissue, plan, and read blocks, as a run does before its networks."""
    source = _pick(good, chance)
    content = source.read_bytes()
    spoil = mutated_tiff if chance.random() < 0.6 and source.name != "sample.svs" else mutated
    path = work / source.name
    path.write_bytes(spoil(content, chance))
    read_slide(path, chance.choice(("auto", "auto", "openslide", "tiffslide")))


def read_slide(path: Path, backend: str) -> None:
    """What a run reads of a slide."""
    from pipeline.config import SegmentConfig
    from pipeline.slide.plan import make_plan
    from tests.models.networks import make_card
    from wsi.slide import open_slide
    from wsi.tissue import find_tissue

    config = SegmentConfig(block_out=32, runtime="torch", device="cpu", num_workers=1)
    with open_slide(path, None, backend) as slide:
        plan = make_plan(slide.info, find_tissue(slide), make_card(), config)
        for block in plan.blocks[:: max(1, len(plan.blocks) // 3)]:
            slide.read(plan.grid.level, plan.grid.box_lv(plan.grid.box_m(block.box_out)))


def good_bundles(folder: Path) -> None:
    from tests.pipeline.small_bundle import small_bundle

    small_bundle(folder / "small")


def attack_bundle(good: Path, work: Path, chance: random.Random) -> None:
    """A spoilt card, or spoilt weights that the card names: whoever sends one can send the other."""
    from models.bundle import load_bundle, load_networks

    bundle = work / "small"
    shutil.copytree(good / "small", bundle)
    card = bundle / "model.json"
    if chance.random() < 0.6:
        card.write_bytes(mutated_json(card.read_bytes(), chance))
        bundle_ = load_bundle(bundle)
        if bundle_.card.classes and chance.random() < 0.3:
            load_networks(bundle_)
        return
    part = chance.choice(("classifier", "segmenter"))
    weights = bundle / f"{part}.safetensors"
    content = weights.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = content[:length]
    spoilt = mutated(header, chance) if chance.random() < 0.5 else header[:8] + mutated_json(header[8:], chance)
    if chance.random() < 0.5:
        spoilt = (len(spoilt) - 8).to_bytes(8, "little", signed=True) + spoilt[8:]
    weights.write_bytes(spoilt + content[length:])
    facts = json.loads(card.read_bytes())
    facts["weights"][part] = hashlib.sha256(weights.read_bytes()).hexdigest()
    card.write_text(json.dumps(facts))
    load_networks(load_bundle(bundle))


def good_journals(folder: Path) -> None:
    """A whole result, and the working folder of a run that stopped before it was published."""
    from pipeline.slide.blocks import BlockRecord
    from pipeline.slide.journal import Journal, make_durable
    from pipeline.slide.recipe import segment_slide
    from tests.pipeline.fakes import SMALL, color_predictor, region_slide

    result = segment_slide(region_slide(folder / "slide.svs"), folder / "out", color_predictor(), SMALL)
    assert result.folder is not None
    work = folder / "out" / ".slide.work"
    work.mkdir()
    identity = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))["identity"]
    (work / "identity.json").write_text(json.dumps(identity))
    journal = Journal(work, identity)
    for index in range(4):
        (work / f"{index}.bin").write_bytes(bytes(index))
        journal.append(make_durable(work, BlockRecord(index, {}, [1, 2, 3], 6.0, 4, 1, 0, []), [work / f"{index}.bin"]))


def attack_journal(good: Path, work: Path, chance: random.Random) -> None:
    """A spoilt run.json, summary, identity or journal, read by all that read them."""
    from pipeline.checks.result import broken_rules
    from pipeline.errors import RunRecordError
    from pipeline.pages.report_page import write_report
    from pipeline.results.folder import finished_run, open_folder
    from pipeline.results.record import RunIdentity
    from pipeline.results.slide_result import SlideResult
    from pipeline.results.summary import write_summary
    from pipeline.slide.journal import Journal
    from pipeline.viewing.viewer.results import find_results

    out = work / "out"
    shutil.copytree(good / "out", out, copy_function=_link)
    identity = json.loads((out / "slide" / "run.json").read_text(encoding="utf-8"))["identity"]
    name = chance.choice(("slide/run.json", "slide/run.json", ".slide.work/journal.jsonl", ".slide.work/identity.json"))
    spoil = mutated if name.endswith("jsonl") else mutated_json
    _replace(out / name, spoil((good / "out" / name).read_bytes(), chance))
    records = Journal(out / ".slide.work", identity).finished()
    assert all(record.class_px == [1, 2, 3] and record.tiles == 4 for record in records.values()), "a changed record"
    with suppress(RunRecordError):
        finished_run(out / "slide", RunIdentity.model_validate(identity))
    write_summary(out, [SlideResult("slide", "done", 1.0, {"class-0": 1.0})])
    write_report(out)
    broken_rules(out)
    find_results(out)
    with open_folder(out, "slide", RunIdentity.model_validate(identity), {}, force=True):
        pass


def good_tables(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.svs").write_bytes(b"slide")
    (folder / "manifest.csv").write_text("slide,mpp,model\na.svs,0.5,\nb.svs,,colon-gland\n", encoding="utf-8")
    (folder / "summary.csv").write_text(
        "slide,status,seconds,tissue_mm2,area_mm2 gland,warnings,error\na,done,3.0,1.5,0.2,,\nb,failed,1,,,,bad\n",
        encoding="utf-8",
    )
    (folder / "labels.csv").write_text("name,gland,stroma\na,1,0\nb.svs,0,1\n", encoding="utf-8")


def attack_table(good: Path, work: Path, chance: random.Random) -> None:
    from pipeline.batch.collect import collect_jobs
    from pipeline.batch.names import name_clashes
    from pipeline.pages.report_page import write_report
    from pipeline.results.slide_result import SlideResult
    from pipeline.results.summary import write_summary
    from pipeline.training.dataset_sections import CsvLabels, Table
    from pipeline.training.labels import labels_of_row
    from pipeline.training.splits import rows_of

    path = _spoilt(_pick(good, chance, ".csv"), work, mutated, chance)
    if path.name == "manifest.csv":
        name_clashes(collect_jobs([path]))
    elif path.name == "summary.csv":
        write_report(work)
        write_summary(work, [SlideResult("c", "done", 1.0)])
    else:
        images = {name: work / f"{name}.svs" for name in ("a", "b")}
        rows = rows_of(images, work, Table(files=(path.name,)))
        for name, image in images.items():
            labels_of_row(image, rows[name], CsvLabels(source="csv", columns=("gland", "stroma")), ("gland", "stroma"))


def good_toml(folder: Path) -> None:
    from pipeline.training.dataset import SHIPPED

    for file in SHIPPED.glob("*.toml"):
        shutil.copy(file, folder)
    (folder / "train.toml").write_text(
        'head = "gap"\nema = 0.9\nlayer_weights = [0.2, 0.2, 0.6]\nregion = 224\nmpp = 1.0\n', encoding="utf-8"
    )


def attack_toml(good: Path, work: Path, chance: random.Random) -> None:
    from pipeline.training.dataset import load_dataset, samples
    from pipeline.training.presets import train_config

    path = _spoilt(_pick(good, chance), work, mutated, chance)
    if chance.random() < 0.02:
        path.write_bytes(b"root = " + b"[" * 100_000)
    if path.name == "train.toml":
        train_config(file=path)
    else:
        samples(load_dataset(path, work), "train")


def attack_geojson(good: Path, work: Path, chance: random.Random) -> None:
    """Spoilt polygons and maps of a result, checked as `wsi-export check` does."""
    from pipeline.checks.result import broken_rules
    from pipeline.viewing.viewer.outlines import outline_bytes

    out = work / "out"
    shutil.copytree(good / "out" / "slide", out / "slide", copy_function=_link)
    store = "slide/slide.ome.zarr"
    names = ["slide/slide.geojson"] * 4 + [
        "slide/slide.parquet", f"{store}/.zattrs", f"{store}/0/.zarray", f"{store}/OME/METADATA.ome.xml"
    ]  # fmt: skip
    name = chance.choice(names)
    is_json = name.endswith((".geojson", ".zattrs", ".zarray"))
    _replace(
        out / name,
        (mutated_json if is_json else mutated)((good / "out" / name).read_bytes(), chance),
    )
    assert broken_rules(out)
    if name.endswith(".parquet"):
        try:
            outline_bytes(out / name, 1)
        except OSError:  # as it promises
            return


def _pick(folder: Path, chance: random.Random, end: str = "") -> Path:
    return chance.choice(sorted(path for path in folder.iterdir() if path.name.endswith(end)))


def _spoilt(source: Path, work: Path, spoil: Callable[[bytes, random.Random], bytes], chance: random.Random) -> Path:
    path = work / source.name
    path.write_bytes(spoil(source.read_bytes(), chance))
    return path


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # it is a second name of the good one
    path.write_bytes(content)


TARGETS = {
    "slides": Target(good_slides, attack_slide),
    "bundles": Target(good_bundles, attack_bundle),
    "journals": Target(good_journals, attack_journal),
    "tables": Target(good_tables, attack_table),
    "toml": Target(good_toml, attack_toml),
    "geojson": Target(good_journals, attack_geojson),
}
