"""Masks for masked language modelling: what is masked, anew in each epoch or once for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskkd.augmentation import Augmented, generator_for
from taskkd.nlp.text import as_table

__all__ = ["Masked", "Masker", "text_lines"]

#: samples that are held as Python numbers at a time
CHUNK = 1000


def text_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a text file that are not empty, as the column `text`."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", {"text": line.strip()}


@dataclass(frozen=True)
class Masker:
    """BERT's masking (Devlin et al. 2019): of the tokens chosen, 8 in 10 become the mask token, 1 in 10 any token.

    Args:
        mask_token: its id.
        vocabulary: number of tokens.
        share: of the tokens that are chosen, each by itself; 0.15 in the paper.
    """

    mask_token: int
    vocabulary: int
    share: float = 0.15

    def __call__(self, sample: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """A sample with masked `input_ids` and with `labels`, -100 where nothing was chosen.

        Args:
            sample: with `input_ids` and `special_tokens_mask`, which is taken out.
            generator: of all randomness.
        """
        ids = torch.tensor(sample["input_ids"])
        special = torch.tensor(sample["special_tokens_mask"], dtype=torch.bool)
        chosen, fate = torch.rand(2, len(ids), generator=generator)
        picked = (chosen < self.share) & ~special
        others = torch.randint(self.vocabulary, (len(ids),), generator=generator)
        masked = torch.where(picked & (fate < 0.8), self.mask_token, ids)
        masked = torch.where(picked & (fate >= 0.9), others, masked)
        kept = {k: v for k, v in sample.items() if k != "special_tokens_mask"}
        return {**kept, "input_ids": masked.tolist(), "labels": _labels(ids, picked)}

    def fixed(self, table: Any, seed: int) -> Any:
        """A table masked once, each row from a generator seeded by (seed, 0, its position)."""

        def chunk(start: int) -> dict[str, list[Any]]:
            columns = {k: v for k, v in table[start : start + CHUNK].items() if k != "id"}
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            masked = [self(row, generator_for(seed, 0, start + i)) for i, row in enumerate(rows)]
            return {name: [row[name] for row in masked] for name in masked[0]}

        first_id = table[0]["id"] if "id" in table.column_names else 0
        return as_table((chunk(start) for start in range(0, len(table), CHUNK)), first_id)


def _labels(ids: Tensor, picked: Tensor) -> list[int]:
    return [int(i) for i in torch.where(picked, ids, -100)]


class Masked(Augmented):
    """A table of unmasked texts whose samples are masked anew in each epoch; see `Augmented`.

    A column, asked for by its name, is that of the table.
    """

    @property
    def column_names(self) -> Sequence[str]:
        """The columns of the table."""
        names: Sequence[str] = self.dataset.column_names
        return names

    @property
    def _fingerprint(self) -> str:
        return str(self.dataset._fingerprint)

    def __getitem__(self, index: int | str) -> Any:
        return self.dataset[index] if isinstance(index, str) else super().__getitem__(index)
