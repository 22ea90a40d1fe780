"""Class activation maps of a `Classifier` and the pseudo masks made of them.

All functions want a classifier in eval mode, and pass at most `chunk` images through it at once: that bounds their
memory, and changes no result. Maps come at the resolution of the feature map, float32, detached and not normalised.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w a feature map, L the three layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.classifier import Classifier
from models.errors import CamUnavailableError
from models.heads import HEADS
from models.score_cam import score_cam

CAM_METHODS = ("cam", "grad-cam", "grad-cam++", "score-cam", "lfi-cam", "pcam", "abn")
LAYERS = ("shallow", "middle", "deep")

_OWN_HEAD = {"lfi-cam": "lfi", "pcam": "pcam", "abn": "abn"}
"""Methods that read the map of a head made for it."""

_DEEP_ONLY = ("cam", *_OWN_HEAD)

Weigh = Callable[[Tensor, Tensor], Tensor]
"""Activation and gradient of one class's logit, both (N, C, h, w) -> weights of the channels (N, C)."""


class LayerMaps(NamedTuple):
    """One map (N, K, h, w) per stage of the backbone."""

    shallow: Tensor
    middle: Tensor
    deep: Tensor


def cam_maps(method: str, classifier: Classifier, x_NCHW: Tensor, layer: str = "deep", *, chunk: int = 32) -> Tensor:
    """Return the maps (N, K, h, w) that one of `CAM_METHODS` makes of normalised images at a stage.

    grad-cam comes without its definition's final ReLU, as pseudo masks want it (below 0, too, one class is more likely
    than another), and cam has none; grad-cam++ and score-cam come with it. lfi-cam and abn have one map for all
    classes; it is multiplied with the deep Grad-CAM of each class. Raises CamUnavailableError for an unknown method or
    layer, and where the method does not exist for this classifier's head or at this layer; ValueError in training mode.
    """
    check_available(method, classifier, layer)
    if method == "cam":
        return class_activation_maps(classifier, x_NCHW, chunk=chunk)
    if method == "grad-cam":
        return grad_cam(classifier, x_NCHW, layer, chunk=chunk)
    if method == "grad-cam++":
        return grad_cam_plus_plus(classifier, x_NCHW, layer, chunk=chunk)
    if method == "score-cam":
        return score_cam(classifier, x_NCHW, layer, chunk=chunk)
    if method == "pcam":
        return pcam(classifier, x_NCHW, chunk=chunk)
    attention_N1hw = (
        lfi_cam(classifier, x_NCHW, chunk=chunk) if method == "lfi-cam" else abn(classifier, x_NCHW, chunk=chunk)
    )
    return attention_N1hw * grad_cam(classifier, x_NCHW, chunk=chunk)


def layer_maps(method: str, classifier: Classifier, x_NCHW: Tensor, *, chunk: int = 32) -> LayerMaps:
    """Return the maps of all three stages; where a method defines the deep one only, the other two are Grad-CAM's.

    Raises what `cam_maps` raises.
    """
    check_available(method, classifier, "deep")
    if method == "score-cam":
        return LayerMaps(*(score_cam(classifier, x_NCHW, layer, chunk=chunk) for layer in LAYERS))
    if method not in _DEEP_ONLY:
        weigh = _grad_cam_weights if method == "grad-cam" else _plus_plus_weights
        maps = _gradient_maps(classifier, x_NCHW, LAYERS, weigh, chunk)
        return LayerMaps(*(map_NKhw if method == "grad-cam" else map_NKhw.relu() for map_NKhw in maps))
    shallow, middle = _gradient_maps(classifier, x_NCHW, ("shallow", "middle"), _grad_cam_weights, chunk)
    return LayerMaps(shallow, middle, cam_maps(method, classifier, x_NCHW, chunk=chunk))


def cam(deep_NChw: Tensor, weight_KC: Tensor) -> Tensor:
    """Return the class activation maps ``M_k = sum_c w_kc f_c`` (N, K, h, w), without ReLU. Source: Zhou et al., CVPR
    2016.
    """
    return torch.einsum("nchw,kc->nkhw", deep_NChw.float(), weight_KC.float())


def class_activation_maps(classifier: Classifier, x_NCHW: Tensor, *, chunk: int = 32) -> Tensor:
    """Return `cam` (N, K, h, w) of the deep stage, for a head whose class map is linear in it."""
    check_available("cam", classifier, "deep")
    with torch.no_grad():
        parts = [cam(classifier.stages(part).deep, classifier.head.weight_KC) for part in x_NCHW.split(chunk)]
    return torch.cat(parts)


def grad_cam(classifier: Classifier, x_NCHW: Tensor, layer: str = "deep", *, chunk: int = 32) -> Tensor:
    """Return Grad-CAM of every class (N, K, h, w), without the final ReLU, of the logit before the sigmoid.

    ``w_kc = mean_xy(d y_k / d A_c)``, ``sum_c w_kc A_c`` (Selvaraju et al., ICCV 2017; no ReLU as in the code of Han et
    al. 2022). One backward pass per class for all images of a chunk, since the logits of one image do not depend on
    another; none for the deep stage under an average-pooled linear head, where the maps are `cam` / (h w).
    """
    check_available("grad-cam", classifier, layer)
    return _gradient_maps(classifier, x_NCHW, (layer,), _grad_cam_weights, chunk)[0]


