"""Where slides are segmented."""
