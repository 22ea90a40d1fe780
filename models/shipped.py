"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "86bc0b651640c517fdc9963b4b59ae3ccb44ac0bf2d0b2557fb5b38811e7720f",
    "colorectal-tissue": "7555d97e4c8a2a92ee731f92b45a0f868307ca22d3a29ea263f5cb4d00e3b455",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
