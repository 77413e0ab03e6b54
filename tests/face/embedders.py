"""Small face models for tests of methods: no convolutions, everything that methods look at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

IDENTITIES = 6


class Embedder(nn.Module):
    """Images (N, 3, 2, 2) to raw embeddings."""

    def __init__(self, size: int = 8, seed: int = 0, centres: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, size))
            self.centres = torch.randn(IDENTITIES, size) if centres else None
        self.embedding_size, self.identities = size, IDENTITIES
        self.views: Any = SimpleNamespace(stages=())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"embeddings": self.backbone(images)}


def pair(student: int = 8, teacher: int = 8) -> tuple[Embedder, Embedder]:
    return Embedder(student, 1), Embedder(teacher, 2, centres=True)


def batch(labels: list[int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Identities with one sample, with several, and a sample without."""
    found = torch.tensor([0, 1, 1, 3, 3, 3, 5, -1] if labels is None else labels)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(found), 3, 2, 2, generator=generator)
    return {"images": images, "labels": found, "id": 2 * torch.arange(len(found))}


def no_task(output: dict[str, Tensor], batch: Any) -> Tensor:
    """Stands for the margin head."""
    return output["embeddings"].square().mean()
