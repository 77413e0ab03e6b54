"""A small problem in the place of real images: 8x8 glyphs of ten classes, shifted and noisy, with a trained teacher."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


def glyphs(count: int, seed: int = 0, noise: float = 0.6) -> tuple[Tensor, Tensor]:
    """(count, 1, 8, 8) images and their classes: a fixed pattern for each class, moved by up to a pixel."""
    patterns = torch.randn(CLASSES, 8, 8, generator=torch.Generator().manual_seed(77)).sign()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    moves = torch.randint(-1, 2, (count, 2), generator=generator).tolist()
    images = torch.stack([patterns[c].roll(m, (0, 1)) for c, m in zip(labels, moves, strict=True)])
    return (images + noise * torch.randn(images.shape, generator=generator))[:, None], labels


def batches(count: int = 512, size: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    images, labels = glyphs(count, seed)
    return [{"x": images[i : i + size], "y": labels[i : i + size]} for i in range(0, count, size)]


class Net(nn.Module):
    """features -> mean over quarters -> logits."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3))
            self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.features(x))
        out: Tensor = self.head(F.adaptive_avg_pool2d(maps, 2).flatten(1))
        return out


@cache
def _teacher_state() -> dict[str, Tensor]:
    net = Net(24, 3)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for epoch in range(6):
        for batch in batches(1024, seed=100 + epoch):
            F.cross_entropy(net(batch["x"]), batch["y"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.state_dict()


def teacher() -> Net:
    net = Net(24)
    net.load_state_dict(_teacher_state())
    return net.eval()


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """On images that no training has seen."""
    images, labels = glyphs(512, seed=999)
    return float((network.eval()(images).argmax(1) == labels).float().mean())
