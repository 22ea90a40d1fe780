"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "13701490c4f54801ce0604bc0e1da79f5b3d74a77807b8caa9a4748523f98f3d",
    "colorectal-tissue": "a87a6f9cc0c2a15265cc996e437127e368dc10fa60eedaa34f167a85361d8075",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
