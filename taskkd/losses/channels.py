"""Losses that compare channel by channel: as distributions over space, weighted, or matched to each other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.chunked import chunked_kl, suits
from taskkd.losses.features import overhaul
from taskkd.losses.primitives import (
    NOWHERE,
    check_mask,
    check_same_shape,
    full_precision,
    l2_normalise,
    masked_mean,
    softened_kl,
)

__all__ = ["channel_weighted", "channel_wise", "match_channels", "matching_guided", "reduce_channels"]


def channel_wise(
    student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 4.0, mask: Tensor | None = None
) -> Tensor:
    """Channel-wise distillation: each channel's softmax over space, `T^2 * KL(teacher || student)`.

    Source: Shu, Liu, Gao, Yan, Shen 2021, "Channel-wise Knowledge Distillation for Dense Prediction" (temperature 4).

    Scaling: mean over batch and channels. The authors' formula is the same (their alpha is 3 for logits, 50 for
    features). Large tensors (a million numbers or more) are looked at in parts, and take no memory but that of the
    gradient.

    Args:
        student, teacher: (batch, channels, H, W) of one shape.
        temperature: `T`, positive.
        mask: weights or booleans over (batch,) or (batch, channels); or booleans over the pixels, (batch, H, W): those
            left out are in no distribution, and a sample of which none is left does not count.

    Raises:
        ShapeError: shapes differ or there is no spatial dimension.
        ValueError: `temperature` is not positive.
    """
    check_same_shape(student, teacher, "channel_wise")
    if student.ndim < 3:
        raise ShapeError(f"`channel_wise` needs (batch, channels, height, width), got {tuple(student.shape)}.")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    valid = None
    if mask is not None and student.ndim == 4 and mask.ndim == 3:
        check_mask(mask, student.select(1, 0).shape)
        valid = (mask > 0).flatten(1)[:, None]
        mask = valid.any(2)[:, 0]
    s, t = student.flatten(2), teacher.flatten(2)
    if suits(s, t, temperature):
        return masked_mean(chunked_kl(s, t, temperature, 2, valid), mask)
    return _channel_wise(s, t, temperature, valid, mask)


@full_precision
def _channel_wise(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, valid: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`channel_wise` of small tensors (batch, channels, pixels), in one go."""
    if valid is not None:
        student, teacher = (x.masked_fill(~valid, NOWHERE) for x in (student, teacher))
    return masked_mean(softened_kl(student, teacher, temperature, 2), mask)


