"""How a map is stored: one writer per output."""
