"""The command `wsi-familiarity`."""

from __future__ import annotations

# Heavy libraries are imported inside the command, so that `--help` answers at once.
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.commands import (
    EXIT_INTERRUPTED,
    DeviceOption,
    QuietOption,
    VerboseOption,
    configure_logging,
    fail,
    fail_with,
    run,
    version_option,
)
from pipeline.console import printable_json

if TYPE_CHECKING:
    from models.bundle import Bundle
    from models.card import ModelCard
    from pipeline.training.familiarity import Source

logger = logging.getLogger(__name__)

PROGRAM = "wsi-familiarity"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def familiarity(
    bundle: Annotated[str, typer.Argument(help="Path of a model bundle.")],
    dataset: Annotated[str, typer.Argument(help="Name of a shipped data set, a dataset.toml, or a folder with one.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the images.", show_default="the folder that the description names")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="What the data show, such as 'colon, H&E'.",
            show_default="that of the model, or else of the description",
        ),
    ] = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
    _version: Annotated[bool, version_option(PROGRAM)] = False,
) -> None:
    """Store statistics of its training data in a model bundle, so that runs warn about slides that differ.

    The data set must be the one that the model was trained with. A warning is logged if its images, masks or labels
    differ, unless the data set has composed images. The weights of the bundle do not change. wsi-train does the same
    for every model.

    Exit status: 0 done, 1 failed, 2 usage error, 130 interrupted.
    """
    configure_logging(verbose, quiet=quiet)
    from wsi.errors import WsiSegmentError

    try:
        changed = _changed(bundle, dataset, data, scope, device)
    except WsiSegmentError as error:
        fail_with(PROGRAM, error)
    except KeyboardInterrupt:
        # Not in the caller: typer would turn this into exit status 1.
        fail(PROGRAM, "interrupted; the bundle is unchanged", EXIT_INTERRUPTED)
    card = changed.card
    assert card.familiarity is not None
    facts = {"bundle": str(changed.path), "scope": card.scope, **card.familiarity.model_dump()}
    typer.echo(printable_json(facts))


def _changed(bundle: str, dataset: str, data: Path | None, scope: str | None, device: str) -> Bundle:
    """Return the bundle with statistics of the data set's training and validation split."""
    from models.bundle import load_bundle, shipped_bundles
    from pipeline.errors import ConfigError, OutputError
    from pipeline.training.compose import composed, without_whole
    from pipeline.training.dataset import load_dataset
    from pipeline.training.evaluate import check_same_classes
    from pipeline.training.familiarity import add_familiarity
    from pipeline.training.pieces import other_datasets
    from pipeline.training.prepare import training_images

    if bundle in shipped_bundles():
        raise ConfigError(f"{bundle} is a shipped model, which must not change; copy its folder and pass the copy")
    model, chosen = load_bundle(bundle), load_dataset(dataset, data)
    check_same_classes(model.card, chosen)
    wording = scope if scope is not None else model.card.scope or chosen.card.scope
    with tempfile.TemporaryDirectory(prefix="wsi-familiarity-") as work:
        made = composed(chosen, Path(work), ("train", "val"))
        used = [without_whole(chosen, made), *other_datasets(chosen)]
        sources = [training_images(one, model.card.mpp, cache_bytes=0) for one in used]
        if chosen.card.compose is None:  # other versions of libraries compose images of other bytes
            _warn_of_other_data(model.card, sources[0])
        try:
            return add_familiarity(model, sources, wording, device)
        except OSError as error:
            raise OutputError(
                f"{model.path}: cannot be written ({error.strerror or error}); check the free space and your "
                "permissions"
            ) from error


def _warn_of_other_data(model: ModelCard, source: Source) -> None:
    """Log a warning if the model was trained with other data than these. Old cards do not record their data."""
    from pipeline.training.provenance import data_digest

    if model.made_with.get("data") not in (None, data_digest(*source)):
        logger.warning(
            "model %s was trained with other images, masks or labels than those of %s, or by an earlier version that "
            "held out other images; runs will compare slides with data that the model was not trained with; run "
            "wsi-familiarity again with the model's training data",
            model.name,
            source[0].dataset.card.name,
        )


def main() -> None:
    """Run the console script."""
    run(app)


if __name__ == "__main__":
    main()
