"""The joined work: from a slide and a model bundle to stores, polygons and reports."""
