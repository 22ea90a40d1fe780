"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "9f719ed8bcabb2ab8a9198bf10068a1b4719c489e125990c61cc7539ff44dcb7",
    "colorectal-tissue": "3ea5ed7d7e0a4a82b618e84f93eb6fdfa01a08e704aff61225f2036472fa1f82",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
