"""Losses over several layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
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
    safe_divide,
    to_smaller,
    token_weights,
)

__all__ = [
    "attention_based_features",
    "dynamic_layers",
    "flow_of_solution",
    "patience",
    "pyramid",
    "singular_vectors",
]


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
    does not. TextBrewer's `pkd`, of one layer, sums over features: `features` times larger.

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
def dynamic_layers(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, ordered: bool = True, mask: Tensor | None = None
) -> Tensor:
    """A dynamic layer map: the squared difference of each teacher layer to the student layer that is nearest now.

    Source: Xia, Zhong, Chen 2022, "Structured Pruning Learns Compact and Accurate Models" (CoFi): teacher layers 3, 6,
    9 and 12 against all of the student's, through one linear map for all. Which layers match is found anew at every
    call, without gradient. `ordered` goes from the last teacher layer down, each student layer below the one before
    (their version 4); where none is left, the one before again.

    Scaling: mean over teacher layers, tokens and features. The authors sum over teacher layers, `layers` times this
    (their weight of 0.9 belongs to it), and take in the padding, as a call without `mask` does. They leave out pruned
    layers: give only those that exist.

    Args:
        student, teacher: one or more states of one shape, (batch, tokens, features) or (batch, ...).
        ordered: keep the order of layers; False takes the nearest of all (their version 3).
        mask: weights or booleans over (batch, tokens) or the leading dimensions.

    Raises:
        ShapeError: no layers, or the shapes differ.

    Example:
        >>> zero, one, two = (torch.full((1, 3, 2), x) for x in (0.0, 1.0, 2.0))
        >>> dynamic_layers([one, zero], [zero, one]), dynamic_layers([one, zero], [zero, one], ordered=False)
        (tensor(0.5000), tensor(0.))
    """
    if not len(student) or not len(teacher):
        raise ShapeError("`dynamic_layers` needs as many layers as you like of both, at least one of each.")
    for x in (*student, *teacher):
        check_same_shape(x, teacher[0], "dynamic_layers")
    with torch.no_grad():
        rows = [torch.stack([masked_mean((s - t).square(), mask) for s in student]) for t in teacher]
        nearest: list[Tensor] = []
        below = torch.full_like(rows[0], len(student), dtype=torch.long)[0]
        places = torch.arange(len(student), device=below.device)
        for row in reversed(rows):
            allowed = (places < below) | (not ordered) | ((below == 0) & (places == 0))
            below = row.masked_fill(~allowed, torch.inf).argmin()
            nearest.insert(0, below)
    chosen = torch.stack(tuple(student))[torch.stack(nearest)]
    return torch.stack([masked_mean((s - t).square(), mask) for s, t in zip(chosen, teacher, strict=True)]).mean()


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
    of the smaller; student and teacher need the same channels, not the same sizes. Of states (batch, tokens, features)
    the mean is over valid tokens (TextBrewer's `fsp` and `gram`, equal).

    Scaling: mean over pairs of layers, batch and both channels. The usual code sums over the pairs: `layers - 1` times
    this; the paper sums over both channels too. torchdistill takes the norms of the columns of `Gs - Gt` (`squared`
    False) and sums them over columns and pairs. The value grows with the fourth power of the features, the gradient
    with the third, so large fp16 features may overflow the fp16 gradient (a loss scaler then skips the step).

    Args:
        student, teacher: two or more maps (batch, channels, H, W) each, or states (batch, tokens, features).
        pool: "avg" (the usual code) or "max" (the paper).
        squared: False compares by the L2 norm of each column of the difference.
        mask: weights or booleans over (batch,), or for states (batch, tokens).

    Raises:
        ShapeError: fewer than two maps, or the numbers of maps, batches or channels differ.
        ValueError: no such `pool`.
    """
    if pool not in ("avg", "max"):
        raise ValueError(f"`pool` must be 'avg' or 'max', got {pool!r}.")
    if len(student) != len(teacher) or len(student) < 2 or {x.ndim for x in (*student, *teacher)} not in ({4}, {3}):
        raise ShapeError(
            "`flow_of_solution` needs two or more maps (batch, channels, height, width) of each, or states (batch, "
            f"tokens, features), got {[tuple(x.shape) for x in student]} and {[tuple(x.shape) for x in teacher]}."
        )
    if student[0].ndim == 3:
        student, teacher = _token_maps(student, mask), _token_maps(teacher, mask)
        mask = None if mask is None else mask.flatten(1).amax(1) if mask.ndim > 1 else mask
    for s, t in zip(student, teacher, strict=True):
        check_same_shape(s[..., 0, 0], t[..., 0, 0], "flow_of_solution")
    values = []
    for s_pair, t_pair in zip(pairwise(student), pairwise(teacher), strict=True):
        (s1, s2), (t1, t2) = to_smaller(*s_pair, pool), to_smaller(*t_pair, pool)
        gs, gt = (a.flatten(2) @ b.flatten(2).mT / a.shape[2:].numel() for a, b in ((s1, s2), (t1, t2)))
        d = gs - gt
        values.append(masked_mean(d.square() if squared else torch.linalg.vector_norm(d, dim=1), mask))
    return torch.stack(values).mean()


