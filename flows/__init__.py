"""Prefect flows over the pipeline; no algorithms."""

from flows.settings import apply_defaults

# Prefect reads its environment at import, and the modules of this package import it.
apply_defaults()
