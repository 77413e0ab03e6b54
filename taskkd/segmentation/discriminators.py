"""Discriminators of maps of scores: which of two networks, or of two domains, made this map?

Both are called as `taskkd.Adversarial` calls them, with a map and what it is conditioned on, and give a map of scores.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import ShapeError, TaskkdError, nearest

__all__ = [
    "PatchDiscriminator",
    "SelfAttention",
    "SelfAttentionDiscriminator",
    "Small",
    "SpectralConv2d",
    "conditioned",
]

#: what is done to maps that are too small
Small: TypeAlias = Literal["resize", "pad"]
Preprocessing: TypeAlias = Literal["batch_norm", "tanh"]


def probabilities(x: Tensor) -> Tensor:
    """The softmax over classes of logits (batch, classes, h, w), in fp32 (fp64) without autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).softmax(1)


def conditioned(x: Tensor, *conditions: Tensor, align_corners: bool = False) -> Tensor:
    """Conditions before the map in its channels, bilinearly resized to its height and width.

    Args:
        x: (batch, channels, h, w).
        conditions: (batch, any channels, any height, any width), such as the images.
        align_corners: of the resizing.

    Raises:
        ShapeError: one is not of four dimensions, or of another batch.
    """
    for condition in (x, *conditions):
        if condition.ndim != 4 or len(condition) != len(x):
            raise ShapeError(
                "a discriminator of maps takes tensors (batch, channels, height, width) of one batch, got "
                f"{', '.join(str(tuple(t.shape)) for t in (x, *conditions))}."
            )
    sized = [
        c if c.shape[2:] == x.shape[2:] else F.interpolate(c, x.shape[2:], mode="bilinear", align_corners=align_corners)
        for c in conditions
    ]
    return torch.cat([*sized, x], 1)


def _large_enough(x: Tensor, least: int, small: Small) -> Tensor:
    """A map whose sides are at least `least`."""
    height, width = x.shape[2:]
    if min(height, width) >= least:
        return x
    if small == "pad":
        return F.pad(x, (0, max(least - width, 0), 0, max(least - height, 0)))
    scale = least / min(height, width)  # of both sides: the shapes stay what they are
    size = [max(least, round(side * scale)) for side in (height, width)]
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _check_small(small: str) -> None:
    if small not in get_args(Small):
        raise TaskkdError(f"`small` is 'resize' or 'pad', got {small!r}{nearest(str(small), get_args(Small))}.")


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight is divided by its largest singular value, found by one power iteration a forward.

    Source: Miyato et al. 2018. In torch's own parametrisation the iteration starts from the other side, so that its
    numbers are others; the limit is the same.

    Args:
        inputs, outputs, size, stride, padding: of the convolution.
        overwrite: the vectors are overwritten past autograd, as in the code that structured knowledge distillation
            uses: of two forwards before a backward, that of the first uses the vectors of the second, which is no
            gradient of the loss. Default False.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self, inputs: int, outputs: int, size: int, *, stride: int = 1, padding: int = 0, overwrite: bool = False
    ) -> None:
        super().__init__(inputs, outputs, size, stride, padding)
        self.overwrite = overwrite
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(inputs * size * size), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        if self.training:
            self._iterate(flat.detach())
        u, v = (self.u, self.v) if self.overwrite else (self.u.clone(), self.v.clone())
        weight = self.weight / u.dot(flat.mv(v))
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out

    @torch.no_grad()
    def _iterate(self, flat: Tensor) -> None:
        v = _unit(flat.T.mv(self.u))
        u = _unit(flat.mv(v))
        for kept, new in ((self.u, u), (self.v, v)):
            (kept.data if self.overwrite else kept).copy_(new)


def _unit(x: Tensor) -> Tensor:
    unit: Tensor = x / (torch.linalg.vector_norm(x) + 1e-12)
    return unit


