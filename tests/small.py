"""Tiny models and batches that many tests share; small enough to be read in one look."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A residual block as torchvision writes it: `out += x`, then a ReLU in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return self.relu(out)


class ConvNet(nn.Module):
    """stem -> BatchNorm -> ReLU in place -> residual block -> mean over space -> linear head."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.block = Block(width)
        self.head = nn.Linear(width, classes)

    def features(self, image: Tensor) -> Tensor:
        features: Tensor = self.block(self.relu(self.norm(self.stem(image))))
        return features

    def forward(self, image: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.features(image).mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def conv_batch(count: int = 4, size: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Images, labels and ids."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(count, 3, size, size, generator=generator),
        "labels": torch.randint(0, 3, (count,), generator=generator),
        "id": torch.arange(count) + 100 * seed,
    }


def bert(layers: int = 2, hidden: int = 16, *, positions: int = 32, seed: int = 0) -> nn.Module:
    """A random BERT classifier without dropout."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=positions,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def tokens(lengths: list[int], pad_to: int | None = None, *, seed: int = 0, first_id: int = 0) -> dict[str, Tensor]:
    """A padded batch of token sequences of these lengths; a sample's tokens depend on its id and the seed alone."""
    width = pad_to or max(lengths)
    batch = {
        "input_ids": torch.zeros(len(lengths), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "labels": torch.arange(len(lengths)) % 3,
        "id": torch.arange(first_id, first_id + len(lengths)),
    }
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + first_id + row)
        batch["input_ids"][row, :length] = torch.randint(1, 40, (length,), generator=generator)
        batch["attention_mask"][row, :length] = 1
    return batch
