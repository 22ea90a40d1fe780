"""The command `wsi-label`: label patches of slides in the browser, and turn the labels into a data set."""

from __future__ import annotations

# Heavy libraries are imported inside the commands, so that `--help` answers at once.
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli.commands import annotator_name, fail_with, run, version_option
from pipeline.cli.label_inputs import (
    PROGRAM,
    class_pairs,
    import_sources,
    only_slide_file,
    slide_files,
    two_names,
    with_patients,
)
from pipeline.console import log_to_stderr
from pipeline.files import local_path

if TYPE_CHECKING:
    from pipeline.labeling.labels import Labels
    from pipeline.labeling.store import EventStore

DEFAULT_MODEL = "colorectal-tissue"
"""Gives a new folder its pixel size and the features by which patches are compared."""


class _PageFirst(TyperGroup):
    """A group whose command `page` need not be named: `wsi-label SLIDES -o labels`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # Any: typer has its own copy of click's Context
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version"):
            args = ["page", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, cls=_PageFirst)

FolderArgument = Annotated[Path, typer.Argument(help="Labels folder.", show_default=False)]
AnnotatorOption = Annotated[
    str | None, typer.Option(help="Name of the person who labels.", show_default="your user name")
]

PatchMppOption = Annotated[
    float | None,
    typer.Option(
        help="Pixel size of the patches in µm.", min=0.01, show_default=f"that of the model or {DEFAULT_MODEL}"
    ),
]
PatchSideOption = Annotated[
    int | None,
    typer.Option(help="Side of a patch in pixels.", min=32, show_default=f"that of the model or {DEFAULT_MODEL}"),
]
PatientOption = Annotated[
    str | None,
    typer.Option(
        help="Regular expression with one group that finds the patient in a slide's name. Patches of one patient "
        "stay in one split.",
        show_default="the patient of an earlier command, or the slide's name",
    ),
]
MppOption = Annotated[
    float | None,
    typer.Option(
        help="Micrometers per pixel of the slides, if the files do not state it.", show_default="from the file"
    ),
]


@app.callback()
def label(_version: Annotated[bool, version_option(PROGRAM)] = False) -> None:
    """Label patches of slides in the browser, and turn the labels into a data set for wsi-train.

    Without the name of a command, `page` runs: `wsi-label slides/ -o labels --classes tumor,stroma`.

    Exit status: 0 done or stopped by Ctrl-C, 1 failed, 2 usage error.
    """
    log_to_stderr(logging.WARNING)


@app.command()
def page(
    slides: Annotated[
        list[Path], typer.Argument(help="Slides, folders of slides, or CSV manifests.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Labels folder. Existing labels in it are kept.")],
    classes: Annotated[
        str,
        typer.Option(
            help="Names of the classes, separated by commas. New names are added to those of the folder.",
            show_default="those of the folder, or of the model",
        ),
    ] = "",
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="Model that makes suggestions when you ask for them: a shipped model or a bundle folder.",
            show_default="none",
        ),
    ] = None,
    annotator: AnnotatorOption = None,
    patch_mpp: PatchMppOption = None,
    patch_side: PatchSideOption = None,
    blind_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the patches that never show a suggestion and that every annotator labels.",
            min=0.0,
            max=0.9,
            show_default="0.1",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Number that fixes the random order of patches.", show_default="1")
    ] = None,
    patient: PatientOption = None,
    mpp: MppOption = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Search the subfolders of folders.")] = False,
    port: Annotated[int, typer.Option(help="Port of the page.", min=0, max=65535, show_default="a free port")] = 0,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address of the page and do not open it.")
    ] = False,
) -> None:
    """Serve the page on which you label patches.

    Every label is on the disk before the page shows it as saved. The page is visible on this machine only. Press
    Ctrl-C
    to stop the server, and give the same command again to continue.
    """
    from models.bundle import DEFAULT_BUNDLE, load_bundle
    from pipeline.labeling.app import make_app
    from pipeline.labeling.desk import open_desk
    from pipeline.labeling.folder import Wishes, has_classes
    from pipeline.web.server import open_browser, serve

    def ready(url: str) -> None:
        typer.echo(f"{url}  (press Ctrl-C to stop)")
        if not no_browser:
            open_browser(url)

    with failing():
        local_path(output, "--output")
        bundle = load_bundle(model) if model else None
        names = [name.strip() for name in classes.split(",") if name.strip()]
        if bundle is not None and not names and not has_classes(output):
            names = [one.name for one in bundle.card.classes]
        with open_desk(
            output,
            with_patients(slide_files(slides, mpp, recursive=recursive), patient),
            annotator_name(PROGRAM, annotator),
            wishes=Wishes(patch_mpp, patch_side, seed, blind_share),
            classes=names,
            model=bundle,
            shipped=load_bundle(DEFAULT_BUNDLE),
        ) as desk:
            serve(make_app(desk), port, ready)
        _print_warnings(output)
    typer.echo(f"{PROGRAM}: ended; train with: wsi-train {output} -o runs/name", err=True)


@app.command("import")
def import_(
    output: Annotated[Path, typer.Option("-o", "--output", help="Labels folder. Existing labels in it are kept.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="GeoJSON files that QuPath exported (.geojson, .geojson.gz, .zip), or folders of them.",
            show_default=False,
        ),
    ] = None,
    corrections: Annotated[
        Path | None,
        typer.Option(
            help="Instead of files: a result, or a folder of results, that people corrected in wsi-view or QuPath. "
            "Only what they changed is imported.",
            show_default="none",
        ),
    ] = None,
    slide: Annotated[
        Path | None,
        typer.Option(
            help="Slide of the annotations, or a folder with slides of the same names as the files.",
            show_default="with --corrections, the path in the result",
        ),
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="Class for a class of QuPath, such as Tumor=tumor or 'Ignore*=other'. Can be repeated. A derived "
            "class such as 'Tumor: Positive' counts as Tumor.",
            show_default="the same names; classes that end with * are ignored",
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial", help="Also import patches that the annotations cover in part. The page asks for the rest."
        ),
    ] = False,
    annotator: AnnotatorOption = None,
    patch_mpp: PatchMppOption = None,
    patch_side: PatchSideOption = None,
    patient: PatientOption = None,
    mpp: MppOption = None,
) -> None:
    """Turn annotations that were drawn in QuPath, or corrections of results, into labels of patches.

    A class is present in a patch if it covers at least 5 % of it. Locked annotations and unchanged regions of
    wsi-segment are never imported.
    """
    from pipeline.labeling.folder import Wishes, has_classes
    from pipeline.labeling.importer import check_names, import_drawings, known_classes, names_of, open_import

    pairs = class_pairs(mapping or [])
    who = annotator_name(PROGRAM, annotator)
    with failing():
        local_path(output, "--output")
        sources = import_sources(files or [], corrections, slide, who, mpp)
        names = names_of([drawing for one in sources for drawing in one.drawings], pairs)
        is_new = not has_classes(output)
        if corrections is not None and is_new:
            names = [*(pairs.get(tissue.name, tissue.name) for one in sources for tissue in one.classes), *names]
        slides = with_patients([only_slide_file(one.slide, one.mpp) for one in sources], patient)
        if is_new:
            check_names(names, sources, pairs)
        known = known_classes([tissue for one in sources for tissue in one.classes], pairs)
        with open_import(output, who, Wishes(patch_mpp, patch_side), names, known) as folder:
            for one, file in zip(sources, slides, strict=True):
                done = import_drawings(folder, file, one.drawings, pairs, partial=partial, digest=one.digest)
                rest = "imported" if partial else "not imported; pass --partial to complete them on the page"
                typer.echo(
                    f"{one.name}: {done.complete} complete patches, {done.partial} covered in part ({rest}), "
                    f"{done.ignored} with an ignored class, {done.kept} labeled on the page before and kept, "
                    f"{done.taken_back} removed, because the files do not show them anymore"
                )
                outside = ("outside the slide; check that they were drawn on this slide", done.outside)
                for reason, number in [*one.skipped.items(), outside]:
                    if number:
                        typer.echo(f"{PROGRAM}: warning: {one.name}: objects skipped: {number} {reason}", err=True)
        _print_warnings(output)


@app.command()
def classes(
    folder: FolderArgument,
    add: Annotated[list[str] | None, typer.Option(help="Add a class. Can be repeated.", show_default="none")] = None,
    rename: Annotated[
        list[str] | None, typer.Option(help="Rename a class, as old=new. Can be repeated.", show_default="none")
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(help="Make a class a part of another one, as part=whole. Can be repeated.", show_default="none"),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="Remove a class that is present in no patch. Can be repeated.", show_default="none"),
    ] = None,
    annotator: AnnotatorOption = None,
) -> None:
    """List the classes of a labels folder, or change them.

    After you add a class, the page first shows the labeled patches that have no answer for it.
    """
    from pipeline.labeling.folder import add_classes, merge_classes, open_events, remove_class, rename_class

    who = annotator_name(PROGRAM, annotator)
    with failing(), open_events(folder) as store:
        add_classes(store, who, add or [], {})
        for pair in rename or []:
            rename_class(store, who, *two_names("--rename", pair))
        for pair in merge or []:
            merge_classes(store, who, *two_names("--merge", pair))
        for name in remove or []:
            remove_class(store, who, name)
        labels = _written(folder, store)
    for one in labels.classes.values():
        typer.echo(one.name)


@app.command()
def report(folder: FolderArgument) -> None:
    """Write the data set of a labels folder again, and print what it contains and how well annotators agree."""
    from pipeline.labeling.agreement import agreements
    from pipeline.labeling.counts import count
    from pipeline.labeling.folder import open_events

    with failing(), open_events(folder) as store:
        labels = _written(folder, store)
        counts = count(labels)
    typer.echo(
        f"{counts.labeled} labeled patches of {sum(map(bool, counts.by_slide.values()))} slides, "
        f"{counts.incomplete} incomplete or disputed, {counts.unsure} unsure, {counts.artifact} artifacts"
    )
    for one in labels.classes.values():
        typer.echo(f"{one.name}: present in {counts.present[one.id]}")
    for pair in agreements(labels):
        kappa = "not defined" if pair.kappa is None else f"{pair.kappa:.2f}"
        typer.echo(
            f"{' and '.join(pair.annotators)}, {pair.class_name}: {pair.same} of {pair.patches} blind patches alike, "
            f"kappa {kappa}"
        )
    _print_warnings(folder)


@contextmanager
def failing() -> Iterator[None]:
    """Print an error of this project in one line and exit: see `fail_with`."""
    from wsi.errors import WsiSegmentError

    try:
        yield
    except WsiSegmentError as error:
        fail_with(PROGRAM, error)


def _written(folder: Path, store: EventStore) -> Labels:
    from pipeline.labeling.dataset_files import write_dataset
    from pipeline.labeling.labels import Labels

    labels = Labels(store.read())
    lacking = write_dataset(folder, labels, lambda _: None)
    if lacking:
        typer.echo(
            f"{PROGRAM}: {lacking} labeled patches have no picture yet; open their slides once with wsi-label", err=True
        )
    return labels


def _print_warnings(folder: Path) -> None:
    from pipeline.labeling.dataset_files import warnings_of
    from pipeline.labeling.folder import open_events
    from pipeline.labeling.labels import Labels

    with open_events(folder) as store:
        for text in warnings_of(Labels(store.read())):
            typer.echo(f"{PROGRAM}: warning: {text}", err=True)


def main() -> None:
    """Run the console script."""
    run(app)


if __name__ == "__main__":
    main()
