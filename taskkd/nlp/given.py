"""`kd.distill` with models and data that the caller holds, instead of names and paths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn

from taskkd.caches import weights_sha256
from taskkd.errors import DataError, RecipeError
from taskkd.nlp import data as text
from taskkd.nlp import models
from taskkd.nlp.task import NlpData, NlpTask, fitting_length

__all__ = ["GivenTask"]


class GivenTask(NlpTask):
    """The NLP task with a given student and teacher; data as paths, lists of dicts, data frames, or HF `Dataset`s.

    A `Dataset` with `input_ids` is used as it is (`labels` or the label column, `id` added if missing); other sources
    have a text and a label column and are tokenized. Every training starts from a copy of the given student.

    Args:
        student: a sequence classifier, its name or path, or the list of the teacher's layers it is to have.
        teacher: a sequence classifier that is trained for the task, or its name or path.
        train, eval, test, unlabelled: data. Without `eval`, validation and test are held out from `train`; without
            `test`, the report is on `eval`.
        processing_class: the tokenizer; may be left out where `teacher` is a name or path.
        text, label: columns.
        max_length: texts are cut to it; None: 128, or what the model takes if that is less.

    Raises:
        RecipeError: the tokenizer is missing, or student and teacher differ in labels.
        DataError: the data is empty or malformed.
    """

    def __init__(
        self,
        student: nn.Module | str | Path | Sequence[int],
        teacher: nn.Module | str | Path,
        train: Any,
        eval: Any = None,  # noqa: A002
        *,
        test: Any = None,
        unlabelled: Any = None,
        processing_class: Any = None,
        text: str | Sequence[str] = "text",
        label: str = "label",
        max_length: int | None = None,
    ) -> None:
        teacher = str(teacher) if isinstance(teacher, Path) else teacher
        if isinstance(student, str | Path):
            student = models.load_model(str(student))
        if processing_class is None:
            if not isinstance(teacher, str):
                raise RecipeError("give the tokenizer as processing_class=..., the teacher is a module.")
            processing_class = models.load_tokenizer(teacher)
        self._teacher = models.load_model(teacher) if isinstance(teacher, str) else teacher
        self._student = (
            student if isinstance(student, nn.Module) else models.student_from_layers(self._teacher, list(student))
        )
        models.check_same_labels(self._student, self._teacher)
        self._columns = (text, label)
        config: Any = self._teacher.config
        regression = models.is_regression(self._teacher)
        self._names = (
            None if regression else [str(config.id2label[i]) for i in range(models.number_of_labels(self._teacher))]
        )
        max_length = fitting_length(max_length, processing_class)
        self._tokenizer, self._max_length, self._next = processing_class, max_length, 0
        if eval is None:
            whole = self._table(train, labelled=True)
            if len(whole) < 10:
                raise DataError(
                    f"{len(whole)} samples are too few to hold out a validation and a test set; give eval=..."
                )
            cut = whole.train_test_split(0.2, seed=0)
            held = cut["test"].train_test_split(0.5, seed=0)
            tables = {"train": cut["train"], "validation": held["train"], "test": held["test"]}
        else:
            tables = {"train": self._table(train, labelled=True), "validation": self._table(eval, labelled=True)}
            tables["test"] = tables["validation"] if test is None else self._table(test, labelled=True)
        tables["unlabelled"] = None if unlabelled is None else self._table(unlabelled, labelled=False)
        self._data = NlpData(**tables, labels=self._names or [], tokenizer=processing_class, max_length=max_length)

    def _table(self, source: Any, *, labelled: bool) -> Any:
        """A tokenized data set with ids that no other of this run has."""
        import datasets

        column, label = self._columns
        if isinstance(source, datasets.Dataset) and "input_ids" in source.column_names:
            table = source
            if "labels" not in table.column_names and label in table.column_names:
                table = table.rename_column(label, "labels")
            if labelled and "labels" not in table.column_names:
                raise DataError(
                    f"a tokenized data set needs the column 'labels' or {label!r}; it has {table.column_names}."
                )
            if "id" in table.column_names:
                table = table.remove_columns("id")
            if not len(table):
                raise DataError("a data set is empty.")
            table = table.add_column("id", list(range(self._next, self._next + len(table))))
        else:
            rows = self._rows(source, column, label if labelled else None)
            table = text.tokenized(rows, self._tokenizer, self._names, max_length=self._max_length, first_id=self._next)
        self._next += len(table)
        return table

    def _rows(self, source: Any, column: str | Sequence[str], label: str | None) -> list[text.Row]:
        if isinstance(source, str | Path):
            return text.read_rows(source, column, label)
        if isinstance(source, Mapping):
            raise DataError(f"data are one table, not a mapping of {', '.join(map(repr, source))}; give one of them.")
        if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas, polars
            source = source.to_dict("records") if hasattr(source, "iloc") else source.to_dicts()
        rows = []
        for number, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise DataError(f"sample {number}: expected a dict with text and label, got {type(row).__name__}.")
            value = dict(row)
            # Class numbers in memory mean the model's labels by position.
            if label is not None and self._names is not None and isinstance(value.get(label), Integral):
                if not 0 <= value[label] < len(self._names):
                    raise DataError(f"sample {number}: label {value[label]} is not in 0 .. {len(self._names) - 1}.")
                value[label] = self._names[value[label]]
            rows.append(text.row(value, column, label, f"sample {number}"))
        return rows

    def describe(self) -> dict[str, Any]:
        """What of this run goes into its resolved recipe, so that a run of other models or data is noticed."""
        data = {
            k: f"given:{len(t)}:{getattr(t, '_fingerprint', '')}"
            for k, t in vars(self._data).items()
            if hasattr(t, "column_names")
        }
        files = {k: v for k, v in data.items() if k in ("train", "validation", "test", "unlabelled")}
        return {
            "data": {"files": files, "max_length": self._max_length},
            "teacher": {"model": f"given:{weights_sha256(self._teacher)[:16]}"},
            "student": {"model": f"given:{weights_sha256(self._student)[:16]}"},
        }

    def fingerprint(self, recipe: Any) -> str:
        """The digest of the given teacher."""
        return weights_sha256(self._teacher)

    def load(self, recipe: Any, folder: Path | None = None) -> NlpData:
        """The given data."""
        return self._data

    def teacher(self, recipe: Any, data: NlpData, source: str | None = None) -> nn.Module:
        """The given teacher, or what it became in this run."""
        return self._teacher if source is None else models.load_model(source, data.labels)

    def student(self, recipe: Any, data: NlpData, teacher: nn.Module, seed: int) -> nn.Module:
        """A copy of the given student."""
        return copy.deepcopy(self._student)
