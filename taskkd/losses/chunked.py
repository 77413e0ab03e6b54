"""Softened KL divergences of large tensors, part by part: no tensor besides both inputs and the gradient.

The usual form holds two log-softmaxes, a softmax and what autograd saves of them, each as large as the logits: 381 MB
for 19 classes at 2 x 512 x 1024, where the gradient alone takes 80. Here each part of the rows is looked at once, and
value and gradient are found together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.losses.primitives import HALF, NOWHERE, spread

__all__ = ["chunked_kl", "suits"]

#: elements from which a tensor is looked at in parts
LARGE = 2**20
#: elements of a part: what a core's cache holds, and on other devices what keeps them busy
PART_CPU, PART_DEVICE = 2**17, 2**22

Part = tuple[slice, slice, slice]


def suits(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> bool:
    """Whether `chunked_kl` is of use: of large tensors, run eagerly, with a temperature that is not learned."""
    if student.numel() < LARGE or torch.compiler.is_compiling():
        return False
    learned = isinstance(temperature, Tensor) and temperature.requires_grad
    return not learned and student.is_floating_point() and student.device == teacher.device


def chunked_kl(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, dim: int, valid: Tensor | None = None
) -> Tensor:
    """`primitives.softened_kl` in parts: `T^2 * KL(softmax(teacher / T) || softmax(student / T))` along `dim`.

    Half-precision tensors are raised to fp32 part by part. Can be differentiated once cheaply and twice at the usual
    cost, with respect to both.

    Args:
        student, teacher: of one shape.
        temperature: a number, or a tensor as for `primitives.spread`.
        dim: of the softmax.
        valid: booleans that broadcast against the tensors, for three dimensions only; entries where it is False are in
            no distribution, whatever they hold.

    Returns:
        The divergences, the shape of the tensors without `dim`; fp32 (fp64 of fp64).
    """
    dim = dim % student.ndim
    rest = student.shape[:dim] + student.shape[dim + 1 :]
    by = spread(temperature, student, dim)
    if valid is None:
        outer, size, inner = student.shape[:dim].numel(), student.shape[dim], student.shape[dim + 1 :].numel()
        shape = (1, outer, size) if inner == 1 else (outer, size, inner)
        student, teacher, dim = student.reshape(shape), teacher.reshape(shape), 2 if inner == 1 else 1
    if isinstance(by, Tensor) and by.ndim > 0:
        kept = [1 if d == dim else n for d, n in enumerate(student.shape)]
        by = by.expand(rest).reshape(kept)
    kl: Tensor = _Divergence.apply(student, teacher, by, valid, dim, torch.is_grad_enabled())
    kl = kl.reshape(rest)
    return (
        kl * spread(temperature, kl.unsqueeze(-1), -1) ** 2 if isinstance(temperature, Tensor) else kl * temperature**2
    )


class _Divergence(torch.autograd.Function):
    """Divergences along `dim` of three, that dimension kept with size 1; without the factor `T^2`."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, by: float | Tensor, valid: Tensor | None, dim: int, training: bool
    ) -> Tensor:
        wanted = (training and ctx.needs_input_grad[0], training and ctx.needs_input_grad[1])
        # Gradients are found with the value and wait unscaled. In half precision that would lose what a loss scale
        # keeps: they are found again.
        hold = not {student.dtype, teacher.dtype} & HALF
        kl, *held = _evaluate(student, teacher, by, valid, dim, (wanted[0] and hold, wanted[1] and hold))
        ctx.save_for_backward(student, teacher)
        ctx.by, ctx.valid, ctx.dim, ctx.held = by, valid, dim, held if hold else None
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # to be differentiated again
            return *_differentiable(student, teacher, ctx, grad), None, None, None, None
        held, ctx.held = ctx.held, None  # given away: what a second backward needs is found again
        scale = grad / ctx.by
        if held is None:
            _, *held = _evaluate(student, teacher, ctx.by, ctx.valid, ctx.dim, wanted, scale)
        else:
            held = [None if x is None else x.mul_(scale) for x in held]
        return held[0], held[1], None, None, None, None


