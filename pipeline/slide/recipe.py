"""The recipe: one slide from file to published result."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from models.card import ModelCard
from models.predictor import Predictor
from pipeline.config import ResolvedSettings, SegmentConfig, resolve
from pipeline.errors import SHORTAGE_HELP, Cancelled, ConfigError, OutputError
from pipeline.files import disk_shortage, sync, sync_tree
from pipeline.formats.chunk_files import sweep_partial_files
from pipeline.formats.ome_zarr import CHUNK_OUT, MapSpec, MapStore, create_store
from pipeline.formats.outputs import OUTPUTS, SegmentedSlide
from pipeline.formats.polygons import Region, join_regions
from pipeline.formats.region_files import load_regions
from pipeline.pages.slide_page import write_slide_page
from pipeline.progress import Progress, no_progress
from pipeline.results.digests import Listing, list_files, write_result
from pipeline.results.folder import check_unlocked, open_folder
from pipeline.results.names import BLOCKS, LISTING, MAP_END, PAGE, RUN, THUMBNAIL
from pipeline.results.record import (
    Run,
    read_header,
    run_identity,
    stored_runtime,
    versions,
)
from pipeline.results.slide_result import SlideResult, finished_result, skipped_result
from pipeline.slide.blocks import BlockRecord, BlockWork, chunks_of, regions_file
from pipeline.slide.engine import BlockRunner, ThreadRunner
from pipeline.slide.facts import (
    bad_tiles_l0,
    familiarity_map_of,
    familiarity_of,
    label_areas_mm2,
    left_out_areas,
    slide_facts,
    stage_seconds,
    status_of,
    tile_counts,
    tissue_mm2,
    unfamiliar_warning,
    warnings_of,
)
from pipeline.slide.journal import Journal, write_records
from pipeline.slide.plan import Plan, PlannedSlide, check_resources, plan_slide
from pipeline.slide.repair import take_over_blocks
from wsi.errors import SlideReadError, shortage
from wsi.left_out import LeftOut
from wsi.slide import Slide, slide_digest, slide_stamp

log = logging.getLogger(__name__)


def segment_slide(
    path: Path,
    output: Path,
    predictor: Predictor,
    config: SegmentConfig,
    progress: Progress = no_progress,
    planned: PlannedSlide | None = None,
    name: str | None = None,
) -> SlideResult:
    """Segment a slide into `output/<name>`, which README.md describes. `name` is a path with slashes; None: the file's
    name without its ending. `planned` is the plan of `plan_slide` for this model and these settings, if the caller
    already has it.

    A finished result of the same slide, model and parameters is kept (`skipped`). The result is built in a working
    folder beside the target, and one rename makes it visible. After a crash or an interrupt, the next call resumes from
    the finished blocks.

    Raises SlideError, ModelError or PipelineError; Cancelled on KeyboardInterrupt.
    """
    settings = resolve(config, predictor.compute)
    _check_predictor(predictor, settings)
    return segment_slide_with(ThreadRunner(predictor), path, output, settings, progress, planned, name)


def segment_slide_with(
    runner: BlockRunner,
    path: Path,
    output: Path,
    settings: ResolvedSettings,
    progress: Progress = no_progress,
    planned: PlannedSlide | None = None,
    name: str | None = None,
) -> SlideResult:
    """Segment a slide as `segment_slide` does, with its blocks run by `runner`."""
    name = path.stem if name is None else name
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    try:
        with ExitStack() as stack:
            if planned is None and read_header(output / name) is None:
                check_unlocked(output, name)
                # Before the digest, which reads the whole file: a file that no reader opens may have terabytes.
                with _timed(seconds, "plan"):
                    planned = plan_slide(path, runner.card, settings)
                stack.enter_context(planned.slide)
            return _segment_slide(path, output, name, runner, settings, progress, planned, start, seconds)
    except KeyboardInterrupt:
        raise Cancelled(
            f"{path.name}: interrupted; run the same command again to resume from the finished blocks"
        ) from None


def _segment_slide(
    path: Path,
    output: Path,
    name: str,
    runner: BlockRunner,
    settings: ResolvedSettings,
    progress: Progress,
    planned: PlannedSlide | None,
    start: float,
    seconds: dict[str, float],
) -> SlideResult:
    run_versions = versions(settings.runtime)
    # Before the digest: otherwise a slide that changes in between would count as unchanged.
    stamp = slide_stamp(path) if planned is None else planned.stamp
    # Before any work: a finished result of another runtime is kept if the user named none.
    runtime = stored_runtime(output / name, settings) or settings.runtime
    identity = run_identity(slide_digest(path), runner.digest, settings.parameters(runtime))
    check_unchanged = partial(_check_unchanged, path, stamp)
    computed_with = settings.computed_with() | {"versions": run_versions}
    with (
        _named_write_errors(path, output),
        open_folder(
            output, name, identity, computed_with, slide=path, force=settings.force, repair=settings.repair
        ) as folder,
        # Also inside: after an error, `open_folder` removes files, and the disk no longer looks full.
        _named_write_errors(path, output),
    ):
        if folder.finished is not None:
            return skipped_result(name, folder.target, folder.finished, time.perf_counter() - start)
        if runtime != settings.runtime:
            raise OutputError(
                f"{folder.target}: was computed with {runtime}, and its blocks must not be mixed with blocks of "
                f"{settings.runtime}; pass --runtime {runtime}, or --force to compute the whole slide again"
            )

        with _timed(seconds, "plan"):
            _, slide, tissue, plan = planned or plan_slide(path, runner.card, settings)
        with slide:
            folder.resume_only(tissue.digest)
            check_resources(plan, settings, path.name, output)
            spec = _map_spec(folder.target.name, runner.card, plan)
            store_path = folder.result / f"{spec.name}{MAP_END}"
            try:
                store = _open_store(store_path, folder.work, spec)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):  # files in the place of folders
                folder.start_over(tissue.digest, "has a damaged map")
                store = _open_store(store_path, folder.work, spec)
            work = BlockWork(slide.info, plan.grid, tissue, settings, store, folder.work)

            with _timed(seconds, "blocks"):
                journal = Journal(folder.work, folder.work_identity)
                if folder.damaged:
                    take_over_blocks(folder, work, plan.blocks, journal)
                records, resumed = _run_blocks(runner, work, slide, plan, journal, check_unchanged, progress)
            sweep_partial_files(store.path)  # left by workers that were killed while others continued

            familiarity_map = familiarity_map_of(runner.card, work, plan, records)
            familiarity = familiarity_of(runner.card, familiarity_map, plan)
            unfamiliar = unfamiliar_warning(runner.card, familiarity)
            regions = partial(_regions, work, plan)
            segmented = SegmentedSlide(
                slide, tissue, plan.grid, store, identity.slide, regions, familiarity_map, unfamiliar
            )
            _write_outputs(segmented, folder.result, seconds, progress)

            if records:
                write_records(folder.result / BLOCKS, identity.as_json() | {"tissue": tissue.digest}, records)
            listing = list_files(store.path)
            _check_chunks(path.name, work, records, listing)
            polygons, areas_mm2 = segmented.measured
            seconds |= stage_seconds(records) | {"total": time.perf_counter() - start}
            run = Run(
                identity=identity,
                status=status_of(tissue, plan),
                name=name,
                slide=slide_facts(slide.info, stamp),
                model=runner.card.name,
                scope=runner.card.scope,
                limits=runner.card.limits,
                familiarity=familiarity,
                tissue_mm2=tissue_mm2(records, spec),
                fold_mm2=tissue.left_out[LeftOut.FOLD].area_um2 / 1e6,
                left_out=left_out_areas(tissue),
                classes=spec.classes,
                class_areas_mm2=areas_mm2,
                label_areas_mm2=label_areas_mm2(records, spec),
                polygons=polygons,
                tiles=tile_counts(records),
                bad_tiles_l0=bad_tiles_l0(records, slide.info),
                warnings=((unfamiliar,) if unfamiliar else ()) + warnings_of(work, runner.card.mpp, records, polygons),
                plan=plan.facts(settings),
                resumed_blocks=resumed,
                device=runner.device,
                computed_with=settings.computed_with(),
                seconds=seconds,
                versions=run_versions,
                outputs=tuple(sorted({p.name for p in folder.result.iterdir()} | {RUN, PAGE, THUMBNAIL, LISTING})),
            )
            write_slide_page(folder.result, run, segmented.picture)
            run = write_result(folder.result, run, listing)
        progress("publishing", 0, 1)
        check_unchanged()
        folder.publish()
    return finished_result(name, folder.target, run, time.perf_counter() - start)


def _check_predictor(predictor: Predictor, settings: ResolvedSettings) -> None:
    """Raise ConfigError if the predictor was made with other settings than the result would state."""
    for name, present, requested in (
        ("output_stride", predictor.output_stride, settings.output_stride),
        ("keep_ungated", predictor.ungated_fallback, settings.keep_ungated),
    ):
        if present != requested:
            raise ConfigError(f"the predictor was made with {name} {present}, the settings request {requested}")


def _open_store(path: Path, work: Path, spec: MapSpec) -> MapStore:
    """Return a new store, or that of an interrupted run with new metadata and without its half-written files.

    The journal has no digests of metadata, so damaged metadata would be published.
    """
    new = work / "store"
    shutil.rmtree(new, ignore_errors=True)
    create_store(new, spec)
    if path.exists():
        sweep_partial_files(path)
        for file in sorted(file for file in new.rglob("*") if file.is_file()):
            place = path / file.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        shutil.rmtree(new)
    else:
        sync_tree(new)
        new.rename(path)
        sync(path.parent)
    return MapStore(path, spec)


def _run_blocks(
    runner: BlockRunner,
    work: BlockWork,
    slide: Slide,
    plan: Plan,
    journal: Journal,
    check_unchanged: Callable[[], None],
    progress: Progress,
) -> tuple[list[BlockRecord], int]:
    """Run the unfinished blocks. Return the records of all blocks, and how many an earlier run had finished."""
    total = len(plan.blocks)
    blocks = {block.index: block for block in plan.blocks}
    records = {index: record for index, record in journal.finished().items() if index in blocks}
    for index, record in records.items():
        # A power cut can restore chunks that the block had removed.
        work.store.sweep_block(blocks[index].box_out, chunks_of(work, record))
    resumed = len(records)
    if resumed:
        log.info("%s: resuming from %d of %d blocks", work.info.path.name, resumed, total)
    lock = threading.Lock()

    def finished(record: BlockRecord) -> None:
        check_unchanged()  # before the journal: a block of a changed slide must not count
        journal.append(record)
        with lock:
            records[record.index] = record
            _check_readable(work, plan, records.values())
            progress("segmenting", len(records), total)

    progress("segmenting", resumed, total)
    runner.run(work, slide, [block for block in plan.blocks if block.index not in records], finished)
    return [records[index] for index in sorted(records)], resumed


def _write_outputs(segmented: SegmentedSlide, folder: Path, seconds: dict[str, float], progress: Progress) -> None:
    """Write all `OUTPUTS`.

    An error is raised after both threads have ended. If both fail, the error of the calling thread is raised.
    """

    def write(stage: str) -> None:
        with _timed(seconds, stage):
            OUTPUTS[stage].write(segmented, folder)

    with ThreadPoolExecutor(1, thread_name_prefix="output") as pool:
        beside = []
        for stage, output in OUTPUTS.items():
            progress(output.progress, 0, 1)
            if output.beside:
                beside.append(pool.submit(write, stage))
            else:
                write(stage)
        for future in beside:
            future.result()


def _check_unchanged(path: Path, stamp: str) -> None:
    """Raise SlideReadError if the slide's files have changed since the digest was computed."""
    if slide_stamp(path) != stamp:
        raise SlideReadError(
            f"{path.name}: the file has changed since the run began; run the same command again when nothing "
            f"writes to the file"
        )


