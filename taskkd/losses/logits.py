"""Losses on logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_same_shape, full_precision, log_softmax, masked_mean, softened_kl

__all__ = ["kl_divergence", "logit_mse", "soft_cross_entropy"]


def _class_dim(student: Tensor, dim: int | None, loss: str) -> int:
    if dim is not None:
        return dim
    if student.ndim == 2:
        return 1
    raise ShapeError(
        f"`{loss}` got logits of shape {tuple(student.shape)}: say which dimension holds the classes, "
        "dim=1 for (batch, classes, height, width) or dim=-1 for (batch, tokens, classes)."
    )


def _check_temperature(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")


@full_precision
def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Soft targets: `T^2 * KL(softmax(teacher/T) || softmax(student/T))`, mean over every non-class dimension.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".

    Scaling: for (batch, classes) equal to the usual `batchmean`. For (batch, classes, H, W) the common code divides by
    the batch alone and is `H * W` times larger; TAKD, DGKD and Patient KD divide by `batch * classes` and are
    `classes` times smaller; several packages leave out `T^2`.

    Args:
        student: logits, (batch, classes), (batch, classes, H, W) or (batch, tokens, classes).
        teacher: logits of the same shape.
        temperature: `T`, positive; a number or a tensor that broadcasts against the result.
        dim: the class dimension; may be left out for two dimensions only.
        mask: weights or booleans over the non-class dimensions or the leading ones of them.

    Returns:
        A scalar; 0 where the logits agree up to a constant.

    Raises:
        ShapeError: shapes differ, or `dim` is missing for more than two dimensions.
        ValueError: `temperature` is not positive.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(kl_divergence(s, t, temperature=2.0).item(), 4)
        1.8485
    """
    check_same_shape(student, teacher, "kl_divergence")
    _check_temperature(temperature)
    dim = _class_dim(student, dim, "kl_divergence")
    if mask is None and not isinstance(temperature, Tensor) and student.numel() > 0:  # the same in fewer kernels
        log_s, log_t = log_softmax(student, temperature, dim), log_softmax(teacher, temperature, dim)
        rows = student.numel() // student.shape[dim]
        return F.kl_div(log_s, log_t, reduction="sum", log_target=True) * (temperature**2 / rows)
    return masked_mean(softened_kl(student, teacher, temperature, dim), mask)


@full_precision
def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`-T^2 * sum softmax(teacher/T) * log softmax(student/T)`, mean over every non-class dimension.

    Same gradient as `kl_divergence`; the value has the teacher's entropy added, so it is not 0 where they agree.
    Source: Hinton et al. 2015, eq. 2 with soft targets. BYOT and TOFD use this form without the entropy taken off.

    Args, returns, raises: as `kl_divergence`.
    """
    check_same_shape(student, teacher, "soft_cross_entropy")
    _check_temperature(temperature)
    dim = _class_dim(student, dim, "soft_cross_entropy")
    log_s, log_t = log_softmax(student, temperature, dim), log_softmax(teacher, temperature, dim)
    return masked_mean(-(log_t.exp() * log_s).sum(dim) * temperature**2, mask)


@full_precision
def logit_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of logits, mean over every dimension.

    Source: Ba & Caruana 2014; the limit of `kl_divergence` for a large temperature is `logit_mse / 2` (of centred
    logits) when both sum over classes.

    Args:
        student, teacher: logits of one shape.
        mask: weights or booleans over leading dimensions.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "logit_mse")
    return masked_mean((student - teacher).square(), mask)
