"""Prefect flows over the pipeline; no algorithms."""

from flows.settings import apply_defaults

# Prefect reads its environment when it is imported, which the flows do next.
apply_defaults()
