"""Where localization is distilled (Zheng et al. 2022): positives, the valuable localization region around them.

All functions take the anchors of one image, levels one after the other, and work on all pairs of anchors and boxes at
once. No boxes: nothing is anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskkd.errors import ShapeError

__all__ = ["assign_atss", "fine_grained_region", "inside_region", "square_anchors", "vlr_weights"]


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _overlaps(anchors: Tensor, boxes: Tensor) -> Tensor:
    from torchvision.ops import box_iou

    found: Tensor = box_iou(anchors, boxes)
    return found


def _margin(anchors: Tensor, boxes: Tensor) -> Tensor:
    """(A, G): how far an anchor's centre is inside a box, negative outside."""
    points = _centres(anchors)[:, None]
    return torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], -1).amin(-1)


def _candidates(anchors: Tensor, boxes: Tensor, level_sizes: Sequence[int], count: int) -> Tensor:
    """(K, G): of each level the `count` anchors whose centres are nearest to that of each box."""
    if sum(level_sizes) != len(anchors):
        raise ShapeError(f"levels of {list(level_sizes)} anchors are not the {len(anchors)} anchors that there are.")
    distance, found, start = torch.cdist(_centres(anchors), _centres(boxes)), [], 0
    for size in level_sizes:
        nearest = distance[start : start + size].topk(min(count, size), dim=0, largest=False).indices
        found.append(nearest + start)
        start += size
    return torch.cat(found)


def _threshold(overlaps: Tensor, candidates: Tensor) -> Tensor:
    """(G,): mean + standard deviation of the overlaps of each box's candidates."""
    own = overlaps.gather(0, candidates)
    return own.mean(0) + own.std(0, correction=min(1, len(own) - 1))


@torch.no_grad()
def assign_atss(anchors: Tensor, boxes: Tensor, level_sizes: Sequence[int], *, candidates: int = 9) -> Tensor:
    """The adaptive assignment that GFL and LD train with: candidates above the mean + deviation of their overlaps.

    Source: Zhang S. et al. 2020 (ATSS).

    Args:
        anchors: (A, 4), x1 y1 x2 y2.
        boxes: (G, 4).
        level_sizes: anchors of each level.
        candidates: of each level and box.

    Returns:
        (A,) int64: the index of the box; of several that with the largest overlap; -1: none.

    Raises:
        ShapeError: the levels do not sum to the anchors.
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    overlaps, near = _overlaps(anchors, boxes), _candidates(anchors, boxes, level_sizes, candidates)
    good = torch.zeros_like(overlaps, dtype=torch.bool).scatter(0, near, True)
    good &= (overlaps >= _threshold(overlaps, near)) & (_margin(anchors, boxes) > 0.01)
    best, index = torch.where(good, overlaps, -1.0).max(1)
    return torch.where(best < 0, -1, index)


@torch.no_grad()
def vlr_weights(
    anchors: Tensor,
    boxes: Tensor,
    level_sizes: Sequence[int],
    *,
    candidates: int = 9,
    low: float = 0.25,
    legacy_iof: bool = False,
) -> Tensor:
    """The valuable localization region: anchors whose DIoU with a box is at least `low * t` and below `t`.

    `t` is the threshold of `assign_atss` for that box. Source: Zheng et al. 2022.

    Args:
        anchors, boxes, level_sizes, candidates: as for `assign_atss`.
        low: the share of the threshold from which on anchors count.
        legacy_iof: as the released code computes it: the shared area over the anchor's alone, not over the union.

    Returns:
        (A,): the largest overlap (IoU) with a box in whose region the anchor is, 0 outside. No boxes: zeros (the
        released code crashes).

    Raises:
        ShapeError: the levels do not sum to the anchors.
    """
    if not len(boxes):
        return anchors.new_zeros(len(anchors))
    overlaps = _overlaps(anchors, boxes)
    threshold = _threshold(overlaps, _candidates(anchors, boxes, level_sizes, candidates))
    shared = overlaps
    if legacy_iof:
        corner, other = (
            torch.maximum(anchors[:, None, :2], boxes[:, :2]),
            torch.minimum(anchors[:, None, 2:], boxes[:, 2:]),
        )
        area = (anchors[:, 2:] - anchors[:, :2]).prod(-1)
        shared = (other - corner).clamp(min=0).prod(-1) / area[:, None].clamp(min=1e-6)
    around = torch.maximum(anchors[:, None, 2:], boxes[:, 2:]) - torch.minimum(anchors[:, None, :2], boxes[:, :2])
    apart = (_centres(anchors)[:, None] - _centres(boxes)).square().sum(-1)
    distance_iou = shared - apart / around.square().sum(-1).clamp(min=1e-6)
    inside = (distance_iou >= low * threshold) & (distance_iou < threshold)
    return torch.where(inside, overlaps, 0.0).amax(1)


@torch.no_grad()
def fine_grained_region(anchors: Tensor, boxes: Tensor, *, share: float = 0.5) -> Tensor:
    """(A,) 1 where an anchor's overlap with a box exceeds `share` of that box's largest, else 0.

    Source: Wang T. et al. 2019 (FGFI), as LD's feature imitation uses it.
    """
    if not len(boxes):
        return anchors.new_zeros(len(anchors))
    overlaps = _overlaps(anchors, boxes)
    return (overlaps > share * overlaps.amax(0)).any(1).to(anchors.dtype)


@torch.no_grad()
def inside_region(anchors: Tensor, boxes: Tensor) -> Tensor:
    """(A,) 1 where an anchor's centre is inside a box, else 0."""
    return (_margin(anchors, boxes) > 0).any(1).to(anchors.dtype) if len(boxes) else anchors.new_zeros(len(anchors))


def square_anchors(shapes: Sequence[tuple[int, int]], strides: Sequence[float], *, scale: float = 8.0) -> Tensor:
    """One square of `scale * stride` at each cell, as GFL and ATSS have them, (A, 4), levels one after the other.

    Their centres are the cells' upper left corners, as mmdetection places them.
    """
    found = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        centre = torch.stack([x, y], -1).reshape(-1, 2).float()
        half = scale * stride / 2
        found.append(torch.cat([centre - half, centre + half], 1))
    return torch.cat(found)
