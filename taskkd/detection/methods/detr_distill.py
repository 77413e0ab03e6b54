"""DETRDistill (Chang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.detection.boxes import paired_giou, pairwise_giou
from taskkd.errors import ShapeError, TaskkdError
from taskkd.losses.primitives import full_precision, l2_normalise, masked_mean, safe_divide

__all__ = ["class_cost", "hungarian_response", "matched_queries", "target_aware"]

Activation = Literal["sigmoid", "softmax"]
Predictions = tuple[Tensor, Tensor]


@full_precision
def class_cost(student: Tensor, teacher: Tensor, *, activation: Activation = "sigmoid") -> Tensor:
    """How badly each query of the student fits the classes of each of the teacher.

    "sigmoid": `sum_c BCE(s_n, p_m)`; "softmax" (ours, for DETR): `-sum_c p_m log softmax(s_n)`.

    Args:
        student: logits (..., n, classes).
        teacher: probabilities (..., m, classes).
        activation: of the detectors.

    Returns:
        (..., n, m).
    """
    if activation == "softmax":
        return -F.log_softmax(student, -1) @ teacher.mT
    return F.softplus(student).sum(-1, keepdim=True) - student @ teacher.mT


@torch.no_grad()
def matched_queries(
    student: Predictions,
    teacher: Predictions,
    *,
    cls: float = 1.0,
    l1: float = 5.0,
    giou: float = 2.0,
    activation: Activation = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """One-to-one matches of the queries of both sides that make the sum of their costs smallest.

    Args:
        student: logits (batch, n, classes) and boxes (batch, n, 4), centre x, centre y, width, height in 0 to 1.
        teacher: probabilities (batch, m, classes) and boxes (batch, m, 4).
        cls, l1, giou: weights of the costs.
        activation: of the detectors.

    Returns:
        Indices (batch, min(n, m)) of the student's queries and of the teacher's.

    Raises:
        TaskkdError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise TaskkdError("queries are matched by scipy, which is not installed: pip install scipy.") from error
    cost = cls * class_cost(student[0], teacher[0], activation=activation)
    cost = cost + l1 * torch.cdist(student[1].float(), teacher[1].float(), p=1)
    cost = cost - giou * pairwise_giou(student[1].float(), teacher[1].float())
    limit = torch.finfo(cost.dtype).max / 1e3
    every = cost.nan_to_num(limit, limit, -limit).cpu().numpy()
    pairs = [torch.as_tensor(linear_sum_assignment(one)) for one in every]  # (2, min(n, m)) each
    rows, columns = torch.stack(pairs, 1).to(cost.device)
    return rows, columns


@full_precision
def hungarian_response(
    student: Predictions,
    teacher: Predictions,
    *,
    cls: float = 1.0,
    l1: float = 5.0,
    giou: float = 2.0,
    activation: Activation = "sigmoid",
) -> Tensor:
    """The teacher's predictions as ground truth of the student's queries, matched one to one.

    Mean over matches of `cls * sum_c BCE(s, p_t) + l1 * sum|s - t| + giou * (1 - GIoU)`. For "softmax" (DETR) the first
    part is the cross-entropy with the teacher's probabilities, "no object" among them.

    Source: Chang et al. 2023, "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families",
    Hungarian-matching logits distillation; the reduction is the authors'.

    Args:
        student, teacher: logits (batch, queries, classes) and boxes (batch, queries, 4), centre x, centre y, width,
            height in 0 to 1; the numbers of queries may differ, what finds no partner does not count.
        cls, l1, giou: weights of costs and parts.
        activation: of the detectors.

    Raises:
        ShapeError: the numbers of classes differ.
        TaskkdError: scipy is missing.
    """
    (s, s_boxes), (t, t_boxes) = student, teacher
    if s.shape[-1] != t.shape[-1] or len(s) != len(t):
        raise ShapeError(
            "`hungarian_response` needs logits (batch, queries, classes) of the same images and classes, got "
            f"{tuple(s.shape)} and {tuple(t.shape)}."
        )
    t = t.sigmoid() if activation == "sigmoid" else t.softmax(-1)
    rows, columns = matched_queries((s, s_boxes), (t, t_boxes), cls=cls, l1=l1, giou=giou, activation=activation)
    s, s_boxes = (x.take_along_dim(rows[..., None], 1) for x in (s, s_boxes))
    t, t_boxes = (x.take_along_dim(columns[..., None], 1) for x in (t, t_boxes))
    if activation == "sigmoid":
        classes = F.binary_cross_entropy_with_logits(s, t, reduction="none").sum(-1)
    else:
        classes = -(t * F.log_softmax(s, -1)).sum(-1)
    boxes = l1 * (s_boxes - t_boxes).abs().sum(-1) + giou * (1 - paired_giou(s_boxes, t_boxes))
    return masked_mean(cls * classes + boxes)


@full_precision
def target_aware(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    queries: Tensor,
    scores: Tensor,
    inside: Sequence[Tensor] | None = None,
    floor: float = 0.01,
) -> Tensor:
    """Maps compared where the teacher's queries look for objects.

    For every layer of the decoder and every level: `m = max(sum_q score_q cos(query_q, pixel), floor)`, divided by its
    largest value in the image, and the mean of `(m (s - t))^2`; summed over levels and layers.

    Source: Chang et al. 2023, target-aware feature distillation; the mask is applied before squaring, as released.

    Args:
        student, teacher: maps (batch, width, height, width) of each level.
        queries: (layers, batch, queries, width) of the teacher, as wide as its maps.
        scores: (layers, batch, queries): the teacher's highest probability times the largest overlap with a box.
        inside: (batch, 1, height, width) of each level, 0 where it is padded; there nothing counts. None: all counts.
        floor: of the mask.

    Raises:
        ShapeError: maps differ, or the queries are not as wide as them.
    """
    total: Tensor | None = None
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape or t.shape[1] != queries.shape[-1]:
            raise ShapeError(
                f"`target_aware`, level {level}: student {tuple(s.shape)}, teacher {tuple(t.shape)}, queries "
                f"{tuple(queries.shape)}; expected maps of one shape and queries as wide as their channels."
            )
        # sum_q score_q cos(query_q, pixel) needs no map for each query
        direction = (scores[..., None] * l2_normalise(queries)).sum(2)
        focus = torch.einsum("lbc,bchw->lbhw", direction, l2_normalise(t, dim=1)).clamp(min=floor)
        where = None if inside is None else inside[level].to(focus.dtype)
        if where is not None:
            focus = focus * where[:, 0]
        focus = safe_divide(focus, focus.amax((2, 3), keepdim=True))
        apart = (focus.square().sum(0)[:, None] * (s - t).square()).mean(1)
        value = masked_mean(apart, None if where is None else where[:, 0])
        total = value if total is None else total + value
    if total is None:
        raise ShapeError("`target_aware` got no maps.")
    return total
