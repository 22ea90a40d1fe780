"""Files made bad: real ones with bits turned, parts cut off, moved or doubled, and numbers that nobody would write."""

from __future__ import annotations

import io
import json
import math
import random
import struct
from typing import Any

import tifffile

NUMBERS = (0, 1, 2, 255, 256, 65535, 65536, 2**24, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**9,
    10**400,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    "",
    "../x",
    "/etc/passwd",
    "CON",
    "a:b",
    "<script>alert(1)</script>",
    "\x00\n\r\u202e",
    "\ud800",
    "x" * 70_000,
    [],
    {},
    [[]],
    {"": None},
)

DEEP = 100_000
"""Brackets in one another: more than any parser that recurses can take."""

TEXTS = (b"nan", b"-inf", b"1e999", b"-1", b"\x00", b"\xff\xfe", b'"', b",,,,", b"\n\n", b"../../x", b"9" * 5000, b"[")


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with one to four changes of any kind."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        content = chance.choice(_CHANGES)(content, chance)
    return content


def mutated_tiff(content: bytes, chance: random.Random) -> bytes:
    """A TIFF file with one to three entries of its directories changed, now and then with other changes too."""
    changed = bytearray(content)
    entries = tiff_entries(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        offset, big = chance.choice(entries)
        _change_entry(changed, offset, big, chance)
    return mutated(bytes(changed), chance) if chance.random() < 0.2 else bytes(changed)


def mutated_json(content: bytes, chance: random.Random) -> bytes:
    """A JSON document with one of its values changed, or with its text changed."""
    if chance.random() < 0.3:
        return mutated(content, chance)
    if chance.random() < 0.03:
        return b"[" * DEEP + b"]" * DEEP
    document = json.loads(content)
    for _ in range(chance.choice((1, 1, 2))):
        document = _with_another_value(document, chance)
    return json.dumps(document).encode()


def tiff_entries(content: bytes) -> list[tuple[int, bool]]:
    """Offsets of the directory entries of a good TIFF file, and whether it is a BigTIFF."""
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        return [(tag.offset, tiff.is_bigtiff) for page in tiff.pages for tag in page.aspage().tags]


def _change_entry(content: bytearray, offset: int, big: bool, chance: random.Random) -> None:
    # An entry is tag, type, count, value (or the offset of the values); little endian, as tifffile writes here.
    kind, place, wide = chance.choice(
        (("<H", 0, False), ("<H", 2, False), ("count", 4, big), ("value", 12 if big else 8, big))
    )
    size = 8 if wide else 4 if kind in ("count", "value") else 2
    number = chance.choice((*NUMBERS, chance.randrange(65536), offset, len(content), len(content) - 1))
    struct.pack_into({2: "<H", 4: "<I", 8: "<Q"}[size], content, offset + place, number % 256**size)


def _with_another_value(document: Any, chance: random.Random) -> Any:
    if isinstance(document, dict) and document and chance.random() < 0.9:
        key = chance.choice(sorted(document))
        changed = dict(document)
        if chance.random() < 0.1:
            del changed[key]
        else:
            changed[key] = _with_another_value(document[key], chance)
        return changed
    if isinstance(document, list) and document and chance.random() < 0.8:
        at = chance.randrange(len(document))
        return [*document[:at], _with_another_value(document[at], chance), *document[at + 1 :]]
    return chance.choice(VALUES)


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 4, 64)) if changed else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _swap(content: bytes, chance: random.Random) -> bytes:
    a, b, c = sorted(chance.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _double(content: bytes, chance: random.Random) -> bytes:
    a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:b] + content[a:b] + content[b:]


def _drop(content: bytes, chance: random.Random) -> bytes:
    a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:a] + content[min(b, a + 4096) :]


def _zero(content: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(content) + 1), chance.choice((1, 16, 512, 4096))
    return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]


def _number(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    form = chance.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    return content[:at] + struct.pack(form, chance.choice(NUMBERS) % 256**size) + content[at + size :]


def _text(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + chance.choice(TEXTS) + content[at + chance.choice((0, 1, 8)) :]


def _head(content: bytes, chance: random.Random) -> bytes:
    """Change one of the first bytes, which hold lengths and offsets."""
    return _number(content[:64], chance) + content[64:]


_CHANGES = (_flip, _flip, _cut, _swap, _double, _drop, _zero, _number, _text, _head)
