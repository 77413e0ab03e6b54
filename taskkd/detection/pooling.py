"""Regions pooled from feature maps: of each region from the level of its size, or from every level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["levels_of", "pool_all_levels", "pool_own_level"]


def levels_of(boxes: Tensor, strides: Sequence[float]) -> Tensor:
    """(R,) int64: the level that a box belongs to, the one whose stride is nearest to `2^floor(4 + log2(side / 224))`.

    Source: Lin et al. 2017 (FPN), with any strides instead of consecutive powers of 2: a box of 224 pixels belongs to
    stride 16.

    Args:
        boxes: (R, 4) x1 y1 x2 y2 in pixels.
        strides: of each level, in pixels.
    """
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=1e-6)
    wanted = (4 + (area.sqrt() / 224).log2() + 1e-6).floor()
    known = wanted.new_tensor([math.log2(s) for s in strides])
    return (wanted[:, None] - known).abs().argmin(1)


def _pool(x: Tensor, rois: Tensor, shape: tuple[int, int], size: int) -> Tensor:
    """(R, C, size, size) of the rois (R, 5) `image x1 y1 x2 y2` in pixels of images of this (height, width)."""
    from torchvision.ops import roi_align

    x = x if x.dtype == torch.float64 else x.float()  # half precision would move the regions by pixels
    by = rois.new_tensor([1, x.shape[3] / shape[1], x.shape[2] / shape[0]])[[0, 1, 2, 1, 2]]
    pooled: Tensor = roi_align(x, (rois * by).to(x.dtype), size, sampling_ratio=2, aligned=True)
    return pooled


def _rois(boxes: Sequence[Tensor]) -> Tensor:
    """(R, 5): the number of the image before each box."""
    images = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    return torch.cat([torch.cat([i, b], 1) for i, b in zip(images, boxes, strict=True)])


def pool_all_levels(
    maps: Sequence[Tensor], boxes: Sequence[Tensor], shape: tuple[int, int], size: int = 7
) -> list[Tensor]:
    """Every region from every level, (R, C, size, size) each, by RoIAlign.

    Args:
        maps: (N, C, h, w) of each level; they may differ in channels.
        boxes: of each image (r, 4) x1 y1 x2 y2 in pixels; no gradient flows to them.
        shape: (height, width) of the images with padding, in those pixels.
        size: cells of a side.
    """
    rois = _rois(boxes).detach()
    return [_pool(x, rois, shape, size) for x in maps]


def pool_own_level(maps: Sequence[Tensor], boxes: Sequence[Tensor], shape: tuple[int, int], size: int = 7) -> Tensor:
    """Every region from the level that it belongs to (`levels_of`), (R, C, size, size), by RoIAlign.

    Args:
        maps: (N, C, h, w) of each level; where they differ in channels, narrower ones are filled up with zeros.
        boxes, shape, size: see `pool_all_levels`.
    """
    rois = _rois(boxes).detach()
    level = levels_of(rois[:, 1:], [shape[0] / x.shape[2] for x in maps])
    order = level.argsort(stable=True)
    each = torch.split(rois[order], level.bincount(minlength=len(maps)).tolist())
    pooled = [_pool(x, r, shape, size) for x, r in zip(maps, each, strict=True)]
    widest = max(x.shape[1] for x in pooled)
    filled = [x if x.shape[1] == widest else F.pad(x, (0, 0, 0, 0, 0, widest - x.shape[1])) for x in pooled]
    return torch.cat(filled)[order.argsort()]
