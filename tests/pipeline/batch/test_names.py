from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch.collect import collect_jobs
from pipeline.batch.names import name_clashes, named_jobs
from pipeline.errors import ConfigError
from pipeline.results.record import write_run
from pipeline.workers.base import SlideJob
from tests.pipeline.ignored_case import ignore_case
from tests.pipeline.runs import make_run


def touched(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [root / name for name in names]


def names(jobs: list[SlideJob], output: Path) -> list[str]:
    """Return the names of the results, which must not clash."""
    named = named_jobs(jobs, output)
    assert not name_clashes(named)
    return [job.result_name for job in named]


def finished(output: Path, name: str, slide: Path) -> None:
    folder = output / name
    folder.mkdir(parents=True)
    run = make_run(folder.name)
    write_run(folder, run.model_copy(update={"slide": run.slide.model_copy(update={"path": slide.absolute()})}))


def test_only_slides_with_the_same_name_are_named_by_their_places(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    touched(slides, "a.svs", "case1/a.svs", "case1/deep/A.ndpi", "case2/b.svs")
    assert names(collect_jobs([slides], recursive=True), tmp_path / "out") == ["a", "case1/a", "case1/deep/A", "b"]


def test_slides_of_several_folders_are_told_apart_by_the_folders(tmp_path: Path) -> None:
    paths = touched(tmp_path, "x/1/a.svs", "x/2/a.svs")
    by_folder = collect_jobs([path.parent for path in paths])
    assert names(by_folder, tmp_path / "out") == names(collect_jobs(paths), tmp_path / "out") == ["1/a", "2/a"]


@pytest.mark.full
def test_names_that_differ_in_their_unicode_form_count_as_equal(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Ä") for form in ("NFC", "NFD"))
    paths = touched(tmp_path, f"x/1/{composed}.svs", f"x/2/{decomposed.lower()}.svs")
    assert names(collect_jobs(paths), tmp_path / "out") == [f"1/{composed}", f"2/{decomposed.lower()}"]
    clashes = name_clashes([SlideJob(paths[0]), SlideJob(paths[1]), SlideJob(Path("b.svs"), name=f"{decomposed}/b")])
    assert [str(path) for path in clashes] == [str(paths[0]), str(paths[1]), "b.svs"]


@pytest.mark.full
def test_ids_that_differ_in_their_unicode_form_are_refused(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "ä") for form in ("NFC", "NFD"))
    touched(tmp_path, "1.svs", "2.svs")
    (tmp_path / "list.csv").write_text(f"slide,id\n1.svs,{composed}\n2.svs,{decomposed}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"list\.csv, line 3: the id .* is also in line 2"):
        collect_jobs([tmp_path / "list.csv"])
    for number, id_ in enumerate((composed, decomposed), start=1):
        (tmp_path / f"list{number}.csv").write_text(f"slide,id\n{number}.svs,{id_}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"2\.svs: its id .* is also that of .*1\.svs"):
        collect_jobs([tmp_path / "list1.csv", tmp_path / "list2.csv"])


@pytest.mark.full
def test_a_slide_in_two_spellings_is_listed_twice_if_case_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = touched(tmp_path, "s/slide.svs", "s/SLIDE.svs")
    lists = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for path, cell in zip(lists, ("0.25", "0.5"), strict=True):
        path.write_text(f"slide,mpp\ns/slide.svs,0.25\ns/SLIDE.svs,{cell}\n")
    assert [job.path for job in collect_jobs(paths)] == paths
    ignore_case(monkeypatch)
    assert [job.path for job in collect_jobs(paths)] == paths[:1]
    assert [job.path for job in collect_jobs(lists[:1])] == paths[:1]
    with pytest.raises(ConfigError, match=r"two\.csv, line 3: s/SLIDE\.svs is also in line 2, with another mpp"):
        collect_jobs(lists[1:])


@pytest.mark.full
def test_a_result_keeps_its_name_if_case_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides, output = tmp_path / "slides", tmp_path / "out"
    paths = touched(slides, "case1/a.svs", "CASE1/A.svs", "case2/a.svs", "case2/b.svs")
    finished(output, "a", paths[0])
    finished(output, "A", paths[0])
    finished(output, "study/b", paths[3])
    for folder in ("study/B", "STUDY"):
        (output / folder).mkdir()
    ignore_case(monkeypatch)
    assert names([SlideJob(paths[1], place="CASE1/A"), SlideJob(paths[2], place="case2/a")], output) == [
        "a", "case2/a"
    ]  # fmt: skip
    assert names([SlideJob(paths[1]), SlideJob(paths[3], name="STUDY/B")], output) == ["a", "study/b"]


@pytest.mark.full
def test_a_link_to_a_result_does_not_rename_the_result(tmp_path: Path) -> None:
    slide, output = tmp_path / "a.svs", tmp_path / "out"
    finished(output, "a", slide)
    (output / "A").symlink_to(output / "a")
    assert names([SlideJob(slide)], output) == ["a"]
    assert names([SlideJob(tmp_path / "A.svs")], output) == ["A"]


@pytest.mark.full
def test_paths_with_two_dots_are_named_by_the_folders_that_they_lead_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched(tmp_path, "project/d/slide.svs", "s1/slide.svs")
    monkeypatch.chdir(tmp_path / "project")
    jobs = collect_jobs([Path("d/slide.svs"), Path("../s1/slide.svs")])
    assert names(jobs, tmp_path / "out") == ["project/d/slide", "s1/slide"]


def test_an_output_that_cannot_be_examined_contains_no_results(tmp_path: Path) -> None:
    paths = touched(tmp_path, "x/1/a.svs", "x/2/a.svs")
    assert names(collect_jobs(paths), tmp_path / ("n" * 300)) == ["1/a", "2/a"]


def test_a_new_slide_does_not_move_the_result_of_another(tmp_path: Path) -> None:
    slides, output = tmp_path / "slides", tmp_path / "out"
    first, _ = touched(slides, "case1/a.svs", "case2/a.svs")
    finished(output, "a", first)
    assert names(collect_jobs([slides], recursive=True), output) == ["a", "case2/a"]


def test_a_slide_keeps_its_place_when_the_other_one_is_gone(tmp_path: Path) -> None:
    slides, output = tmp_path / "slides", tmp_path / "out"
    (first,) = touched(slides, "case1/a.svs")
    finished(output, "case1/a", first)
    jobs = collect_jobs([slides], recursive=True)
    assert names(jobs, output) == ["case1/a"]
    assert names(jobs, tmp_path / "other") == ["a"]


@pytest.mark.parametrize("spelled", ["x/../slides", "link"])
def test_a_result_keeps_its_name_if_the_folder_of_its_slide_is_spelled_differently(
    tmp_path: Path, spelled: str
) -> None:
    slides, output = tmp_path / "slides", tmp_path / "out"
    touched(slides, "case1/a.svs", "case2/a.svs")
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(slides)
    finished(output, "a", tmp_path / spelled / "case1" / "a.svs")
    assert names(collect_jobs([slides], recursive=True), output) == ["a", "case2/a"]


def test_an_id_is_never_changed_and_another_slide_with_that_name_moves(tmp_path: Path) -> None:
    touched(tmp_path, "case1/a.svs", "case2/b.svs")
    (tmp_path / "list.csv").write_text("slide,id\ncase1/a.svs,study/7\ncase2/b.svs,a\n")
    assert names(collect_jobs([tmp_path / "list.csv"]), tmp_path / "out") == ["study/7", "a"]
    moved = [SlideJob(Path("x/a.svs"), place="x/a"), SlideJob(Path("y/b.svs"), name="a")]
    assert names(moved, tmp_path / "out") == ["x/a", "a"]


def test_the_same_id_in_two_manifests_is_refused(tmp_path: Path) -> None:
    touched(tmp_path, "1/a.svs", "2/a.svs")
    for name in ("x", "case/x"):
        lists = [tmp_path / "1" / "list.csv", tmp_path / "2" / "list.csv"]
        for path, id_ in zip(lists, (name, name.upper()), strict=True):
            path.write_text(f"slide,id\na.svs,{id_}\n")
        with pytest.raises(ConfigError) as caught:
            collect_jobs(lists)
        assert str(caught.value) == (
            f"{tmp_path / '2' / 'a.svs'}: its id {name.upper()!r} is also that of {tmp_path / '1' / 'a.svs'}; ids name "
            f"the results, so each slide needs its own"
        )
        assert [job.result_name for job in collect_jobs([lists[0], lists[0]])] == [name]


def test_an_id_is_not_replaced_by_the_name_of_an_earlier_result(tmp_path: Path) -> None:
    (slide,) = touched(tmp_path, "case/a.svs")
    finished(tmp_path / "out", "case/a", slide)
    (tmp_path / "list.csv").write_text("slide,id\ncase/a.svs,x\n")
    assert names(collect_jobs([tmp_path / "list.csv"]), tmp_path / "out") == ["x"]


def test_a_result_inside_another_result_is_refused(tmp_path: Path) -> None:
    jobs = [SlideJob(Path("case1.svs")), SlideJob(Path("case1/a.svs"), name="case1/a")]
    clashes = name_clashes(named_jobs(jobs, tmp_path))
    assert list(clashes) == [Path("case1/a.svs")]
    assert "its result case1/a would lie inside the result of case1.svs" in clashes[Path("case1/a.svs")]


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a//b", "a/.b", "qupath/x", "Summary.csv", ".", "a\\b", "a\tb", "x/left-out"]
)
def test_an_id_that_cannot_be_a_result_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.csv").write_text(f"slide,id\na.svs,{name}\n")
    with pytest.raises(ConfigError, match=r"list\.csv, line 2: id is .*; it must be a name or a path with slashes"):
        collect_jobs([tmp_path / "list.csv"])


@pytest.mark.parametrize("name", ["case\\a.svs", "Left-Out.svs"])
def test_a_slide_whose_result_could_not_have_its_name_is_refused(tmp_path: Path, name: str) -> None:
    (slide,) = touched(tmp_path, name)
    said = name_clashes(collect_jobs([slide]))[slide]
    assert said == (
        f"{slide}: results are named after slides, and '{slide.stem}' cannot be the name of a result (index.html, "
        f"qupath, summary.csv, left-out, and names that start with a dot or contain a backslash are reserved); rename "
        f"the slide, or name its result in the column 'id' of a manifest"
    )


def test_a_folder_of_results_can_be_named_like_the_left_out_areas(tmp_path: Path) -> None:
    assert not name_clashes([SlideJob(tmp_path / "a.svs", name="left-out/a")])


def test_names_do_not_depend_on_the_order_of_the_slides(tmp_path: Path) -> None:
    touched(tmp_path / "s", "1/a.svs", "2/a.svs", "3/b.svs")
    jobs = collect_jobs([tmp_path / "s"], recursive=True)
    assert names(jobs[::-1], tmp_path / "out")[::-1] == names(jobs, tmp_path / "out") == ["1/a", "2/a", "b"]
    assert replace(jobs[0], name="1/a") == named_jobs(jobs, tmp_path / "out")[0]


@pytest.mark.full
def test_no_folders_of_a_new_output_are_listed_for_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = collect_jobs(touched(tmp_path, *(f"x/{number}/a.svs" for number in range(3))))
    output, listed, iterdir = tmp_path / "out", list[Path](), Path.iterdir

    def counted(folder: Path) -> Iterator[Path]:
        listed.append(folder)
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", counted)
    assert names(jobs, output) == ["0/a", "1/a", "2/a"]
    assert listed == [output]