def _check_readable(work: BlockWork, plan: Plan, records: Iterable[BlockRecord]) -> None:
    """Raise SlideReadError as soon as too many tiles are unreadable."""
    bad_l0 = [box for record in records for box in record.bad_tiles_l0]
    if len(bad_l0) > work.settings.max_bad_share * plan.tiles:
        raise SlideReadError(
            f"{work.info.path.name}: at least {len(bad_l0)} of {plan.tiles} tiles cannot be read (at most "
            f"{work.settings.max_bad_share:.0%}), one at level-0 (x, y, width, height) {tuple(bad_l0[0])}; copy or "
            f"scan it again"
        )


def _check_chunks(name: str, work: BlockWork, records: Iterable[BlockRecord], listing: Listing) -> None:
    """Raise OutputError if a chunk is not the one that its block wrote."""
    for record in records:
        for chunk, written in chunks_of(work, record).items():
            if chunk.as_posix() not in listing or listing[chunk.as_posix()].sha256 != written:
                raise OutputError(
                    f"{name}: {work.store.path / chunk} changed after it was written; check the disk, and run the same "
                    f"command again, which computes the block again"
                )


def _map_spec(name: str, card: ModelCard, plan: Plan) -> MapSpec:
    return MapSpec(name, plan.grid.size_out, card.classes, plan.grid.mpp_out, chunk=min(CHUNK_OUT, plan.grid.block_out))


