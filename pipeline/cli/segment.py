"""The command `wsi-segment`."""

from __future__ import annotations

# Heavy libraries are imported inside the command, so that `--help` answers at once.
import math
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from models.runtimes import OUTPUT_STRIDES, Precision, RuntimeName
from pipeline.cli.commands import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    configure_logging,
    fail,
    fail_with,
    run,
    version_option,
)
from pipeline.config import FEWEST_ALLOWED_PROCESSES, MOST_WORKERS, PROCESSES_PER_CORE, RESULTS_FOLDER, SegmentConfig
from pipeline.console import printable, printable_json

if TYPE_CHECKING:
    from pipeline.results.slide_result import SlideResult
    from pipeline.workers.base import SlideJob, Workers

PROGRAM = "wsi-segment"
DEFAULTS = SegmentConfig()
DEFAULT_MODEL = "colorectal-tissue"
"""`models.bundle.DEFAULT_BUNDLE`, whose import would slow --help down. A test compares them."""
SCHEDULER_OF_SEVERAL = "process"
"""Several slides run in a child process, so a reader crash cannot end the batch."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def segment(
    slides: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Slides, folders of slides, or CSV manifests with the columns slide, mpp, model and id.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(RESULTS_FOLDER),
    model: Annotated[
        str, typer.Option("--model", "-m", help="Name of a shipped model bundle, or path of a bundle.")
    ] = DEFAULT_MODEL,
    model_digest: Annotated[
        str | None,
        typer.Option(
            help="SHA-256 of the model's model.json. The run fails if a model has another digest.", show_default="any"
        ),
    ] = DEFAULTS.model_digest,
    sample: Annotated[
        bool, typer.Option("--sample", help="Segment a small real slide, which is downloaded once and cached.")
    ] = False,
    mpp: Annotated[
        float | None,
        typer.Option(
            help="Micrometers per pixel at full size; overrides the value in the slide.", show_default="from the slide"
        ),
    ] = DEFAULTS.mpp,
    device: DeviceOption = DEFAULTS.device,
    precision: Annotated[
        Precision, typer.Option(help="Number format of the networks; docs/benchmarks/speed.md compares them.")
    ] = DEFAULTS.precision,
    runtime: Annotated[
        RuntimeName,
        typer.Option(
            help="Library that runs the networks. auto: OpenVINO on a CPU if it is installed and supports the "
            "model, else PyTorch."
        ),
    ] = DEFAULTS.runtime,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    num_workers: Annotated[
        int | None,
        typer.Option(
            "--num-workers",
            "-j",
            help="Blocks that are read and written at the same time.",
            min=1,
            show_default=f"one per core, at most {MOST_WORKERS}",
        ),
    ] = DEFAULTS.num_workers,
    output_stride: Annotated[
        int,
        typer.Option(help=f"Model pixels per map pixel: {', '.join(map(str, sorted(OUTPUT_STRIDES)))}."),
    ] = DEFAULTS.output_stride,
    min_area: Annotated[
        float,
        typer.Option(
            help="Merge regions and gaps below this many µm² into a neighbor, before borders are smoothed. Polygons "
            "can end up slightly smaller.",
            min=0,
        ),
    ] = DEFAULTS.min_area_um2,
    simplify: Annotated[
        float, typer.Option(help="Tolerance of smooth polygon borders, in map pixels; 0 keeps pixel edges.", min=0)
    ] = DEFAULTS.simplify_px,
    keep_ungated: Annotated[
        bool, typer.Option("--keep-ungated", help="Use the segmenter's prediction if the gate rejects every class.")
    ] = DEFAULTS.keep_ungated,
    exclude_folds: Annotated[
        bool, typer.Option("--exclude-folds", help="Leave folds out of the map and its areas.")
    ] = DEFAULTS.exclude_folds,
    backend: Annotated[
        str,
        typer.Option(
            help="Library that reads the slides: openslide or tiffslide. auto: the faster one if both return the same "
            "pixels."
        ),
    ] = DEFAULTS.backend,
    recursive: Annotated[bool, typer.Option("--recursive", help="Search subfolders too.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace existing results. Removes only files that wsi-segment wrote.")
    ] = DEFAULTS.force,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Read existing results, and compute blocks with missing or changed files again."),
    ] = DEFAULTS.repair,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry slides that failed permanently in an earlier run.")
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Where slides are segmented: process (a child process, so a reader crash cannot end the batch), local "
            f"(one process per GPU), local:N (N processes: up to {FEWEST_ALLOWED_PROCESSES}, or "
            f"{PROCESSES_PER_CORE} per core if that is more), or the address or scheduler file of a "
            "dask.distributed cluster.",
            show_default=f"this process for one slide, {SCHEDULER_OF_SEVERAL} for several",
        ),
    ] = None,
    spread: Annotated[
        Literal["slides", "blocks"],
        typer.Option(help="With --scheduler: give each process whole slides, or blocks of one large slide."),
    ] = "slides",
    slide_timeout: Annotated[
        float | None,
        typer.Option(
            help="With several slides or --scheduler: seconds after which a slide fails.", show_default="no limit"
        ),
    ] = None,
    qupath: Annotated[
        bool, typer.Option("--qupath", help="Write a QuPath project of all results to the output folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with an estimate of the time, and stop.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
    _version: Annotated[bool, version_option(PROGRAM)] = False,
) -> None:
    """Turn whole-slide images into tissue maps: OME-Zarr probabilities, GeoJSON, GeoParquet, a preview and a report.

    To resume an interrupted run, give the same command again. To examine the installation, run wsi-segment doctor.

    A slide that fails because of its file is recorded as failed. Later runs report it, and retry it only with
    --retry-failed or if the slide, a setting, the model or the version has changed.

    Exit status: 0 no slide failed in this run, 1 a slide failed, or the only slide that was named failed in an earlier
    run, or the run could not start because of the model, device or scheduler, or a row of the table or the output of
    the command could not be written, 2 usage error, 130 interrupted.
    """
    configure_logging(verbose, quiet=quiet)
    from pipeline.errors import Cancelled
    from pipeline.files import local_path
    from wsi.errors import WsiSegmentError

    try:
        config = SegmentConfig(
            mpp=mpp,
            model_digest=model_digest,
            backend=backend,
            output_stride=output_stride,
            min_area_um2=min_area,
            simplify_px=simplify,
            keep_ungated=keep_ungated,
            exclude_folds=exclude_folds,
            device=device,
            precision=precision,
            runtime=runtime,
            batch_size=batch_size,
            force=force,
            repair=repair,
            num_workers=num_workers,
        )
        local_path(output, "--output")
        local_path(model, "--model")
        from pipeline.results.folder import check_output  # imports the readers
        from pipeline.workers.open import check_workers

        check_output(output, "--output")
        jobs = _jobs(slides or [], sample=sample, recursive=recursive)
        if scheduler is None and len(jobs) > 1:
            scheduler = SCHEDULER_OF_SEVERAL
        check_workers(scheduler, spread=spread, slide_timeout_s=slide_timeout)
        if dry_run:
            _print_plans(jobs, output, model, config, as_json=as_json)
        else:
            _run(
                jobs,
                output,
                model,
                config,
                alone=_is_alone(jobs, slides or []),
                retry_failed=retry_failed,
                scheduler=scheduler,
                spread=spread,
                slide_timeout_s=slide_timeout,
                qupath=qupath,
                as_json=as_json,
                quiet=quiet,
            )
    except (Cancelled, KeyboardInterrupt) as stop:
        # Not in the caller: typer would turn this into exit status 1.
        fail(PROGRAM, str(stop) or "interrupted; run the same command again to resume", EXIT_INTERRUPTED)
    except WsiSegmentError as error:
        fail_with(PROGRAM, error)


def _jobs(inputs: list[Path], *, sample: bool, recursive: bool) -> list[SlideJob]:
    from pipeline.batch.collect import collect_jobs
    from pipeline.errors import ConfigError

    if sample:
        from pipeline.cli.sample import sample_slide

        inputs = [*inputs, sample_slide()]
    jobs = collect_jobs(inputs, recursive=recursive)
    if not jobs:
        raise ConfigError("no slides to segment; pass a slide, a folder, a manifest, or --sample")
    return jobs


def _is_alone(jobs: list[SlideJob], inputs: list[Path]) -> bool:
    """Return whether one slide was named by itself, and not by a folder or a manifest."""
    if len(jobs) != 1:
        return False
    return all(path == jobs[0].path or not (path.is_dir() or path.suffix.lower() == ".csv") for path in inputs)


def _run(
    jobs: list[SlideJob],
    output: Path,
    model: str,
    config: SegmentConfig,
    *,
    alone: bool,
    retry_failed: bool,
    scheduler: str | None,
    spread: Literal["slides", "blocks"],
    slide_timeout_s: float | None,
    qupath: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from pipeline.batch.earlier import EarlierRuns
    from pipeline.batch.queue import run_batch
    from pipeline.batch.tally import new_failures, tally
    from pipeline.cli.progress import ProgressBars
    from pipeline.workers.malloc import keep_freed_memory
    from pipeline.workers.open import open_workers

    keep_freed_memory()
    earlier = EarlierRuns(output, model, config, retry_failed=retry_failed)
    if not quiet and config.model_digest is None:
        _print_foreign_digests([model, *(job.model for job in jobs if job.model)])

    def opened(first: SlideJob) -> AbstractContextManager[Workers]:
        return open_workers(scheduler, model, config, spread=spread, slide_timeout_s=slide_timeout_s, first=first)

    incomplete: list[str] = []
    with ProgressBars(hidden=quiet) as bars:
        results = run_batch(
            jobs,
            output,
            opened,
            lambda job: bars.slide(job.result_name),
            lambda result: bars.end(result.slide, _line(result)),
            earlier=earlier,
            lock_timeout_s=slide_timeout_s or math.inf,
            incomplete=incomplete.append,
        )
        if len(results) > 1:
            bars.line(tally(results))
    project = None
    try:
        if qupath and any(r.status != "failed" for r in results):
            from pipeline.viewing.qupath.project import write_project

            project = write_project(output)  # before the results are printed, because stdout can be closed or full
    finally:
        _print_results(results, project, as_json=as_json, quiet=quiet)
    if incomplete:
        fail(PROGRAM, incomplete[0], EXIT_FAILED)
    if new_failures(results) or (alone and results[0].status == "failed"):
        sys.exit(EXIT_FAILED)


def _print_foreign_digests(models: list[str]) -> None:
    """Print the digest of each model that is not shipped. A model that cannot be used is left to its slides."""
    from models.bundle import load_bundle
    from models.errors import ModelError

    for model in dict.fromkeys(models):
        with suppress(ModelError):
            bundle = load_bundle(model)
            if not bundle.shipped:
                line = f"model {bundle.card.name} is not shipped; to pin it: --model-digest {bundle.digest}"
                with suppress(OSError):  # a closed or full stderr stops no slide
                    print(line, file=sys.stderr)


def _print_results(results: list[SlideResult], project: Path | None, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(printable_json([_plain(r) for r in results]))
    elif not quiet:
        for path in (*(result.folder for result in results), project):
            if path is not None:
                print(printable(str(path)))


def _print_plans(jobs: list[SlideJob], output: Path, model: str, config: SegmentConfig, *, as_json: bool) -> None:
    from pipeline.cli.plans import make_plans, plan_lines

    plans = make_plans(jobs, output, model, config)
    if as_json:
        print(printable_json(plans))
    else:
        for entry in plans:
            print("\n".join(plan_lines(entry)))
    if any("error" in entry for entry in plans):
        sys.exit(EXIT_FAILED)


def _line(result: SlideResult) -> str:
    """Return a line of text about a finished slide."""
    if result.failed_before:
        return f"failed     before, not tried again (see --retry-failed): {result.error}"
    if result.status == "failed":
        return f"failed     {result.error}"
    areas = ", ".join(f"{name} {area:.2f} mm²" for name, area in result.areas_mm2.items())
    notes = [f"{result.seconds:.1f} s"] if result.status != "skipped" else ["same inputs, result kept"]
    if result.resumed_blocks:
        notes.append(f"resumed after {result.resumed_blocks} block{'s' if result.resumed_blocks > 1 else ''}")
    notes += [f"warning: {text}" for text in result.warnings]
    return f"{result.status:<10} {result.slide}: {areas} ({'; '.join(notes)})"


def _plain(result: SlideResult) -> dict[str, object]:
    folder = None if result.folder is None else str(result.folder)
    return result.row() | {
        "failed_before": result.failed_before,
        "areas_mm2": result.areas_mm2,
        "warnings": list(result.warnings),
        "folder": folder,
    }


def main() -> None:
    """Run the console script. Its first argument may be `doctor`; a slide of this name is `./doctor`."""
    if sys.argv[1:2] == ["doctor"]:
        from pipeline.cli import doctor

        del sys.argv[1]
        doctor.main()
    run(app)


if __name__ == "__main__":
    main()
