"""Batches from samples of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["Collator"]


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
