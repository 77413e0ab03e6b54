"""IResNet, the residual network of face recognition, under the names of insightface and of TFace.

Both normalise before the first convolution of a block and add nothing after the sum (ArcFace, 2019); they differ in the
shortcut of the first block and in the last normalisation, so neither's weights fit the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["IR", "LAYERS", "IResNet"]

#: blocks of each stage
LAYERS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}


def _conv(inside: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False)


def _downsample(inside: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_conv(inside, out, 1, stride), nn.BatchNorm2d(out))


class Block(nn.Module):
    """A block of insightface's IResNet; the second convolution has the stride."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = _conv(inside, out, 3)
        self.bn2 = nn.BatchNorm2d(out)
        self.prelu = nn.PReLU(out)
        self.conv2 = _conv(out, out, 3, stride)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _downsample(inside, out, stride) if stride != 1 or inside != out else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + shortcut


class IResNet(nn.Module):
    """insightface's IResNet (arcface_torch): its names, shapes and order of tensors.

    Each stage halves the map and doubles the channels; the embedding is a linear layer on the whole last map, followed
    by a batch normalisation whose weight stays 1. 18, 34, 50 and 100 layers at the defaults: 24.0, 34.1, 43.6 and 65.2
    million parameters.

    Args:
        layers: blocks of each stage; four in the published networks.
        width: channels of the first stage.
        embedding_size: of the embedding.
        size: side of the images; the linear layer fits no other.
        dropout: before the linear layer.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        width: int = 64,
        embedding_size: int = 512,
        size: int = 112,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.stages = tuple(f"layer{number}" for number in range(1, len(layers) + 1))
        inside = width
        for level, (name, count) in enumerate(zip(self.stages, layers, strict=True)):
            out = width * 2**level
            blocks = [Block(inside if i == 0 else out, out, 2 if i == 0 else 1) for i in range(count)]
            self.add_module(name, nn.Sequential(*blocks))
            inside = out
        self.bn2 = nn.BatchNorm2d(inside)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inside * side(size, len(layers)) ** 2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, size, size), normalised -> (N, embedding_size)."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        x = torch.flatten(self.bn2(x), 1)
        embeddings: Tensor = self.features(self.fc(self.dropout(x)))
        return embeddings


class IRBlock(nn.Module):
    """A block of TFace's IR; where the channels stay, its shortcut is every second pixel, without weights."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if inside == out else _downsample(inside, out, stride)
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inside),
            _conv(inside, out, 3),
            nn.BatchNorm2d(out),
            nn.PReLU(out),
            _conv(out, out, 3, stride),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return out


class IR(nn.Module):
    """IResNet as TFace, AdaFace and CVLface have it (IR-18 to IR-101, without squeeze-and-excitation).

    The last normalisation has no parameters, the first stage's shortcut none, and the blocks of all stages are numbered
    through (`body.N`); else as `IResNet`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        width: int = 64,
        embedding_size: int = 512,
        size: int = 112,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(_conv(3, width, 3), nn.BatchNorm2d(width), nn.PReLU(width))
        last = width * 2 ** (len(layers) - 1)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(last * side(size, len(layers)) ** 2, embedding_size),
            nn.BatchNorm1d(embedding_size, affine=False),
        )
        blocks: list[nn.Module] = []
        stages: list[str] = []
        inside = width
        for level, count in enumerate(layers):
            out = width * 2**level
            blocks += [IRBlock(inside if i == 0 else out, out, 2 if i == 0 else 1) for i in range(count)]
            stages.append(f"body.{len(blocks) - 1}")
            inside = out
        self.body = nn.Sequential(*blocks)
        self.stages = tuple(stages)
        start_like_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, size, size), normalised -> (N, embedding_size)."""
        embeddings: Tensor = self.output_layer(self.body(self.input_layer(x)))
        return embeddings


def side(size: int, halvings: int) -> int:
    """Side of a map after so many convolutions of stride 2, each of which rounds up."""
    return math.ceil(size / (1 << halvings))


def start_like_he(net: nn.Module) -> None:
    """Convolutions and linear layers as He et al. (2015), by what goes out of them."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
