"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "86bc0b651640c517fdc9963b4b59ae3ccb44ac0bf2d0b2557fb5b38811e7720f",
    "colorectal-tissue": "6df7090550da527c67f54f62132e0d591aff9eb6bd5587c2980368a0a4d67c2a",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
