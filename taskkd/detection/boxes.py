"""Boxes of DETR-like detectors: centre x, centre y, width, height in 0 to 1, and how far two of them are apart."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_corners", "paired_giou", "pairwise_giou"]


def as_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> x1, y1, x2, y2."""
    from torchvision.ops import box_convert

    corners: Tensor = box_convert(boxes, "cxcywh", "xyxy")
    return corners


def paired_giou(a: Tensor, b: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Generalised overlap (Rezatofighi et al. 2019) of boxes one by one, in -1 to 1.

    Args:
        a, b: (..., 4) centre x, centre y, width, height.
        eps: added to the areas that are divided by, so that boxes without area are finite.
    """
    from torchvision.ops import generalized_box_iou_loss

    found: Tensor = 1 - generalized_box_iou_loss(as_corners(a), as_corners(b), reduction="none", eps=eps)
    return found


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised overlaps (..., n, m) of all pairs of `a` (..., n, 4) and `b` (..., m, 4); form as above."""
    n, m = a.shape[-2], b.shape[-2]
    every = (*a.shape[:-2], n, m, 4)
    return paired_giou(a.unsqueeze(-2).expand(every), b.unsqueeze(-3).expand(every))
