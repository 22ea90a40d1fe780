"""DICOM headers that the tests write themselves, without pixels."""

from __future__ import annotations

import struct
from pathlib import Path

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"


def element(tag: tuple[int, int], representation: str, value: bytes, *, explicit: bool = True) -> bytes:
    """Return one element in little-endian; sequences and other long forms have a length of four bytes."""
    value += b" " * (len(value) % 2)
    head = struct.pack("<HH", *tag)
    if not explicit:
        return head + struct.pack("<I", len(value)) + value
    if representation in ("SQ", "OB", "UN"):
        return head + representation.encode() + struct.pack("<2xI", len(value)) + value
    return head + representation.encode() + struct.pack("<H", len(value)) + value


def open_sequence(tag: tuple[int, int], content: bytes, representation: str = "SQ") -> bytes:
    """Return a sequence of one item, both without a length, as scanners write them."""
    undefined = struct.pack("<I", 0xFFFFFFFF)
    item = struct.pack("<HH", 0xFFFE, 0xE000) + undefined + content + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    head = struct.pack("<HH", *tag) + representation.encode() + b"\0\0"
    return head + undefined + item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def write_instance(
    path: Path,
    series: str,
    *,
    columns: int = 1024,
    kind: str = "VOLUME",
    number: str = "1",
    syntax: str = EXPLICIT,
    padding: int = 0,
) -> Path:
    """Write the header of a DICOM slide file: `kind` is VOLUME, LABEL or OVERVIEW. Return the path."""
    explicit = syntax != IMPLICIT
    content = b"\0" * 128 + b"DICM" + element((0x0002, 0x0010), "UI", syntax.encode())
    content += element((0x0008, 0x0008), "CS", f"ORIGINAL\\PRIMARY\\{kind}\\NONE".encode(), explicit=explicit)
    if explicit:
        # A nested series of another slide must not count.
        nested = open_sequence((0x0008, 0x1115), element((0x0020, 0x000E), "UI", b"9.9.9"))
        content += open_sequence((0x0008, 0x1110), nested)
        # Archives that do not know a private sequence write it as "UN", whose items stay implicit.
        private = element((0x0009, 0x1001), "LO", b"PRIVATE TEXT", explicit=False)
        content += open_sequence((0x0009, 0x1005), private, "UN")
    if padding:
        content += element((0x0009, 0x1010), "OB", bytes(padding), explicit=explicit)
    content += element((0x0010, 0x0010), "PN", b"DOE^JANE", explicit=explicit)
    content += element((0x0020, 0x000E), "UI", series.encode(), explicit=explicit)
    content += element((0x0020, 0x0011), "IS", number.encode(), explicit=explicit)
    content += element((0x0048, 0x0006), "UL", struct.pack("<I", columns), explicit=explicit)
    content += element((0x0048, 0x0007), "UL", struct.pack("<I", columns), explicit=explicit)
    path.write_bytes(content)
    return path
