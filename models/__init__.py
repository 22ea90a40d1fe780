"""Networks for patches of H&E tissue: classifier, class activation maps, segmenter, gate and model bundles.

Importing this package does not import torch or timm. Its modules import them when needed.
"""
