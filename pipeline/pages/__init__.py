"""Pages that show results and need no server: all slides, and each slide."""
