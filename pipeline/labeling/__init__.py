"""From slides to patch labels: what people said about patches, the page that asks them, and the data set."""
