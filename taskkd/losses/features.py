"""Losses on features of one shape (an adapter makes it one shape where it is not)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from taskkd.losses.primitives import check_same_shape, full_precision, l2_normalise, masked_mean

__all__ = ["cosine", "mse"]


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
