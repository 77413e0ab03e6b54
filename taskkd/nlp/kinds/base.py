"""What a kind of NLP task is: one object that knows its rows, labels, loss and metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from taskkd.nlp.collation import Collator
from taskkd.nlp.heads import Head
from taskkd.nlp.text import Reader, Row

__all__ = ["ComparesWithTeacher", "Encoding", "Kind", "Prediction"]

Prediction: TypeAlias = tuple[str, float | None, str]
Table: TypeAlias = Any  # a `datasets.Dataset`


@dataclass(frozen=True)
class Encoding:
    """How rows become a model's inputs.

    Args:
        max_length: in tokens, special ones included.
        pairs: whether there are two texts a sample.
        seed: of masks that are fixed.
        stride: question answering: tokens that neighbouring windows of a context share; None: a third of `max_length`.
        no_answer: question answering: whether questions may have no answer.
        masking: masked language modelling: "dynamic", anew in each epoch, or "static".
        mask_share: masked language modelling: of the tokens that are masked.
    """

    max_length: int
    pairs: bool = False
    seed: int = 0
    stride: int | None = None
    no_answer: bool = False
    masking: Literal["dynamic", "static"] = "dynamic"
    mask_share: float = 0.15


@runtime_checkable
class ComparesWithTeacher(Protocol):
    """A kind whose metric needs the teacher's answers beside the data."""

    def with_teacher(self, table: Table, teacher: nn.Module, tokenizer: Any) -> Table:
        """A table to evaluate on, with the teacher's answers in it.

        Raises:
            RecipeError: they cannot be learned from.
        """


class Kind(Protocol):
    """A kind of task: classification, regression, ...; all that depends on it is here.

    Attributes:
        name: as `data.type` in a recipe.
        head: of the models.
        text, label: the columns of the data, unless the recipe says others.
        max_length: in tokens, unless the recipe says another.
        readers: of file formats beside those that all kinds read, by suffix.
        tokenizer_options: with which tokenizers are loaded.
    """

    name: str
    head: Head
    text: str | tuple[str, str]
    label: str
    max_length: int
    readers: Mapping[str, Reader]
    tokenizer_options: Mapping[str, Any]

    def row(self, entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
        """One sample from a mapping of columns; `label=None`: unlabelled.

        Raises:
            DataError: a column is missing or holds something else.
        """

    def has_label(self, row: Row) -> bool:
        """Whether a row can be trained and evaluated on."""

    def names(self, rows: Sequence[Row], given: Sequence[str] | None) -> list[str]:
        """The label names; none where the kind has no classes.

        Raises:
            DataError: there are too few.
        """

    def describe(self, names: Sequence[str]) -> str:
        """A few words for the summary of the data."""

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
        """Rows as a table of the models' inputs and labels with `id`s from `first_id` on; a row may become several.

        Raises:
            DataError: there are no rows, or a label is wrong.
        """  # fmt: skip

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
        """A table that the caller has tokenized, with the columns that `encode` gives (but for `id`).

        Raises:
            DataError: a column is missing that cannot be made; the labels' may be missing with `label=None`.
        """  # fmt: skip

    def collator(self, tokenizer: Any) -> Collator:
        """Makes batches."""

    def loss(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        """The task loss of a batch, mean over what is labelled; 0 if nothing is."""

    def metric(self, names: Sequence[str], tables: Sequence[Table]) -> Any:
        """A fresh streaming metric for samples of these tables."""

    def main_metric(self, names: Sequence[str]) -> str:
        """The metric that models are selected by; larger is better."""

    def chance(self, names: Sequence[str], table: Table) -> float:
        """The main metric without looking at the text."""

    def predict(
        self, student: nn.Module, tokenizer: Any, inputs: Sequence[str], encoding: Encoding
    ) -> Iterator[Prediction]:
        """(answer, its probability or None, input) for each line of input."""
