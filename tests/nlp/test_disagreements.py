"""Texts on which models disagree, chosen by a rule that anyone can follow."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from torch import nn

from taskkd.nlp.collation import Collator
from taskkd.nlp.disagreements import disagreements
from tests import tiny


class Fixed(nn.Module):
    """Answers by the first word: its place in a list of answers."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers = torch.tensor(answers)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": 3.0 * torch.eye(2)[self.answers[input_ids[:, 1] - len(tiny.SPECIAL)]]}


class Data:
    """What is read of a run's data: a text for each plain word, the third without a label."""

    labels = ("no", "yes")

    def __init__(self) -> None:
        self.tokenizer: Any = tiny.tokenizer()
        self.collator = Collator(self.tokenizer)
        columns = dict(self.tokenizer(tiny.PLAIN[:8]))
        self.test = datasets.Dataset.from_dict({**columns, "labels": [1, 1, -100, 1, 1, 0, 0, 1]})


def test_the_first_of_each_pattern_then_the_second() -> None:
    right = [1, 1, 0, 1, 1, 0, 0, 1]
    models = {
        "teacher": Fixed(right),
        "alone": Fixed([1, 0, 0, 0, 0, 0, 1, 1]),
        "distilled": Fixed([1, 1, 1, 0, 1, 0, 0, 1]),
    }
    found = disagreements(Data(), models, shown=3)
    assert (found["looked_at"], found["agreed"]) == (7, 3)
    assert found["patterns"] == [
        {"right": ["teacher", "distilled"], "count": 3},
        {"right": ["teacher"], "count": 1},
    ]
    assert [one["text"] for one in found["texts"]] == [tiny.PLAIN[i] for i in (1, 3, 4)]
    answer = found["texts"][1]["answers"]["distilled"]
    assert (answer["label"], answer["right"], round(answer["probability"], 2)) == ("no", False, 0.95)
    few = disagreements(Data(), models, looked_at=2)
    assert (few["looked_at"], len(few["texts"])) == (2, 1)
