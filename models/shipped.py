"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "dc515f517d427b5aa550d6d15f74ca062d189409956d56f018196e8017856345",
    "colorectal-tissue": "02acb73d521e3a8928a94e65c8cf619900b995941a4bbc2826d13b7ab9716a27",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
