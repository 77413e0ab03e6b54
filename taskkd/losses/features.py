"""Losses on features of one layer, of one shape where the loss says so (an adapter makes it one shape)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import (
    check_mask,
    check_same_shape,
    full_precision,
    l2_normalise,
    masked_mean,
    to_smaller,
)

__all__ = [
    "activation_boundaries",
    "attention_transfer",
    "cosine",
    "euclidean",
    "factor",
    "mse",
    "neuron_selectivity",
    "orthogonal_penalty",
    "overhaul",
    "overhaul_margin",
    "partial_mse",
    "prediction_aware",
    "variational_information",
]


def _check_maps(student: Tensor, teacher: Tensor, loss: str) -> None:
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise ShapeError(
            f"`{loss}` needs student and teacher tensors of one shape (batch, channels, height, width) but for their "
            f"channels and size, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    """One value for each channel (dimension 1) so that it broadcasts against `like`; other shapes as they are."""
    return (value.reshape(1, -1, *(1,) * (like.ndim - 2)) if value.ndim == 1 else value).to(like)


@full_precision
def mse(student: Tensor, teacher: Tensor, *, normalise: bool = False, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference, mean over every dimension.

    Source: Romero et al. 2015 (FitNets) with a regressor as adapter; their formula is half the sum of squares, that is
    `features / 2` times this mean per sample.

    Args:
        student, teacher: tensors of one shape.
        normalise: L2-normalise both along the last dimension first.
        mask: weights or booleans over the leading dimensions ((batch,) or (batch, tokens)).

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "mse")
    if normalise:
        student, teacher = l2_normalise(student), l2_normalise(teacher)
    elif mask is None and student.numel() > 0:
        return F.mse_loss(student, teacher)  # one fused kernel
    return masked_mean((student - teacher).square(), mask)


@full_precision
def cosine(student: Tensor, teacher: Tensor, *, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """`1 - cos(student, teacher)` along `dim`, mean over the other dimensions.

    Source: the last-hidden-state term of DistilBERT (Sanh et al. 2019) and embedding mimicking. A zero vector has
    cosine 0 to everything.

    Args:
        student, teacher: tensors of one shape.
        dim: the feature dimension.
        mask: weights or booleans over the remaining dimensions or the leading ones of them.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "cosine")
    return masked_mean(1 - (l2_normalise(student, dim) * l2_normalise(teacher, dim)).sum(dim), mask)


@full_precision
def euclidean(
    student: Tensor, teacher: Tensor, *, over: Literal["sample", "batch"] = "sample", mask: Tensor | None = None
) -> Tensor:
    """`|s - t|_2` of each sample's features, mean over the batch.

    Source: the feature term of Zhang L., Shi, Shi, Ma, Bao 2020, "Task-Oriented Feature Distillation" (weight 0.05).
    Their code takes the norm of the whole batch as one vector, `over="batch"`, which grows with the root of the batch.

    Args:
        student, teacher: tensors of one shape, (batch, ...).
        over: whose norm: each "sample"'s, or the "batch"'s.
        mask: weights or booleans over (batch,); for "batch" it only matters whether a weight is 0.

    Raises:
        ShapeError: the shapes differ.
        ValueError: `over` is neither.
    """
    check_same_shape(student, teacher, "euclidean")
    if over not in ("sample", "batch"):
        raise ValueError(f"`over` must be 'sample' or 'batch', got {over!r}.")
    difference = student.flatten(1) - teacher.flatten(1)
    if over == "sample":
        return masked_mean(torch.linalg.vector_norm(difference, dim=1), mask)
    if mask is not None:
        check_mask(mask, difference.shape[:1])
        difference = difference.masked_fill(~(mask > 0)[:, None], 0)
    norm: Tensor = torch.linalg.vector_norm(difference)
    return norm


def orthogonal_penalty(weight: Tensor) -> Tensor:
    """`|W W' - 1|_2 + |W' W - 1|_2` of a linear map, so that an adapter keeps what the features hold.

    Source: Zhang L. et al. 2020, "Task-Oriented Feature Distillation" (weight 0.03), from the paper. Not 0 for a map
    that is not square.

    Args:
        weight: (out, in).

    Raises:
        ShapeError: it is no matrix.
    """
    if weight.ndim != 2:
        raise ShapeError(f"`orthogonal_penalty` needs the weight (out, in) of a linear map, got {tuple(weight.shape)}.")
    norms: list[Tensor] = [
        torch.linalg.matrix_norm(w @ w.T - torch.eye(len(w), dtype=w.dtype, device=w.device))
        for w in (weight, weight.T)
    ]
    return norms[0] + norms[1]


