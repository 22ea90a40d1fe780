"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "86bc0b651640c517fdc9963b4b59ae3ccb44ac0bf2d0b2557fb5b38811e7720f",
    "colorectal-tissue": "ab3e34866359a4c61b5164bfe031f0b1fea7afa4e05ec9c5c112717a07241447",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
