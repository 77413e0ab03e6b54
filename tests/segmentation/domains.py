"""A small network with an auxiliary head, and images of two domains: the colours of the second are those inverted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

CLASSES = 3


class Net(nn.Module):
    """Logits and auxiliary logits at a quarter (or an eighth) of the images' size."""

    def __init__(
        self, width: int = 4, *, classes: int = CLASSES, stride: int = 4, aux: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.classes = tuple(map(str, range(classes)))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride // 2, 1), nn.BatchNorm2d(width), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
            self.head = nn.Conv2d(2 * width, classes, 1)
            self.aux_head = nn.Conv2d(width, classes, 1, stride=2) if aux else None
        self.views = SimpleNamespace(logits="head", feature="body", aux="aux_head" if aux else None, stages=())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        early = self.stem(images)
        found = {"logits": self.head(self.body(early))}
        if self.aux_head is not None:
            found["aux"] = self.aux_head(early)
        return found


def task_loss(output: dict[str, Tensor], batch: Any) -> Tensor:
    """Cross-entropy at the labels' size, 0 where nothing is labelled; the auxiliary head's counts a tenth."""
    labels, total = batch["labels"], torch.zeros(())
    for name, share in (("logits", 1.0), ("aux", 0.1)):
        if name in output:
            logits = F.interpolate(output[name], labels.shape[1:], mode="bilinear")
            loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
            total = total + share * loss / (labels != 255).sum().clamp(min=1)
    return total


def picture(seed: int, size: tuple[int, int], *, target: bool) -> dict[str, Any]:
    """A bright disc (1) and a red bar (2) on a dark ground (0), with noise; the target's are inverted, unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cy, cx, top = (int(torch.randint(side // 4, 3 * side // 4, (1,), generator=generator)) for side in (*size, height))
    truth = torch.zeros(size, dtype=torch.int64)
    truth[(y - top).abs() < height // 12] = 2
    truth[(y - cy) ** 2 + (x - cx) ** 2 < (min(size) // 5) ** 2] = 1
    colours = torch.tensor([[0.25, 0.3, 0.35], [0.8, 0.75, 0.6], [0.7, 0.2, 0.2]])
    image = colours[truth].permute(2, 0, 1) + 0.08 * torch.randn(3, *size, generator=generator)
    image = (1 - image if target else image).clamp(0, 1)
    labels = torch.full_like(truth, 255) if target else truth
    return {"id": seed, "images": image, "labels": labels, "unlabelled": torch.tensor(target), "truth": truth}


class Pictures(Dataset[dict[str, Any]]):
    """Samples of both domains in turn."""

    def __init__(self, count: int = 8, size: tuple[int, int] = (32, 32), first: int = 0) -> None:
        self.samples = [picture(first + i, size, target=i % 2 == 1) for i in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {k: v for k, v in self.samples[index].items() if k != "truth"}


def batch(
    count: int = 4, size: tuple[int, int] = (64, 64), *, seed: int = 0, targets: str = "mixed"
) -> dict[str, Tensor]:
    """A batch of mixed domains, or of "none" or "all" of the target's."""
    kinds = {"mixed": [i % 2 == 1 for i in range(count)], "none": [False] * count, "all": [True] * count}
    samples = [picture(100 * seed + i, size, target=target) for i, target in enumerate(kinds[targets])]
    tensors = {k: torch.stack([s[k] for s in samples]) for k in ("images", "labels", "unlabelled")}
    return {**tensors, "id": torch.arange(count) + 100 * seed}
