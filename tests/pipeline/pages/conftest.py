"""A report for the tests of both kinds of pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.pages.report_page import write_report
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary
from tests.pipeline.fakes import run_of
from tests.pipeline.pages.results import NASTY, result_of, write_result


@pytest.fixture(scope="package")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of five slides: two done, one without tissue, one skipped, one failed."""
    output = tmp_path_factory.mktemp("results")
    empty: dict[str, Any] = {
        "class_areas_mm2": {"tumour": 0.0, "stroma": 0.0},
        "tissue_mm2": 0.0,
        "status": "no tissue",
    }
    warned = write_result(output, "b10", warnings=["it was <scanned> twice"], tissue_mm2=30.0)
    glass = write_result(output, "glass", **empty)
    skipped = write_result(output, "b9", class_areas_mm2={"tumour": 0.9, "stroma": 0.1})
    results = [
        result_of(write_result(output, NASTY)),
        result_of(warned, resumed_blocks=7),
        SlideResult("glass", "no tissue", 2.0, run_of(glass)["class_areas_mm2"], {"tissue_mm2": 0.0}),
        SlideResult("b9", "skipped", 0.1, run_of(skipped)["class_areas_mm2"], {"tissue_mm2": 1.5}),
        SlideResult("torn", "failed", 0.2, error="torn.svs: <no slide>; copy it again"),
    ]
    write_summary(output, results)
    return write_report(output)
