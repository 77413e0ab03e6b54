"""Losses over several layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskkd.losses.primitives import check_same_shape, full_precision, l2_normalise, masked_mean

__all__ = ["patience"]


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
