"""Losses that compare channels as distributions over space."""

from __future__ import annotations

from torch import Tensor

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean, softened_kl

__all__ = ["channel_wise"]


@full_precision
def channel_wise(
    student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 4.0, mask: Tensor | None = None
) -> Tensor:
    """Channel-wise distillation: each channel's softmax over space, `T^2 * KL(teacher || student)`.

    Source: Shu, Liu, Gao, Yan, Shen 2021, "Channel-wise Knowledge Distillation for Dense Prediction" (temperature 4).

    Scaling: mean over batch and channels. The authors' formula is the same (their alpha is 3 for logits, 50 for
    features).

    Args:
        student, teacher: (batch, channels, H, W) of one shape.
        temperature: `T`, positive.
        mask: weights or booleans over (batch,) or (batch, channels).

    Raises:
        ShapeError: shapes differ or there is no spatial dimension.
        ValueError: `temperature` is not positive.
    """
    check_same_shape(student, teacher, "channel_wise")
    if student.ndim < 3:
        raise ShapeError(f"`channel_wise` needs (batch, channels, height, width), got {tuple(student.shape)}.")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    return masked_mean(softened_kl(student.flatten(2), teacher.flatten(2), temperature, 2), mask)
