"""Batches from samples of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Collator", "FullLength"]


class Collator:
    """Pads a batch to its longest text.

    Args:
        tokenizer: pads its own columns, and decides on which side.
        fills: further columns with an entry for each token, and what they are padded with.
    """

    def __init__(self, tokenizer: Any, fills: Mapping[str, int] | None = None) -> None:
        from transformers import DataCollatorWithPadding

        self.tokenizer, self.fills = tokenizer, dict(fills or {})
        self._pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these samples, as tensors."""
        plain = [{k: v for k, v in sample.items() if k not in self.fills} for sample in samples]
        batch = dict(self._pad(plain))
        length = batch["input_ids"].shape[1]
        left = self.tokenizer.padding_side == "left"
        for column, fill in self.fills.items():
            if column in samples[0]:
                rows = [list(sample[column]) for sample in samples]
                gaps = [[fill] * (length - len(row)) for row in rows]
                batch[column] = torch.tensor([g + r if left else r + g for r, g in zip(rows, gaps, strict=True)])
        return batch


class FullLength:
    """Pads the batches of another collator further, all to one length.

    Args:
        collator: makes the batches; further padding is on the side that it pads on.
        tokenizer: says what its columns are padded with, and on which side, if the collator has no tokenizer.
        length: in tokens.
    """

    def __init__(self, collator: Callable[[Sequence[Mapping[str, Any]]], Any], tokenizer: Any, length: int) -> None:
        self.collator, self.length = collator, length
        self.left = getattr(collator, "tokenizer", tokenizer).padding_side == "left"
        self.fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.fills |= {"labels": -100, **getattr(collator, "fills", {})}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these samples, as tensors."""
        batch = dict(self.collator(samples))
        own = batch["input_ids"].shape[1]
        more = (self.length - own, 0) if self.left else (0, self.length - own)
        for name, value in batch.items():
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == own:
                batch[name] = torch.nn.functional.pad(value, more, value=self.fills.get(name, 0))
        return batch
