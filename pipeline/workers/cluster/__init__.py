"""Slides segmented by the processes of a dask.distributed cluster, or by processes of our own."""