def _token_maps(states: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """States as maps (batch, features, tokens, 1), scaled so that means of products are over valid tokens."""
    if mask is None:
        return [x.mT[..., None] for x in states]
    maps = []
    for x in states:
        weight = token_weights(mask, x)
        share = safe_divide(weight, weight.mean(1, keepdim=True)).sqrt()[..., None]
        maps.append((x.masked_fill(share <= 0, 0) * share).mT[..., None])
    return maps


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


@full_precision
def attention_based_features(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    attention: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention-based feature distillation (AFD): every teacher map against all student maps, weighted by attention.

    `sum_s a_ts mean_hw (Q_s - Q_t)^2` with `Q` the L2-normalised map `mean_c x^2`, the student's average-pooled to the
    teacher's size before. Source: Ji, Heo, Park 2021, "Show, Attend and Distill"; the attention is learned,
    `taskkd.attention.LayerAttention` (or the whole term `AttentionBasedFeatures`).

    Scaling: mean over batch and teacher layers. The authors sum over the teacher's layers: `layers` times this (their
    beta of 200 belongs to it).

    Args:
        student, teacher: one or more maps (batch, channels, H, W) each; as many as there are, of any size.
        attention: weights (batch, teacher layers, student layers) or (teacher layers, student layers) that sum to 1
            over the student's layers; None: all alike.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: no maps, batches differ, or the attention does not fit.
    """
    maps = [*student, *teacher]
    if not len(student) or not len(teacher) or any(x.ndim != 4 or len(x) != len(maps[0]) for x in maps):
        raise ShapeError(
            "`attention_based_features` needs as many samples of the student as of the teacher in maps (batch, "
            f"channels, height, width), got {[tuple(x.shape) for x in student]} and "
            f"{[tuple(x.shape) for x in teacher]}."
        )
    shape = (len(teacher), len(student))
    weight = maps[0].new_full(shape, 1 / len(student)) if attention is None else attention
    if weight.shape[-2:] != shape or weight.shape[:-2] not in ((), maps[0].shape[:1]):
        raise ShapeError(
            f"attention of shape {tuple(weight.shape)} for {shape[0]} teacher and {shape[1]} student maps."
        )
    energies = [x.square().mean(1, keepdim=True) for x in student]
    rows = []
    for t in teacher:
        q_t = l2_normalise(t.square().mean(1).flatten(1))
        q_s = [l2_normalise(F.adaptive_avg_pool2d(e, (t.shape[2], t.shape[3])).flatten(1)) for e in energies]
        rows.append(torch.stack([(q - q_t).square().mean(1) for q in q_s], 1))
    distances = torch.stack(rows, 1)
    if mask is not None:  # 0 times what a masked sample holds may be NaN, in the weights too
        check_mask(mask, distances.shape[:1])
        weight = weight.expand_as(distances).masked_fill(~(mask > 0)[:, None, None], 0)
    return masked_mean((weight * distances).sum(2), mask)


@full_precision
def singular_vectors(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    count: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Knowledge distillation by SVD: how the first right singular vectors of consecutive maps relate.

    A map is a matrix (positions, channels); its first `count` right singular vectors, weighted by the teacher's
    normalised singular values, are related to those of the next map by `exp(-(a - b)^2 / 8)` of all pairs of channels,
    and the squared differences of student and teacher are averaged. Source: Lee, Kim, Song 2018, "Self-supervised
    Knowledge Distillation Using Singular Value Decomposition", as RepDistiller has it. Each teacher vector is compared
    with the nearest, up to sign, of the student's first `count + 3`. The signs of the teacher's own vectors, on which
    the value depends, are what the linear algebra library gives, there as here.

    Scaling: mean over batch, pairs of channels, vectors, pairs of maps. RepDistiller sums: `channels^2 * count *
    (maps - 1)` times this for each sample, where all maps have as many channels. The gradient between singular vectors
    of equal singular values, infinite in the usual code, is left out.

    Args:
        student, teacher: two or more maps (batch, channels, H, W) each; map by map of one shape but for their size.
        count: singular vectors, at least 1.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: fewer than two maps, or the numbers of maps, batches or channels differ.
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    if len(student) != len(teacher) or len(student) < 2 or any(x.ndim != 4 for x in (*student, *teacher)):
        raise ShapeError(
            "`singular_vectors` needs two or more maps (batch, channels, height, width) of each, got "
            f"{[tuple(x.shape) for x in student]} and {[tuple(x.shape) for x in teacher]}."
        )
    aligned = []
    for s, t in zip(student, teacher, strict=True):
        check_same_shape(s[..., 0, 0], t[..., 0, 0], "singular_vectors")
        (v_s, _), (v_t, values) = _right_vectors(_kept(s, mask), count + 3), _right_vectors(_kept(t, mask), count)
        cosines = v_s.mT @ v_t
        nearest = cosines.abs().argmax(1, keepdim=True)
        signs = cosines.gather(1, nearest).detach().sign()
        v_s = v_s.gather(2, nearest.expand(-1, v_s.shape[1], -1)) * signs
        aligned.append((v_s * values[:, None], v_t * values[:, None]))
    relations = []
    for (s1, t1), (s2, t2) in pairwise(aligned):
        kernels = [torch.exp(-(b[:, :, None] - a[:, None]).square() / 8) for a, b in ((s1, s2), (t1, t2))]
        relations.append(masked_mean((kernels[0] - kernels[1]).square(), mask))
    return torch.stack(relations).mean()


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Maps of samples of weight 0 as zeros, whatever they hold."""
    if mask is None:
        return x
    check_mask(mask, x.shape[:1])
    return x.masked_fill(~(mask > 0)[:, None, None, None], 0)


def _right_vectors(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors (batch, channels, count) of (positions, channels), and normalised values."""
    matrix = x.flatten(2).mT
    gram = matrix.mT @ matrix
    with torch.no_grad():  # in double precision, so that the signs do not depend on the precision of the inputs
        _, values, rows = (y.to(x.dtype) for y in torch.linalg.svd(matrix.double(), full_matrices=False))
        vectors, squares = rows.mT, values.square()
        gaps = squares[:, None] - squares[:, :, None]  # [j, i]: of vector i over vector j
        apart = gaps.abs() > 1e-6 * squares[:, :1, None]
        inverse = torch.where(apart, 1 / torch.where(apart, gaps, 1.0), 0.0)[..., :count]
        first, squares = vectors[..., :count], squares[:, None, :count]
        rest = torch.where(squares > 1e-6 * squares[..., :1], 1 / torch.where(squares > 0, squares, 1.0), 0.0)
    # The derivative of vector i is that of sum_j v_j <v_j, gram v_i> / (square of its value - that of j), and what of
    # gram v_i lies outside of all v_j (fewer positions than channels) over the square of its value.
    moved = gram @ first
    moved = moved - moved.detach()
    inside = vectors.mT @ moved
    moved = vectors @ (inverse * inside) + rest * (moved - vectors @ inside)
    return first + moved, l2_normalise(values[:, :count])
