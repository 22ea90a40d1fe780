"""From patch labels to a model bundle, and what the bundle is worth: data sets, stages of the training, evaluation."""
