"""From patch labels to a model bundle: data sets, training stages and the evaluation of a bundle."""
