"""Targets: what is made of a teacher's logits before a loss on logits sees them.

Every function but `dynamic_temperature` returns logits, for `kl_divergence` and all others: where a paper mixes
probabilities these are `T * log(probability)`, whose softmax at temperature `T` they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import (
    check_same_shape,
    check_temperature,
    cosines,
    full_precision,
    log_softmax,
    safe_divide,
)

__all__ = [
    "batch_ensemble",
    "dynamic_temperature",
    "gated_ensemble",
    "group_targets",
    "label_smoothing",
    "probability_shift",
]

Confusion = Literal["agreement", "confidence", "cosine"]


def _labels(teacher: Tensor, labels: Tensor, dim: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The labels and the teacher's choices, both with the class dimension kept; ignored labels are the choices."""
    chosen = teacher.argmax(dim, keepdim=True)
    if labels.shape != teacher.select(dim, 0).shape:
        raise ShapeError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(teacher.shape)}.")
    return torch.where(labels.unsqueeze(dim) == ignore_index, chosen, labels.unsqueeze(dim)), chosen


@full_precision
def probability_shift(teacher: Tensor, labels: Tensor, *, dim: int = 1, ignore_index: int = -100) -> Tensor:
    """Knowledge adjustment: where the teacher is wrong, its largest logit and that of the true class change places.

    Source: Wen, Lai, Qian 2021, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision"
    (probability shift; of logits the same as of probabilities).

    Args:
        teacher: logits, (batch, classes) or with the classes in `dim`.
        labels: the true classes, the shape of the logits without `dim`.
        dim: the class dimension.
        ignore_index: the label where nothing is changed.

    Raises:
        ShapeError: the labels do not fit.

    Example:
        >>> probability_shift(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([1]))
        tensor([[1., 3., 0.]])
    """
    true, chosen = _labels(teacher, labels, dim, ignore_index)
    shifted = teacher.scatter(dim, chosen, teacher.gather(dim, true))
    return shifted.scatter(dim, true, teacher.gather(dim, chosen))


@full_precision
def label_smoothing(
    teacher: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.1,
    temperature: float = 1.0,
    dim: int = 1,
    ignore_index: int = -100,
) -> Tensor:
    """Knowledge adjustment: where the teacher is wrong, its logits give way to smoothed labels.

    `(1 - smoothing) * [class is true] + smoothing / classes`, as `temperature * log` of it.

    Source: Wen, Lai, Qian 2021, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision" (label
    smoothing regularisation).

    Args:
        teacher: logits, (batch, classes) or with the classes in `dim`.
        labels: the true classes, the shape of the logits without `dim`.
        smoothing: in (0, 1].
        temperature: that of the loss which follows.
        dim: the class dimension.
        ignore_index: the label where nothing is changed.

    Raises:
        ShapeError: the labels do not fit.
        ValueError: `smoothing` or `temperature` is out of range.
    """
    if not 0 < smoothing <= 1:
        raise ValueError(f"`smoothing` must be in (0, 1], got {smoothing}.")
    check_temperature(temperature)
    true, chosen = _labels(teacher, labels, dim, ignore_index)
    share = smoothing / teacher.shape[dim]
    smooth = torch.full_like(teacher, share).scatter(dim, true, 1 - smoothing + share)
    return torch.where(true == chosen, teacher, temperature * smooth.log())


