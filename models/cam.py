"""Class activation maps of a `Classifier`: where in an image the classifier finds a class.

A new method is one entry in `CAMS`. Training settings, the pseudo masks and the benchmark read the table.

All functions need a classifier in eval mode. They pass at most `chunk` images through the network at once, which bounds
their memory and does not change a result. Maps have the resolution of the feature map. They are float32, detached and
not normalized.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w a feature map, L the three layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.classifier import Classifier
from models.errors import CamUnavailableError
from models.heads import HEADS
from models.score_cam import score_cam

LAYERS = ("shallow", "middle", "deep")

MapsOfLayers = Callable[[Classifier, Tensor, Sequence[str], int], list[Tensor]]
"""Classifier, normalized images (N, 3, H, W), layers and `chunk` -> one map (N, K, h, w) for each layer."""

Weigh = Callable[[Tensor, Tensor], Tensor]
"""Activation and gradient of one class's logit, both (N, C, h, w) -> weights of the channels (N, C)."""


@dataclass(frozen=True)
class CamMethod:
    """A method that makes class activation maps, and what it needs of a classifier."""

    title: str
    """Name in tables and pictures."""
    maps: MapsOfLayers
    deep_only: bool = False
    """The method is defined at the deep layer alone."""
    heads: tuple[str, ...] = ()
    """The keys in `HEADS` of the heads that the method works with; empty if the head does not matter."""
    linear: bool = False
    """The method needs a head with `linear_map`."""


class LayerMaps(NamedTuple):
    """One map (N, K, h, w) for each stage of the backbone."""

    shallow: Tensor
    middle: Tensor
    deep: Tensor


def cam_maps(method: str, classifier: Classifier, x_NCHW: Tensor, layer: str = "deep", *, chunk: int = 32) -> Tensor:
    """Return the maps (N, K, h, w) that a method of `CAMS` makes of normalized images at one layer.

    Raises CamUnavailableError if the method or the layer is unknown, or if the method does not work with this
    classifier's head or at this layer. Raises ValueError in training mode.
    """
    check_available(method, classifier, layer)
    return CAMS[method].maps(classifier, x_NCHW, (layer,), chunk)[0]


def layer_maps(method: str, classifier: Classifier, x_NCHW: Tensor, *, chunk: int = 32) -> LayerMaps:
    """Return the maps of all three layers.

    If the method is defined at the deep layer alone, the other two maps are those of Grad-CAM. Raises the errors of
    `cam_maps`.
    """
    check_available(method, classifier, "deep")
    chosen = CAMS[method]
    if not chosen.deep_only:
        return LayerMaps(*chosen.maps(classifier, x_NCHW, LAYERS, chunk))
    others = grad_cam(classifier, x_NCHW, ("shallow", "middle"), chunk)
    return LayerMaps(*others, *chosen.maps(classifier, x_NCHW, ("deep",), chunk))


def check_available(method: str, classifier: Classifier, layer: str) -> None:
    """Raise CamUnavailableError if the method cannot make maps of this classifier at this layer.

    Raises ValueError if the classifier is in training mode.
    """
    if method not in CAMS:
        raise CamUnavailableError(f"unknown CAM method {method!r}; use one of {', '.join(CAMS)}")
    if layer not in LAYERS:
        raise CamUnavailableError(f"unknown layer {layer!r}; use one of {', '.join(LAYERS)}")
    chosen = CAMS[method]
    head: Any = type(classifier.head)
    if layer != "deep" and chosen.deep_only:
        raise CamUnavailableError(f"{method} is defined at the deep layer, not at the {layer} one; use grad-cam there")
    if chosen.heads and head not in [HEADS[name] for name in chosen.heads]:
        wanted = " or ".join(map(repr, chosen.heads))
        raise CamUnavailableError(
            f"{method} needs a classifier that was trained with head {wanted}, but this one has a "
            f"{head.__name__}; train one with that head, or use grad-cam"
        )
    if chosen.linear and not classifier.head.linear_map:
        raise CamUnavailableError(
            f"{method} needs a head whose class map is linear in the features, but {head.__name__} is not; use grad-cam"
        )
    if classifier.training:
        raise ValueError(
            f"{method} needs the classifier in eval mode, because dropout and attention change the maps; call .eval()"
        )


def weighted_features(deep_NChw: Tensor, weight_KC: Tensor) -> Tensor:
    """Return ``M_k = sum_c w_kc f_c`` (N, K, h, w) in float32, without ReLU."""
    return torch.einsum("nchw,kc->nkhw", deep_NChw.float(), weight_KC.float())


def cam(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], chunk: int) -> list[Tensor]:
    """Return CAM of the deep layer: `weighted_features` with the weights of a linear head, without ReLU.

    Source: Zhou et al., CVPR 2016.
    """
    del layers  # always the deep one
    with torch.no_grad():
        weight_KC = classifier.head.weight_KC
        return [torch.cat([weighted_features(classifier.stages(x).deep, weight_KC) for x in x_NCHW.split(chunk)])]


def grad_cam(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], chunk: int) -> list[Tensor]:
    """Return Grad-CAM of the logits before the sigmoid, without its definition's final ReLU.

    ``w_kc = mean_xy(d y_k / d A_c)``, ``sum_c w_kc A_c`` (Selvaraju et al., ICCV 2017). The code of Han et al. 2022 has
    no ReLU either: below 0, too, one class is more likely than another, and pseudo masks need that order.

    One backward pass per class serves all images of a chunk, since the logits of one image do not depend on another.
    The deep layer under a head with `averaged` needs none: its maps are those of `cam` divided by (h w).
    """
    return _gradient_maps(classifier, x_NCHW, layers, _grad_cam_weights, chunk)


