"""How well class activation maps explain a classifier, and how well they point at what a mask says.

All functions work on pairs of an image and a class that is present in it. `score` maps normalized images (N, 3, H, W)
to probabilities (N, K), after the sigmoid. What a map takes away becomes white, as glass without tissue, not 0, which
is a gray in normalized space that no slide shows.

Shape suffixes: B pairs, C channels, K classes, H and W the image, N images of one call of `score`, P its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Score = Callable[[Tensor], Tensor]


def glass_white(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return white (1 of 0–1 in every channel) in the space of images normalized with mean and std, (3,) float32."""
    return (1 - torch.tensor(mean, dtype=torch.float32)) / torch.tensor(std, dtype=torch.float32)


def unit_maps(map_NKhw: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """Return maps (N, K, H, W) between 0 and 1: bilinear upsampling, then min-max of each image and class.

    A flat map becomes 0. If the method has a ReLU, it comes before.
    """
    up_NKHW = F.interpolate(map_NKhw.float(), size=size_HW, mode="bilinear", align_corners=False)
    low = up_NKHW.amin(dim=(2, 3), keepdim=True)
    span = up_NKHW.amax(dim=(2, 3), keepdim=True) - low
    # The upsampling of a flat map leaves rounding errors, which must not be stretched to 0–1.
    varied = span > 1e-6 * up_NKHW.abs().amax(dim=(2, 3), keepdim=True)
    return torch.where(varied, (up_NKHW - low) / span.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def masked_scores(
    score: Score, x_BCHW: Tensor, unit_BHW: Tensor, class_B: Tensor, white_C: Tensor, *, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """Return each pair's score of its class for the whole image and for the image seen through its map, two (B,).

    ``Y = f(x)``, ``O = f(white + (x - white) map)`` with maps between 0 and 1; O is `f(x * map)` of Chattopadhay et
    al., WACV 2018, with white in the place of 0.
    """
    white_1C11 = white_C.to(x_BCHW)[None, :, None, None]
    whole, seen = [], []
    for x, unit, picked in zip(x_BCHW.split(chunk), unit_BHW.split(chunk), class_B.split(chunk), strict=True):
        whole.append(_class_score(score, x, picked))
        seen.append(_class_score(score, white_1C11 + (x - white_1C11) * unit[:, None], picked))
    return torch.cat(whole), torch.cat(seen)


def average_drop(whole_B: Tensor, seen_B: Tensor) -> float:
    """Return ``mean(relu(Y - O) / Y)``, 0–1, lower is better; a score of 0 can drop no further. Source: Chattopadhay et
    al., WACV 2018.
    """
    drop_B = (whole_B - seen_B).relu() / whole_B.clamp_min(torch.finfo(torch.float32).tiny)
    return float(drop_B.double().mean())


def increase(whole_B: Tensor, seen_B: Tensor) -> float:
    """Return the share of pairs with ``O > Y``, higher is better. Source: Chattopadhay et al., WACV 2018."""
    return float((seen_B > whole_B).double().mean())


def deletion(
    score: Score, x_BCHW: Tensor, map_BHW: Tensor, class_B: Tensor, white_C: Tensor, *, steps: int = 20, chunk: int = 32
) -> Tensor:
    """Return the area under each pair's deletion curve, (B,) 0–1, lower is better.

    The score of the image while its pixels turn white in the order of the map, highest first, in `steps` equal steps
    from none to all; trapezoids over the share of deleted pixels (Petsiuk et al., BMVC 2018). Pixels of equal value go
    row by row. Only the order counts, so maps need no scaling.
    """
    white_BCHW = white_C.to(x_BCHW)[None, :, None, None].expand_as(x_BCHW)
    return _area(score, x_BCHW, white_BCHW, map_BHW, class_B, steps, chunk)


def insertion(
    score: Score, x_BCHW: Tensor, map_BHW: Tensor, class_B: Tensor, white_C: Tensor, *, steps: int = 20, chunk: int = 32
) -> Tensor:
    """Return the area under each pair's insertion curve, (B,) 0–1, higher is better.

    As `deletion`, but the pixels of the image appear on white glass. Petsiuk et al. start from the blurred image; a
    blurred tissue still has the tissue's colors, by which a classifier of stained tissue knows much.
    """
    white_BCHW = white_C.to(x_BCHW)[None, :, None, None].expand_as(x_BCHW)
    return _area(score, white_BCHW, x_BCHW, map_BHW, class_B, steps, chunk)


def pointing_energy(unit_BHW: Tensor, truth_BHW: Tensor) -> Tensor:
    """Return the share of each map's sum that lies inside the bool mask of its class, (B,), higher is better.

    ``sum(L inside) / sum(L)`` of maps without negative values: the energy-based pointing game of Wang et al., CVPR
    Workshops 2020, with the mask in the place of a box. 0 for a map of zeros, which points nowhere.
    """
    inside_B = (unit_BHW * truth_BHW).double().sum(dim=(1, 2))
    total_B = unit_BHW.double().sum(dim=(1, 2))
    return torch.where(total_B > 0, inside_B / total_B.clamp_min(torch.finfo(torch.float64).tiny), 0.0).float()


def _area(
    score: Score,
    from_BCHW: Tensor,
    to_BCHW: Tensor,
    map_BHW: Tensor,
    class_B: Tensor,
    steps: int,
    chunk: int,
) -> Tensor:
    """Return the area under the score (B,) while pixels change from one image to the other in the order of the map."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    pixels = map_BHW.shape[1] * map_BHW.shape[2]
    areas = []
    for start in range(0, len(class_B), chunk):
        picked = slice(start, start + chunk)
        order_NP = map_BHW[picked].flatten(1).argsort(dim=1, descending=True, stable=True)
        # The argsort of a permutation is its inverse: each pixel's place in the order.
        rank_N1HW = order_NP.argsort(dim=1).view_as(map_BHW[picked])[:, None]
        curve = []
        for step in range(steps + 1):
            changed_N1HW = rank_N1HW < round(step * pixels / steps)
            x_NCHW = torch.where(changed_N1HW, to_BCHW[picked], from_BCHW[picked])
            curve.append(_class_score(score, x_NCHW, class_B[picked]))
        areas.append(torch.trapezoid(torch.stack(curve, dim=1), dx=1 / steps, dim=1))
    return torch.cat(areas)


def _class_score(score: Score, x_NCHW: Tensor, class_N: Tensor) -> Tensor:
    with torch.no_grad():
        return score(x_NCHW).float().gather(1, class_N[:, None])[:, 0]
