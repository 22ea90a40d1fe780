"""The command `wsi-segment doctor`: what this installation can read, compute and write."""

from __future__ import annotations

# Heavy libraries are imported inside the functions, so that `--help` answers at once.
import os
import platform
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.commands import EXIT_FAILED, EXIT_USAGE, JsonOption, fail, run, version_option
from pipeline.config import RESULTS_FOLDER
from pipeline.console import printable, printable_json

PROGRAM = "wsi-segment doctor"
DEFAULT_MODEL = "colorectal-tissue"  # as in pipeline/cli/segment.py

OLDEST_OPENSLIDE = (4, 0, 1)
"""OpenSlide 4.0.0 writes outside its memory if a BIF file is crafted (CVE-2026-48977)."""

CODECS = ("JPEG8", "JPEG2K", "JPEGXR", "JPEGXL", "WEBP", "ZSTD", "LZW", "DEFLATE")
"""Codecs of imagecodecs that slides use; the first two and the last two are in almost every slide."""
NEEDED_CODECS = ("JPEG8", "JPEG2K", "LZW", "DEFLATE")

LITTLE_MEMORY, LITTLE_DISK = 3 << 30, 1 << 30
"""Bytes below which a run on a whole slide is likely to stop (docs/benchmarks/slides.md)."""

Section = dict[str, object]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def doctor(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Name of a shipped model bundle, or path of a bundle.")
    ] = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(RESULTS_FOLDER),
    as_json: JsonOption = False,
    _version: Annotated[bool, version_option(PROGRAM)] = False,
) -> None:
    """Print the versions of readers and codecs, the devices, the model, the memory and the disk, and what is wrong.

    The command writes no files. Exit status: 0 nothing is wrong, 1 a problem was found, 2 usage error.
    """
    from pipeline.errors import ConfigError
    from pipeline.files import local_path

    try:
        report, problems = examine(model, local_path(output, "--output"))
    except ConfigError as error:
        fail(PROGRAM, str(error), EXIT_USAGE)
    if as_json:
        typer.echo(printable_json(report | {"problems": problems}))
    else:
        for line in lines(report, problems):
            typer.echo(line)
    if problems:
        sys.exit(EXIT_FAILED)


def examine(model: str, output: Path) -> tuple[dict[str, Section], list[str]]:
    """Return the facts by section, and a text for each problem."""
    sections = {
        "program": _program(),
        "readers": _readers(),
        "codecs": _codecs(),
        "processor": _processor(),
        "devices": _devices(),
        "model": _model(model),
        "disk": _disk(output),
    }
    problems = [str(facts.pop("problem")) for facts in sections.values() if "problem" in facts]
    return sections, problems


def lines(report: dict[str, Section], problems: list[str]) -> list[str]:
    """Return the report for people: a line per section, and a line per problem."""
    shown = [
        f"{name:<10} {', '.join(f'{key} {printable(str(value))}' for key, value in facts.items())}"
        for name, facts in report.items()
    ]
    return [*shown, *(f"{'problem':<10} {printable(text)}" for text in problems), *([] if problems else ["all good"])]


def _program() -> Section:
    return {
        "wsi-segment": version("wsi-segment"),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def _readers() -> Section:
    from wsi.readers import reader_versions

    facts: Section = dict(reader_versions())
    found = tuple(int(part) for part in str(facts["openslide"]).split(".")[:3] if part.isdecimal())
    if found < OLDEST_OPENSLIDE:
        facts["problem"] = (
            f"OpenSlide {facts['openslide']} has a known vulnerability (CVE-2026-48977); install openslide-bin "
            f"{'.'.join(map(str, OLDEST_OPENSLIDE))} or newer"
        )
    return facts


def _codecs() -> Section:
    import imagecodecs

    facts: Section = {name: "yes" if getattr(imagecodecs, name).available else "no" for name in CODECS}
    if missing := [name for name in NEEDED_CODECS if facts[name] == "no"]:
        facts["problem"] = f"imagecodecs lacks {', '.join(missing)}; install its wheel again"
    return facts


def _processor() -> Section:
    import torch

    from models.runtimes import has_instructions_for
    from pipeline.limits import available_cores, available_memory

    memory = available_memory()
    facts: Section = {
        "cores": available_cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "precisions": " ".join(name for name in ("float32", "bf16", "fp16") if has_instructions_for(name)),
        "memory": f"{memory / 2**30:.1f} GiB available",
    }
    if memory < LITTLE_MEMORY:
        facts["problem"] = f"only {memory / 2**30:.1f} GiB of memory is available; a whole slide takes about 2"
    return facts


def _devices() -> Section:
    import torch

    from models.devices import available_devices, memory_bytes, processor_name

    facts: Section = {"torch": torch.__version__, "openvino": _version("openvino")}
    for name in available_devices()[1:]:
        memory = memory_bytes(torch.device(name))
        shown = "" if memory is None else f" {memory / 2**30:.0f} GiB"
        facts[name] = processor_name(torch.device(name)) + shown
    return facts


def _model(name: str) -> Section:
    from models.bundle import load_bundle, load_networks
    from models.errors import ModelError

    try:
        bundle = load_bundle(name)
        load_networks(bundle)
    except ModelError as error:
        return {"name": name, "problem": str(error)}
    classes = " ".join(one.name for one in bundle.card.classes)
    return {"name": bundle.card.name, "digest": bundle.digest[:12], "mpp": bundle.card.mpp, "classes": classes}


def _disk(output: Path) -> Section:
    facts: Section = {"folder": str(output)}
    try:
        existing = _existing(output)
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return facts | {"problem": f"{output}: {error.strerror or error}; choose another --output"}
    facts["free"] = f"{free / 2**30:.1f} GiB"
    if (refused := _refused(output)) is not None:
        facts["problem"] = refused
    elif not os.access(existing, os.W_OK | os.X_OK):
        facts["problem"] = f"{existing}: is not writable; choose another --output"
    elif free < LITTLE_DISK:
        facts["problem"] = f"only {free / 2**30:.1f} GiB is free on the disk of {output}; free some space"
    return facts


def _refused(output: Path) -> str | None:
    """Return why no run writes its results there, or None."""
    from pipeline.errors import ConfigError
    from pipeline.results.folder import check_output

    try:
        check_output(output, "--output")
    except ConfigError as error:
        return str(error)
    return None


def _existing(path: Path) -> Path:
    """Return the path or the nearest of its parents that exists. Raises OSError if one of them cannot be examined."""
    for one in (path, *path.absolute().parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            one.stat()
            return one
    raise FileNotFoundError(f"{path}: no parent exists")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Run the command as a module."""
    run(app)


if __name__ == "__main__":
    main()
