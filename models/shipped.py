"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "9f719ed8bcabb2ab8a9198bf10068a1b4719c489e125990c61cc7539ff44dcb7",
    "colorectal-tissue": "2df6f3830ec786ac8cb51c6b39903761ec81e5ef2cac6256650ab97838c830aa",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
