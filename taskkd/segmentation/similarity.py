"""Similarities of rows to groups of columns as distributions, compared without the matrix of all pairs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_mask, check_temperature, full_precision, l2_normalise, safe_divide

__all__ = ["MOST", "average_pool", "cross_image_similarity", "queue_similarity", "similarity_kl"]

#: pixels of a map that are related to each other: those of the paper's crops, 512 x 1024 at stride 8
MOST = 64 * 128
#: entries of a block of similarities: 1 MB in fp32, of which about six are alive at a time; on other devices few
#: launches count
BLOCK, BLOCK_ELSEWHERE = 1 << 18, 1 << 24
#: but rows at least, or the columns are read again for few of them
ROWS = 32


class _Setting(NamedTuple):
    """What is no tensor of the loss's arguments: of (R, C) rows and (G, P, C) columns."""

    temperature: float
    row_weight: Tensor  # (R,)
    column_out: Tensor | None  # (G, P) bool
    group_weight: Tensor  # (G,)
    block: int


@full_precision
def similarity_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    temperature: float = 0.1,
    block: int | None = None,
    columns: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`KL(softmax(t) || softmax(s))` of each row's similarities to each group of columns, mean over rows and groups.

    A row's similarity to a column is their product over `temperature`; each group of columns has a softmax of its own.
    It is worked out in blocks of rows with the gradient in the same pass: beside its arguments and their gradients it
    takes three blocks, whatever the number of rows. It can be differentiated once.

    Source: Yang C., Zhou, An, Jiang, Xu, Zhang 2022, "Cross-Image Relational Knowledge Distillation for Semantic
    Segmentation" (CIRKD). No `T^2`, as theirs.

    Args:
        student, teacher: rows (R, features) and columns (groups, P, features) of each; L2-normalised by the caller. The
            features of both sides need not be as many. Gradient flows to the student's rows and columns.
        temperature: positive.
        block: rows at a time; None: as many as make 1 MB of similarities in fp32 (64 MB on other devices than a CPU),
            and at least 32.
        columns: booleans (groups, P) of those that count; a group without any is left out.
        mask: weights or booleans (R,) of the rows.

    Raises:
        ShapeError: rows and columns do not fit.
        ValueError: `temperature` is not positive.
    """
    check_temperature(temperature)
    (rows, across), (other_rows, other_across) = student, teacher
    if rows.shape[:1] != other_rows.shape[:1] or across.shape[:2] != other_across.shape[:2] or across.ndim != 3:
        shapes = ", ".join(str(tuple(x.shape)) for x in (*student, *teacher))
        raise ShapeError(
            f"`similarity_kl` needs rows (R, features) and columns (groups, P, features) of both, got {shapes}."
        )
    if mask is not None:
        check_mask(mask, rows.shape[:1])
    if columns is not None:
        check_mask(columns, across.shape[:2])
    setting = _Setting(
        temperature,
        rows.new_ones(len(rows)) if mask is None else mask.to(rows.dtype),
        None if columns is None else ~columns.bool(),
        rows.new_ones(len(across)) if columns is None else columns.bool().any(1).to(rows.dtype),
        block or _rows(across),
    )
    total: Tensor = _SimilarityKL.apply(rows, across, other_rows.detach(), other_across.detach(), setting)
    return safe_divide(total, setting.row_weight.sum() * setting.group_weight.sum())


@full_precision
def cross_image_similarity(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.1, pool: int | None = 1, mask: Tensor | None = None
) -> Tensor:
    """Similarities of every vector to those of each image of the batch, as distributions: `similarity_kl` of all pairs
    of images, an image and itself too.

    Source: Yang C. et al. 2022 (CIRKD), mini-batch pixel to pixel; with channels as vectors, CIRKDv2 (2025). On several
    ranks each relates its own images, as theirs.

    Scaling: mean over vectors and pairs of images, as theirs. No `T^2`.

    Args:
        student, teacher: maps (N, C, h, w) whose pixels are the vectors, channels need not be as many; or vectors (N,
            P, features). L2-normalised here.
        temperature: positive.
        pool: maps: averages of so many pixels each way first. None: 1, and more for maps of more than `MOST` pixels, so
            that no more are left; the time grows with their square.
        mask: booleans (N, h, w), or (N, P) of vectors: those left out are related to none.

    Raises:
        ShapeError: batches or sizes differ, or the mask does not fit.
        ValueError: `temperature` is not positive.
    """
    if student.ndim == 4:
        if pool is None:
            pool = max(1, math.ceil((student.shape[2] * student.shape[3] / MOST) ** 0.5))
        if mask is not None:
            check_mask(mask, student[:, 0].shape)
        (student, mask), (teacher, _) = (average_pool(x, pool, mask) for x in (student, teacher))
        student, teacher = (x.flatten(2).mT for x in (student, teacher))
        mask = None if mask is None else mask.flatten(1)
    sides = [l2_normalise(x).contiguous() for x in (student, teacher)]  # or each block would copy them
    both = [(x.flatten(0, 1), x) for x in sides]
    rows = None if mask is None else mask.flatten()
    return similarity_kl(both[0], both[1], temperature=temperature, columns=mask, mask=rows)


@full_precision
def queue_similarity(
    student: Tensor,
    teacher: Tensor,
    *,
    queue: Tensor,
    temperature: float = 0.1,
    kd_temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """`T_kd^2 KL` of the similarities of each row to those of a queue, over `temperature * T_kd`; mean over rows.

    Args:
        student, teacher: (R, features), L2-normalised.
        queue: (P, features).
        temperature, kd_temperature: positive.
        mask: weights or booleans (R,).

    Raises:
        ShapeError: shapes do not fit.
    """
    columns = queue[None].to(student.dtype)
    both = (student, columns), (teacher, columns)
    return similarity_kl(*both, temperature=temperature * kd_temperature, mask=mask) * kd_temperature**2


def _rows(columns: Tensor) -> int:
    """How many rows make a block with (groups, P, features) of columns."""
    entries = BLOCK if columns.device.type == "cpu" else BLOCK_ELSEWHERE
    return max(ROWS, entries // max(columns.shape[0] * columns.shape[1], 1))


def _log_shares(rows: Tensor, columns: Tensor, setting: _Setting) -> Tensor:
    """(r, G, P): the log-softmax of the rows' similarities to each group."""
    groups, size, features = columns.shape
    found = (rows @ columns.reshape(-1, features).T).div_(setting.temperature).view(len(rows), groups, size)
    if setting.column_out is not None:
        found.masked_fill_(setting.column_out, torch.finfo(found.dtype).min)
    return found.sub_(found.logsumexp(2, keepdim=True))


