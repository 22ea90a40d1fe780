"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "c4e0ac7ab68187c1e4f0600ebae222998d87e3fe0fd7ed0558c9a27b0c32a767",
    "colorectal-tissue": "a87a6f9cc0c2a15265cc996e437127e368dc10fa60eedaa34f167a85361d8075",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
