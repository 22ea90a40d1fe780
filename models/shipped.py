"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "13caa55df49f0eecb06d60d7e89a31907a82bbaa0ab154faca1dc2584a8a7ea9",
    "colorectal-tissue": "a862675e56f989f96157ceeaafc30328942c54b03cc9e8251be0ab6553104d6a",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
