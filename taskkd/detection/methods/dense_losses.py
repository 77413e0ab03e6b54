"""Losses on what one-stage detectors predict at every anchor: class scores, boxes, distributions of a box's sides.

Each is a sum over positions, with their weights, divided by the sum of the weights (a mean) or by a number that is
given, as the papers divide by the number of positives.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import (
    check_mask,
    check_same_shape,
    check_temperature,
    full_precision,
    masked_mean,
    softened_kl,
)

__all__ = ["box_overlap", "distribution_kl", "quality_focal"]


def _reduced(values: Tensor, weights: Tensor | None, divisor: float | Tensor | None) -> Tensor:
    """The weighted mean of a map, or its weighted sum divided by `divisor`."""
    if divisor is None:
        return masked_mean(values, weights)
    if weights is not None:
        check_mask(weights, values.shape)
        weight = weights.to(values.dtype).reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
        values = torch.where(weight > 0, values * weight, torch.zeros_like(values))
    return values.sum() / divisor


@full_precision
def quality_focal(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    weights: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """`|sigma(s) - sigma(t)|^beta * BCE(s, sigma(t))`, summed over classes.

    Source: the quality focal loss of Li X. et al. 2020 with the teacher's scores as targets, as CrossKD (Wang J. et al.
    2023) and BCKD (Yang L. et al. 2023) use it. The gradient flows through the focal factor too.

    Scaling: the mean over positions; the papers divide the sum by the number of positive anchors (`divisor`).

    Args:
        student, teacher: logits (..., classes).
        beta: >= 0; the factor counts as 0 where the scores are equal.
        weights: of the positions (...), >= 0; None: all count.
        divisor: of the sum over positions; None: the sum of the weights.

    Raises:
        ShapeError: the shapes differ.
        ValueError: `beta` is negative.

    Example:
        >>> s = torch.zeros(2, 3)
        >>> round(quality_focal(s, s + 1.0).item(), 4)
        0.4805
    """
    check_same_shape(student, teacher, "quality_focal")
    if not beta >= 0:
        raise ValueError(f"`beta` must not be negative, got {beta}.")
    target = teacher.detach().sigmoid()
    gap = (student.sigmoid() - target).abs()
    if beta != 1:  # a root has no finite slope at 0
        apart = gap > 0
        gap = torch.where(apart, torch.where(apart, gap, 1.0) ** beta, 0.0**beta)
    values = gap * F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return _reduced(values.sum(-1), weights, divisor)


@full_precision
def distribution_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 10.0,
    bins: Literal["mean", "sum"] = "mean",
    weights: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """`T^2 KL(softmax(t / T) || softmax(s / T))` of discrete distributions, the sides of boxes or the classes.

    Source: Zheng et al. 2022, "Localization Distillation for Dense Object Detection" (LD: the mean over bins);
    CrossKD sums.

    Scaling: the mean over positions. `bins="mean"` divides by the number of bins, as LD's weights expect.

    Args:
        student, teacher: logits (..., bins).
        temperature: `T`.
        bins: how the terms of the divergence are put together: "sum" is the divergence, "mean" that over their number.
        weights: of the positions, >= 0: the shape without the bins or the leading dimensions of it; None: all count.
        divisor: of the sum over positions; None: the sum of the weights.

    Raises:
        ShapeError: the shapes differ.
        ValueError: `temperature` is not positive, or an unknown `bins`.

    Example:
        >>> s, t = torch.zeros(1, 4, 2), torch.tensor([1.0, -1.0]).expand(1, 4, 2)
        >>> round(distribution_kl(s, t, temperature=1.0, bins="sum").item(), 4)
        0.3278
    """
    check_same_shape(student, teacher, "distribution_kl")
    check_temperature(temperature)
    if bins not in ("mean", "sum"):
        raise ValueError(f"`bins` must be 'mean' or 'sum', got {bins!r}.")
    values = softened_kl(student, teacher.detach(), temperature, -1)
    if bins == "mean":
        values = values / student.shape[-1]
    return _reduced(values, weights, divisor)


@full_precision
def box_overlap(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: Literal["giou", "iou"] = "giou",
    weights: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """How little boxes overlap: `1 - GIoU`, or `-log IoU`.

    Source: GIoU: Rezatofighi et al. 2019. The logarithm (UnitBox, Yu et al. 2016) is what mmdetection's FCOS means by
    "IoU loss"; an IoU below 1e-6 counts as that, without gradient.

    Args:
        student, teacher: boxes (..., 4), x1 y1 x2 y2.
        kind: "giou" or "iou".
        weights: of the boxes (...), >= 0; None: all count.
        divisor: of the sum over boxes; None: the sum of the weights.

    Raises:
        ShapeError: the shapes differ, or are not (..., 4).
        ValueError: an unknown `kind`.

    Example:
        >>> a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 1]])
        >>> round(box_overlap(a, b).item(), 4), round(box_overlap(a, b, kind="iou").item(), 4)
        (0.5, 0.6931)
    """
    check_same_shape(student, teacher, "box_overlap")
    if student.shape[-1] != 4:
        raise ShapeError(f"`box_overlap` needs boxes (..., 4), got {tuple(student.shape)}.")
    teacher = teacher.detach()
    if kind == "giou":
        from torchvision.ops import generalized_box_iou_loss

        return _reduced(generalized_box_iou_loss(student, teacher), weights, divisor)
    if kind != "iou":
        raise ValueError(f"`kind` must be 'giou' or 'iou', got {kind!r}.")
    low, high = torch.maximum(student[..., :2], teacher[..., :2]), torch.minimum(student[..., 2:], teacher[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (student, teacher)]
    overlap = shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)
    return _reduced(-overlap.clamp(min=1e-6).log(), weights, divisor)
