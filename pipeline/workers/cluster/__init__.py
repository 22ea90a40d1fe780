"""Slides segmented by the processes of a dask.distributed cluster, or by local processes."""
