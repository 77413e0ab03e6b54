"""Token classification: a tag for each word, as in named entity recognition."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from taskkd.errors import DataError, nearest
from taskkd.nlp import heads, models
from taskkd.nlp.collation import Collator
from taskkd.nlp.entities import Tags, column_sentences, has_entities
from taskkd.nlp.kinds.base import Encoding, Prediction, Table
from taskkd.nlp.kinds.sequences import adopt_labels, task_loss
from taskkd.nlp.text import Reader, Row, as_table, columns_of

__all__ = ["TOKEN_CLASSIFICATION", "TokenKind"]

logger = logging.getLogger(__name__)


class TokenKind:
    """A tag for each word. The first piece of a word carries its label, the others -100; `word_mask` is 1 there."""

    name = "token_classification"
    head = heads.TOKENS
    text: str | tuple[str, str] = "tokens"
    label = "tags"
    max_length = 128
    readers: Mapping[str, Reader] = {".conll": column_sentences, ".txt": column_sentences, ".bio": column_sentences}
    tokenizer_options: Mapping[str, Any] = {"add_prefix_space": True}  # words of byte-level tokenizers begin with one
    loss = staticmethod(task_loss)

    def row(self, entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
        """Words and tags, as lists or as texts with white space between them.

        Raises:
            DataError: a column is missing or holds something else, there is no word, or the lengths differ.
        """
        if not isinstance(text, str):
            raise DataError(f"{where}: token classification takes one column of words, got {', '.join(text)}.")
        values = columns_of(entry, [text] if label is None else [text, label], where)
        words = _items(values[0], text, where)
        if not words or not all(isinstance(w, str) for w in words):
            raise DataError(f"{where}: column {text!r} holds {values[0]!r}, expected a list of words.")
        tags = None
        if label is not None and values[1] is not None:
            tags = [None if t is None else str(t) for t in _items(values[1], label, where)]
            if len(tags) != len(words):
                raise DataError(f"{where}: {len(words)} words and {len(tags)} tags; expected as many of each.")
        return Row(" ".join(words), None, tags, where, tuple(words))

    def has_label(self, row: Row) -> bool:
        """Whether some word has a tag."""
        return row.label is not None and any(tag is not None for tag in row.label)

    def names(self, rows: Sequence[Row], given: Sequence[str] | None) -> list[str]:
        """The tags, O first, the others sorted."""
        found = {tag for row in rows for tag in row.label or () if tag is not None}
        names = list(given or sorted(found, key=lambda tag: (tag != "O", tag)))
        if len(names) < 2:
            raise DataError(f"token classification needs two tags or more, the training data has {names}.")
        return names

    def describe(self, names: Sequence[str]) -> str:
        """As "9 tags"."""
        return f"{len(names)} tags"

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
        """`labels` and `word_mask` beside the tokenizer's columns; words that are cut off are told in one warning.

        Raises:
            DataError: there are no rows, or a tag is not one of the names.
        """
        if not rows:
            raise DataError("there are no rows to tokenize.")
        numbers = [_numbers(row, names) for row in rows]
        found = _tokenized([row.words or () for row in rows], tokenizer, encoding)
        firsts = [_first_pieces(found.word_ids(i)) for i in range(len(rows))]
        columns = {k: v for k, v in found.items() if k in tokenizer.model_input_names}
        columns["word_mask"] = [[int(w is not None) for w in first] for first in firsts]
        columns["labels"] = [
            [-100 if w is None else number[w] for w in first] for first, number in zip(firsts, numbers, strict=True)
        ]
        _tell_lost(rows, columns["word_mask"], encoding)
        return as_table([columns], first_id)

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
        """With `labels`, and `word_mask` where these are not -100 unless there is one."""
        if label is not None:
            table = adopt_labels(table, label, None)
            if "word_mask" in table.column_names:
                return table
            return table.add_column("word_mask", [[int(x >= 0) for x in row] for row in table["labels"]])
        if "word_mask" not in table.column_names:
            raise DataError(
                "a tokenized data set without labels needs the column 'word_mask' (1 at the first piece of a word); "
                f"it has {table.column_names}."
            )
        table = table.remove_columns([c for c in ("labels",) if c in table.column_names])
        return table.add_column("labels", [[-100] * len(row) for row in table["word_mask"]])

    def collator(self, tokenizer: Any) -> Collator:
        """Pads labels with -100, the mask with 0."""
        return Collator(tokenizer, {"labels": -100, "word_mask": 0})

    def metric(self, names: Sequence[str], tables: Sequence[Table]) -> Tags:
        """F1 of entities and accuracy."""
        return Tags(names)

    def main_metric(self, names: Sequence[str]) -> str:
        """F1 of entities; accuracy where the tags are not of entities."""
        return "f1" if has_entities(names) else "accuracy"

    def chance(self, names: Sequence[str], table: Table) -> float:
        """The best of tagging all words alike, on up to 1,000 sentences."""
        rows = [[x for x in row if x >= 0] for row in table["labels"][:1000]]
        metric, best = self.metric(names, []), 0.0
        for tag in range(len(names)):
            metric.reset()
            for row in rows:
                logits = torch.zeros(1, len(row), len(names))
                logits[..., tag] = 1
                metric.update({"logits": logits}, {"labels": torch.tensor([row])})
            best = max(best, metric.compute()[self.main_metric(names)])
        return best

    def predict(
        self, student: nn.Module, tokenizer: Any, inputs: Sequence[str], encoding: Encoding
    ) -> Iterator[Prediction]:
        """(a tag for each word that white space separates, None, text); "?" for words beyond the length."""
        names = models.label_names(student)
        for start in range(0, len(inputs), 32):
            chunk = inputs[start : start + 32]
            words = [line.split() for line in chunk]
            found = _tokenized(words, tokenizer, encoding, padding=True, return_tensors="pt")
            guesses = models.forward(student, found).logits.argmax(-1).tolist()
            for i, line in enumerate(chunk):
                tags = ["?"] * len(words[i])
                for guess, word in zip(guesses[i], _first_pieces(found.word_ids(i)), strict=True):
                    if word is not None:
                        tags[word] = names[guess]
                yield " ".join(tags), None, line


def _items(value: Any, column: str, where: str) -> list[Any]:
    if isinstance(value, str):
        if value.startswith("[") and value.endswith("]"):
            raise DataError(
                f"{where}: column {column!r} holds a list written as text; use jsonl or parquet, or words with "
                "white space between them."
            )
        return value.split()
    if not hasattr(value, "__iter__"):
        raise DataError(f"{where}: column {column!r} holds {value!r}, expected a list.")
    return list(value)


def _numbers(row: Row, names: Sequence[str]) -> list[int]:
    """The label of each word."""
    words = row.words or ()
    if row.label is None:
        return [-100] * len(words)
    known = {name: i for i, name in enumerate(names)}
    for number, (word, tag) in enumerate(zip(words, row.label, strict=True), 1):
        if tag is not None and tag not in known:
            raise DataError(
                f"{row.where}: tag {tag!r} of word {number}, {word!r}, is not one of the {len(names)} tags "
                f"{', '.join(names)}{nearest(tag, names)}."
            )
    return [-100 if tag is None else known[tag] for tag in row.label]


def _tokenized(words: Sequence[Sequence[str]], tokenizer: Any, encoding: Encoding, **options: Any) -> Any:
    return tokenizer(
        [list(w) for w in words], is_split_into_words=True, truncation=True, max_length=encoding.max_length, **options
    )


def _first_pieces(words: Sequence[int | None]) -> list[int | None]:
    """The number of the word at each token that is the first of it; None elsewhere."""
    return [word if i == 0 or word != words[i - 1] else None for i, word in enumerate(words)]


def _tell_lost(rows: Sequence[Row], masks: Sequence[Sequence[int]], encoding: Encoding) -> None:
    lost = [len(row.words or ()) - sum(mask) for row, mask in zip(rows, masks, strict=True)]
    if any(lost):
        worst = max(range(len(rows)), key=lost.__getitem__)
        logger.warning(
            "%d words of %d sentences are beyond %d tokens (data.max_length), or the tokenizer has nothing for them; "
            "they are neither trained nor evaluated on. The most, %d, are lost at %s.",
            sum(lost), sum(x > 0 for x in lost), encoding.max_length, lost[worst], rows[worst].where,
        )  # fmt: skip


TOKEN_CLASSIFICATION = TokenKind()