def _evaluate(
    student: Tensor,
    teacher: Tensor,
    by: float | Tensor,
    valid: Tensor | None,
    dim: int,
    wanted: tuple[bool, bool],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The divergences, and their gradients with respect to `student / T` and `teacher / T`, times `scale`."""
    full = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    kept = [1 if d == dim else n for d, n in enumerate(student.shape)]
    kl = student.new_empty(kept, dtype=full)
    grads = [torch.empty_like(x) if w else None for x, w in zip((student, teacher), wanted, strict=True)]
    for part in _parts(student, dim):
        s, p_s, sum_s = _softmax(student[part], full, _cut(by, part), _cut(valid, part), dim)
        t, p_t, sum_t = _softmax(teacher[part], full, _cut(by, part), _cut(valid, part), dim)
        ratio = t.sub_(s)  # of logarithms, but for those of both sums
        between = (sum_s / sum_t).log_()
        value = torch.mul(p_t, ratio, out=s).sum(dim, keepdim=True).add_(between)
        _cut(kl, part).copy_(value)
        factor = _cut(scale, part)
        if grads[0] is not None:
            slope = p_s.sub_(p_t)
            grads[0][part] = slope if factor is None else slope.mul_(factor)
        if grads[1] is not None:
            slope = p_t.mul_(ratio.add_(between - value))
            grads[1][part] = slope if factor is None else slope.mul_(factor)
    return kl, grads[0], grads[1]


def _softmax(
    x: Tensor, full: torch.dtype, by: float | Tensor, valid: Tensor | None, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits over `T` less their largest, their softmax, and the sum that it was divided by."""
    x = x.to(full)
    if valid is not None:
        x = x.masked_fill(~valid, NOWHERE)
    shifted = x - x.amax(dim, keepdim=True)
    if isinstance(by, Tensor) or by != 1:
        shifted.div_(by)
    p = shifted.exp()
    total = p.sum(dim, keepdim=True)
    return shifted, p.div_(total), total


def _parts(x: Tensor, dim: int) -> Iterator[Part]:
    """Parts of a tensor of three dimensions that hold all of `dim`."""
    budget = PART_CPU if x.device.type == "cpu" else PART_DEVICE
    every = slice(None)
    step = max(budget // max(x[0].numel(), 1), 1)
    rows = max(budget // x.shape[dim], 1) if step == 1 else x.shape[3 - dim]
    for start in range(0, x.shape[0], step):
        for row in range(0, x.shape[3 - dim], rows):
            some = slice(row, row + rows)
            yield slice(start, start + step), *((every, some) if dim == 1 else (some, every))


def _cut(x: Any, part: Part) -> Any:
    """The part of what broadcasts against the tensors; numbers and None as they are."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    return x[tuple(slice(None) if n == 1 else p for n, p in zip(x.shape, part, strict=True))]


def _differentiable(student: Tensor, teacher: Tensor, ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients, as values that can be differentiated."""
    s, t = student.view_as(student), teacher.view_as(teacher)  # two, though they be one
    a, b = (x.double() if torch.float64 in (s.dtype, t.dtype) else x.float() for x in (s, t))
    if ctx.valid is not None:
        a, b = (x.masked_fill(~ctx.valid, NOWHERE) for x in (a, b))
    log_s, log_t = (F.log_softmax(x / ctx.by, ctx.dim) for x in (a, b))
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(ctx.dim, keepdim=True)
    wanted = ctx.needs_input_grad[:2]
    found = iter(
        torch.autograd.grad(kl, [x for x, w in zip((s, t), wanted, strict=True) if w], grad, create_graph=True)
    )
    return [next(found) if w else None for w in wanted]
