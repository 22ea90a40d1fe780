"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "98429e9f9ac2dda66edaaf49fd199ae4ff39aab29dd5b15a6c349e8468e0f775",
    "colorectal-tissue": "ac7d7bd8d0332a3acb2e2624e3b3ff50a42afd6bec24233a043752c62403cca5",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
