"""Definitions of the heads, as loops over float64 arrays.

Shape suffixes: C channels, K classes, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def arrays(module: Any) -> dict[str, Floats]:
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def slow_conv(x_Chw: Floats, weight: Floats) -> Floats:
    """Convolve cell by cell, with zeros around the image."""
    outputs, inputs, side, _ = weight.shape
    _, height, width = x_Chw.shape
    reach = side // 2
    result = np.zeros((outputs, height, width))
    for y in range(height):
        for x in range(width):
            for i in range(side):
                for j in range(side):
                    if 0 <= y + i - reach < height and 0 <= x + j - reach < width:
                        for c in range(inputs):
                            result[:, y, x] += weight[:, c, i, j] * x_Chw[c, y + i - reach, x + j - reach]
    return result


def slow_batch_norm(x_Chw: Floats, state: dict[str, Floats], name: str) -> Floats:
    result = np.empty_like(x_Chw)
    for c in range(len(x_Chw)):
        scale = state[f"{name}.weight"][c] / math.sqrt(state[f"{name}.running_var"][c] + 1e-5)
        result[c] = (x_Chw[c] - state[f"{name}.running_mean"][c]) * scale + state[f"{name}.bias"][c]
    return result


def slow_minmax(x_hw: Floats) -> Floats:
    low, high = x_hw.min(), x_hw.max()
    return (x_hw - low) / (high - low) if high > low else np.zeros_like(x_hw)


def sigmoid(value: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-value))
    return result


def softmax(value_K: Floats) -> Floats:
    exponential_K: Floats = np.exp(value_K - value_K.max())
    result: Floats = exponential_K / exponential_K.sum()
    return result


def slow_class_maps(deep_Chw: Floats, weight_KC: Floats) -> Floats:
    return slow_conv(deep_Chw, weight_KC[:, :, None, None])


def slow_gap(deep_Chw: Floats, image: Floats, state: dict[str, Floats]) -> tuple[Floats, Floats]:
    maps_Khw = slow_class_maps(deep_Chw, state["conv.weight"][:, :, 0, 0])
    return np.array([maps_hw.sum() / maps_hw.size for maps_hw in maps_Khw]), maps_Khw


def slow_area(deep_Chw: Floats, image: Floats, state: dict[str, Floats]) -> tuple[Floats, Floats]:
    scores_Khw = slow_class_maps(deep_Chw, state["conv.weight"][:, :, 0, 0])
    for k, bias in enumerate(state["bias_K"]):
        scores_Khw[k] += bias
    classes, height, width = scores_Khw.shape
    probs_Khw = np.zeros_like(scores_Khw)
    for y in range(height):
        for x in range(width):
            probs_Khw[:, y, x] = softmax(scores_Khw[:, y, x])
    logits_K = np.zeros(classes)
    for k in range(classes):
        largest = sorted(probs_Khw[k].ravel().tolist(), reverse=True)[: math.ceil(0.2 * height * width)]
        share = min(max(sum(largest) / len(largest), 1e-6), 1 - 1e-6)
        logits_K[k] = math.log(share / (1 - share))
    return logits_K, scores_Khw


def slow_pcam(deep_Chw: Floats, image: Floats, state: dict[str, Floats]) -> tuple[Floats, Floats]:
    weight_KC, bias_K = state["conv.weight"][:, :, 0, 0], state["conv.bias"]
    heat_Khw = sigmoid(slow_class_maps(deep_Chw, weight_KC) + bias_K[:, None, None])
    logits_K = np.zeros(len(bias_K))
    for k in range(len(bias_K)):
        for c in range(len(deep_Chw)):
            pooled = (heat_Khw[k] / heat_Khw[k].sum() * deep_Chw[c]).sum()
            logits_K[k] += weight_KC[k, c] * pooled
        logits_K[k] += bias_K[k]
    return logits_K, heat_Khw


def slow_resize(gray_HW: Floats, height: int, width: int) -> Floats:
    """Resize bilinearly between the four nearest pixel centers."""
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v, u = (y + 0.5) * gray_HW.shape[0] / height - 0.5, (x + 0.5) * gray_HW.shape[1] / width - 0.5
            top, left = math.floor(v), math.floor(u)
            for row, row_share in ((top, 1 - (v - top)), (top + 1, v - top)):
                for column, column_share in ((left, 1 - (u - left)), (left + 1, u - left)):
                    result[y, x] += row_share * column_share * gray_HW[row, column]
    return result


def slow_lfi(
    deep_Chw: Floats, image: Floats, state: dict[str, Floats], *, final_relu: bool = False
) -> tuple[Floats, Floats]:
    channels, height, width = deep_Chw.shape
    gray_hw = slow_resize(image.mean(axis=0), height, width)
    x_Chw = np.stack([slow_minmax(deep_hw) * gray_hw for deep_hw in deep_Chw])
    for conv, norm in ((0, 1), (3, 4), (6, 7), (9, 10)):
        x_Chw = slow_conv(x_Chw, state[f"importance.{conv}.weight"])
        x_Chw = slow_batch_norm(x_Chw, state, f"importance.{norm}")
        if conv < 9 or final_relu:
            x_Chw = np.maximum(x_Chw, 0)
    weight_C = softmax(np.array([x_hw.mean() for x_hw in x_Chw]))
    weighted_hw = np.zeros((height, width))
    for c in range(channels):
        weighted_hw += weight_C[c] * deep_Chw[c]
    attention_hw = slow_minmax(np.maximum(weighted_hw, 0))
    pooled_C = np.array([(attention_hw * deep_hw + deep_hw).mean() for deep_hw in deep_Chw])
    return state["fc.weight"] @ pooled_C + state["fc.bias"], attention_hw[None]


def slow_bottleneck(x_Chw: Floats, state: dict[str, Floats], name: str) -> Floats:
    y_Chw = x_Chw
    for conv, norm in ((0, 1), (3, 4), (6, 7)):
        y_Chw = slow_batch_norm(slow_conv(y_Chw, state[f"{name}.branch.{conv}.weight"]), state, f"{name}.branch.{norm}")
        if conv < 6:
            y_Chw = np.maximum(y_Chw, 0)
    return np.maximum(x_Chw + y_Chw, 0)


def slow_abn(deep_Chw: Floats, image: Floats, state: dict[str, Floats]) -> tuple[Floats, Floats, Floats]:
    maps_Khw = slow_conv(slow_bottleneck(deep_Chw, state, "attention_stage"), state["class_maps.0.weight"])
    maps_Khw = np.maximum(slow_batch_norm(maps_Khw, state, "class_maps.1"), 0)
    attention_1hw = sigmoid(slow_batch_norm(slow_conv(maps_Khw, state["attention.0.weight"]), state, "attention.1"))
    auxiliary_K = slow_conv(maps_Khw, state["attention_logits.weight"]).mean(axis=(1, 2))
    perceived_Chw = slow_bottleneck(deep_Chw * attention_1hw + deep_Chw, state, "perception_stage")
    return state["fc.weight"] @ perceived_Chw.mean(axis=(1, 2)) + state["fc.bias"], attention_1hw, auxiliary_K


SLOW: dict[str, Any] = {
    "gap": slow_gap,
    "pcam": slow_pcam,
    "lfi": slow_lfi,
    "lfi-release": partial(slow_lfi, final_relu=True),
    "abn": slow_abn,
    "area": slow_area,
}
