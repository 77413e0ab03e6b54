"""The few operations under every loss: precision, masks, softened divergences.

A loss is written as a map over its non-class dimensions, then reduced here by `masked_mean`; so one place decides
the convention of reduction, what an empty mask gives, and in which precision all of it is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError

__all__ = [
    "check_same_shape",
    "full_precision",
    "l2_normalise",
    "log_softmax",
    "masked_mean",
    "softened_kl",
    "to_smaller",
]

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def _upcast(value: Any) -> Any:
    """Half-precision tensors as fp32; everything else unchanged."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, (tuple, list)):
        return type(value)(_upcast(v) for v in value)
    return value


def full_precision(loss: Loss) -> Loss:
    """Decorate a loss so that it computes in fp32 with autocast off (fp64 inputs stay fp64).

    Half-precision distillation losses are wrong or NaN: relational angles on every batch in fp16, soft targets near
    convergence by a factor of 91 in bf16.
    """

    @functools.wraps(loss)
    def wrapped(student: Any, teacher: Any, *args: Any, **options: Any) -> Tensor:
        student, teacher = _upcast(student), _upcast(teacher)
        if args:
            args = tuple(_upcast(a) for a in args)
        for name, value in options.items():  # this call's own dictionary
            options[name] = _upcast(value)
        first = student[0] if isinstance(student, (tuple, list)) else student
        kind = first.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return loss(student, teacher, *args, **options)
        return loss(student, teacher, *args, **options)

    return cast(Loss, wrapped)


def check_same_shape(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Refuse a pair that would broadcast silently.

    Raises:
        ShapeError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ShapeError(
            f"`{loss}` needs student and teacher tensors of one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. An adapter maps the student's: adapter='linear' for (..., features), "
            "adapter='conv1x1' for (batch, channels, height, width)."
        )


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `values` where `mask` counts.

    Args:
        values: a map of losses, any shape.
        mask: `None` (all count), booleans, or non-negative weights; its shape is that of `values` or of its leading
            dimensions ((batch,) or (batch, tokens) for a map (batch, tokens, features)).

    Returns:
        `sum(mask * values) / sum(mask)`, a scalar. An empty mask gives 0 with a gradient path; entries of weight 0
        contribute exactly 0 whatever they hold.

    Raises:
        ShapeError: the mask fits neither way.
    """
    if mask is None:
        if values.numel() == 0:
            return values.sum()
        return values.mean()
    if mask.shape != values.shape[: mask.ndim]:
        raise ShapeError(
            f"a mask of shape {tuple(mask.shape)} does not fit a loss map of shape {tuple(values.shape)}: "
            "expected the same shape or its leading dimensions."
        )
    weight = mask.to(values.dtype).reshape(mask.shape + (1,) * (values.ndim - mask.ndim)).expand_as(values)
    total = weight.sum()
    kept = torch.where(weight > 0, values * weight, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() / torch.where(total > 0, total, torch.ones_like(total))


def l2_normalise(x: Tensor, dim: int = -1, eps: float = 1e-12) -> Tensor:
    """`x / max(|x|, eps)` along `dim`; a zero vector stays zero and has a finite gradient."""
    return F.normalize(x, dim=dim, eps=eps)


def log_softmax(logits: Tensor, temperature: float | Tensor, dim: int) -> Tensor:
    """`log softmax(logits / temperature)`; the division is left out at temperature 1."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return F.log_softmax(logits, dim)
    return F.log_softmax(logits / temperature, dim)


def softened_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor, dim: int) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` along `dim`, the other dimensions kept.

    Both sides stay in log space: a separate log of a softmax is -inf for confident teachers.
    """
    log_s, log_t = log_softmax(student, temperature, dim), log_softmax(teacher, temperature, dim)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim) * temperature**2


def to_smaller(a: Tensor, b: Tensor, pool: Literal["avg", "max"] = "avg") -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width of the two."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    shrink = F.adaptive_avg_pool2d if pool == "avg" else F.adaptive_max_pool2d
    small = [x if x.shape[2:] == size else shrink(x, size) for x in (a, b)]
    return small[0], small[1]
