"""Classification and regression of sentences and pairs of sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import DataError
from taskkd.nlp import heads, models
from taskkd.nlp.collation import Collator
from taskkd.nlp.kinds.base import Encoding, Prediction, Table
from taskkd.nlp.metrics import Classification, Regression
from taskkd.nlp.text import Reader, Row, has_label, label_names, text_row, tokenized

__all__ = ["CLASSIFICATION", "REGRESSION", "SequenceKind", "adopt_labels", "task_loss"]


def task_loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy (or squared error) over what is labelled in a batch; 0 if nothing is.

    Labels -100 (NaN for regression) are text without a label. The mean is over the labelled samples, or tokens.

    Args:
        output: with `logits`, (batch, classes), (batch, tokens, classes), or (batch, 1).
        batch: with `labels`, (batch,) or (batch, tokens).
    """
    logits, labels = output["logits"].float(), batch["labels"]
    if labels.is_floating_point():
        known = ~labels.isnan()
        error = (logits.reshape(-1) - torch.where(known, labels, 0.0)).square() * known
        total: Tensor = error.sum()
    else:
        known = labels >= 0
        total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    loss: Tensor = total / known.sum().clamp(min=1)
    return loss


def adopt_labels(table: Table, label: str | None, unlabelled: Any) -> Table:
    """A tokenized table with its label column named `labels`; with `label=None` all of them are `unlabelled`.

    Raises:
        DataError: there is neither such a column nor `labels`.
    """
    import datasets

    if label is None:
        table = table.remove_columns([c for c in ("labels",) if c in table.column_names])
        return table.add_column("labels", [unlabelled] * len(table))
    if "labels" not in table.column_names and label in table.column_names:
        table = table.rename_column(label, "labels")
    if "labels" not in table.column_names:
        raise DataError(f"a tokenized data set needs the column 'labels' or {label!r}; it has {table.column_names}.")
    if isinstance(table.features["labels"], datasets.ClassLabel):  # which has no -100
        table = table.cast_column("labels", datasets.Value("int64"))
    return table


class SequenceKind:
    """Classification, or with `name="regression"` regression, of one text or two."""

    head = heads.SEQUENCE
    text: str | tuple[str, str] = "text"
    label = "label"
    max_length = 128
    readers: Mapping[str, Reader] = {}
    tokenizer_options: Mapping[str, Any] = {}
    row = staticmethod(text_row)
    loss = staticmethod(task_loss)

    def __init__(self, name: str) -> None:
        self.name = name
        self.regression = name == "regression"

    def has_label(self, row: Row) -> bool:
        """Whether there is a label and it is not empty."""
        return has_label(row)

    def names(self, rows: Sequence[Row], given: Sequence[str] | None) -> list[str]:
        """The classes, sorted as numbers where all are; none for regression."""
        if self.regression:
            return []
        names = list(given or label_names(rows))
        if len(names) < 2:
            raise DataError(f"classification needs two labels or more, the training data has {names}.")
        return names

    def describe(self, names: Sequence[str]) -> str:
        """As "2 labels"."""
        return f"{len(names)} labels" if names else "regression"

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, names: Sequence[str], encoding: Encoding, *, first_id: int = 0,
        training: bool = True,
    ) -> Table:  # fmt: skip
        """See `taskkd.nlp.@tokenized`."""
        known = None if self.regression else names
        return tokenized(rows, tokenizer, known, max_length=encoding.max_length, first_id=first_id)

    def adopt(
        self, table: Table, tokenizer: Any, names: Sequence[str], encoding: Encoding, *, label: str | None,
        training: bool = True,
    ) -> Table:  # fmt: skip
        """With its label column named `labels`, which for regression are no whole numbers."""
        table = adopt_labels(table, label, math.nan if self.regression else -100)
        if self.regression:
            import datasets

            table = table.cast_column("labels", datasets.Value("float32"))
        return table

    def collator(self, tokenizer: Any) -> Collator:
        """Pads a batch to its longest text."""
        return Collator(tokenizer)

    def metric(self, names: Sequence[str], tables: Sequence[Table]) -> Classification | Regression:
        """Accuracy and others, or correlations."""
        return Regression() if self.regression else Classification(len(names), names)

    def main_metric(self, names: Sequence[str]) -> str:
        """Accuracy or Pearson's correlation."""
        return "pearson" if self.regression else "accuracy"

    def chance(self, names: Sequence[str], table: Table) -> float:
        """The share of the commonest label; 0 for regression."""
        if self.regression:
            return 0.0
        labels = torch.tensor(table["labels"])
        return float(torch.bincount(labels[labels >= 0], minlength=2).max()) / max(int((labels >= 0).sum()), 1)

    def predict(
        self, student: nn.Module, tokenizer: Any, inputs: Sequence[str], encoding: Encoding
    ) -> Iterator[Prediction]:
        """(label, probability, text) of each text, or (value, None, text) for regression; pairs are tab-separated."""
        config: Any = student.config
        for start in range(0, len(inputs), 32):
            chunk = list(inputs[start : start + 32])
            first, second = chunk, None
            if encoding.pairs:
                pairs = [t.partition("\t") for t in chunk]
                first, second = [p[0] for p in pairs], [p[2] for p in pairs]
            batch = tokenizer(
                first, second, truncation=True, max_length=encoding.max_length, padding=True, return_tensors="pt"
            )
            logits = models.forward(student, batch).logits.float()
            if self.regression:
                for content, value in zip(chunk, logits.reshape(-1).tolist(), strict=True):
                    yield f"{value:.4f}", None, content
            else:
                for content, row in zip(chunk, logits.softmax(-1), strict=True):
                    best = int(row.argmax())
                    yield str(config.id2label[best]), float(row[best]), content


CLASSIFICATION, REGRESSION = SequenceKind("classification"), SequenceKind("regression")
