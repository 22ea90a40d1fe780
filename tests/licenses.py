"""List the licenses of all dependencies, as their own metadata state them, in docs/licenses.md.

    python -m tests.licenses

The script reads the installed packages, so run it in the environment that the README's second command makes.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

from tests.repository import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "licenses.md"

PURPOSES = ("run", "train", "test")
"""What needs a dependency: every run, or an extra of pyproject.toml. The first one counts."""

COPYLEFT = re.compile(r"GPL|MPL|Mozilla|EUPL|CDDL|Eclipse", re.IGNORECASE)

_LONGEST = 60
"""Characters; a longer entry is the license's text, not its name."""

_HEAD = """# Licenses of the dependencies

To update this page, run `python -m tests.licenses`. It reads the packages' own metadata, for Linux and Python 3.11.
Versions are in `constraints.txt`.

**Copyleft** marks licenses that put conditions on passing on changes to the package itself (GPL, LGPL, MPL). None of
these packages is part of our wheel. Besides our own files, the wheel contains OpenSeadragon, under BSD-3-Clause with
its license text. **For** names what needs the package: every run, the extra `train`, or the tests. torch's CUDA
packages (nvidia-*, triton) come with torch on Linux under their own licenses and are not listed.

| package | license | copyleft | for |
|---|---|---|---|
"""


@dataclass(frozen=True)
class License:
    """A dependency, its license as its metadata state it, and what needs it."""

    package: str
    version: str
    text: str
    purpose: str

    @property
    def copyleft(self) -> bool:
        """Return whether the license, or one of several to choose from, is a copyleft license."""
        return COPYLEFT.search(self.text) is not None

    def row(self) -> str:
        """Return the package's row of the table."""
        return f"| {self.package} | {self.text} | {'copyleft' if self.copyleft else ''} | {self.purpose} |"


def licenses() -> list[License]:
    """Return the installed dependencies of the package and of its extras, sorted by name."""
    found: dict[str, License] = {}
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
                found.setdefault(normal(name), License(normal(name), package.version, stated(package), purpose))
            news = {one for one in required(package, extras) if one not in seen}
            seen |= news
            left += news
    return [found[name] for name in sorted(found)]


def required(package: Distribution, extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """Return what a package with these extras needs on this machine: names and their extras."""
    needed = set()
    for text in package.requires or []:
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            needed.add((normal(one.name), frozenset(one.extras)))
    return needed


def stated(package: Distribution) -> str:
    """Return the license expression, else the classifiers or the free text, else the head of the license file."""

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
    """Return a package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Write the document, and print the copyleft packages."""
    rows = licenses()
    DOCUMENT.write_text(_HEAD + "\n".join(one.row() for one in rows) + "\n", encoding="utf-8")
    for one in rows:
        if one.copyleft:
            print(f"{one.package} ({one.purpose}): {one.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
