"""Extractive question answering: files of SQuAD, the best span of a window, exact match and F1."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskkd.errors import DataError
from taskkd.nlp.text import READERS

__all__ = ["Answers", "exact_match", "f1", "squad_questions"]

#: in tokens, as in the evaluation scripts of BERT
LONGEST_ANSWER = 30


def squad_questions(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of a SQuAD file (1.1 or 2.0) with `question`, `context`, `answers`; else JSON lines with these.

    Raises:
        DataError: it is neither.
    """
    text = path.read_text(encoding="utf-8-sig")
    if '"paragraphs"' not in text:
        yield from READERS[".jsonl"](path)
        return
    try:
        articles = json.loads(text)["data"]
        for article in articles:
            title = article.get("title", "")
            for number, paragraph in enumerate(article["paragraphs"], 1):
                for question in paragraph["qas"]:
                    where = f"{path}, {title!r}, paragraph {number}, question {question.get('id', '')!r}"
                    yield where, {**question, "context": paragraph["context"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a file of SQuAD ({type(error).__name__}: {error}).") from None


# ---- comparing answers, as the evaluation script of SQuAD does


def _plain(text: str) -> list[str]:
    """The words of an answer without case, punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer is one of the true ones but for case, punctuation and articles, else 0."""
    return float(any(_plain(answer) == _plain(truth) for truth in truths))


def f1(answer: str, truths: Sequence[str]) -> float:
    """The largest F1 of the answer's words against a true answer's; two empty answers agree."""
    return max(_f1(_plain(answer), _plain(truth)) for truth in truths)


def _f1(words: Sequence[str], truth: Sequence[str]) -> float:
    if not words or not truth:
        return float(words == truth)
    shared = sum((Counter(words) & Counter(truth)).values())
    return 2 * shared / (len(words) + len(truth))


# ---- from windows to questions


@dataclass(frozen=True)
class _Window:
    question: int
    offsets: Sequence[Sequence[int]]  # of each token in the context; (-1, -1): not of the context
    start: int  # the position of [CLS]


@dataclass(frozen=True)
class _Question:
    context: str
    truths: tuple[str, ...]
    no_answer: bool


@dataclass
class Candidate:
    """What the windows seen so far say of a question: the best span's score, text and probability; the least score of
    no answer."""

    score: float
    text: str
    probability: float
    null: float

    def merged(self, other: Candidate) -> Candidate:
        """Both together."""
        best = self if self.score >= other.score else other
        return Candidate(best.score, best.text, best.probability, min(self.null, other.null))


class Answers:
    """Exact match and F1 of SQuAD (Rajpurkar et al. 2016, 2018), a question at a time from all its windows.

    The answer is the valid span (in the context, at most 30 tokens, not ending before it starts) with the largest sum
    of start and end logits over all windows; where questions may have no answer, none if the least [CLS] score of the
    windows is larger.

    Args:
        tables: as `QuestionKind.encode` gives them with `training=False`.
    """

    def __init__(self, tables: Sequence[Any]) -> None:
        self.windows: dict[int, _Window] = {}
        self.questions: dict[int, _Question] = {}
        for table in tables:
            names = ("id", "question", "offsets", "cls", "context", "answers", "no_answer")
            for row in table.select_columns(list(names)):
                self.windows[row["id"]] = _Window(row["question"], row["offsets"], row["cls"])
                truths = tuple(row["answers"]) or ("",)
                self.questions.setdefault(row["question"], _Question(row["context"], truths, row["no_answer"]))
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seen: dict[int, Candidate] = {}

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Look at one batch of windows: `output.start_logits`, `output.end_logits` (batch, tokens), `batch["id"]`."""
        starts, ends = (output[k].detach().float().cpu() for k in ("start_logits", "end_logits"))
        for start, end, number in zip(starts, ends, batch["id"].tolist(), strict=True):
            window = self.windows[number]
            candidate = _best_span(start, end, window, self.questions[window.question].context)
            known = self.seen.get(window.question)
            self.seen[window.question] = candidate if known is None else known.merged(candidate)

    def state(self) -> dict[int, Candidate]:
        """The candidates by question."""
        return self.seen

    def merge(self, states: Sequence[Mapping[int, Candidate]]) -> None:
        """Take the best of all processes' candidates."""
        self.reset()
        for state in states:
            for question, candidate in state.items():
                known = self.seen.get(question)
                self.seen[question] = candidate if known is None else known.merged(candidate)

    def answers(self) -> dict[int, tuple[str, float]]:
        """(answer, its probability in its window) of every question seen; "" for no answer."""
        found = {}
        for question, best in self.seen.items():
            none = self.questions[question].no_answer and best.null > best.score
            found[question] = ("", best.probability) if none else (best.text, best.probability)
        return found

    def compute(self) -> dict[str, float]:
        """`exact_match` and `f1`, in [0, 1], means over the questions seen; 0 for none."""
        pairs = [(answer, self.questions[q].truths) for q, (answer, _) in self.answers().items()]
        count = max(len(pairs), 1)
        return {
            "exact_match": sum(exact_match(*pair) for pair in pairs) / count,
            "f1": sum(f1(*pair) for pair in pairs) / count,
        }


def _best_span(start: Tensor, end: Tensor, window: _Window, context: str) -> Candidate:
    length = len(window.offsets)
    inside = torch.tensor([begin >= 0 for begin, _ in window.offsets])
    null = float(start[window.start] + end[window.start])
    if not bool(inside.any()):
        return Candidate(float("-inf"), "", 0.0, null)
    start, end = (x[:length].masked_fill(~inside, float("-inf")) for x in (start, end))
    scores = start[:, None] + end[None, :]
    order = torch.arange(length)
    gap = order[None, :] - order[:, None]
    scores = scores.masked_fill((gap < 0) | (gap >= LONGEST_ANSWER), float("-inf"))
    first, last = divmod(int(scores.argmax()), length)
    probability = float(start.softmax(0)[first] * end.softmax(0)[last])
    text = context[window.offsets[first][0] : window.offsets[last][1]]
    return Candidate(float(scores[first, last]), text, probability, null)