class SelfAttention(nn.Module):
    """`x + gamma * attention(x)` over all positions of a map, `gamma` 0 at first.

    Source: Zhang H. et al. 2019 (SAGAN): queries and keys of an eighth of the channels, scores without scaling. Memory
    grows with the square of the positions.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(channels // 8, 1)
        self.query, self.key = nn.Conv2d(channels, narrow, 1), nn.Conv2d(channels, narrow, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        # Written out: the fused kernels have no second derivative, which a gradient penalty needs.
        found = value @ torch.softmax(query.mT @ key, -1).mT
        out: Tensor = self.gamma * found.view_as(x) + x
        return out


class SelfAttentionDiscriminator(nn.Module):
    """Four spectrally normalised 4x4 convolutions of stride 2, self-attention after the third and the fourth, a plain
    4x4 convolution to scores.

    Source: Liu et al. 2019 (structured knowledge distillation), after Zhang H. et al. 2019 (SAGAN). A map of 64 or 65
    pixels gives one score, a larger one a map of them.

    Args:
        channels: of the map and the conditions together, any number.
        width: of the first convolution, doubled by each of the next three. Default 64.
        preprocessing: of the input: "batch_norm", with the statistics of the batch, "tanh", or None.
        small: maps below 64 pixels are bilinearly enlarged, or padded with zeros (after the preprocessing).
        align_corners: of the resizing of conditions; the authors' True. Default False.
        overwrite: see `SpectralConv2d`.

    Raises:
        TaskkdError: an option is none of those named.
    """

    #: the smallest height and width that leave a score
    LEAST = 64

    def __init__(
        self,
        channels: int,
        *,
        width: int = 64,
        preprocessing: Preprocessing | None = None,
        small: Small = "resize",
        align_corners: bool = False,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        _check_small(small)
        known = {"batch_norm": nn.BatchNorm2d(channels), "tanh": nn.Tanh(), None: nn.Identity()}
        if preprocessing not in known:
            raise TaskkdError(
                f"`preprocessing` is 'batch_norm', 'tanh' or None, got {preprocessing!r}"
                f"{nearest(str(preprocessing), ('batch_norm', 'tanh'))}."
            )
        self.channels, self.small, self.align_corners = channels, small, align_corners
        self.preprocessing = known[preprocessing]
        widths = [channels, *(width * 2**i for i in range(4))]
        pairs = pairwise(widths)
        self.convolutions = nn.ModuleList(
            SpectralConv2d(i, o, 4, stride=2, padding=1, overwrite=overwrite) for i, o in pairs
        )
        self.attentions = nn.ModuleList([nn.Identity(), nn.Identity(), *(SelfAttention(w) for w in widths[3:])])
        self.last = nn.Conv2d(widths[-1], 1, 4)

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """Scores (batch, 1, h', w') of maps (batch, channels, h, w), given conditions of any height and width."""
        x = self.preprocessing(conditioned(x, *conditions, align_corners=self.align_corners))
        x = _large_enough(x, self.LEAST, self.small)
        for convolution, attention in zip(self.convolutions, self.attentions, strict=True):
            x = attention(F.leaky_relu(convolution(x), 0.1))
        scores: Tensor = self.last(x)
        return scores


class PatchDiscriminator(nn.Module):
    """Five 4x4 convolutions of stride 2; each score is of a patch of the map.

    Source: Tsai et al. 2018 (AdaptSegNet's `FCDiscriminator`), as in Kothandaraman et al. 2021.

    Args:
        channels: of the map and the conditions together.
        width: of the first convolution, doubled by each of the next three. Default 64.
        small: maps below 32 pixels are bilinearly enlarged, or padded with zeros.

    Raises:
        TaskkdError: `small` is neither.
    """

    #: the smallest height and width that leave a score
    LEAST = 32

    def __init__(self, channels: int, *, width: int = 64, small: Small = "resize") -> None:
        super().__init__()
        _check_small(small)
        self.channels, self.small = channels, small
        widths = [channels, *(width * 2**i for i in range(4)), 1]
        pairs = pairwise(widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in pairs)

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """Scores (batch, 1, h', w') of maps (batch, channels, h, w), given conditions of any height and width."""
        x = _large_enough(conditioned(x, *conditions), self.LEAST, self.small)
        for convolution in self.convolutions[:-1]:
            x = F.leaky_relu(convolution(x), 0.2)
        scores: Tensor = self.convolutions[-1](x)
        return scores
