"""The results folder: what a run writes into it, and how results become visible."""
