"""Results in other programs and in the browser."""
