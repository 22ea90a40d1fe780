"""Find the images of a data set that its patterns miss: only the first pattern of a split that finds a file counts."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.training.dataset_sections import Location
from pipeline.training.image_files import matching_files, spellings


def files_in_any_case(root: Path, locations: Sequence[Location], skip: Container[str] = ()) -> list[Path]:
    """Return the files that a pattern finds if the letter case of the ending does not count. See `matching_files`."""
    return list(dict.fromkeys(file for one in locations for file in matching_files(root, _any_case(one.image), skip)))


def missed_images(
    root: Path, locations: Sequence[Location], splits: Iterable[Sequence[Location]], used: Mapping[str, Path]
) -> tuple[list[Path], str | None]:
    """Return the images, sorted, that another pattern of a split finds, or that only the case of their ending hides.

    `locations` are those of the split, `splits` those of all splits, and `used` the images of the split by name. Their
    copies in other formats are not missed, and neither are masks and what another split uses. The second value is a
    pattern that finds exactly the images in use and the missed ones, or None.
    """
    found = files_in_any_case(root, locations, used)
    if not found:
        return [], None
    others = _masks(root, locations, [*used.values(), *found])
    for elsewhere in splits:
        if elsewhere != locations:
            files = next(filter(None, (matching_files(root, one.image) for one in elsewhere)), [])
            others |= {*files, *_masks(root, elsewhere, files)}
    missed = {file.stem: file for file in found if file not in others}
    if not missed:
        return [], None
    wanted, first = sorted({*used, *missed}), locations[0].image
    folder, slash, _ = first.rpartition("/")
    for pattern in (f"{folder}{slash}*", _any_case(first)):
        files = matching_files(root, pattern)
        if sorted(file.stem for file in files) == wanted and others.isdisjoint(files):
            return sorted(missed.values()), pattern
    return sorted(missed.values()), None


def _masks(root: Path, locations: Sequence[Location], files: Iterable[Path]) -> set[Path]:
    """Return the paths of the masks of these images in every location. No image is its own mask."""
    patterns = [one.mask for one in locations if one.mask is not None]
    return {
        mask
        for file in files
        for pattern in patterns
        for form in spellings(pattern.replace("{name}", file.stem))
        if (mask := root / form) != file
    }


def _any_case(pattern: str) -> str:
    """Return a pattern that also finds files whose ending has other letter case: `*.[jJ][pP][gG]` for `*.jpg`."""
    found = re.fullmatch(r"(.*\.)([A-Za-z0-9]+)", pattern)
    if found is None:
        return pattern
    return found[1] + "".join(f"[{one.lower()}{one.upper()}]" if one.isalpha() else one for one in found[2])
