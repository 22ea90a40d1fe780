"""Count words that plain English avoids: `python -m tests.prose` prints the figures and the lines.

Conditions take "if" or "when"; "where" is for places. "x is not a manifest" replaces "x is no manifest". The prose of
a Python file is its comments, its strings and the names of its tests; that of a document is all of it but code blocks.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.repository import REPOSITORY

FOLDERS = ("wsi", "models", "pipeline", "flows", "deploy", "docs", "tests")

WHERE = re.compile(r"\bwhere\b", re.IGNORECASE)
IF_OR_WHEN = re.compile(r"\b(?:if|when)\b", re.IGNORECASE)
IS_NO = re.compile(r"\b(?:is|are|was|were) no (?!longer\b|more\b|fewer\b|less\b)[a-z]+", re.IGNORECASE)


@dataclass(frozen=True)
class Line:
    """A line of prose. A string of several lines is one line per line of its text."""

    path: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.text.strip()}"


@dataclass(frozen=True)
class Figures:
    """How often the patterns occur in some prose."""

    where: tuple[Line, ...]
    is_no: tuple[Line, ...]
    """Each line as often as the pattern occurs in it."""
    conditions: int
    """Occurrences of "if" and "when"."""

    @property
    def where_share(self) -> float:
        """The share of "where" among "where", "if" and "when"."""
        return len(self.where) / max(1, len(self.where) + self.conditions)


def python_prose(path: str, source: str) -> Iterator[Line]:
    """Yield the comments, strings and test names of a module. f-strings count without their expressions."""
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for offset, text in enumerate(node.value.split("\n")):
                yield Line(path, node.lineno + offset, text)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield Line(path, node.lineno, node.name.replace("_", " "))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Line(path, token.start[0], token.string)


def document_prose(path: str, text: str) -> Iterator[Line]:
    """Yield the lines of a Markdown document outside fenced and indented code blocks."""
    fenced = False
    for number, line in enumerate(text.split("\n"), start=1):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        if not fenced and not fence and not line.startswith("    "):
            yield Line(path, number, line)


def project_prose(root: Path = REPOSITORY) -> Iterator[Line]:
    """Yield the prose of all Python files and Markdown documents of a project, sorted by path."""
    paths = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in (".py", ".md")]
    for path in sorted([*paths, *root.glob("*.md")]):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        yield from (python_prose if path.suffix == ".py" else document_prose)(name, text)


def figures(lines: Iterable[Line]) -> Figures:
    """Count the patterns in lines of prose."""
    where: list[Line] = []
    is_no: list[Line] = []
    conditions = 0
    for line in lines:
        where += [line] * len(WHERE.findall(line.text))
        is_no += [line] * len(IS_NO.findall(line.text))
        conditions += len(IF_OR_WHEN.findall(line.text))
    return Figures(tuple(where), tuple(is_no), conditions)


def listing(lines: Iterable[Line]) -> str:
    """Return each line once, one below the other."""
    return "\n".join(dict.fromkeys(map(str, lines)))


def main() -> None:
    """Print every occurrence, and the figures that tests/test_layout.py limits."""
    found = figures(project_prose())
    print(listing(found.where))
    print(listing(found.is_no))
    print(f'"where": {len(found.where)}, "if" and "when": {found.conditions}, share {found.where_share:.4f}')
    print(f'"is no" and its like: {len(found.is_no)}')


if __name__ == "__main__":
    main()
