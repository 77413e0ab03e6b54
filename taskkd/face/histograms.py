"""Soft histograms of similarities: how many lie near each node, by a Gaussian."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taskkd.losses.primitives import safe_divide

__all__ = ["dense_histogram", "soft_histogram"]

#: the largest exponent in a factor of the kernel, far from overflow and from lost digits
REACH = 10.0


def dense_histogram(values: Tensor, nodes: Tensor, *, sigma: float, weight: Tensor | None = None) -> Tensor:
    """`soft_histogram` at any nodes, from the kernel of each value at each node.

    Args:
        values: (..., N).
        nodes: (R,).
        sigma: of the Gaussian.
        weight: of the values, (..., N); None: 1 each.

    Returns:
        (..., R), which sums to 1; 0 of no values.
    """
    kernel = (values[..., None] - nodes).square().mul(-0.5 / sigma**2).exp()
    if weight is not None:
        kernel = kernel * weight[..., None]
    counts = kernel.sum(-2)
    return safe_divide(counts, counts.sum(-1, keepdim=True))


def soft_histogram(
    values: Tensor,
    *,
    bins: int = 1000,
    low: float = 0.0,
    high: float = 1.0,
    sigma: float = 0.1,
    weight: Tensor | None = None,
) -> Tensor:
    """`h_r = sum_i exp(-(s_i - t_r)^2 / (2 sigma^2))` at `t_r = low + r (high - low) / bins`, over its sum.

    Source: Huang et al. 2020 (DDL), whose code has these defaults.

    Exact, and yet each value meets about `2 sqrt(bins)` numbers instead of `bins`: of a node `t = T + u`, `T` the
    middle of its block, the kernel is `exp(-(s - T)^2 / 2 sigma^2) exp(s u / sigma^2)` times a constant, so that all
    blocks with all offsets are a product of matrices. All factors are positive: tails keep their digits in fp32.

    Args:
        values: (..., N), cosines.
        bins: the number of nodes. A hundred give the same KL within a tenth of a per cent.
        low, high: the range of the nodes, the upper end excluded; values outside count with their tails.
        sigma: of the Gaussian.
        weight: of the values, (..., N), constants, 0: not counted; None: 1 each.

    Returns:
        (..., bins), which sums to 1; 0 of no values.

    Example:
        >>> soft_histogram(torch.tensor([0.0, 0.0]), bins=2, sigma=0.5)
        tensor([0.6225, 0.3775])
    """
    blocks = _blocks(bins, low, high, sigma, values.dtype, values.device)
    weight = torch.ones((), dtype=values.dtype, device=values.device) if weight is None else weight
    counts = _Counts.apply(values, weight, *blocks, (low + high) / 2, sigma).flatten(-2)[..., :bins]
    return safe_divide(counts, counts.sum(-1, keepdim=True))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _blocks(
    bins: int, low: float, high: float, sigma: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Middles of blocks (B,), offsets in them over `sigma^2` (J,), and the constant of each node, (B, J)."""
    width, middle = (high - low) / bins, (low + high) / 2
    furthest = max(1.0 + abs(middle), high - middle)
    inside = max(1, min(math.isqrt(bins), int(2 * REACH * sigma**2 / (furthest * width))))
    offsets = (torch.arange(inside, dtype=torch.float64) - (inside - 1) / 2) * width
    centres = low + (torch.arange(-(-bins // inside), dtype=torch.float64) * inside + (inside - 1) / 2) * width
    constant = (((centres[:, None] - middle) * offsets + offsets.square() / 2) / -(sigma**2)).exp()
    return tuple(x.to(device, dtype) for x in (centres, offsets / sigma**2, constant))  # type: ignore[return-value]


class _Counts(torch.autograd.Function):
    """The histogram before it is divided by its sum, (..., B, J), keeping B + J numbers of each value."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        centres: Tensor,
        offsets: Tensor,
        constant: Tensor,
        middle: float,
        sigma: float,
    ) -> Tensor:
        near = (values[..., None] - centres).square_().mul_(-0.5 / sigma**2).exp_().mul_(weight[..., None])
        tilt = ((values[..., None] - middle) * offsets).exp_()
        ctx.save_for_backward(values, near, tilt, centres, offsets, constant)
        ctx.sigma = sigma
        return (near.mT @ tilt) * constant

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, near, tilt, centres, offsets, constant = ctx.saved_tensors
        gradient = gradient * constant
        by_block, by_offset = (tilt @ gradient.mT).mul_(near), (near @ gradient).mul_(tilt)
        slope = (by_block @ centres - values * by_block.sum(-1)) / ctx.sigma**2 + by_offset @ offsets
        return slope, *[None] * 6
