"""Networks as methods see them: embeddings, their size, and the taps of stages."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class TinyFace(nn.Module):
    """Two convolutional stages and an embedding of a few hundred weights."""

    def __init__(self, width: int = 4, size: int = 8, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
            self.layer2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.head = nn.Linear(2 * width, size)
        self.embedding_size, self.identities = size, 6
        self.centres: Tensor | None = None
        self.views = SimpleNamespace(stages=("layer1", "layer2"))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.layer2(self.layer1(images.float()).relu()).relu()
        return {"embeddings": self.head(x.mean((2, 3)))}


def batch(count: int = 12, *, seed: int = 0) -> dict[str, Tensor]:
    """Images, four identities among them, and branches of DDL: 2 + 2 of identities, then pairs."""
    generator = torch.Generator().manual_seed(seed)
    branch = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    return {
        "images": torch.rand(count, 3, 16, 16, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator),
        "labels": torch.arange(count) // 3,
        "id": torch.arange(count) * 2,
        "branch": branch[:count],
    }
