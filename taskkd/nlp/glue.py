"""GLUE (Wang et al. 2019): columns, labels and metrics of its tasks, as the hub's data set `nyu-mll/glue` has them.

The labels of GLUE's test sets are hidden. The test set of a run is therefore the task's validation set, on which papers
report, and what models are selected on is held out of its training set: no figure is of data that was selected on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import field_validator

from taskkd.errors import DataError, nearest
from taskkd.nlp.text import Row, Splits, hub_rows, text_row
from taskkd.schema import Model

__all__ = ["GLUE_TASKS", "HIDDEN_LABELS", "HUB", "Glue", "GlueTask"]

HUB = "nyu-mll/glue"
HIDDEN_LABELS = (
    "; GLUE's own test labels are hidden: test is its validation set, validation is held out of its training set"
)


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE.

    Args:
        text: the text column, or two for pairs.
        labels: in the order of their numbers; none: regression.
        metric: that models are selected by.
        validation_size: what is held out of train: a share, or for large tasks a number of samples.
        test: the split that serves as the test set.
        mismatched: a second one of other genres (MNLI).
    """

    text: str | tuple[str, str]
    labels: tuple[str, ...]
    metric: str = "accuracy"
    validation_size: int | float = 0.1
    test: str = "validation"
    mismatched: str | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """What can be no other in a recipe's `data`."""
        kind = "classification" if self.labels else "regression"
        text = self.text if isinstance(self.text, str) else list(self.text)
        return {"type": kind, "text": text, "label": "label"}

    @property
    def defaults(self) -> dict[str, Any]:
        """What a recipe's `data` has unless it says another; lengths are those of TinyBERT (Jiao et al. 2020)."""
        return {
            "labels": list(self.labels) or None,
            "max_length": 64 if isinstance(self.text, str) else 128,
            "metric": self.metric,
            "validation_size": self.validation_size,
        }

    def row(self, entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
        """One sample; its label may be a name or, in a copy without the names, a number (-1: hidden).

        Raises:
            DataError: a column is missing, or the number is of no label.
        """
        row = text_row(entry, text, label, where)
        if not self.labels or not isinstance(row.label, int):
            return row
        if row.label >= len(self.labels):
            raise DataError(f"{where}: label {row.label} is none of 0 to {len(self.labels) - 1}.")
        return replace(row, label=self.labels[row.label] if row.label >= 0 else None)


PAIR = ("sentence1", "sentence2")
GLUE_TASKS = {
    "cola": GlueTask("sentence", ("unacceptable", "acceptable"), "mcc"),
    "sst2": GlueTask("sentence", ("negative", "positive"), validation_size=5000),
    "mrpc": GlueTask(PAIR, ("not_equivalent", "equivalent"), "binary_f1"),
    "stsb": GlueTask(PAIR, (), "spearman"),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), "binary_f1", validation_size=5000),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), validation_size=5000,
        test="validation_matched", mismatched="validation_mismatched",
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment"), validation_size=5000),
    "rte": GlueTask(PAIR, ("entailment", "not_entailment")),
    "wnli": GlueTask(PAIR, ("not_entailment", "entailment")),
}  # fmt: skip


class Glue(Model):
    """A task of GLUE from the hub, or from `path`, a local copy in the same layout."""

    task: str
    path: str | None = None

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in GLUE_TASKS:
            raise ValueError(f"no task {task!r} in GLUE{nearest(task, GLUE_TASKS)}; it has {', '.join(GLUE_TASKS)}")
        return task

    def read(self) -> Splits:
        """Train and test; for MNLI also `mismatched`.

        Raises:
            DataError: the data set cannot be loaded, or has other columns.
        """
        own, source = GLUE_TASKS[self.task], self.path or HUB

        def rows(split: str | None) -> list[Row]:
            return hub_rows(source, self.task, split, own.text, "label", row=own.row) if split else []

        return Splits(train=rows("train"), test=rows(own.test), mismatched=rows(own.mismatched))
