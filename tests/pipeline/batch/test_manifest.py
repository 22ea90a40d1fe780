from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.batch.collect import collect_jobs
from pipeline.batch.manifest import read_manifest
from pipeline.errors import ConfigError
from pipeline.workers.base import SlideJob


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,MPP\na.svs,1\n", "line 1, column 2: 'MPP' is not a column; did you mean 'mpp'? "),
        ("slide,mmp\na.svs,1\n", "line 1, column 2: 'mmp' is not a column; did you mean 'mpp'? "),
        ("slide,mpp,Model\na.svs,1,\n", "line 1, column 3: 'Model' is not a column; did you mean 'model'? "),
        ("slide,stain\na.svs,H&E\n", "put # before the name of a column that is not for wsi-segment"),
        ("slide;mpp\na.svs;0,5\n", "line 1, column 1: 'slide;mpp' is not a column; separate the columns with commas"),
        ("slide,mpp,mpp\na.svs,1,2\n", "line 1, column 3: 'mpp' occurs twice"),
        ("slide,mpp\na.svs,1,5\n", "line 2: has 3 cells, but the header has 2"),
        ("", "list.csv: is empty"),
        ("\n\n", "list.csv: is empty"),
        (
            "slide,mpp\na.svs,1\nb.svs,1\n./a.svs,2\n",
            "line 4: ./a.svs is also in line 2, with another mpp, model or id",
        ),
        ("slide,model\na.svs,colon-gland\na.svs,\n", "line 3: a.svs is also in line 2"),
        ("slide,model\na.svs,no-such\n", "line 2: the column 'model' cannot be used: "),
        ("slide,id\na.svs,x\nb.svs,X\n", "line 3: the id 'X' is also in line 2"),
        ("slide\na.svs\n./.\n", "line 3: the column 'slide' is './.', which is a folder; it must name a slide"),
        ("slide\n/\n", "line 2: the column 'slide' is '/', which is a folder; it must name a slide"),
        ("slide\na.svs\ncase/..svs\n", "line 3: the column 'slide' is 'case/..svs'; results are named after slides"),
        ("slide\ns3://bucket/a.svs\n", "line 2: the slide: s3://bucket/a.svs is an address (s3://)"),
    ],
)
def test_what_would_be_lost_is_refused_with_its_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        collect_jobs([path])
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_columns_come_in_any_order_and_equal_rows_and_empty_lines_count_once(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(
        '#note, id ,model,slide,mpp\n"a, b",x/1,colon-gland,s/a.svs,0.5\n\n,,,,\n'
        "c,x/1,colon-gland,s/a.svs,0.5\n,,,b.svs\n"
    )
    assert read_manifest(path) == [
        SlideJob(tmp_path / "s/a.svs", 0.5, "colon-gland", "x/1"),
        SlideJob(tmp_path / "b.svs"),
    ]
