"""The data of a run: a recipe's texts, tokenized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from taskkd.nlp import metrics, text, tokenization
from taskkd.nlp.collation import FullLength
from taskkd.nlp.heads import CAUSAL_LM, TOKENS
from taskkd.nlp.kinds import Encoding, Kind
from taskkd.nlp.masking import Masked
from taskkd.nlp.schema import Data

__all__ = ["NlpData", "beside", "encoded", "encoding_of", "select_by", "two_tokenizers"]

PARTS = ("train", "unlabelled", "validation", "test", "mismatched")


@dataclass
class NlpData:
    """Tokenized data of a run. `train` is labelled; `unlabelled` has labels that count nothing, its ids follow on.

    `copies` says which of the unlabelled texts are augmented ones, `note` what else there is to say, for the summary.
    """

    train: Any
    validation: Any
    test: Any
    unlabelled: Any | None
    labels: list[str]
    tokenizer: Any
    kind: Kind
    encoding: Encoding
    copies: str = ""
    note: str = ""
    #: that models are selected by; None: as the kind has it
    metric: str | None = None
    #: a second test set
    mismatched: Any | None = None
    #: the same samples as the teacher reads them, where its tokenizer is another one
    of_teacher: NlpData | None = None

    @property
    def everything(self) -> Any:
        """Labelled and unlabelled training text as one data set."""
        if self.unlabelled is None:
            return self.train
        if isinstance(self.train, Masked):
            return Masked(
                text.joined(self.train.dataset, self.unlabelled.dataset), self.train.transform, seed=self.train.seed
            )
        return text.joined(self.train, self.unlabelled)

    @property
    def further_tests(self) -> dict[str, Any]:
        """Test sets beside `test`, by the name that their results have in front."""
        return {} if self.mismatched is None else {"mismatched": self.mismatched}

    @property
    def collator(self) -> Any:
        """Pads a batch to its longest text."""
        own = self.kind.collator(self.tokenizer)
        if self.of_teacher is None:
            return own
        other = self.of_teacher
        return tokenization.TwoCollator(own, other.collator, (self.tokenizer, other.tokenizer))

    @property
    def full_length_collator(self) -> Any:
        """Pads every batch to the longest text that there may be."""
        return FullLength(self.collator, self.tokenizer, self.encoding.max_length)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the teacher's inputs depend on beside the text, for the key of a cache."""
        if self.of_teacher is not None:
            return self.of_teacher.preprocessing
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "vocabulary": len(self.tokenizer),
            "max_length": self.encoding.max_length,
        }

    @property
    def processing(self) -> Any:
        """What is saved beside a student."""
        return self.tokenizer

    def first(self, table: Any, count: int) -> Any:
        """The first samples of a split."""
        return table.select(range(min(count, len(table))))

    def fingerprint(self) -> str:
        """A digest of every sample of every split, as tokenized."""
        digest = xxhash.xxh3_128()
        # Not what a teacher computed: its last digits follow the number of threads.
        left_out = {"id", "teacher_embedding"}
        for split in (self.train, self.validation, self.test, self.unlabelled, *self.further_tests.values()):
            for column in [] if split is None else sorted(set(split.column_names) - left_out):
                digest.update(column.encode())
                digest.update(repr(list(split[column])).encode())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line with the numbers of samples."""
        free = 0 if self.unlabelled is None else len(self.unlabelled)
        held = f"{len(self.validation)} validation, {len(self.test)} test"
        held += "".join(f", {len(table)} {name} test" for name, table in self.further_tests.items())
        use, kind = "labelled" if self.kind.head.logits else "to train on", self.kind.describe(self.labels)
        return f"{len(self.train)} {use}, {free} unlabelled{self.copies}, {held}; {kind}{self.note}"


def encoding_of(config: Data, tokenizer: Any, configs: Mapping[str, Any] | None = None) -> Encoding:
    """How the texts of a recipe are encoded.

    Raises:
        RecipeError: `max_length` is more than a model has positions.
    """
    length = tokenization.fitting_length(config.max_length, tokenizer, config.kind.max_length, configs)
    return Encoding(
        length,
        pairs=isinstance(config.text, list),
        seed=config.split_seed,
        stride=config.stride,
        no_answer=config.no_answer,
        masking=config.masking,
        mask_share=config.mask_share,
    )


def encoded(
    kind: Kind, splits: text.Splits, tokenizer: Any, names: Sequence[str], encoding: Encoding
) -> dict[str, Any]:
    """A table for each part, or None; ids count through."""
    start, tables = 0, {}
    for part in PARTS:
        rows, training = getattr(splits, part), part in ("train", "unlabelled")
        tables[part] = (
            kind.encode(rows, tokenizer, names, encoding, first_id=start, training=training) if rows else None
        )
        start += len(tables[part] or ())
    return tables


def select_by(data: NlpData, name: str | None) -> NlpData:
    """The data with the metric that models are selected by; None: as the kind has it.

    Raises:
        RecipeError: models cannot be selected by this one.
    """
    if name is None:
        return data
    name = metrics.chosen(name, data.kind.metric(data.labels, [data.validation, data.test]))
    other = data.of_teacher
    return replace(data, metric=name, of_teacher=None if other is None else replace(other, metric=name))


def two_tokenizers(data: NlpData, teacher: NlpData, rows: Mapping[str, Sequence[text.Row]]) -> NlpData:
    """A student's data with the teacher's columns beside it, for different tokenizers.

    Args:
        data: by the student's tokenizer.
        teacher: the same samples by the teacher's.
        rows: the samples, by part.
    """
    tables = {}
    for part in PARTS:
        own, other = getattr(data, part), getattr(teacher, part)
        if own is not None:
            own = tokenization.joined(own, other, teacher.tokenizer.model_input_names)
            if data.kind.head is CAUSAL_LM:
                own = own.add_column("teacher_next_mask", tokenization.next_mask(other["labels"]))
            if data.kind.head is TOKENS:
                words = [row.words or () for row in rows[part]]
                for name, side in zip(tokenization.WORDS, (data, teacher), strict=True):
                    index = tokenization.word_index(words, side.tokenizer, side.encoding.max_length)
                    own = own.add_column(name, index)
        tables[part] = own
    return replace(data, **tables, of_teacher=teacher)


def beside(table: Any, other: Any) -> Any:
    """A table with the columns of another of the same samples that it has not."""
    for column in other.column_names:
        if column not in table.column_names:
            table = table.add_column(column, other[column])
    return table
