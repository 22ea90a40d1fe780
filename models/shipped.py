"""The digests of the shipped model bundles. `python -m tests.shipped_models` writes this file."""

from __future__ import annotations

SHIPPED_DIGESTS = {
    "colon-gland": "13caa55df49f0eecb06d60d7e89a31907a82bbaa0ab154faca1dc2584a8a7ea9",
    "colorectal-tissue": "e59474c6524c5e627e9173efe2de236628bc01d2a31188398b9599d9fcb2f940",
}
"""Name of a shipped bundle -> SHA-256 of its model.json, which contains the digests of the weights."""
