"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "dc515f517d427b5aa550d6d15f74ca062d189409956d56f018196e8017856345",
    "colorectal-tissue": "4ea3ed71eea5253c42851e61681032867e382c95f9928ca5db1eee5e1e50fcfd",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
