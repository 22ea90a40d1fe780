"""Links, paths and modules that the documents name exist."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repository import REPOSITORY

DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "deploy").rglob("*.md")]
)
NAMES = [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS]
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


def test_a_broken_link_path_and_module_are_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "# A page\n[a](#a-page) [b](b.md) [c](#c) `tests/none.py` `tests/test_docs.py` python -m tests.none\n"
    )
    assert broken(document) == ["b.md#", "#c", "tests/none.py", "tests.none"]