def grad_cam_plus_plus(classifier: Classifier, x_NCHW: Tensor, layer: str = "deep", *, chunk: int = 32) -> Tensor:
    """Return Grad-CAM++ of every class (N, K, h, w), with its final ReLU.

    ``w_kc = sum_xy(alpha relu(g))``, ``alpha = g² / (2 g² + S_c g³)`` with g the gradient of the logit and ``S_c =
    sum_xy A_c`` (Chattopadhay et al., WACV 2018, equation 19; their factor exp(y_k) is left out, as everywhere).
    Computed as ``alpha = 1 / (2 + S_c g)``: the same without the constant that others add to the denominator (1e-6 in
    pytorch-grad-cam), beside which the squares of small gradients vanish. torch-cam 0.5.0 differs: its division is lost
    (it divides a copy). S_c counts positive activations: the definition assumes features after a ReLU, and has poles
    for others.
    """
    check_available("grad-cam++", classifier, layer)
    return _gradient_maps(classifier, x_NCHW, (layer,), _plus_plus_weights, chunk)[0].relu()


def pcam(classifier: Classifier, x_NCHW: Tensor, *, chunk: int = 32) -> Tensor:
    """Return the heatmap ``sigmoid(conv1x1(X))`` (N, K, h, w) of a `pcam` head. Source: Ye et al., 2020 (PCAM
    pooling).
    """
    return _head_maps("pcam", classifier, x_NCHW, chunk)


def lfi_cam(classifier: Classifier, x_NCHW: Tensor, *, chunk: int = 32) -> Tensor:
    """Return the attention (N, 1, h, w) of an `lfi` head, 0–1, the same for all classes. Source: Lee et al., 2021
    (LFI-CAM).
    """
    return _head_maps("lfi-cam", classifier, x_NCHW, chunk)


def abn(classifier: Classifier, x_NCHW: Tensor, *, chunk: int = 32) -> Tensor:
    """Return the attention (N, 1, h, w) of an `abn` head, 0–1, the same for all classes. Source: Fukui et al., CVPR
    2019 (attention branch network).
    """
    return _head_maps("abn", classifier, x_NCHW, chunk)


def _head_maps(method: str, classifier: Classifier, x_NCHW: Tensor, chunk: int) -> Tensor:
    check_available(method, classifier, "deep")
    with torch.no_grad():
        parts = [classifier.head_output(classifier.stages(part), part).map_NKhw for part in x_NCHW.split(chunk)]
    return torch.cat(parts).float()


def check_available(method: str, classifier: Classifier, layer: str) -> None:
    """Raise CamUnavailableError where the method has no map of this classifier at this layer."""
    if method not in CAM_METHODS:
        raise CamUnavailableError(f"unknown CAM method {method!r}; known are {', '.join(CAM_METHODS)}")
    if layer not in LAYERS:
        raise CamUnavailableError(f"unknown layer {layer!r}; known are {', '.join(LAYERS)}")
    if layer != "deep" and method in _DEEP_ONLY:
        raise CamUnavailableError(f"{method} is defined at the deep layer, not at the {layer} one; use grad-cam there")
    head = type(classifier.head).__name__
    if method in _OWN_HEAD and not _is_head(classifier, _OWN_HEAD[method]):
        raise CamUnavailableError(
            f"{method} needs a classifier trained with head {_OWN_HEAD[method]!r}, this one has {head}; train one with "
            "that head, or use grad-cam"
        )
    if method == "cam" and not classifier.head.linear_map:
        raise CamUnavailableError(
            f"cam needs a head whose class map is linear in the features, which {head} is not; use grad-cam"
        )
    if classifier.training:
        raise ValueError(
            f"{method} needs the classifier in eval mode: dropout and attention change the maps; call .eval()"
        )


def _is_head(classifier: Classifier, name: str) -> bool:
    head: Any = HEADS[name]
    return type(classifier.head) is head


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
    """Return ``sum_c w_kc A_c`` (N, K, h, w) of each layer, with the weights that `weigh` makes of the gradients."""
    parts = [_chunk_gradient_maps(classifier, part, layers, weigh) for part in x_NCHW.split(chunk)]
    return [torch.cat(maps) for maps in zip(*parts, strict=True)]


def _chunk_gradient_maps(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], weigh: Weigh) -> list[Tensor]:
    averaged = _is_head(classifier, "gap") or _is_head(classifier, "pda")
    derived = [layer for layer in layers if not (averaged and layer == "deep")]
    # The gradient at the deep stage passes through the head alone.
    through_backbone = any(layer != "deep" for layer in derived)
    with torch.set_grad_enabled(through_backbone):
        # A leaf that needs a gradient makes autograd record the graph even if every weight is frozen.
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
