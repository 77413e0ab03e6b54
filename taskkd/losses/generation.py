"""Masked generative distillation: the teacher's map is generated from what a random mask leaves of the student's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taskkd.losses.primitives import check_mask, check_same_shape, full_precision

__all__ = ["conv_generator", "kept_cells", "masked_generative_loss"]


def conv_generator(channels: int) -> nn.Sequential:
    """The generator of Yang Z. et al. 2022: a 3x3 convolution, ReLU, a 3x3 convolution, all of `channels`."""
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(inplace=True), second)


def kept_cells(like: Tensor, masked: float, *, draw: Tensor | None = None) -> Tensor:
    """(N, 1, h, w), 0 in a random share `masked` of the cells of a map, else 1.

    Args:
        like: (N, C, h, w).
        masked: the share.
        draw: (N, 1, h, w) in [0, 1); None: drawn from the global generator, as dropout does.
    """
    if draw is None:
        draw = torch.rand(len(like), 1, *like.shape[2:], device=like.device)
    return (draw <= 1 - masked).to(like.dtype)


@full_precision
def masked_generative_loss(
    student: Tensor, teacher: Tensor, *, generator: nn.Module, kept: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`sum (G(s M) - t)^2`, mean over the batch: the teacher's map from what a mask leaves of the student's.

    Source: Yang Z., Li, Shao, Shi, Yuan, Yuan 2022, "Masked Generative Distillation".

    Scaling: a sum over channels and cells, as in the authors' code.

    Args:
        student, teacher: (N, C, h, w).
        generator: `G`.
        kept: `M`, (N, 1, h, w), as of `kept_cells`.
        mask: (N, h, w), the cells that count in the sum; those left out are not seen by the generator either.

    Raises:
        ShapeError: shapes differ.
    """
    check_same_shape(student, teacher, "masked_generative_loss")
    seen = kept.to(student.dtype)
    if mask is not None:
        check_mask(mask, student[:, 0].shape)
        seen = seen * mask[:, None]
    squares = (generator(student * seen) - teacher).square()
    if mask is not None:
        squares = squares.masked_fill(~mask[:, None].bool(), 0)
    total: Tensor = squares.sum()
    return total / max(len(student), 1)
