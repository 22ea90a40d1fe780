from __future__ import annotations

from types import SimpleNamespace

import jinja2

from tests.pipeline.runs import make_run


def test_the_page_lists_the_left_out_areas_that_the_slide_has() -> None:
    left_out = [{"name": "pen", "area_mm2": 0.5, "pieces": 2}, {"name": "dust", "area_mm2": 0.0, "pieces": 0}]
    pages = jinja2.Environment(loader=jinja2.PackageLoader("pipeline.viewing.viewer", "assets"), autoescape=True)
    result = SimpleNamespace(name="a", id="1", run=make_run(left_out=left_out), classes=[])
    text = pages.get_template("viewer.html").render(result=result, results=[result])
    assert "<dt>Pen</dt><dd>0.500 mm²</dd>" in text
    assert "Dust" not in text
