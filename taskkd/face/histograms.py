"""Soft histograms of similarities: how many lie near each node, by a Gaussian."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
        weight: of the values, (..., N), 0: not counted; None: 1 each.

    Returns:
        (..., bins), which sums to 1; 0 of no values.

    Example:
        >>> soft_histogram(torch.tensor([0.0, 0.0]), bins=2, sigma=0.5)
        tensor([0.6225, 0.3775])
    """
    width, middle = (high - low) / bins, (low + high) / 2
    furthest = max(abs(1.0 - middle), abs(-1.0 - middle), high - middle)
    inside = max(1, min(math.isqrt(bins), int(2 * REACH * sigma**2 / (furthest * width))))
    offsets = torch.arange(inside, dtype=values.dtype, device=values.device).sub((inside - 1) / 2).mul(width)
    centres = torch.arange(-(-bins // inside), dtype=values.dtype, device=values.device).mul(inside * width)
    centres = centres + (low + (inside - 1) / 2 * width)
    scale = 1 / sigma**2
    near = (values[..., None] - centres).square().mul(-scale / 2).exp()
    if weight is not None:
        near = near * weight[..., None]
    tilt = ((values - middle)[..., None] * (offsets * scale)).exp()
    constant = ((centres[:, None] - middle) * offsets + offsets.square() / 2).mul(-scale).exp()
    counts = ((near.mT @ tilt) * constant).flatten(-2)[..., :bins]
    return safe_divide(counts, counts.sum(-1, keepdim=True))
