"""Slides and their geometry: readers, tissue, tile grid; no torch, no Dask, no Prefect."""
