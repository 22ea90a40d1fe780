"""What the project is made of: every package pinned, with its hashes, and its license known."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.licenses import COPYLEFT, DOCUMENT, License, licenses
from tests.repository import REPOSITORY

COPYLEFT_IN_RUNS = {
    "certifi": "MPL: unchanged",
    "openslide-bin": "LGPL: a shared library of its own, replaceable",
    "openslide-python": "LGPL: unchanged",
    "orjson": "MPL: unchanged",
    "pathspec": "MPL: unchanged",
    "text-unidecode": "Artistic License or GPL: the first is taken",
    "tqdm": "MPL: unchanged",
}
"""Packages under copyleft licenses that runs need, and why that is allowed."""


def pins(name: str) -> list[str]:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return [normal(pin) for pin in re.findall(r"^([\w.-]+==[\w.]+)", text, re.MULTILINE)]


def normal(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


def test_every_pinned_version_has_hashes_and_no_other_has() -> None:
    hashed, pinned = pins("constraints-hashes.txt"), pins("constraints.txt")
    assert len(hashed) == len(set(hashed))
    assert set(hashed) == set(pinned), "constraints.txt has changed: run the command on top of constraints-hashes.txt"


def test_hashes_are_whole_and_each_package_has_one() -> None:
    text = (REPOSITORY / "constraints-hashes.txt").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[\w])", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(pins("constraints.txt"))
    for block in blocks:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", block), block[:80]


def test_the_command_that_makes_the_hashes_stands_above_them() -> None:
    head = (REPOSITORY / "constraints-hashes.txt").read_text(encoding="utf-8").splitlines()[1]
    assert head.startswith("#    uv pip compile --no-deps --generate-hashes ")
    assert head.endswith(" constraints.txt -o constraints-hashes.txt")


def pinned_licenses() -> list[License]:
    """Of packages that are installed in the version that constraints.txt has."""
    pinned = set(pins("constraints.txt"))
    return [one for one in licenses() if f"{one.package}=={one.version.partition('+')[0]}" in pinned]


def test_the_document_has_the_license_of_every_dependency() -> None:
    found = pinned_licenses()
    if not found:
        pytest.skip("no installed package has the version that constraints.txt pins")
    rows = set(DOCUMENT.read_text(encoding="utf-8").splitlines())
    missing = [one.row() for one in found if one.row() not in rows]
    assert not missing, "run python -m tests.licenses"


def test_copyleft_licenses_are_those_that_somebody_has_looked_at() -> None:
    row = re.compile(r"^\| ([\w.-]+) \| (.*) \| (copyleft|) \| (run|train|test) \|$", re.MULTILINE)
    table = row.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert len(table) > 100
    assert {name for name, _, mark, purpose in table if mark and purpose != "test"} == set(COPYLEFT_IN_RUNS)
    assert all(bool(mark) == bool(COPYLEFT.search(text)) for _, text, mark, _ in table)
    assert not [name for name, text, _, _ in table if text in ("", "not stated")]


def test_the_license_of_the_package_covers_the_library_that_it_contains() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0 AND BSD-3-Clause"
    contained = sorted((REPOSITORY / "pipeline").rglob("LICENSE*"))
    assert [path.parent.name for path in contained] == ["openseadragon"]
    files = ["LICENSE", *(path.relative_to(REPOSITORY).as_posix() for path in contained)]
    assert project["license-files"] == files


def test_security_md_gives_the_command_that_makes_the_hashes() -> None:
    head = (REPOSITORY / "constraints-hashes.txt").read_text(encoding="utf-8").splitlines()[1]
    assert f"`{head.removeprefix('#    ')}`" in (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
