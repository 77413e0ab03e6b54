"""Losses over several layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_same_shape, full_precision, l2_normalise, masked_mean, to_smaller

__all__ = ["flow_of_solution", "patience", "pyramid"]


@full_precision
def patience(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    normalise: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Patient KD: mean squared difference of (normalised) [CLS] states of several layers.

    Source: Sun, Cheng, Gan, Liu 2019, "Patient Knowledge Distillation for BERT Model Compression".

    Scaling: mean over batch, layers and features, as the authors' code (their beta of 10 to 1000 belongs to it); the
    paper writes the sum, `batch * layers * features` times larger. The authors' code rounds the result to fp16; this
    does not.

    Args:
        student: (batch, layers, features), or a sequence of `layers` tensors (batch, features).
        teacher: the same.
        normalise: L2-normalise each state first (the paper always; the authors' best runs on MRPC, SST-2 and RTE).
        mask: weights or booleans over (batch,) or (batch, layers).

    Raises:
        ShapeError: the shapes differ.
    """
    s = student if isinstance(student, Tensor) else torch.stack(tuple(student), 1)
    t = teacher if isinstance(teacher, Tensor) else torch.stack(tuple(teacher), 1)
    check_same_shape(s, t, "patience")
    if normalise:
        s, t = l2_normalise(s), l2_normalise(t)
    return masked_mean((s - t).square(), mask)


@full_precision
def flow_of_solution(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    pool: Literal["avg", "max"] = "avg",
    squared: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Flow of the solution procedure (FSP): matrices `G = mean_hw a b'` of consecutive maps, `(Gs - Gt)^2`.

    Source: Yim, Joo, Bae, Kim 2017, "A Gift from Knowledge Distillation". The larger map of two is pooled to the size
    of the smaller; student and teacher need the same channels, not the same sizes.

    Scaling: mean over pairs of layers, batch and both channels. The usual code sums over the pairs: `layers - 1` times
    this; the paper sums over both channels too. torchdistill takes the norms of the columns of `Gs - Gt` (`squared`
    False) and sums them over columns and pairs. The value grows with the fourth power of the features, the gradient
    with the third, so large fp16 features may overflow the fp16 gradient (a loss scaler then skips the step).

    Args:
        student, teacher: two or more maps (batch, channels, H, W) each.
        pool: "avg" (the usual code) or "max" (the paper).
        squared: False compares by the L2 norm of each column of the difference.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: fewer than two maps, or the numbers of maps, batches or channels differ.
        ValueError: no such `pool`.
    """
    if pool not in ("avg", "max"):
        raise ValueError(f"`pool` must be 'avg' or 'max', got {pool!r}.")
    if len(student) != len(teacher) or len(student) < 2 or any(x.ndim != 4 for x in (*student, *teacher)):
        raise ShapeError(
            "`flow_of_solution` needs two or more maps (batch, channels, height, width) of each, got "
            f"{[tuple(x.shape) for x in student]} and {[tuple(x.shape) for x in teacher]}."
        )
    for s, t in zip(student, teacher, strict=True):
        check_same_shape(s[..., 0, 0], t[..., 0, 0], "flow_of_solution")
    values = []
    for s_pair, t_pair in zip(pairwise(student), pairwise(teacher), strict=True):
        (s1, s2), (t1, t2) = to_smaller(*s_pair, pool), to_smaller(*t_pair, pool)
        gs, gt = (a.flatten(2) @ b.flatten(2).mT / a.shape[2:].numel() for a, b in ((s1, s2), (t1, t2)))
        d = gs - gt
        values.append(masked_mean(d.square() if squared else torch.linalg.vector_norm(d, dim=1), mask))
    return torch.stack(values).mean()


@full_precision
def pyramid(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """The hierarchical context loss (HCL) of knowledge review: squared difference of the maps and of poolings of them.

    Per level `(mse + sum_k 2^-k mse(pooled to size_k)) / (1 + sum_k 2^-k)` for those of the sizes 4, 2, 1 that are
    smaller than the map's height. Source: Chen P., Liu, Zhao, Jia 2021, "Distilling Knowledge via Knowledge Review".

    Scaling: mean over levels. The authors sum over them: `levels` times this (their weights of 0.6 to 8 belong to it).

    Args:
        student, teacher: maps (batch, channels, H, W), one or several levels; level by level of one shape.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the shapes or the numbers of levels differ.
    """
    students = (student,) if isinstance(student, Tensor) else student
    teachers = (teacher,) if isinstance(teacher, Tensor) else teacher
    if len(students) != len(teachers) or not students:
        raise ShapeError(f"`pyramid` needs as many maps of each, got {len(students)} and {len(teachers)}.")
    levels = []
    for s, t in zip(students, teachers, strict=True):
        check_same_shape(s, t, "pyramid")
        if s.ndim != 4:
            raise ShapeError(f"`pyramid` needs maps (batch, channels, height, width), got {tuple(s.shape)}.")
        sizes = [n for n in (4, 2, 1) if n < s.shape[2]]
        total = masked_mean((s - t).square(), mask)
        for k, size in enumerate(sizes, 1):
            total = total + masked_mean(F.adaptive_avg_pool2d(s - t, size).square(), mask) / 2**k
        levels.append(total / (2 - 0.5 ** len(sizes)))  # the sum of the weights
    return torch.stack(levels).mean()