@full_precision
def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float | Tensor = 2.0,
    distance: Literal["squared", "absolute", "euclidean"] = "squared",
    mask: Tensor | None = None,
) -> Tensor:
    """Attention transfer: the maps `Q = mean_c |x|^p`, L2-normalised over space, compared; mean over batch and space.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention" (power 2). The larger map is average-pooled
    to the size of the smaller. With different architectures it often does worse than no distillation.

    Scaling: "squared" is the authors' code (their beta of 1000 belongs to it); "euclidean" is the paper's formula,
    `|Qs - Qt|_2`, mean over the batch. RepDistiller's factor transfer is this loss with distance "absolute".

    Args:
        student, teacher: (batch, channels, H, W); channels and sizes may differ.
        power: `p`, at least 1.
        distance: how two maps are compared.
        mask: weights or booleans over (batch,); or over (batch, H, W) of the smaller map, not for "euclidean", where
            positions of weight 0 are left out of the norm too.

    Raises:
        ShapeError: batches differ or a tensor is no map.
        ValueError: `power` is below 1, or there is no such `distance`.
    """
    _check_maps(student, teacher, "attention_transfer")
    plain = not isinstance(power, Tensor)  # a schedule's tensor is not looked at: that would stop the device
    if plain and not power >= 1:
        raise ValueError(f"`power` must be at least 1, got {power}.")
    if distance not in ("squared", "absolute", "euclidean"):
        raise ValueError(f"`distance` must be 'squared', 'absolute' or 'euclidean', got {distance!r}.")
    maps = []
    for x in to_smaller(student, teacher):
        q = (x.square() if plain and power == 2 else x.abs().pow(power)).mean(1)
        if mask is not None and mask.shape == q.shape:
            q = torch.where(mask > 0, q, torch.zeros_like(q))
        maps.append(l2_normalise(q.flatten(1)).view_as(q))
    difference = maps[0] - maps[1]
    if distance == "euclidean":
        return masked_mean(torch.linalg.vector_norm(difference.flatten(1), dim=1), mask)
    return masked_mean(difference.square() if distance == "squared" else difference.abs(), mask)


@full_precision
def factor(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Factor transfer: mean absolute difference of the L2-normalised factors (one vector for each sample).

    Source: Kim, Park, Kwak 2018, "Paraphrasing Complex Network: Network Compression via Factor Transfer"; the
    paraphraser and the translator that make the factors are adapters.

    Scaling: mean over every dimension, as the authors' code (their beta of 500 belongs to it). RepDistiller's loss of
    this name is `attention_transfer` with distance "absolute".

    Args:
        student, teacher: factors of one shape, (batch, ...).
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "factor")
    return masked_mean((l2_normalise(student.flatten(1)) - l2_normalise(teacher.flatten(1))).abs(), mask)


@full_precision
def overhaul(student: Tensor, teacher: Tensor, *, margin: float | Tensor = 0.0, mask: Tensor | None = None) -> Tensor:
    """Overhaul of feature distillation: `(s - t')^2` with `t' = max(t, margin)`, left out where `s <= t' <= 0`.

    Source: Heo, Kim, Yun, Park, Kwak, Choi 2019, "A Comprehensive Overhaul of Feature Distillation", on features before
    the ReLU; `overhaul_margin` gives the margin from the teacher's batch norm.

    Scaling: mean over every dimension. The authors sum: `channels * H * W` times this for each sample; then they
    divide by 1000 (CIFAR) or 10000 (ImageNet), and level `i` of `n` by `2^(n-1-i)`.

    Args:
        student, teacher: features of one shape, (batch, channels, ...).
        margin: not positive, one number or one for each channel.
        mask: weights or booleans over the leading dimensions.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "overhaul")
    floor = _per_channel(margin, teacher) if isinstance(margin, Tensor) else teacher.new_tensor(margin)
    teacher = torch.maximum(teacher, floor)
    difference = torch.where((student > teacher) | (teacher > 0), student - teacher, torch.zeros_like(student))
    return masked_mean(difference.square(), mask)


def overhaul_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The margin of `overhaul`: what a channel after batch norm is on average where it is negative.

    `E[x | x < 0]` for `x ~ N(bias, |weight|)`, and `-3 |weight|` for a channel that is negative less than once in 1000.
    Source: Heo et al. 2019, appendix.

    Args:
        weight, bias: of the teacher's batch norm, (channels,).

    Returns:
        (channels,), not positive.
    """
    mean, deviation = bias.detach().double(), weight.detach().double().abs().clamp(min=1e-30)
    z = mean / deviation
    negative = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = mean - deviation * density / negative.clamp(min=1e-3)
    return torch.where(negative > 1e-3, expected, -3 * deviation).to(weight.dtype)


