"""Sentence embeddings: texts without labels, measured against the teacher's embeddings and scored pairs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.errors import DataError, RecipeError
from taskkd.losses.primitives import l2_normalise
from taskkd.nlp import heads, models
from taskkd.nlp.collation import Collator
from taskkd.nlp.kinds.base import Encoding, Prediction, Table
from taskkd.nlp.masking import text_lines
from taskkd.nlp.similarity import Similarity, pairwise_cosines
from taskkd.nlp.text import Reader, Row, columns_of, encode_label, text_row

__all__ = ["SCORED_PAIRS", "SENTENCE_EMBEDDING", "SentenceKind", "TextsCollator", "texts_row"]

TARGET = "teacher_embedding"
#: embeddings whose mean cosine is above this are taken for the same one
COLLAPSED = 0.99
logger = logging.getLogger(__name__)


class TextsCollator(Collator):
    """Pads a batch to its longest text; where a sample is several texts, to (batch, texts, tokens)."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these samples, as tensors."""
        ids = samples[0]["input_ids"]
        if not len(ids) or not isinstance(ids[0], list):
            return super().__call__(samples)
        # Token types also where this tokenizer gives none: the table may be made with the other model's.
        own = [k for k in samples[0] if k in {*self.tokenizer.model_input_names, "token_type_ids"}]
        flat = [{k: sample[k][i] for k in own} for sample in samples for i in range(len(ids))]
        batch = {k: v.reshape(len(samples), len(ids), -1) for k, v in super().__call__(flat).items()}
        return batch | {k: torch.tensor([s[k] for s in samples]) for k in samples[0] if k not in own}


def texts_row(entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
    """One sample of several texts, from a mapping of columns.

    Raises:
        DataError: a column is missing or its value is no text.
    """
    values = [text_row(entry, column, None, where).text for column in text]
    score = None if label is None else columns_of(entry, [label], where)[0]
    return Row(values[0], values[1], score, where, texts=tuple(values))


class SentenceKind:
    """Embeddings of texts. Nothing is labelled: a sample is a text, or several that are encoded one by one.

    Args:
        scored: whether what is evaluated on are pairs of texts with a score.
    """

    name = "sentence_embedding"
    head = heads.SENTENCE
    text: str | tuple[str, str] = "text"
    label = "score"
    max_length = 128
    readers: Mapping[str, Reader] = {".txt": text_lines}
    tokenizer_options: Mapping[str, Any] = {}

    def __init__(self, *, scored: bool = False) -> None:
        self.scored = scored

    def row(self, entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
        """One sample; labels are not looked at."""
        if isinstance(text, str):
            return text_row(entry, text, None, where)
        return texts_row(entry, text, None, where)

    def has_label(self, row: Row) -> bool:
        """Always: no sample needs one."""
        return True

    def names(self, rows: Sequence[Row], given: Sequence[str] | None) -> list[str]:
        """None."""
        return []

    def describe(self, names: Sequence[str]) -> str:
        """As it is called."""
        return "sentence embeddings"

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, names: Sequence[str], encoding: Encoding, *, first_id: int = 0,
        training: bool = True,
    ) -> Table:  # fmt: skip
        """The tokenizer's columns, a list of them for a sample of several texts; `labels` of scored pairs."""
        import datasets

        if not rows:
            raise DataError("there are no rows to tokenize.")
        samples = [row.texts or (row.text,) for row in rows]
        flat = dict(
            tokenizer([t for texts in samples for t in texts], truncation=True, max_length=encoding.max_length)
        )  # fmt: skip
        count = len(samples[0])
        if rows[0].texts is not None:
            flat = {k: [v[i : i + count] for i in range(0, len(v), count)] for k, v in flat.items()}
        if not training and any(row.label is not None for row in rows):
            flat["labels"] = [encode_label(row, None) for row in rows]
        return datasets.Dataset.from_dict({**flat, "id": list(range(first_id, first_id + len(rows)))})

    def adopt(
        self, table: Table, tokenizer: Any, names: Sequence[str], encoding: Encoding, *, label: str | None,
        training: bool = True,
    ) -> Table:  # fmt: skip
        """As it is; scores of pairs are named `labels`."""
        if not training and label in table.column_names:
            table = table.rename_column(label, "labels")
        return table

    def with_teacher(self, table: Table, teacher: nn.Module, tokenizer: Any) -> Table:
        """A table to evaluate on, with the teacher's embeddings in a further column.

        Raises:
            RecipeError: the teacher's embeddings are not finite, or all the same: they tell nothing apart.
        """
        from taskkd.taps import accepted_arguments

        teacher, collate, accepted = teacher.eval(), self.collator(tokenizer), accepted_arguments(teacher.forward)
        device = next(teacher.parameters()).device
        parts = []
        with torch.no_grad():
            for start in range(0, len(table), 64):
                batch = collate([table[i] for i in range(start, min(start + 64, len(table)))])
                inputs = {k: v.to(device) for k, v in accepted(batch).items()}
                parts.append(teacher(**inputs)["sentence_embedding"].float().cpu())
        found = torch.cat(parts)
        _check_target(found)
        return table.add_column(TARGET, found.tolist())

    def collator(self, tokenizer: Any) -> Collator:
        """Pads a batch to its longest text."""
        return TextsCollator(tokenizer)

    def loss(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        """0: nothing is labelled."""
        zero: Tensor = output["sentence_embedding"].sum() * 0.0
        return zero

    def metric(self, names: Sequence[str], tables: Sequence[Table]) -> Similarity:
        """Nearness to the teacher, and the order of scored pairs."""
        return Similarity(scored=self.scored)

    def main_metric(self, names: Sequence[str]) -> str:
        """How well similarities are the teacher's, or those that pairs are scored with."""
        return "spearman" if self.scored else "pairwise_spearman"

    def chance(self, names: Sequence[str], table: Table) -> float:
        """0: unrelated embeddings. (What is asked of the teacher is checked by `with_teacher`.)"""
        return 0.0

    def predict(
        self, student: nn.Module, tokenizer: Any, inputs: Sequence[str], encoding: Encoding
    ) -> Iterator[Prediction]:
        """(embedding as a JSON list, None, text) of each text; (cosine, None, line) of two, tab-separated."""
        for line in inputs:
            texts = line.split("\t", 1)
            batch = tokenizer(
                texts, truncation=True, max_length=encoding.max_length, padding=True, return_tensors="pt"
            )  # fmt: skip
            embedding = models.forward(student, batch)["sentence_embedding"]
            if len(texts) == 2:
                first, second = l2_normalise(embedding)
                yield f"{float(first @ second):.4f}", None, line
            else:
                yield json.dumps([round(x, 6) for x in embedding[0].tolist()]), None, line


def _check_target(embeddings: Tensor) -> None:
    if not bool(embeddings.isfinite().all()):
        raise RecipeError("the teacher's embeddings of the held-out texts are not all finite.")
    cosines = pairwise_cosines(embeddings)
    if len(cosines) and float(cosines.mean()) > COLLAPSED:
        raise RecipeError(
            f"the teacher's embeddings of different texts have a mean cosine of {float(cosines.mean()):.4f}: they tell "
            "nothing apart. It is not trained for sentence embeddings, or its pooling is wrong."
        )


SENTENCE_EMBEDDING, SCORED_PAIRS = SentenceKind(), SentenceKind(scored=True)
