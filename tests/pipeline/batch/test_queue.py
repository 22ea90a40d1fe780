from __future__ import annotations

from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from models.predictor import Predictor
from pipeline.batch.collect import collect_jobs
from pipeline.batch.names import name_clashes
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled, ConfigError
from pipeline.progress import Progress, no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess
from tests.pipeline.fakes import SMALL, color_predictor, constant_predictor, region_slide
from tests.pipeline.summaries import rows_of
from tests.slides import PINK, painted, small_slide, write_slide


def silent(_: SlideJob) -> Progress:
    return no_progress


def here(predictor: Predictor, config: SegmentConfig = SMALL) -> InProcess:
    """Workers in this process, of which every model is this one."""
    return InProcess(lambda _: predictor, "any", config)


def run(jobs: list[SlideJob], output: Path, progress: Progress = no_progress) -> list[SlideResult]:
    """The results of a batch with the color model, which are also what was reported."""
    reported: list[SlideResult] = []
    results = run_batch(jobs, output, here(color_predictor()), lambda _: progress, reported.append)
    assert reported == results
    return results


def manifest(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_stands_for_its_slides_and_with_recursive_for_those_below(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.SVS", "a.tiff", "notes.txt", ".hidden.svs", "deep/er/c.ndpi"):
        (tmp_path / name).touch()
    (tmp_path / "folder.svs").mkdir()
    assert [job.path.name for job in collect_jobs([tmp_path])] == ["a.tiff", "b.SVS"]
    assert [job.path.name for job in collect_jobs([tmp_path], recursive=True)] == ["a.tiff", "b.SVS", "c.ndpi"]


def test_a_folder_without_slides_is_an_error_that_names_recursive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no slides in this folder .*\.svs.*; pass --recursive"):
        collect_jobs([tmp_path])
    with pytest.raises(ConfigError, match=r"no slides in this folder \(endings: [^;]*\)$"):
        collect_jobs([tmp_path], recursive=True)


def test_a_slide_named_twice_is_taken_once(tmp_path: Path) -> None:
    slide = small_slide(tmp_path / "a.svs")
    (tmp_path / "link").mkdir()
    link = tmp_path / "link" / "b.svs"
    link.symlink_to(slide)
    listed = manifest(tmp_path / "list.csv", "slide,mpp\na.svs,\n")
    assert collect_jobs([slide, tmp_path, link, listed]) == [SlideJob(slide)]
    listed = manifest(tmp_path / "list.csv", "slide,mpp\na.svs,0.5\n")
    with pytest.raises(ConfigError, match=r"a\.svs: is listed twice, without settings and with mpp 0\.5; list it once"):
        collect_jobs([slide, listed])


def test_a_manifest_gives_paths_beside_it_and_an_mpp_for_each(tmp_path: Path) -> None:
    path = manifest(tmp_path / "list.csv", "\ufeffmpp,slide,#stain\r\n0.25,sub/größe 1.svs,H&E\r\n,/data/b.svs,\r\n")
    assert collect_jobs([path]) == [SlideJob(tmp_path / "sub/größe 1.svs", 0.25), SlideJob(Path("/data/b.svs"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,mpp\na.svs,0.5\nb.svs,half\n", "line 3: mpp is 'half'; it must be a positive number, or empty"),
        ("slide,mpp\na.svs,0\n", "line 2: mpp is '0'"),
        ("slide,mpp\na.svs,-1\n", "line 2: mpp is '-1'"),
        ("slide,mpp\na.svs,nan\n", "line 2: mpp is 'nan'"),
        ("slide,mpp\n\n\na.svs,x\n", "line 4: mpp is 'x'"),
        ("slide,mpp\na.svs,\n,0.5\n", "line 3: the column 'slide' is empty"),
        ("mpp,slide\n0.5\n", "line 2: the column 'slide' is empty"),
        (
            "path,mpp\na.svs,\n",
            "line 1, column 1: 'path' is not a column; a manifest has the columns slide, mpp, model, id",
        ),
        ("mpp,id\n1,a\n", "needs a header with a column 'slide' and at least one row"),
        ("slide,mpp\n", "needs a header with a column 'slide' and at least one row"),
        ("", "needs a header with a column 'slide' and at least one row"),
    ],
)
def test_an_invalid_manifest_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"list\.csv") as caught:
        collect_jobs([manifest(tmp_path / "list.csv", text)])
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [None, b"slide\n\xff\xfe.svs\n"])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "list.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"list\.csv: cannot be read as a manifest"):
        collect_jobs([path])


def test_names_clash_regardless_of_case_and_extension(tmp_path: Path) -> None:
    paths = [Path("a/Slide.svs"), Path("b/slide.tiff"), Path("c/other.svs")]
    clashes = name_clashes([SlideJob(p) for p in paths])
    assert set(clashes) == set(paths[:2])
    assert clashes[paths[0]].startswith("a/Slide.svs: its result would have the same name as that of b/slide.tiff")
    assert clashes[paths[1]].startswith("b/slide.tiff: its result would have the same name as that of a/Slide.svs")


def test_slides_with_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    jobs = [SlideJob(small_slide(tmp_path / name)) for name in ("a/same.svs", "b/SAME.svs", "a/other.svs")]
    results = run(jobs, tmp_path / "out")
    assert [(r.slide, r.status) for r in results] == [("a/same", "done"), ("b/SAME", "done"), ("other", "done")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b", "index.html", "other", "summary.csv"]
    assert [r.folder for r in results] == [tmp_path / "out" / name for name in ("a/same", "b/SAME", "other")]
    assert {n: r["status"] for n, r in rows_of(tmp_path / "out").items()} == dict.fromkeys(
        ("a/same", "b/SAME", "other"), "done"
    )
    assert [r.status for r in run(jobs, tmp_path / "out")] == ["skipped"] * 3


def test_slides_of_one_folder_with_the_same_name_fail_and_the_others_are_segmented(tmp_path: Path) -> None:
    jobs = [SlideJob(small_slide(tmp_path / name)) for name in ("same.svs", "SAME.tif", "other.svs")]
    results = run(jobs, tmp_path / "out")
    assert [r.status for r in results] == ["failed", "failed", "done"]
    assert str(jobs[1].path) in results[0].error
    assert "in the column 'id' of a manifest" in results[1].error


@pytest.mark.full
def test_the_mpp_of_a_job_wins_over_the_settings(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.svs", painted((300, 250), ((20, 20, 250, 200), PINK)), mpp=None)
    other = small_slide(tmp_path / "b.svs")
    jobs = [SlideJob(slide, 2.0), SlideJob(other)]
    config = replace(SMALL, mpp=4.0)
    first, second = run_batch(jobs, tmp_path / "out", here(color_predictor(), config), silent, lambda _: None)
    assert first.areas_mm2["class-0"] == pytest.approx(250 * 200 * 2.0**2 / 1e6, rel=0.05)
    assert second.areas_mm2["class-0"] == pytest.approx(250 * 200 * 4.0**2 / 1e6, rel=0.05)


def test_another_runs_result_fails_its_slide_only(tmp_path: Path) -> None:
    a, b = (small_slide(tmp_path / f"{name}.svs") for name in "ab")
    run_batch([SlideJob(a)], tmp_path / "out", here(constant_predictor([1.0, 0.0])), silent, lambda _: None)
    results = run([SlideJob(a), SlideJob(b)], tmp_path / "out")
    assert [r.status for r in results] == ["failed", "done"]
    assert "holds the result of another run (other model); pass --force to replace it" in results[0].error


def test_a_refused_slide_keeps_the_row_of_the_stored_result_and_adds_its_error(tmp_path: Path) -> None:
    jobs, out = [SlideJob(small_slide(tmp_path / "a.svs"))], tmp_path / "out"
    run(jobs, out)
    row = rows_of(out)["a"]
    assert (row["status"], row["error"]) == ("done", "")
    (refused,) = run_batch(jobs, out, here(constant_predictor([1.0, 0.0])), silent, lambda _: None)
    assert refused.status == "failed"
    assert rows_of(out)["a"] == row | {"error": refused.error}
    assert refused.error.partition(":")[2] in unescape((out / "index.html").read_text(encoding="utf-8"))
    run(jobs, out)
    assert rows_of(out)["a"] == row
    (out / "summary.csv").unlink()
    run_batch(jobs, out, here(constant_predictor([1.0, 0.0])), silent, lambda _: None)
    assert rows_of(out)["a"]["status"] == "failed"


def test_the_summary_is_up_to_date_when_the_next_slide_is_interrupted(tmp_path: Path) -> None:
    a, b = small_slide(tmp_path / "a.svs"), region_slide(tmp_path / "b.svs")
    seen: list[str] = []

    def interrupt(stage: str, done: int, _: int) -> None:
        seen.append(stage)
        if "publishing" in seen and (stage, done) == ("segmenting", 3):
            raise KeyboardInterrupt

    with pytest.raises(Cancelled, match=r"^b\.svs: interrupted.*; run the same command again"):
        run_batch(
            [SlideJob(a), SlideJob(b)], tmp_path / "out", here(color_predictor()), lambda _: interrupt, lambda _: None
        )
    assert {n: r["status"] for n, r in rows_of(tmp_path / "out").items()} == {"a": "done"}
    again = run([SlideJob(a), SlideJob(b)], tmp_path / "out")
    assert [r.status for r in again] == ["skipped", "done"]
    assert again[1].resumed_blocks >= 3
    assert {n: r["status"] for n, r in rows_of(tmp_path / "out").items()} == {"a": "done", "b": "done"}


def test_the_row_of_a_missing_slide_stays_until_its_line_is_deleted(tmp_path: Path) -> None:
    out, jobs = tmp_path / "out", [SlideJob(small_slide(tmp_path / "a.svs"))]
    run([SlideJob(tmp_path / "tyop.svs"), *jobs], out)
    run(jobs, out)
    assert rows_of(out)["tyop"]["status"] == "failed"
    table = out / "summary.csv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    table.write_text("".join(line for line in lines if not line.startswith("tyop,")), encoding="utf-8")
    run(jobs, out)
    assert list(rows_of(out)) == ["a"]
    assert "tyop" not in (out / "index.html").read_text(encoding="utf-8")


def test_a_foreign_summary_does_not_stop_the_slides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.csv").write_text("my;own;table\n1;2;3\n", encoding="utf-8")
    assert [r.status for r in run([SlideJob(small_slide(tmp_path / "a.svs"))], tmp_path / "out")] == ["done"]
    assert "summary.csv: was not written by wsi-segment" in caplog.text
    assert (tmp_path / "out" / "summary.csv").read_text(encoding="utf-8") == "my;own;table\n1;2;3\n"


def test_an_output_that_cannot_be_made_is_one_clear_error_for_each_slide(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    results = run([SlideJob(small_slide(tmp_path / "a.svs"))], tmp_path / "file" / "out")
    assert results[0].status == "failed"
    assert results[0].error.startswith("a.svs: cannot write ")
    assert "Not a directory" in results[0].error


def test_a_clash_of_many_slides_names_a_few_of_them() -> None:
    jobs = [SlideJob(Path(f"case-{number}/slide.svs")) for number in range(1000)]
    said = name_clashes(jobs)
    assert len(said) == 1000
    assert said[jobs[0].path].startswith(
        "case-0/slide.svs: its result would have the same name as that of case-1/slide.svs, case-2/slide.svs, "
        "case-3/slide.svs and 996 more; "
    )
