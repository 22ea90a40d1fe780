"""Prefect flows over the pipeline; no algorithms."""
