"""The few operations under every loss: precision, masks, softened divergences.

A loss is written as a map over its non-class dimensions, then reduced here by `masked_mean`; so one place decides
the convention of reduction, what an empty mask gives, and in which precision all of it is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError

__all__ = [
    "angles",
    "as_samples",
    "check_mask",
    "check_same_shape",
    "check_temperature",
    "cosines",
    "full_precision",
    "l2_normalise",
    "log_softmax",
    "masked_mean",
    "mean_of_samples",
    "pairs",
    "pairwise_distance",
    "pearson",
    "safe_divide",
    "softened_js",
    "softened_kl",
    "spread",
    "to_smaller",
    "token_weights",
]

Loss = TypeVar("Loss", bound=Callable[..., Tensor])
HALF = frozenset((torch.float16, torch.bfloat16))
#: products of numbers from which on distances of all pairs go through a matrix product
PAIRED = 2**20
#: the logit of what is in no distribution: its share is 0, and it is finite over any temperature
NOWHERE = -1e30


def _upcast(value: Any) -> Any:
    """Half-precision tensors as fp32; everything else unchanged."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
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
            if isinstance(value, (Tensor, tuple, list)):
                options[name] = _upcast(value)
        first = student if isinstance(student, Tensor) else student[0] if len(student) else None
        kind = "cpu" if first is None else first.device.type  # of no layers the loss itself says what it needs
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


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Refuse a mask that is neither of this shape nor of its leading dimensions.

    Raises:
        ShapeError: the mask fits neither way.
    """
    if mask.shape != shape[: mask.ndim]:
        raise ShapeError(
            f"a mask of shape {tuple(mask.shape)} does not fit a loss map of shape {tuple(shape)}: "
            "expected the same shape or its leading dimensions."
        )


def check_temperature(temperature: float | Tensor) -> None:
    """Refuse a temperature that is not positive; a tensor's is not looked at, which would stop the device.

    Raises:
        ValueError: it is 0 or less.
    """
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")


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
    check_mask(mask, values.shape)
    weight, size = mask.to(values.dtype), values.shape[mask.ndim :].numel()
    if mask.ndim < values.ndim:
        values = values.flatten(mask.ndim).sum(-1)  # first, so that the mask is applied to few numbers
    kept = torch.where(weight > 0, values * weight, torch.zeros((), dtype=values.dtype, device=values.device))
    return safe_divide(kept.sum(), weight.sum() * size)


def mean_of_samples(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over what counts of each sample, then over samples: a short one counts as much as a long one.

    Args:
        values: (batch, tokens).
        mask: as for `masked_mean`; a sample counts with the largest of its weights, an empty one not at all.

    Raises:
        ShapeError: the mask fits neither way.
    """
    if mask is None:
        return masked_mean(values)
    check_mask(mask, values.shape)
    weight = mask.to(values.dtype).reshape(mask.shape + (1,) * (2 - mask.ndim)).expand_as(values)
    kept = torch.where(weight > 0, values * weight, torch.zeros_like(values))
    return masked_mean(safe_divide(kept.sum(1), weight.sum(1)), weight.amax(1))


def token_weights(mask: Tensor, x: Tensor) -> Tensor:
    """A mask over (batch, tokens) or (batch,) as weights (batch, tokens); tokens are the dimension -2 of `x`.

    Raises:
        ShapeError: the mask fits neither way.
    """
    shape = torch.Size((x.shape[0], x.shape[-2]))
    check_mask(mask, shape)
    return mask.to(x.dtype).reshape(mask.shape + (1,) * (2 - mask.ndim)).expand(shape)


def safe_divide(x: Tensor, by: Tensor) -> Tensor:
    """`x / by` for a divisor that is not negative; `x` itself where the divisor is 0."""
    return x / torch.where(by > 0, by, torch.ones_like(by))


def l2_normalise(x: Tensor, dim: int = -1, eps: float = 1e-12) -> Tensor:
    """`x / max(|x|, eps)` along `dim`; a zero vector stays zero and has a finite gradient."""
    return F.normalize(x, dim=dim, eps=eps)


def log_softmax(logits: Tensor, temperature: float | Tensor, dim: int) -> Tensor:
    """`log softmax(logits / temperature)`; the division is left out at temperature 1."""
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        temperature = torch.as_tensor(spread(temperature, logits, dim)).unsqueeze(dim)
    elif not isinstance(temperature, Tensor) and temperature == 1:
        return F.log_softmax(logits, dim)
    return F.log_softmax(logits / temperature, dim)


def spread(temperature: float | Tensor, logits: Tensor, dim: int) -> float | Tensor:
    """A temperature that broadcasts against `logits` without its dimension `dim`.

    Raises:
        ShapeError: a tensor that has neither that shape nor that of its leading dimensions.
    """
    if not isinstance(temperature, Tensor) or temperature.ndim == 0:
        return temperature
    shape = logits.select(dim, 0).shape
    if temperature.shape != shape[: temperature.ndim]:
        raise ShapeError(
            f"a temperature of shape {tuple(temperature.shape)} does not fit logits of shape {tuple(logits.shape)}: "
            f"expected a number, or {tuple(shape)} or its leading dimensions."
        )
    return temperature.reshape(temperature.shape + (1,) * (len(shape) - temperature.ndim)).to(logits.dtype)