def _regions(work: BlockWork, plan: Plan) -> Iterable[Region]:
    pieces = (piece for block in plan.blocks for piece in load_regions(regions_file(work.folder, block)))
    return join_regions(pieces, work.settings.min_area_um2 / plan.grid.mpp_out**2)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


@contextmanager
def _named_write_errors(path: Path, output: Path) -> Iterator[None]:
    """Turn write errors into OutputErrors that name the slide and the next step."""
    try:
        yield
    except OSError as error:
        if (full := disk_shortage(error, output)) is not None:
            raise OutputError(
                f"{path.name}: {full}, and run the same command again, which resumes from the finished blocks"
            ) from error
        raise OutputError(
            f"{path.name}: cannot write {error.filename or output}: {error.strerror or error}; {_what_helps(error)}"
        ) from error


def _what_helps(error: OSError) -> str:
    """Return the next step after a write that failed for another reason than a full disk."""
    if what := shortage(error):
        return SHORTAGE_HELP[what]
    if error.errno == errno.EFBIG:
        return (
            "raise the limit of a file's size (ulimit -f); on FAT, which takes files up to 4 GiB, choose another disk"
        )
    if error.errno in (errno.EINVAL, errno.ENAMETOOLONG):
        return (
            "the file system may not take this name: name the result in the column 'id' of a manifest, or choose "
            "another --output"
        )
    return "check that the folder exists and may be written"
