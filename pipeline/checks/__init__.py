"""Strict rules for what other programs read: GeoJSON, OME-Zarr, and whole results."""