@full_precision
def partial_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Squared difference where either feature is positive, 0 where a ReLU makes both 0; mean over every dimension.

    Source: the feature term of Zhang L. et al. 2019, "Be Your Own Teacher", as a third party implements it (no code of
    the authors is public).

    Scaling: mean over every dimension, the inactive ones counted. That code sums over everything, the batch too:
    `numel` times this (its weight of 1e-6 belongs to it).

    Args:
        student, teacher: features of one shape.
        mask: weights or booleans over the leading dimensions.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "partial_mse")
    difference = torch.where((student > 0) | (teacher > 0), student - teacher, torch.zeros_like(student))
    return masked_mean(difference.square(), mask)


@full_precision
def activation_boundaries(
    student: Tensor, teacher: Tensor, *, margin: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Activation boundaries: squared hinge that gives the student's neurons the sign of the teacher's.

    `max(0, m - s)^2` where `t > 0`, `max(0, m + s)^2` elsewhere, on features before the ReLU. Not 0 for equal features.
    Source: Heo, Lee, Yun, Choi 2019, "Knowledge Transfer via Distillation of Activation Boundaries".

    Scaling: mean over every dimension. The authors sum: `channels * H * W` times this for each sample; then level `i`
    of `n` is divided by `2^(n-1-i)` and the whole multiplied by 3/1000.

    Args:
        student, teacher: features of one shape.
        margin: `m`.
        mask: weights or booleans over the leading dimensions.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "activation_boundaries")
    return masked_mean(torch.where(teacher > 0, F.relu(margin - student), F.relu(margin + student)).square(), mask)


@full_precision
def neuron_selectivity(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Neuron selectivity transfer: squared MMD of the channels' spatial patterns under the kernel `<a, b>^2`.

    Each channel is L2-normalised over space; `mean k(s, s') + mean k(t, t') - 2 mean k(s, t)` over pairs of channels,
    mean over the batch. Source: Huang & Wang 2017, "Like What You Like". The larger map is average-pooled.

    Scaling: the usual code's (weight 50 belongs to it).

    Args:
        student, teacher: (batch, channels, H, W); channels and sizes may differ.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: batches differ or a tensor is no map.
    """
    _check_maps(student, teacher, "neuron_selectivity")
    student, teacher = to_smaller(student, teacher)
    s, t = l2_normalise(student.flatten(2)), l2_normalise(teacher.flatten(2))
    if s.shape[2] <= max(s.shape[1], t.shape[1]):  # sum <a, b>^2 = <A'A, B'B>: the smaller Gram matrix, no cancellation
        difference = s.mT @ s / s.shape[1] - t.mT @ t / t.shape[1]
        return masked_mean(difference.square().sum((1, 2)), mask)
    ss, tt, st = ((a @ b.mT).square().mean((1, 2)) for a, b in ((s, s), (t, t), (s, t)))
    return masked_mean(ss + tt - 2 * st, mask)


@full_precision
def variational_information(
    student: tuple[Tensor, Tensor], teacher: Tensor, *, eps: float = 1e-5, mask: Tensor | None = None
) -> Tensor:
    """Variational information distillation: `((mean - t)^2 / var + log var) / 2`, `var = softplus(scale) + eps`.

    Source: Ahn, Hu, Damianou, Lawrence, Dai 2019. The negative log-likelihood of the teacher's features up to a
    constant: not 0 for equal features, and it may be negative.

    Scaling: mean over every dimension, as the usual code.

    Args:
        student: `(mean, scale)` from an adapter: the teacher's features as predicted from the student's, and the
            learned parameter of the variance, one for each channel or a shape that broadcasts.
        teacher: features of the shape of `mean`.
        eps: least variance.
        mask: weights or booleans over the leading dimensions.

    Raises:
        ShapeError: the shapes differ.
    """
    mean, scale = student
    check_same_shape(mean, teacher, "variational_information")
    variance = F.softplus(_per_channel(scale, mean)) + eps
    return masked_mean(((mean - teacher).square() / variance + variance.log()) / 2, mask)


@full_precision
def prediction_aware(
    student: tuple[Tensor, Tensor], teacher: Tensor, *, eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """Prediction-aware distillation: `(t - s)^2 / (eps + e^v) + v`, `v` the predicted log-variance.

    Source: Zhang, Lan, Dai, Zhang, Ju, Wang 2020, "Prime-Aware Adaptive Distillation". Uncertain samples count less.
    Not 0 for equal features, and it may be negative.

    Scaling: mean over every dimension, as the usual code.

    Args:
        student: `(features, v)` from an adapter; `v` of the features' shape, one for each channel, or a shape that
            broadcasts.
        teacher: features of the same shape.
        eps: bounds the weight of a sample.
        mask: weights or booleans over the leading dimensions.

    Raises:
        ShapeError: the shapes differ.
    """
    features, log_variance = student
    check_same_shape(features, teacher, "prediction_aware")
    v = _per_channel(log_variance, features)
    # beyond e^40 the quotient is nothing beside v, and its gradient would be inf / inf
    return masked_mean((teacher - features).square() / (eps + v.clamp(max=40.0).exp()) + v, mask)