def grad_cam_plus_plus(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], chunk: int) -> list[Tensor]:
    """Return Grad-CAM++, with its final ReLU.

    ``w_kc = sum_xy(alpha relu(g))`` and ``alpha = g² / (2 g² + S_c g³)``, with g the gradient of the logit and ``S_c =
    sum_xy A_c`` (Chattopadhay et al., WACV 2018, equation 19, without their factor exp(y_k), as in every
    implementation). S_c counts positive activations only: the definition assumes features after a ReLU, and has poles
    for others.

    alpha is computed as ``1 / (2 + S_c g)``. That is the same without the constant that others add to the denominator
    (1e-6 in pytorch-grad-cam), next to which the squares of small gradients vanish. torch-cam 0.5.0 differs: it divides
    a copy, so its division is lost.
    """
    return [maps.relu() for maps in _gradient_maps(classifier, x_NCHW, layers, _plus_plus_weights, chunk)]


def score_cams(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], chunk: int) -> list[Tensor]:
    """Return `score_cam` of each layer, with its final ReLU."""
    return [score_cam(classifier, x_NCHW, layer, chunk=chunk) for layer in layers]


def head_map(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], chunk: int) -> list[Tensor]:
    """Return the map of the classifier's head.

    For `PcamHead` it is the heatmap ``sigmoid(conv1x1(f))`` (N, K, h, w); source: Ye et al., 2020 (PCAM pooling).
    """
    del layers  # a head reads the deep one
    with torch.no_grad():
        parts = [classifier.head_output(classifier.stages(part), part).map_NKhw for part in x_NCHW.split(chunk)]
    return [torch.cat(parts).float()]


def attended_grad_cam(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], chunk: int) -> list[Tensor]:
    """Return the head's attention, one for all classes and 0–1, times the deep Grad-CAM of each class.

    Sources of the attention (N, 1, h, w): Lee et al., 2021 (LFI-CAM); Fukui et al., CVPR 2019 (attention branch
    network).
    """
    (attention_N1hw,) = head_map(classifier, x_NCHW, layers, chunk)
    (maps_NKhw,) = grad_cam(classifier, x_NCHW, layers, chunk)
    return [attention_N1hw * maps_NKhw]


CAMS: dict[str, CamMethod] = {
    "cam": CamMethod("CAM", cam, deep_only=True, linear=True),
    "grad-cam": CamMethod("Grad-CAM", grad_cam),
    "grad-cam++": CamMethod("Grad-CAM++", grad_cam_plus_plus),
    "score-cam": CamMethod("Score-CAM", score_cams),
    "lfi-cam": CamMethod("LFI-CAM", attended_grad_cam, deep_only=True, heads=("lfi", "lfi-release")),
    "pcam": CamMethod("PCAM", head_map, deep_only=True, heads=("pcam",)),
    "abn": CamMethod("ABN", attended_grad_cam, deep_only=True, heads=("abn",)),
}
"""All methods by name."""


def _grad_cam_weights(activation_NChw: Tensor, gradient_NChw: Tensor) -> Tensor:
    del activation_NChw
    return gradient_NChw.mean(dim=(2, 3))


def _plus_plus_weights(activation_NChw: Tensor, gradient_NChw: Tensor) -> Tensor:
    positive_NChw = gradient_NChw.relu()
    total_NC11 = activation_NChw.relu().sum(dim=(2, 3), keepdim=True)
    return (positive_NChw / (2 + total_NC11 * positive_NChw)).sum(dim=(2, 3))


def _gradient_maps(
    classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], weigh: Weigh, chunk: int
) -> list[Tensor]:
    """Return ``sum_c w_kc A_c`` (N, K, h, w) of each layer; `weigh` computes the weights from the gradients."""
    parts = [_chunk_gradient_maps(classifier, part, layers, weigh) for part in x_NCHW.split(chunk)]
    return [torch.cat(maps) for maps in zip(*parts, strict=True)]


def _chunk_gradient_maps(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], weigh: Weigh) -> list[Tensor]:
    derived = [layer for layer in layers if not (classifier.head.averaged and layer == "deep")]
    # The gradient at the deep stage passes through the head alone.
    through_backbone = any(layer != "deep" for layer in derived)
    with torch.set_grad_enabled(through_backbone):
        # With an input that needs a gradient autograd records the graph even if every weight is frozen.
        stages = classifier.stages(x_NCHW.detach().requires_grad_(through_backbone))
    if not through_backbone:
        stages = stages._replace(deep=stages.deep.requires_grad_())
    with torch.enable_grad():
        logits_NK = classifier.head_output(stages, x_NCHW).logits_NK
    activations = {layer: getattr(stages, layer) for layer in layers}
    maps: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    classes = logits_NK.shape[1]
    for k in range(classes):
        gradients = {}
        if derived:
            wanted = [activations[layer] for layer in derived]
            found = torch.autograd.grad(logits_NK[:, k].sum(), wanted, retain_graph=k < classes - 1)
            gradients = dict(zip(derived, found, strict=True))
        if len(derived) < len(layers):
            # y_k = sum_c w_kc mean_xy(A_c): the derivative is w_kc / (h w) everywhere.
            deep_NChw = activations["deep"]
            slope_1C11 = classifier.head.weight_KC[k].view(1, -1, 1, 1) / (deep_NChw.shape[2] * deep_NChw.shape[3])
            gradients["deep"] = slope_1C11.expand_as(deep_NChw)
        for layer, activation_NChw in activations.items():
            with torch.no_grad():
                activation_NChw = activation_NChw.float()
                weight_NC = weigh(activation_NChw, gradients[layer].float())
                maps[layer].append(torch.einsum("nc,nchw->nhw", weight_NC, activation_NChw))
    return [torch.stack(maps[layer], dim=1) for layer in layers]