@full_precision
def dynamic_temperature(
    student: Tensor,
    teacher: Tensor,
    *,
    base: float,
    spread: float,
    by: Confusion = "agreement",
    power: float = 1.0,
    least: float = 1.0,
    normalise: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """Dynamic temperature: one for each sample, lower for the confusing ones; `base + spread * (mean w - w)`.

    Source: Wen, Lai, Qian 2021, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", from the
    paper alone: `w`, normalised over the batch, is `(1 - <p, q>)^power` of the student's and teacher's probabilities
    (their focal-loss style) or one over the student's largest probability (their confidence-weighted one). TextBrewer
    does not normalise: its FLSW, on logits, is `by="cosine", normalise=False, eps=1e-4`, its CWSM `by="confidence",
    normalise=False, eps=1e-3`, its beta and gamma are `spread` and `power`, and nothing keeps them above 0.

    Args:
        student, teacher: logits (batch, classes) of one shape.
        base: the mean temperature.
        spread: how far the weights, which sum to 1 over the batch, move it; at least 0.
        by: "agreement" of both, their logits' "cosine" in place of `<p, q>`, or the student's "confidence".
        power: for "agreement" and "cosine".
        least: no temperature is below it; positive.
        normalise: False leaves the weights as they are.
        eps: added to the norms of "cosine" and to the probability of "confidence"; not negative.

    Returns:
        (batch,) without gradient: the `temperature` of `kl_divergence` or `soft_cross_entropy`.

    Raises:
        ShapeError: the shapes differ or are not (batch, classes).
        ValueError: `by` is neither, or a number is out of range.
    """
    check_same_shape(student, teacher, "dynamic_temperature")
    if student.ndim != 2:
        raise ShapeError(f"`dynamic_temperature` needs logits (batch, classes), got {tuple(student.shape)}.")
    if by not in get_args(Confusion):
        raise ValueError(f"`by` is one of {', '.join(get_args(Confusion))}, got {by!r}.")
    if not (base > 0 and spread >= 0 and least > 0 and eps >= 0):
        raise ValueError(
            f"`base` and `least` must be positive, `spread` and `eps` at least 0, got {base}, {least}, {spread}, {eps}."
        )
    p, q = student.detach(), teacher.detach()
    if by == "cosine":
        p, q = (safe_divide(x, torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps) for x in (p, q))
    else:
        p, q = p.softmax(1), q.softmax(1)
    w = 1 / (p.amax(1) + eps) if by == "confidence" else (1 - (p * q).sum(1)).clamp(min=0) ** power
    if normalise:
        w = safe_divide(w, w.sum())
    return (base + spread * (w.mean() - w)).clamp(min=least)


@full_precision
def batch_ensemble(teacher: Tensor, features: Tensor, *, omega: float = 0.5, temperature: float = 4.0) -> Tensor:
    """BAKE: each sample's target takes in those of similar samples of the batch, propagated to the limit.

    `Q = (1 - omega) (1 - omega W)^-1 softmax(z / T)`, `W` the softmax of the cosines to the other samples.

    Source: Ge, Choi, Zhang, Zhang, Xu, Li 2021, "Self-distillation with Batch Knowledge Ensembling" (the teacher is the
    student itself; omega 0.5, T 4, batches with 4 images of each class). A batch of one keeps its own.

    Args:
        teacher: logits (batch, classes).
        features: (batch, ...) of the same samples; flattened.
        omega: share of the others, in [0, 1).
        temperature: `T`, that of the loss which follows.

    Returns:
        `T * log Q` without gradient, fp32 or fp64 (the inverse does not exist in half precision).

    Raises:
        ShapeError: not one feature vector for each sample.
        ValueError: `omega` or `temperature` is out of range.
    """
    if teacher.ndim != 2 or features.ndim < 2 or len(teacher) != len(features):
        raise ShapeError(
            "`batch_ensemble` needs logits (batch, classes) and features (batch, ...) of as many samples, got "
            f"{tuple(teacher.shape)} and {tuple(features.shape)}."
        )
    if not 0 <= omega < 1:
        raise ValueError(f"`omega` must be in [0, 1), got {omega}.")
    check_temperature(temperature)
    logits, flat = teacher.detach(), features.detach().flatten(1).to(teacher.dtype)
    itself = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    alike = F.softmax(cosines(flat) - 1e9 * itself, 1)  # a batch of one is left with itself
    own = log_softmax(logits, temperature, 1).exp()
    q: Tensor = (1 - omega) * torch.linalg.solve(itself - omega * alike, own)
    return temperature * q.clamp(min=torch.finfo(q.dtype).tiny).log()


@full_precision
def gated_ensemble(teacher: Tensor | Sequence[Tensor], gate: Tensor) -> Tensor:
    """ONE: the sum of the branches' logits, each times its gate.

    Source: Lan, Zhu, Gong 2018, "Knowledge Distillation by On-the-Fly Native Ensemble" (T 3; the branches learn from
    `gated_ensemble(...).detach()`, the gate and the ensemble from the labels).

    Args:
        teacher: logits (batch, branches, ...), or a sequence of `branches` tensors (batch, ...).
        gate: (batch, branches), as a softmax gives them.

    Returns:
        (batch, ...), with gradient to logits and gate.

    Raises:
        ShapeError: the gate does not fit.
    """
    logits = teacher if isinstance(teacher, Tensor) else torch.stack(tuple(teacher), 1)
    if logits.ndim < 3 or gate.shape != logits.shape[:2]:
        raise ShapeError(
            "`gated_ensemble` needs logits (batch, branches, classes) and a gate (batch, branches), got "
            f"{tuple(logits.shape)} and {tuple(gate.shape)}."
        )
    return (gate.reshape(gate.shape + (1,) * (logits.ndim - 2)) * logits).sum(1)


@full_precision
def group_targets(teacher: Tensor | Sequence[Tensor], queries: Tensor, keys: Tensor, *, detach: bool = False) -> Tensor:
    """OKDDip: each peer's own mixture of all peers' logits, by attention between them: `softmax(q k') z`.

    Source: Chen D., Mei, Wang, Feng, Chen C. 2020, "Online Knowledge Distillation with Diverse Peers" (T 3, 4 branches,
    projections of 1/8 of the features, the scores not divided by the root of their size).

    Args:
        teacher: the peers' logits (batch, peers, classes), or a sequence of `peers` tensors (batch, classes).
        queries, keys: projections of the peers' features (batch, peers, features).
        detach: no gradient to the peers' logits, queries and keys. The authors let it flow (False): each peer then also
            moves towards those that learn from it.

    Returns:
        (batch, peers, classes): the target of each peer.

    Raises:
        ShapeError: queries, keys and logits do not fit.
    """
    logits = teacher if isinstance(teacher, Tensor) else torch.stack(tuple(teacher), 1)
    if logits.ndim != 3 or queries.ndim != 3 or queries.shape != keys.shape or queries.shape[:2] != logits.shape[:2]:
        raise ShapeError(
            "`group_targets` needs logits (batch, peers, classes), queries and keys (batch, peers, features), got "
            f"{tuple(logits.shape)}, {tuple(queries.shape)} and {tuple(keys.shape)}."
        )
    targets = F.softmax(queries @ keys.mT, 2) @ logits
    return targets.detach() if detach else targets
