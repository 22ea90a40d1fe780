"""Attacks on the promise: README and model cards have the sample slide's share of unfamiliar tissue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.bundle import DEFAULT_BUNDLE, shipped_bundles
from pipeline.results.record import read_run
from tests.pipeline.cli.segment_command import invoke
from tests.pipeline.summaries import rows_of
from tests.repository import REPOSITORY


def stated(model: str) -> list[str]:
    """Return the sample slide's shares of unfamiliar tissue, in percent, in the README and the card of this model."""
    card = (REPOSITORY / "docs" / "model-cards" / f"{model}.md").read_text(encoding="utf-8")
    found = re.findall(r"sample slide \(skin\) \| yes \((\d+) % of the tissue\)", card)
    if model == DEFAULT_BUNDLE:
        readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
        found += re.findall(r"The preview therefore warns that (\d+) % of the tissue", readme)
    return found


@pytest.mark.parametrize("model", shipped_bundles())
def test_the_sample_slide_has_the_warning_that_the_documents_describe(
    tmp_path: Path, sample_slide: Path, model: str
) -> None:
    result = invoke(str(sample_slide), "-o", str(tmp_path), "-m", model)
    assert result.exit_code == 0, result.output
    ((name, row),) = rows_of(tmp_path).items()
    run = read_run(tmp_path / name)
    assert run is not None
    assert run.familiarity is not None
    percent = f"{100 * run.familiarity.unfamiliar_share:.0f}"
    shares = stated(model)
    assert len(shares) == (2 if model == DEFAULT_BUNDLE else 1)
    assert set(shares) == {percent}
    assert any(warning.startswith(f"{percent} % of the tissue") for warning in run.warnings), run.warnings
    assert f"{percent} % of the tissue" in row["warnings"]
