"""Networks for patches of H&E tissue: classifier, class activation maps, segmenter, gate and model bundles.

Importing this package imports neither torch nor timm; the modules below do when they need them.
"""
