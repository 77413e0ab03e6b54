"""Learning efficient object detection models with knowledge distillation (Chen et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_same_shape, check_temperature, full_precision, log_softmax, masked_mean

__all__ = [
    "bounded_distance",
    "bounded_regression",
    "hard_and_soft",
    "weighted_binary_soft_targets",
    "weighted_soft_targets",
]


@full_precision
def weighted_soft_targets(
    student: Tensor,
    teacher: Tensor,
    *,
    background_weight: float = 1.5,
    background: int = 0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Soft targets with a heavier background: `-sum_c w_c softmax(teacher/T)_c log softmax(student/T)_c`, mean of rows.

    Source: Chen, Choi, Yu, Han, Chandraker 2017, "Learning Efficient Object Detection Models with Knowledge
    Distillation", eq. 3: errors with background count more; `T = 1` worked best.

    Scaling: equal to the paper's (1/N over proposals), without `T^2`. A cross-entropy, so not 0 where both agree.

    Args:
        student, teacher: logits (..., classes) of one shape.
        background_weight: `w` of the background; 1 for all other classes.
        background: the channel of the background.
        temperature: `T`, positive.
        mask: weights or booleans over the dimensions before the classes.

    Raises:
        ShapeError: the shapes differ.
        ValueError: `temperature` is not positive.
    """
    check_same_shape(student, teacher, "weighted_soft_targets")
    check_temperature(temperature)
    weight = torch.ones(student.shape[-1], dtype=student.dtype, device=student.device)
    weight[background] = background_weight
    soft = log_softmax(teacher, temperature, -1).exp() * log_softmax(student, temperature, -1)
    return masked_mean(-(weight * soft).sum(-1), mask)


@full_precision
def weighted_binary_soft_targets(
    student: Tensor, teacher: Tensor, *, background_weight: float = 1.5, mask: Tensor | None = None
) -> Tensor:
    """`weighted_soft_targets` of sigmoid detectors: `-sum_c p_t log p_s + w (1 - p_t) log(1 - p_s)`, mean of rows.

    Our reading of Chen et al. 2017 for objectness and for one-stage detectors, where each class has a background of its
    own.

    Args:
        student, teacher: logits (..., classes) of one shape.
        background_weight: `w`.
        mask: weights or booleans over the dimensions before the classes.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "weighted_binary_soft_targets")
    is_object = teacher.sigmoid() * F.logsigmoid(student)
    is_none = (-teacher).sigmoid() * F.logsigmoid(-student)
    return masked_mean(-(is_object + background_weight * is_none).sum(-1), mask)


@full_precision
def hard_and_soft(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    mu: float = 0.5,
    background_weight: float = 1.5,
    background: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """The paper's classification loss: `mu * cross-entropy + (1 - mu) * weighted_soft_targets` (eq. 2).

    Here the cross-entropy is a part of the student's own loss; see `chen` for how the two go together.

    Args:
        student, teacher: logits (R, classes) of the same proposals.
        labels: (R,) int64; the cross-entropy with them is not re-weighted.
        mu: share of the labels.
        background_weight, background, temperature: see `weighted_soft_targets`.

    Raises:
        ShapeError: the shapes differ.
    """
    soft = weighted_soft_targets(
        student, teacher, background_weight=background_weight, background=background, temperature=temperature
    )
    return mu * masked_mean(F.cross_entropy(student, labels, reduction="none")) + (1 - mu) * soft


@full_precision
def bounded_distance(
    student: Tensor, teacher: Tensor, target: Tensor, *, margin: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """The teacher as a bound: `|s - y|^2` where `|s - y|^2 + margin > |t - y|^2`, else 0; mean over rows.

    Source: Chen et al. 2017, eq. 4: a student that is better than the teacher by the margin is left alone. The bound is
    of each RoI by itself, not of the batch.

    Args:
        student, teacher: regressions (R, 4), encoded as the student's own loss has them.
        target: of the ground truth, (R, 4).
        margin: `m`, in the units of the squared distance.
        mask: weights or booleans over (R,): the positives. What is masked may hold anything.

    Raises:
        ShapeError: the shapes differ.
    """
    own, other = _distances(student, teacher, target, mask)
    return masked_mean(torch.where(own + margin > other, own, torch.zeros_like(own)), mask)


@full_precision
def bounded_regression(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    nu: float = 0.5,
    margin: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The paper's regression loss: `smooth L1(s, y) + nu * bounded_distance` (eq. 5), both means over rows.

    Here the smooth L1 is a part of the student's own loss; the term is `nu * bounded_distance` alone.

    Args:
        student, teacher, target, margin, mask: see `bounded_distance`.
        nu: weight of the bounded part.

    Raises:
        ShapeError: the shapes differ.
    """
    bounded = bounded_distance(student, teacher, target, margin=margin, mask=mask)
    student, target = (_kept(x, mask) for x in (student, target))
    return masked_mean(F.smooth_l1_loss(student, target, reduction="none").sum(-1), mask) + nu * bounded


def _distances(student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared distances of both to the target, (R,)."""
    check_same_shape(student, teacher, "bounded_distance")
    if target.shape != student.shape:
        raise ShapeError(
            f"`bounded_distance` needs a target for each row, got {tuple(target.shape)} for {tuple(student.shape)}."
        )
    student, teacher, target = (_kept(x, mask) for x in (student, teacher, target))
    return (student - target).square().sum(-1), (teacher - target).square().sum(-1)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Masked rows as 0: what they hold (the logarithm of an empty box, say) reaches no gradient."""
    return x if mask is None else x.masked_fill(~(mask > 0)[..., None], 0)
