"""The classifier of a bundle at the stride of its training, which is finer than that of a run."""

from __future__ import annotations

from models.bundle import Bundle, load_networks
from models.classifier import Classifier


def training_classifier(bundle: Bundle) -> Classifier:
    """Return the classifier of a bundle at stride 8, in eval mode."""
    card = bundle.card
    classifier = Classifier(card.classifier.backbone, card.classifier.head, len(card.classes), card.classifier.depth)
    classifier.load_state_dict(load_networks(bundle)[0].state_dict())
    return classifier.eval()
