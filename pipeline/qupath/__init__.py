"""QuPath projects of results."""
