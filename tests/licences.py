"""Lists the licences of every dependency, as its own metadata state them, in docs/licences.md.

    python -m tests.licences

What is installed is read, so run it in the environment that the README's second command makes.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "licences.md"

PURPOSES = ("run", "openvino", "train", "test")
"""What a dependency is for: every run, or an extra of pyproject.toml. The first one counts."""

COPYLEFT = re.compile(r"GPL|MPL|Mozilla|EUPL|CDDL|Eclipse", re.IGNORECASE)

_LONGEST = 60
"""Characters: what is longer is the licence's text, not its name."""

_HEAD = """# Licences of the dependencies

Written by `python -m tests.licences` from the packages' own metadata, for Linux and Python 3.11; versions are in
`constraints.txt`. **Copyleft** marks licences that ask something of whoever passes on changes to the package itself
(GPL, LGPL, MPL); none of these packages is part of our wheel, which holds our own files only. "For" is what needs it:
every run, an extra (`openvino`, `train`), or the tests. torch's CUDA packages (nvidia-*, triton) come with torch on
Linux, under licences of their own, and are not listed.

| package | licence | copyleft | for |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Licence:
    """A dependency, what its metadata say of its licence, and what it is for."""

    package: str
    version: str
    text: str
    purpose: str

    @property
    def copyleft(self) -> bool:
        """Whether the licence, or one of those to choose from, is a copyleft one."""
        return COPYLEFT.search(self.text) is not None

    def row(self) -> str:
        """Its line of the table."""
        return f"| {self.package} | {self.text} | {'copyleft' if self.copyleft else ''} | {self.purpose} |"


def licences() -> list[Licence]:
    """Every installed dependency of the package and of its extras, by name."""
    found: dict[str, Licence] = {}
    for purpose in PURPOSES:
        left = [("wsi-segment", frozenset() if purpose == "run" else frozenset({purpose}))]
        seen = set(left)
        while left:
            name, extras = left.pop()
            try:
                package = distribution(name)
            except PackageNotFoundError:
                continue  # of another platform, or torch's
            if not re.match(r"wsi-segment$|nvidia-|triton$", normal(name)):
                found.setdefault(normal(name), Licence(normal(name), package.version, stated(package), purpose))
            news = {one for one in required(package, extras) if one not in seen}
            seen |= news
            left += news
    return [found[name] for name in sorted(found)]


def required(package: Distribution, extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """What a package with these extras needs on this machine: names and their extras."""
    needed = set()
    for text in package.requires or []:
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            needed.add((normal(one.name), frozenset(one.extras)))
    return needed


def stated(package: Distribution) -> str:
    """What the metadata say: the expression, else the classifiers or the free text, else the licence file's head."""

    def values(field: str) -> list[str]:
        return package.metadata.get_all(field) or []

    if expression := values("License-Expression"):
        return expression[0]
    classifiers = [c.rpartition(" :: ")[2] for c in values("Classifier") if c.startswith("License ::")]
    text = "".join(values("License")).strip()
    if text and len(text) <= _LONGEST and "\n" not in text and text != "UNKNOWN" and len(classifiers) < 2:
        return text
    if classifiers:
        return ", ".join(classifiers)
    files = [file for file in package.files or [] if file.name.upper().startswith("LICEN")]
    lines = (line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return next((line[:_LONGEST] for line in lines if line), "not stated")


def normal(name: str) -> str:
    """A package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Write the document; tells what is copyleft."""
    rows = licences()
    DOCUMENT.write_text(_HEAD + "\n".join(one.row() for one in rows) + "\n", encoding="utf-8")
    for one in rows:
        if one.copyleft:
            print(f"{one.package} ({one.purpose}): {one.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
