"""Makes a bundle of more classes out of one: for measurements whose size grows with the number of classes.

    python -m tests.bench.more_classes -o five [-m MODEL] [--classes 5]

The classes are copies of the bundle's own in turn, the later ones a little less probable: what they cost is real, what
they say is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle, load_networks, load_statistics, save_bundle, segmenter_of
from models.classifier import Classifier
from models.tissue_class import TissueClass
from pipeline.training.palettes import CLASS_COLORS


def with_more_classes(bundle: Bundle, count: int, folder: Path) -> Bundle:
    """Write the new bundle into `folder` and return it."""
    card = bundle.card
    classes = tuple(TissueClass(f"class-{k + 1}", CLASS_COLORS[k]) for k in range(count))
    thresholds = tuple(card.gate_thresholds[k % len(card.classes)] for k in range(count))
    classifier, segmenter = load_networks(bundle)
    return save_bundle(
        folder,
        card.model_copy(update={"name": folder.name, "classes": classes, "gate_thresholds": thresholds}),
        _widened(classifier, Classifier(card.classifier.backbone, card.classifier.head, count, card.classifier.depth)),
        _widened(segmenter, segmenter_of(card.segmenter, count)),
        load_statistics(bundle),
    )


def _widened(network: nn.Module, wider: nn.Module) -> nn.Module:
    """Fill the wider network: values per class come from the old classes in turn."""
    old = network.state_dict()
    new: dict[str, Tensor] = {}
    for name, empty in wider.state_dict().items():
        value = old[name]
        if value.shape != empty.shape:
            turn_K = torch.arange(len(empty)) % len(value)
            value = value[turn_K]
            if value.ndim == 1:
                value = value - 0.1 * (torch.arange(len(empty)) // len(old[name]))
        new[name] = value
    wider.load_state_dict(new)
    return wider.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the bundle and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-m", "--model", default=DEFAULT_BUNDLE, help="name or folder of a bundle")
    parser.add_argument("--classes", type=int, default=5)
    options = parser.parse_args(arguments)
    print(with_more_classes(load_bundle(options.model), options.classes, options.output).path)


if __name__ == "__main__":
    main()
