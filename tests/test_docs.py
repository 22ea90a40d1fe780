"""Links, paths, modules and options that the documents name exist."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline.cli.evaluate import app as evaluate_app
from pipeline.cli.export import app as export_app
from pipeline.cli.familiarity import app as familiarity_app
from pipeline.cli.label import app as label_app
from pipeline.cli.segment import app as segment_app
from pipeline.cli.train import app as train_app
from pipeline.cli.view import app as view_app
from tests.repository import REPOSITORY
from wsi.readers import slide_suffixes

DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "deploy").rglob("*.md")]
)
NAMES = [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS]
PROGRAMS = {
    "wsi-segment": segment_app,
    "wsi-label": label_app,
    "wsi-train": train_app,
    "wsi-evaluate": evaluate_app,
    "wsi-view": view_app,
    "wsi-export": export_app,
    "wsi-familiarity": familiarity_app,
}
ROOMS = r"(?:wsi|models|pipeline|flows|tests|docs|deploy)"


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yield (path, anchor) of the links to files; both may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(document: Path) -> list[str]:
    """Return what a document names and the project does not have."""
    text = document.read_text(encoding="utf-8")
    found = []
    for path, anchor in links(text):
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(f"{path}#{anchor}")
    # A star or an angle bracket stands for a name that varies.
    paths = re.findall(rf"`({ROOMS}/[\w./-]+)`", text)
    found += [path for path in paths if not (REPOSITORY / path).exists()]
    modules = re.findall(rf"python -m ({ROOMS}(?:\.\w+)+)", text)
    found += [module for module in modules if importlib.util.find_spec(module) is None]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_what_a_document_names_exists(document: Path) -> None:
    assert broken(document) == []


@cache
def offered(program: str) -> set[str]:
    """Return the options of one of our commands, or of a module of `tests` and the modules of `tests` it imports."""
    if program.startswith("tests."):
        text = source(program)
        imported = re.findall(r"^from (tests[.\w]*) import", text, re.MULTILINE)
        return set(re.findall(r'"(--?[a-z][\w-]*)"', "\n".join([text, *map(source, imported)])))
    command = get_command(PROGRAMS[program])
    commands = [command, *getattr(command, "commands", {}).values()]
    return {name for one in commands for parameter in one.params for name in parameter.opts} | {"--help"}


def source(module: str) -> str:
    """Return the text of a module, or nothing if there is none."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""


# Not a path that contains the name, and not the namespace after kubectl's -n.
CALL = re.compile(
    rf"(?:(?<![\w/-])(?<!-n )|(?<=bin/)|python -m )({'|'.join(PROGRAMS)}|tests(?:\.\w+)+)(?![\w/-])([^`\n|;&#]*)"
)


def unknown_options(text: str) -> list[str]:
    """Return "program option" for each option of our programs that a text uses and the program does not have."""
    found = []
    for program, arguments in CALL.findall(text.replace("\\\n", " ")):
        options = re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments)
        once = [re.sub(r"^-([a-z])\1+$", r"-\1", option) for option in options]  # -vv
        found += [f"{program} {option}" for option in once if option not in offered(program)]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_options_that_a_document_gives_to_a_command_exist(document: Path) -> None:
    assert unknown_options(document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_a_model_that_the_reader_trained_gets_a_results_folder_of_its_own(document: Path) -> None:
    lines = [line.split() for line in document.read_text(encoding="utf-8").splitlines() if line.startswith("    wsi-")]
    own = [words for words in lines if words[0] == "wsi-segment" and any("/bundle" in word for word in words)]
    # The default folder has results of the default model, and those of another model are refused.
    assert [words for words in own if "-o" not in words] == []


def test_an_unknown_option_is_found() -> None:
    text = (
        "`wsi-segment a.svs --fast -o b` and `python -m tests.bench.load --slides 5 --none`, not `pip install --none`"
    )
    assert unknown_options(text) == ["wsi-segment --fast", "tests.bench.load --none"]


def test_a_broken_link_path_and_module_are_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "# A page\n[a](#a-page) [b](b.md) [c](#c) `tests/none.py` `tests/test_docs.py` python -m tests.none\n"
    )
    assert broken(document) == ["b.md#", "#c", "tests/none.py", "tests.none"]


PROMISES = (REPOSITORY / "docs" / "promises.md").read_text(encoding="utf-8")
TEST_NAME = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def unknown_tests(text: str) -> list[str]:
    """Return the tests that a text names as `file.py::test` and that do not exist."""
    found = []
    for file, name in TEST_NAME.findall(text):
        path = REPOSITORY / file
        if not path.exists() or not re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(f"{file}::{name}")
    return found


def test_every_promise_names_tests_that_exist() -> None:
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ") and not line.startswith("| promise |")]
    assert len(rows) > 30
    assert [row for row in rows if not TEST_NAME.search(row)] == []
    assert unknown_tests(PROMISES) == []


def test_every_module_of_attacks_holds_a_promise() -> None:
    named = {file for file, _ in TEST_NAME.findall(PROMISES)}
    modules = {f"tests/full/{path.name}" for path in (REPOSITORY / "tests" / "full").glob("test_*.py")}
    assert modules - named == set()


def test_a_promise_with_a_missing_test_is_found() -> None:
    text = "`tests/test_docs.py::test_a_promise_with_a_missing_test_is_found` `tests/test_docs.py::test_none`"
    assert unknown_tests(text) == ["tests/test_docs.py::test_none"]


def test_the_endings_of_slides_in_the_documents_are_those_of_the_readers() -> None:
    text = (REPOSITORY / "docs" / "slides.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^- The endings of slide formats.*$", text, re.MULTILINE)
    assert re.findall(r"`(.+?)`", line) == sorted(slide_suffixes())
