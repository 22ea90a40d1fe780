"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "dbbe9538d528b460f7bd0f42bb6c0743113fe006afbae08640f3cf87516f5a88",
    "colorectal-tissue": "ac7d7bd8d0332a3acb2e2624e3b3ff50a42afd6bec24233a043752c62403cca5",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
