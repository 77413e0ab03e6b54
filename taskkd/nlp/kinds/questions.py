"""Extractive question answering: a span of a context that answers a question, or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import DataError
from taskkd.nlp import heads, models
from taskkd.nlp.answers import Answers, squad_questions
from taskkd.nlp.collation import Collator
from taskkd.nlp.kinds.base import Encoding, Prediction, Table
from taskkd.nlp.text import Reader, Row, as_table, in_chunks, text_row

__all__ = ["QUESTION_ANSWERING", "QuestionKind", "span_loss"]

POSITIONS = ("start_positions", "end_positions")


def span_loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """The mean of the cross-entropies of start and end over the labelled windows of a batch; 0 if there are none.

    Args:
        output: with `start_logits` and `end_logits`, (batch, tokens).
        batch: with `start_positions` and `end_positions`, (batch,), -100 for a window without a label, and
            `attention_mask`: padding takes no part.
    """
    padding = batch["attention_mask"] == 0
    losses = []
    for name in ("start", "end"):
        logits = output[f"{name}_logits"].float().masked_fill(padding, -1e9)
        labels = batch[f"{name}_positions"]
        total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        losses.append(total / (labels >= 0).sum().clamp(min=1))
    return torch.stack(losses).mean()


class QuestionKind:
    """Questions with their contexts. A long context becomes several windows, each with a question and a label: the
    first answer's tokens if it lies in the window, else [CLS]. `context_mask` is 1 at the context and at [CLS]."""

    name = "question_answering"
    head = heads.QUESTION_ANSWERING
    text: str | tuple[str, str] = ("question", "context")
    label = "answers"
    max_length = 384
    readers: Mapping[str, Reader] = {".json": squad_questions}
    tokenizer_options: Mapping[str, Any] = {}
    loss = staticmethod(span_loss)

    def row(self, entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
        """Question and context, and `{"text": [...], "answer_start": [...]}` or a list of such pairs; none for a
        question without answer.

        Raises:
            DataError: a column is missing or holds something else, or an answer is not where it is said to be.
        """
        if isinstance(text, str):
            raise DataError(f"{where}: question answering takes two columns, question and context; got {text!r}.")
        own = text_row(entry, text, label, where)
        answers = None if own.label is None else _answers(own.label, str(label), where)
        for answer, start in answers or ():
            found = (own.pair or "")[start : start + len(answer)]
            if start < 0 or not answer or found != answer:
                raise DataError(f"{where}: the answer {answer!r} is not at {start} of the context, {found!r} is.")
        return Row(own.text.strip(), own.pair, answers, where)

    def has_label(self, row: Row) -> bool:
        """Whether the answers are known; there may be none."""
        return row.label is not None

    def names(self, rows: Sequence[Row], given: Sequence[str] | None) -> list[str]:
        """None."""
        return []

    def describe(self, names: Sequence[str]) -> str:
        """What the numbers of samples mean."""
        return "windows of contexts"

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
        """Windows with `start_positions`, `end_positions` and `context_mask`; for evaluation also what leads from
        tokens to answers.

        Raises:
            DataError: there are no rows, a question leaves no room for its context, or one has no answer although
                `no_answer` is not set.
        """
        chunks = in_chunks(rows)
        self._check(rows, tokenizer, encoding)
        firsts = [first_id + n * len(chunks[0]) for n in range(len(chunks))]
        numbered = zip(chunks, firsts, strict=True)
        return as_table(
            (_windows(chunk, tokenizer, encoding, None if training else first) for chunk, first in numbered), first_id
        )

    def _check(self, rows: Sequence[Row], tokenizer: Any, encoding: Encoding) -> None:
        overlap = _overlap(encoding)
        lengths = [len(ids) for ids in tokenizer([r.text for r in rows], [""] * len(rows))["input_ids"]]
        for row, length in zip(rows, lengths, strict=True):
            if length + overlap >= encoding.max_length:
                raise DataError(
                    f"{row.where}: the question has {length} tokens with the special ones; with data.max_length "
                    f"{encoding.max_length} and an overlap of {overlap} (data.stride) there is no room for its context."
                )
            if row.label is not None and not row.label and not encoding.no_answer:
                raise DataError(
                    f"{row.where}: the question has no answer; say `no_answer: true` in the recipe's data (SQuAD 2.0), "
                    "so that students learn and may say so."
                )

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
        """With `context_mask`, made of token types where it is missing; for training only."""
        if not training and not {"question", "offsets", "cls", "context", "answers", "no_answer"} <= set(
            table.column_names
        ):
            raise DataError(
                "answers are evaluated on text: give questions with their contexts for `eval` and `test`, not a "
                "tokenized data set."
            )
        if label is None:
            table = table.remove_columns([c for c in POSITIONS if c in table.column_names])
            for column in POSITIONS:
                table = table.add_column(column, [-100] * len(table))
        for column in POSITIONS:
            if column not in table.column_names:
                raise DataError(f"a tokenized data set needs the column {column!r}; it has {table.column_names}.")
        if "context_mask" in table.column_names:
            return table
        if "token_type_ids" not in table.column_names:
            raise DataError(
                "a tokenized data set needs the column 'context_mask' (1 at [CLS] and at the tokens of the context) or "
                f"'token_type_ids'; it has {table.column_names}."
            )
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        pairs = zip(table["input_ids"], table["token_type_ids"], strict=True)
        masks = [[int(i == cls or (t == 1 and i != sep)) for i, t in zip(*pair, strict=True)] for pair in pairs]
        return table.add_column("context_mask", masks)

    def collator(self, tokenizer: Any) -> Collator:
        """Pads the mask with 0, and on the right, whatever the tokenizer does: positions count from the first token."""
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "right"
        return Collator(tokenizer, {"context_mask": 0})

    def metric(self, names: Sequence[str], tables: Sequence[Table]) -> Answers:
        """Exact match and F1."""
        return Answers(tables)

    def main_metric(self, names: Sequence[str]) -> str:
        """F1 of the words of answers."""
        return "f1"

    def chance(self, names: Sequence[str], table: Table) -> float:
        """The share of questions without answer: what never answering gives."""
        answers = dict(zip(table["question"], table["answers"], strict=True))
        return sum(not a for a in answers.values()) / max(len(answers), 1)

    def predict(
        self, student: nn.Module, tokenizer: Any, inputs: Sequence[str], encoding: Encoding
    ) -> Iterator[Prediction]:
        """(answer, its probability, input) for each line: a question, a tab, its context. No answer is ""."""
        for number, line in enumerate(inputs, 1):
            question, tab, context = line.partition("\t")
            if not tab:
                raise DataError(f"input {number}, {line[:40]!r}: expected a question, a tab, and the context.")
            row = Row(question.strip(), context, None, f"input {number}")
            table = self.encode([row], tokenizer, [], encoding, training=False)
            metric, collate = self.metric([], [table]), self.collator(tokenizer)
            keep = {*tokenizer.model_input_names, "id"}
            for start in range(0, len(table), 32):
                rows = [table[i] for i in range(start, min(start + 32, len(table)))]
                batch = collate([{k: v for k, v in r.items() if k in keep} for r in rows])
                metric.update(models.forward(student, batch), batch)
            ((answer, probability),) = metric.answers().values()
            yield " ".join(answer.split()), probability, line


def _overlap(encoding: Encoding) -> int:
    """Tokens that neighbouring windows share."""
    return encoding.max_length // 3 if encoding.stride is None else encoding.stride


def _windows(rows: Sequence[Row], tokenizer: Any, encoding: Encoding, question: int | None) -> dict[str, list[Any]]:
    """The columns of these rows' windows; with the number of the first question also what leads to answers."""
    found = tokenizer(
        [r.text for r in rows],
        [r.pair or "" for r in rows],
        truncation="only_second",
        max_length=encoding.max_length,
        stride=_overlap(encoding),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns: dict[str, list[Any]] = {k: v for k, v in found.items() if k in tokenizer.model_input_names}
    own: list[dict[str, Any]] = []
    for i, number in enumerate(found["overflow_to_sample_mapping"]):
        row, ids, inside = rows[number], found["input_ids"][i], [s == 1 for s in found.sequence_ids(i)]
        cls = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        offsets = [list(o) if c else [-1, -1] for o, c in zip(found["offset_mapping"][i], inside, strict=True)]
        start, end = _positions(row, offsets, cls)
        mask = [int(c or j == cls) for j, c in enumerate(inside)]
        window = {"context_mask": mask, "start_positions": start, "end_positions": end}
        if question is not None:
            truths = [answer for answer, _ in row.label or ()]
            window |= {"question": question + number, "offsets": offsets, "cls": cls, "context": row.pair or ""}
            window |= {"answers": truths, "no_answer": encoding.no_answer}
        own.append(window)
    return columns | {name: [window[name] for window in own] for name in own[0]}


def _answers(value: Any, column: str, where: str) -> list[tuple[str, int]]:
    """(text, start) of each answer."""
    try:
        if isinstance(value, Mapping):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in value]
        return [(str(text), int(start)) for text, start in pairs]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{where}: column {column!r} holds {str(value)[:80]!r}, expected answers with 'text' and 'answer_start'."
        ) from None


def _positions(row: Row, offsets: Sequence[Sequence[int]], cls: int) -> tuple[int, int]:
    """The tokens at which the first answer starts and ends; [CLS] if it is not in the window, -100 if not known."""
    if row.label is None:
        return -100, -100
    inside = [i for i, (begin, _) in enumerate(offsets) if begin >= 0]
    if not row.label or not inside:
        return cls, cls
    answer, begin = row.label[0]
    end = begin + len(answer)
    if offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return cls, cls
    first = max((i for i in inside if offsets[i][0] <= begin), default=cls)
    last = min((i for i in inside if offsets[i][1] >= end), default=cls)
    return first, last


QUESTION_ANSWERING = QuestionKind()
