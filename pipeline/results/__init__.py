"""The results folder: what a run leaves there, and how it gets there."""
