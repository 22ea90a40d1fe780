"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "dc515f517d427b5aa550d6d15f74ca062d189409956d56f018196e8017856345",
    "colorectal-tissue": "067217db541bc2407a4e9d864ae13c8953da9f1a8fe4c74c9fb40b580cf80969",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
