"""Segmentation networks of a few hundred parameters, as methods see them: taps in `.views`, names in `.classes`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4


class TinyNetwork(nn.Module):
    """Two stages with batch norm, then a classifier: `feature` is its input, `logits` its output, of `stride`."""

    def __init__(self, width: int, stride: int = 8, classes: int = CLASSES, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.early = nn.Sequential(
                nn.Conv2d(3, width, 3, stride=4, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
            )
            self.late = nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, stride=stride // 4, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()
            )
            self.classifier = nn.Conv2d(2 * width, classes, 1)
        self.classes = tuple(f"class-{i}" for i in range(classes))
        self.views = SimpleNamespace(logits="classifier", feature="classifier:in", aux=None, stages=("early", "late"))

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {"logits": self.classifier(self.late(self.early(images)))}


def cross_entropy(output: dict[str, Any], batch: dict[str, Any]) -> Tensor:
    """Of the logits at the size of the labels; 0 without any label."""
    logits = F.interpolate(output["logits"], size=batch["labels"].shape[1:], mode="bilinear")
    value = F.cross_entropy(logits, batch["labels"], ignore_index=255, reduction="sum")
    return value / (batch["labels"] != 255).sum().clamp(min=1)


def batch(count: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Images, and labels in blocks with some pixels ignored; the last rows of the first image are padding."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, CLASSES, (count, 1, height // 16 + 1, width // 16 + 1), generator=generator)
    labels = F.interpolate(blocks.float(), scale_factor=16).long()[:, 0, :height, :width].contiguous()
    labels[:, ::16, :9] = 255
    valid = torch.ones(count, height, width, dtype=torch.bool)
    valid[0, height - 16 :] = False
    return {
        "images": torch.rand(count, 3, height, width, generator=generator),
        "labels": labels.masked_fill(~valid, 255),
        "valid": valid,
        "unlabelled": torch.zeros(count, dtype=torch.bool),
        "id": torch.arange(count) + count * seed,
    }
