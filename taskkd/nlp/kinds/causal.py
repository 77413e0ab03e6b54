"""Causal language modelling of given texts, or of answers to prompts (teacher forcing)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import DataError
from taskkd.nlp import heads
from taskkd.nlp.collation import Collator
from taskkd.nlp.kinds.base import Encoding, Prediction, Table
from taskkd.nlp.masking import text_lines
from taskkd.nlp.metrics import NextTokens
from taskkd.nlp.text import Reader, Row, as_table, in_chunks, text_row

__all__ = ["CAUSAL_LM", "CausalKind", "next_token_loss"]

#: tokens that `predict` adds to a line
LONGEST = 40


def next_token_loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each token given those before it, mean over the tokens with a label; 0 if there are none.

    Args:
        output: with `logits`, (batch, tokens, vocabulary).
        batch: with `labels`, (batch, tokens): the token itself, -100 for prompts and padding.
    """
    logits, labels = output["logits"][:, :-1].float(), batch["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    loss: Tensor = total / (labels >= 0).sum().clamp(min=1)
    return loss


class CausalKind:
    """Texts, or with two columns prompts and answers, of which the answers alone count. Longer ones are cut off.

    All text trains, with a label or without.
    """

    name = "causal_lm"
    head = heads.CAUSAL_LM
    text: str | tuple[str, str] = "text"
    label = ""
    max_length = 256
    readers: Mapping[str, Reader] = {".txt": text_lines}
    tokenizer_options: Mapping[str, Any] = {}
    loss = staticmethod(next_token_loss)

    def row(self, entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
        """A text, or a prompt and an answer."""
        return text_row(entry, text, None, where)

    def has_label(self, row: Row) -> bool:
        """Always: a text is its own label."""
        return True

    def names(self, rows: Sequence[Row], given: Sequence[str] | None) -> list[str]:
        """None."""
        return []

    def describe(self, names: Sequence[str]) -> str:
        """What there is to learn."""
        return "next tokens"

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, names: Sequence[str], encoding: Encoding, *, first_id: int = 0,
        training: bool = True,
    ) -> Table:  # fmt: skip
        """`input_ids`, `attention_mask`, `labels`.

        Raises:
            DataError: there are no rows, or an answer is cut off as a whole.
        """
        return as_table((_columns(chunk, tokenizer, encoding.max_length) for chunk in in_chunks(rows)), first_id)

    def adopt(
        self, table: Table, tokenizer: Any, names: Sequence[str], encoding: Encoding, *, label: str | None,
        training: bool = True,
    ) -> Table:  # fmt: skip
        """With every token that is no padding as its own label, unless there are `labels`."""
        if "labels" in table.column_names:
            return table
        if "attention_mask" not in table.column_names:
            return table.add_column("labels", list(table["input_ids"]))
        pairs = zip(table["input_ids"], table["attention_mask"], strict=True)
        return table.add_column("labels", [[i if m else -100 for i, m in zip(*p, strict=True)] for p in pairs])

    def collator(self, tokenizer: Any) -> Collator:
        """Pads labels with -100. A tokenizer without a padding token pads with its end-of-text token.

        Raises:
            DataError: it has neither.
        """
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise DataError("the tokenizer has neither a padding nor an end-of-text token to pad a batch with.")
            tokenizer.pad_token = tokenizer.eos_token
        return Collator(tokenizer, {"labels": -100, "next_mask": 0})

    def metric(self, names: Sequence[str], tables: Sequence[Table]) -> NextTokens:
        """Accuracy and perplexity."""
        return NextTokens()

    def main_metric(self, names: Sequence[str]) -> str:
        """Accuracy of the next token."""
        return "accuracy"

    def chance(self, names: Sequence[str], table: Table) -> float:
        """The share of the commonest token."""
        labels = torch.tensor([x for row in table["labels"] for x in row[1:] if x >= 0])
        return float(torch.bincount(labels, minlength=2).max()) / max(len(labels), 1)

    def predict(
        self, student: nn.Module, tokenizer: Any, inputs: Sequence[str], encoding: Encoding
    ) -> Iterator[Prediction]:
        """(the likeliest continuation token by token, at most 40, None, line)."""
        student.eval()
        end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        for line in inputs:
            ids = torch.tensor([_opened(tokenizer, line)[: encoding.max_length]])
            with torch.no_grad():
                found = student.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False,
                    pad_token_id=end,
                )  # fmt: skip
            yield tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True), None, line


def _opened(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a text that goes on: with what the tokenizer puts before a text, without what it puts behind."""
    ids = list(tokenizer(prompt)["input_ids"])
    behind = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if len(ids) > 1 and ids[-1] in behind else ids


def _columns(rows: Sequence[Row], tokenizer: Any, max_length: int) -> dict[str, Any]:
    ids, labels = [], []
    for row in rows:
        if row.pair is None:
            own = list(tokenizer(row.text, truncation=True, max_length=max_length)["input_ids"])
            start = 0
        else:
            own = _opened(tokenizer, row.text)
            start = len(own)
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            own = [*own, *tokenizer(row.pair, add_special_tokens=False)["input_ids"], *end][:max_length]
            if start >= len(own):
                raise DataError(
                    f"{row.where}: nothing is left of the answer: the prompt has {start} tokens, texts are cut to "
                    f"{max_length} (data.max_length)."
                )
        ids.append(own)
        labels.append([-100] * start + own[start:])
    return {"input_ids": ids, "attention_mask": [[1] * len(own) for own in ids], "labels": labels}


CAUSAL_LM = CausalKind()