def softened_kl(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, dim: int, floor: float | None = None
) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` along `dim`, the other dimensions kept.

    Both sides stay in log space: a separate log of a softmax is -inf for confident teachers. `floor` is added to the
    teacher's probabilities, which then sum to more than 1.
    """
    log_s, log_t = log_softmax(student, temperature, dim), log_softmax(teacher, temperature, dim)
    if floor is not None:
        log_t = torch.logaddexp(log_t, log_t.new_full((), math.log(floor)))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim) * spread(temperature, student, dim) ** 2


def to_smaller(a: Tensor, b: Tensor, pool: Literal["avg", "max"] = "avg") -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width of the two."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    shrink = F.adaptive_avg_pool2d if pool == "avg" else F.adaptive_max_pool2d
    small = [x if x.shape[2:] == size else shrink(x, size) for x in (a, b)]
    return small[0], small[1]


def softened_js(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, dim: int, beta: float | Tensor = 0.5
) -> Tensor:
    """`T^2 * (beta * KL(t || m) + (1 - beta) * KL(s || m))` with `m = beta * t + (1 - beta) * s`, in log space."""
    log_s, log_t = log_softmax(student, temperature, dim), log_softmax(teacher, temperature, dim)
    logs = [x.log() if isinstance(x, Tensor) else math.log(x) for x in (1 - beta, beta)]
    log_m = torch.logaddexp(log_s + logs[0], log_t + logs[1])
    both = (1 - beta) * log_s.exp() * (log_s - log_m) + beta * log_t.exp() * (log_t - log_m)
    return both.sum(dim) * spread(temperature, student, dim) ** 2


def pearson(x: Tensor, y: Tensor, dim: int, weight: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of `x` and `y` along `dim`, `eps` added to the product of norms (constants give 0).

    `weight` broadcasts against `x`; entries of weight 0 must be finite.
    """
    if weight is None:
        x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    else:
        total, root = weight.expand_as(x).sum(dim, keepdim=True), weight.sqrt()
        x = (x - safe_divide((x * weight).sum(dim, keepdim=True), total)) * root
        y = (y - safe_divide((y * weight).sum(dim, keepdim=True), total)) * root
    norms: Tensor = torch.linalg.vector_norm(x, dim=dim) * torch.linalg.vector_norm(y, dim=dim)
    return (x * y).sum(dim) / (norms + eps)


def as_samples(student: Tensor, teacher: Tensor, mask: Tensor | None, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Both as (batch, features), and one weight per sample; samples of weight 0 are set to 0, whatever they hold.

    Raises:
        ShapeError: the numbers of samples differ, or the mask is not (batch,).
    """
    if student.ndim < 2 or teacher.ndim < 2 or student.shape[0] != teacher.shape[0]:
        raise ShapeError(
            f"`{loss}` relates the samples of a batch and needs as many of the student as of the teacher, "
            f"(batch, ...), got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    batch = student.shape[0]
    s = student.reshape(batch, student.shape[1:].numel())
    t = teacher.reshape(batch, teacher.shape[1:].numel())
    if mask is None:
        return s, t, s.new_ones(batch)
    check_mask(mask, s.shape[:1])
    out = ~(mask > 0)[:, None]
    return s.masked_fill(out, 0), t.masked_fill(out, 0), mask.to(s.dtype)


def pairs(weight: Tensor) -> Tensor:
    """(batch, batch): the products of two samples' weights."""
    return weight[:, None] * weight


def pairwise_distance(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Euclidean distances of all rows of `x` to all of `y` (itself if left out), with gradient 0 where they are 0.

    Exact for near-duplicates, which the usual `|a|^2 + |b|^2 - 2ab` loses in fp32 to cancellation. Where that is many
    numbers it is computed that way in fp64, around the mean, which is several times as fast as sums of squared
    differences; vectors that are closer than rounding can tell there (of 64 features 2e-7, of 10,000 2e-6 of their
    distance from the mean) then count as equal.
    """
    other = x if y is None else y
    small = x.numel() * other.shape[-2] < PAIRED
    if small or x.dtype == torch.float64 or x.device.type == "mps":  # the last two have nothing more precise
        return torch.cdist(x, other, compute_mode="donot_use_mm_for_euclid_dist")
    mean = x.detach().mean(-2, keepdim=True)  # moves both alike: the distances have no gradient to it
    a = x.double().sub_(mean)
    b = a if y is None else y.double().sub_(mean)
    lengths = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    squares = lengths - 2 * (a @ b.mT)
    # what rounding may leave of the difference of two sums of so many products
    same = squares <= 2 * x.shape[-1] * torch.finfo(torch.float64).eps * lengths
    return squares.masked_fill(same, 1).sqrt().masked_fill(same, 0).to(x.dtype)


def cosines(x: Tensor) -> Tensor:
    """Cosines of all pairs of rows (batch, batch); a zero vector has cosine 0 to everything."""
    unit = l2_normalise(x)
    return unit @ unit.T


def angles(x: Tensor) -> Tensor:
    """(batch, batch, batch): entry [i, j, k] is the cosine of the angle at `i` between `j` and `k`."""
    rays = l2_normalise(x - x[:, None])
    return rays @ rays.transpose(1, 2)
