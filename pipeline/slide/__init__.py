"""One slide, from file to published result."""
