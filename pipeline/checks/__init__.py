"""Strict, independent checks of the files that other programs read: GeoJSON, OME-Zarr and whole results."""
