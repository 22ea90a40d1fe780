"""The deep-zoom page of `wsi-view`: a slide, its probabilities, classes and outlines, served to this machine only."""