class _SimilarityKL(torch.autograd.Function):
    """The weighted sum of all divergences; the gradient is worked out with it and kept, one number for each feature."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, other_rows: Tensor, other_columns: Tensor, setting: _Setting
    ) -> Tensor:
        need_rows, need_columns = ctx.needs_input_grad[:2]
        total = rows.new_zeros(())
        row_grad = rows.new_empty(rows.shape) if need_rows else None
        column_grad = columns.new_zeros(columns.shape) if need_columns else None
        flat = columns.reshape(-1, columns.shape[2])
        for start in range(0, len(rows) if columns.numel() else 0, setting.block):
            part = slice(start, start + setting.block)
            log_t = _log_shares(other_rows[part], other_columns, setting)
            log_s = _log_shares(rows[part], columns, setting)
            weight = setting.row_weight[part, None] * setting.group_weight
            share = log_t.exp()
            total += (share.mul_(log_t.sub_(log_s)).sum(2) * weight).sum()
            if row_grad is None and column_grad is None:
                continue
            # d KL / d similarity = (p_s - p_t) / T, with p_t = exp(log_t - log_s) exp(log_s)
            change = log_t.add_(log_s).exp_().neg_().add_(log_s.exp_())
            change = change.mul_(weight[..., None] / setting.temperature).flatten(1)
            if row_grad is not None:
                torch.mm(change, flat, out=row_grad[part])
            if column_grad is not None:
                column_grad.view_as(flat).addmm_(change.T, rows[part])
        if row_grad is not None and columns.numel() == 0:
            row_grad.zero_()
        ctx.save_for_backward(row_grad, column_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row_grad, column_grad = ctx.saved_tensors
        return (
            None if row_grad is None else row_grad * grad,
            None if column_grad is None else column_grad * grad,
            None,
            None,
            None,
        )


def average_pool(x: Tensor, size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Means of `size` x `size` pixels that count, and which of these means are of any; the last ones may be of fewer.

    Args:
        x: (N, C, h, w).
        size: 1: as they are.
        mask: booleans (N, h, w); None: all count.

    Returns:
        (N, C, ceil(h / size), ceil(w / size)), and booleans without C; None without a mask.
    """
    if size == 1:
        return x, mask
    if mask is None:
        return F.avg_pool2d(x, size, ceil_mode=True), None
    counted = mask[:, None].to(x.dtype)
    share = F.avg_pool2d(counted, size, ceil_mode=True)
    small = F.avg_pool2d(x.masked_fill(counted == 0, 0), size, ceil_mode=True)
    return safe_divide(small, share), share[:, 0] > 0
