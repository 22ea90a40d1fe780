"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "65d886b8b0265ed10933fb99918ffffed49e36106ffb965b0848f91a490bcc61",
    "colorectal-tissue": "1c0dfbc86eee1f1dbb69fefcf6308cd4357796db87cc6adb59ac036dbbf1a946",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