@full_precision
def channel_weighted(
    student: Tensor,
    teacher: Tensor,
    *,
    channels: Tensor | None = None,
    normalise: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`sum_c w_c mean_hw (s_c - t_c)^2`, mean over the batch: some channels count more than others.

    Sources: Jang, Lee, Hwang, Shin 2019, "Learning What and Where to Transfer" (weights from the teacher's features,
    learned by meta-learning, which is not here; their weight of a pair of layers is the term's weight, or its `gate`);
    Wang K., Gao, Zhao, Li, Dou, Xu 2020, "Pay Attention to Features, Transfer Learn Faster CNNs" (`normalise`, weights
    from `taskkd.attention.ChannelAttention`).

    Scaling: equal to the authors' code of both where the weights of a sample sum to 1.

    Args:
        student, teacher: (batch, channels, H, W), alike but for their size; a teacher of another size is resized to the
            student's (bilinear).
        channels: weights (batch, channels) or (channels,); None: all alike, the mean over channels.
        normalise: L2-normalise each channel over space first.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: batches or channels differ, a tensor is no map, or the weights do not fit.
    """
    if student.ndim != 4 or teacher.ndim != 4:
        raise ShapeError(
            "`channel_weighted` needs student and teacher tensors of one shape (batch, channels, height, width), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    check_same_shape(student[..., 0, 0], teacher[..., 0, 0], "channel_weighted")
    if teacher.shape[2:] != student.shape[2:]:
        teacher = F.interpolate(teacher, size=student.shape[2:], mode="bilinear", align_corners=False)
    if normalise:  # the authors' eps
        student, teacher = (
            x / (torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) + 1e-6) for x in (student, teacher)
        )
    distance = (student - teacher).square().mean((2, 3))
    if channels is None:
        return masked_mean(distance, mask)
    if channels.shape not in (distance.shape, distance.shape[1:]):
        raise ShapeError(f"weights of shape {tuple(channels.shape)} for channels {tuple(distance.shape)}.")
    return masked_mean((distance * channels).sum(1), mask)


@full_precision
def matching_guided(
    student: Tensor,
    teacher: Tensor,
    *,
    assignment: Tensor | None = None,
    margin: float | Tensor = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Matching guided distillation: `overhaul` against the teacher's channels that were matched to the student's.

    Each student channel is compared with the entry of largest absolute value among the teacher's channels assigned to
    it; there are no parameters. Source: Yue, Deng, Zhou 2020, "Matching Guided Distillation" (the reducer "absolute max
    pooling"); `match_channels` gives the assignment, which the authors renew every few epochs.

    Scaling: mean over every dimension, as `overhaul`; the authors sum over everything, `numel` of the student's tensor
    times this.

    Args:
        student: (batch, channels, H, W), before the ReLU.
        teacher: (batch, groups * channels, H, W).
        assignment: (groups * channels,), the teacher's channels in order: entry `g * channels + c` goes to the
            student's channel `c`. None: as they are.
        margin: not positive, one number or one for each channel of the teacher (`features.overhaul_margin`).
        mask: weights or booleans over the leading dimensions of the student's.

    Raises:
        ShapeError: batches or sizes differ, or the teacher's channels are no multiple of the student's.
    """
    count = student.shape[1]
    reduced = reduce_channels(teacher, count, assignment)
    if reduced.shape != student.shape:
        check_same_shape(student, reduced, "matching_guided")
    if isinstance(margin, Tensor) and margin.ndim > 0:
        flat = margin.reshape(-1) if assignment is None else margin.reshape(-1)[assignment]
        margin = flat.reshape(-1, count).mean(0)
    return overhaul(student, reduced, margin=margin, mask=mask)


def reduce_channels(teacher: Tensor, count: int, assignment: Tensor | None = None) -> Tensor:
    """The teacher's channels reduced to `count`: of each group the entry of largest absolute value, with its sign.

    Args:
        teacher: (batch, groups * count, ...).
        count: the student's channels.
        assignment: see `matching_guided`.

    Raises:
        ShapeError: the channels are no multiple of `count`.
    """
    if teacher.ndim < 2 or teacher.shape[1] % count:
        raise ShapeError(f"{tuple(teacher.shape)} cannot be reduced to {count} channels: expected a multiple of them.")
    ordered = teacher if assignment is None else teacher[:, assignment]
    groups = ordered.reshape(len(teacher), teacher.shape[1] // count, count, *teacher.shape[2:])
    return groups.gather(1, groups.abs().argmax(1, keepdim=True)).squeeze(1)


@torch.no_grad()
def match_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """Which teacher channel goes to which student channel: the assignment of least total distance.

    The distance of two channels is `2 - 2 cos` of their maps, mean over the batch; each student channel gets as many
    teacher channels as all others. Source: Yue, Deng, Zhou 2020, solved by shortest augmenting paths (Jonker, Volgenant
    1987) in `O(channels^3)` on the CPU: seconds for 1000 channels, so once in some epochs.

    Args:
        student: (batch, channels, H, W).
        teacher: (batch, groups * channels, H, W).

    Returns:
        (groups * channels,) int64, the `assignment` of `matching_guided`.

    Raises:
        ShapeError: batches or sizes differ, or the teacher's channels are no multiple of the student's.
    """
    many, few = teacher.shape[1], student.shape[1]
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:] or many % few:
        raise ShapeError(
            "`match_channels` needs maps of one batch and size and a multiple of the student's channels, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    s, t = (l2_normalise(x.float().flatten(2)) for x in (student, teacher))
    cost = (2 - 2 * s @ t.mT).mean(0).double().cpu().numpy()
    return torch.from_numpy(_assign(np.tile(cost, (many // few, 1)))).to(student.device)


def _assign(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row in the assignment of least total cost; as many rows as columns."""
    size = len(cost)
    rows = np.full(size + 1, -1)  # the row of each column; the last column is where a search starts
    row_price, column_price = np.zeros(size), np.zeros(size + 1)
    for row in range(size):
        rows[size], column = row, size
        best, back = np.full(size, np.inf), np.full(size, size)
        done = np.zeros(size + 1, dtype=bool)
        while rows[column] != -1:
            done[column] = True
            here = rows[column]
            reduced = cost[here] - row_price[here] - column_price[:size]
            shorter = ~done[:size] & (reduced < best)
            best[shorter], back[shorter] = reduced[shorter], column
            column = int(np.where(done[:size], np.inf, best).argmin())
            step = best[column]
            row_price[rows[done]] += step
            column_price[done] -= step
            best[~done[:size]] -= step
        while column != size:
            rows[column] = rows[back[column]]
            column = back[column]
    return rows[:size].argsort()
