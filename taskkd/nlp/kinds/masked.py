"""Masked language modelling: text without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from taskkd.errors import DataError
from taskkd.nlp import heads, models
from taskkd.nlp.collation import Collator
from taskkd.nlp.kinds.base import Encoding, Prediction, Table
from taskkd.nlp.kinds.sequences import task_loss
from taskkd.nlp.masking import Masked, Masker, text_lines
from taskkd.nlp.metrics import MaskedTokens
from taskkd.nlp.text import Reader, Row, as_table, in_chunks, text_row

__all__ = ["MASKED_LM", "MaskedKind"]


class MaskedKind:
    """Text with masked tokens, whose labels are what they were (-100 elsewhere). Longer texts are cut into pieces.

    All text trains, with a label or without: `unlabelled` text is masked, too. In evaluation masks are fixed.
    """

    name = "masked_lm"
    head = heads.MASKED_LM
    text: str | tuple[str, str] = "text"
    label = ""
    max_length = 128
    readers: Mapping[str, Reader] = {".txt": text_lines}
    tokenizer_options: Mapping[str, Any] = {}
    loss = staticmethod(task_loss)

    def row(self, entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
        """A text.

        Raises:
            DataError: the column is missing or holds no text.
        """
        if not isinstance(text, str):
            raise DataError(f"{where}: masked language modelling takes one column of text, got {', '.join(text)}.")
        return text_row(entry, text, None, where)

    def has_label(self, row: Row) -> bool:
        """Always: a text is its own label."""
        return True

    def names(self, rows: Sequence[Row], given: Sequence[str] | None) -> list[str]:
        """None."""
        return []

    def describe(self, names: Sequence[str]) -> str:
        """What there is to learn."""
        return "masked tokens"

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        names: Sequence[str],
        encoding: Encoding,
        *,
        first_id: int = 0,
        training: bool = True,
    ) -> Table:
        """Masked pieces; with dynamic masking, for training, a table that masks them in each epoch anew.

        Raises:
            DataError: there are no rows, or the tokenizer has no mask token.
        """
        return self._masked(
            as_table((_pieces(chunk, tokenizer, encoding) for chunk in in_chunks(rows)), first_id),
            tokenizer,
            encoding,
            training,
        )

    def _masked(self, table: Table, tokenizer: Any, encoding: Encoding, training: bool) -> Table:
        if tokenizer.mask_token_id is None:
            raise DataError("the tokenizer has no mask token; masked language modelling needs one.")
        masker = Masker(tokenizer.mask_token_id, len(tokenizer), encoding.mask_share)
        dynamic = training and encoding.masking == "dynamic"
        return Masked(table, masker, seed=encoding.seed) if dynamic else masker.fixed(table, encoding.seed)

    def adopt(
        self,
        table: Table,
        tokenizer: Any,
        names: Sequence[str],
        encoding: Encoding,
        *,
        label: str | None,
        training: bool = True,
    ) -> Table:
        """Masked, unless it is already: with `labels`."""
        if "labels" in table.column_names:
            return table
        if "special_tokens_mask" not in table.column_names:
            special = set(tokenizer.all_special_ids)
            masks = [[int(i in special) for i in ids] for ids in table["input_ids"]]
            table = table.add_column("special_tokens_mask", masks)
        return self._masked(table, tokenizer, encoding, training)

    def collator(self, tokenizer: Any) -> Collator:
        """Pads labels with -100."""
        return Collator(tokenizer, {"labels": -100})

    def metric(self, names: Sequence[str], tables: Sequence[Table]) -> MaskedTokens:
        """Accuracy and perplexity."""
        return MaskedTokens()

    def main_metric(self, names: Sequence[str]) -> str:
        """Accuracy at masked tokens."""
        return "accuracy"

    def chance(self, names: Sequence[str], table: Table) -> float:
        """The share of the commonest masked token."""
        labels = torch.tensor([x for row in table["labels"] for x in row if x >= 0])
        return float(torch.bincount(labels, minlength=2).max()) / max(len(labels), 1)

    def predict(
        self, student: nn.Module, tokenizer: Any, inputs: Sequence[str], encoding: Encoding
    ) -> Iterator[Prediction]:
        """(a word piece for each mask token of the line, the product of their probabilities, line)."""
        for number, line in enumerate(inputs, 1):
            batch = tokenizer([line], truncation=True, max_length=encoding.max_length, return_tensors="pt")
            masks = batch["input_ids"][0] == tokenizer.mask_token_id
            if not bool(masks.any()):
                raise DataError(f"input {number}, {line[:40]!r}: there is no {tokenizer.mask_token} to fill.")
            best = models.forward(student, batch).logits[0][masks].float().log_softmax(-1).max(-1)
            yield (
                " ".join(tokenizer.convert_ids_to_tokens(best.indices.tolist())),
                math.exp(float(best.values.sum())),
                line,
            )


def _pieces(rows: Sequence[Row], tokenizer: Any, encoding: Encoding) -> dict[str, Any]:
    """The columns of the pieces of these texts."""
    found = tokenizer(
        [r.text for r in rows],
        truncation=True,
        max_length=encoding.max_length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
    )
    return {k: v for k, v in found.items() if k in {*tokenizer.model_input_names, "special_tokens_mask"}}


MASKED_LM = MaskedKind()
