"""`kd.distill` with models and data that the caller holds, instead of names and paths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from torch import nn

from taskkd.errors import DataError, RecipeError
from taskkd.nlp import models, text, tokenization
from taskkd.nlp.data import NlpData, select_by, two_tokenizers
from taskkd.nlp.kinds import Encoding, kind_of
from taskkd.nlp.task import NlpTask
from taskkd.nlp.tokenization import fitting_length
from taskkd.tasks import GivenModels

__all__ = ["GivenNlp"]


class GivenNlp(GivenModels, NlpTask):
    """The NLP task with a given student and teacher; data as paths, lists of dicts, data frames, or HF `Dataset`s.

    The teacher's head says which kind of task it is. A `Dataset` with `input_ids` is used as it is (`labels` or the
    label column, `id` added if missing); other sources have a text and a label column and are tokenized. Every training
    starts from a copy of the given student.

    Args:
        student: a model, its name or path, or the list of the teacher's layers it is to have.
        teacher: a model that is trained for the task, or its name or path.
        train, eval, test, unlabelled: data. Without `eval`, validation and test are held out from `train`; without
            `test`, the report is on `eval`.
        processing_class: the tokenizer; may be left out where `teacher` is a name or path.
        student_processing_class: the student's tokenizer, where it is another than the teacher's; may be left out where
            `student` is a name or path.
        text, label: columns; None: those of the kind of task, "text" and "label" for classification.
        max_length: texts are cut to it; None: that of the kind (128 for classification), or what the model takes if
            that is less.
        metric: that the best epoch is chosen by; None: as the kind of task has it.
        stride, no_answer, masking, mask_share: as in a recipe's data.

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
        student_processing_class: Any = None,
        text: str | Sequence[str] | None = None,
        label: str | None = None,
        max_length: int | None = None,
        metric: str | None = None,
        stride: int | None = None,
        no_answer: bool = False,
        masking: Literal["dynamic", "static"] = "dynamic",
        mask_share: float = 0.15,
    ) -> None:
        teacher = str(teacher) if isinstance(teacher, Path) else teacher
        name = ""
        if isinstance(student, str | Path):
            name = str(student)
            student = models.load_model(name)
        if processing_class is None and not isinstance(teacher, str):
            raise RecipeError("give the tokenizer as processing_class=..., the teacher is a module.")
        self._teacher = models.load_model(teacher) if isinstance(teacher, str) else teacher
        self._student = (
            student if isinstance(student, nn.Module) else models.student_from_layers(self._teacher, list(student))
        )
        models.check_same_labels(self._student, self._teacher)
        self._kind = kind = kind_of(self._teacher)
        if processing_class is None:
            processing_class = models.load_tokenizer(str(teacher), kind.tokenizer_options)
        if student_processing_class is None and name and models.has_tokenizer(name):
            student_processing_class = models.load_tokenizer(name, kind.tokenizer_options)
        self._columns = (text or kind.text, label or kind.label)
        self._names = models.label_names(self._teacher)
        self._encoding = Encoding(
            0,  # the length depends on the tokenizer
            pairs=not isinstance(self._columns[0], str),
            stride=stride,
            no_answer=no_answer,
            masking=masking,
            mask_share=mask_share,
        )
        sources = {"train": self._read(train, labelled=True)}
        if eval is None:
            sources["train"], sources["validation"], test = _cut(sources["train"])
        else:
            sources["validation"] = self._read(eval, labelled=True)
        if test is not None:
            sources["test"] = self._read(test, labelled=True)
        if unlabelled is not None:
            sources["unlabelled"] = self._read(unlabelled, labelled=False)
        self._max_length = max_length
        data = self._encoded(sources, processing_class, student_processing_class or processing_class)
        self._data = select_by(data, metric)

    def _encoded(self, sources: Mapping[str, Any], teacher: Any, student: Any) -> NlpData:
        """The data by the tokenizers of teacher and student, which may be the same."""
        configs = {"teacher": self._teacher.config, "student": self._student.config}
        if tokenization.same(teacher, student):
            data = self._tables(sources, tokenization.richer(teacher, student), configs)
            return self.complete(replace(data, tokenizer=student), lambda: self._teacher)
        tokenization.check_kind(self._kind.head)
        if any(_is_tokenized(source) for source in sources.values()):
            raise RecipeError(
                "student and teacher have different tokenizers: give data with texts, not with `input_ids`."
            )
        own, other = (
            self._tables(sources, tokenizer, {who: configs[who]})
            for who, tokenizer in (("student", student), ("teacher", teacher))
        )
        both = two_tokenizers(own, other, {"test": sources["validation"], **sources})
        return self.complete(both, lambda: self._teacher)

    def _tables(self, sources: Mapping[str, Any], tokenizer: Any, configs: Mapping[str, Any]) -> NlpData:
        """The data by one tokenizer."""
        length = fitting_length(self._max_length, tokenizer, self._kind.max_length, configs)
        self._tokenizer, self._next, self._encoding = tokenizer, 0, replace(self._encoding, max_length=length)
        tables = {"train": self._table(sources["train"])}
        tables["validation"] = tables["test"] = self._table(sources["validation"], training=False)
        if "test" in sources:
            tables["test"] = self._table(sources["test"], training=False)
        tables["unlabelled"] = None
        if "unlabelled" in sources:
            tables["unlabelled"] = self._table(sources["unlabelled"], labelled=False)
        return NlpData(**tables, labels=self._names, tokenizer=tokenizer, kind=self._kind, encoding=self._encoding)

    def _read(self, source: Any, *, labelled: bool) -> Any:
        """A tokenized data set as it is, rows of everything else."""
        if _is_tokenized(source):
            return source
        if isinstance(source, list) and source and isinstance(source[0], text.Row):
            return source
        return self._rows(source, self._columns[0], self._columns[1] if labelled else None)

    def _table(self, source: Any, *, labelled: bool = True, training: bool = True) -> Any:
        """What `_read` gave as a tokenized data set with ids that no other of this run has."""
        kind, names, encoding = self._kind, self._names, self._encoding
        if _is_tokenized(source):
            label = self._columns[1] if labelled else None
            table = kind.adopt(source, self._tokenizer, names, encoding, label=label, training=training)
            if "id" in table.column_names:
                table = table.remove_columns("id")
            if not len(table):
                raise DataError("a data set is empty.")
            table = table.add_column("id", list(range(self._next, self._next + len(table))))
        else:
            table = kind.encode(source, self._tokenizer, names, encoding, first_id=self._next, training=training)
        self._next += len(table)
        return table

    def _rows(self, source: Any, column: str | Sequence[str], label: str | None) -> list[text.Row]:
        if isinstance(source, str | Path):
            return text.read_rows(source, column, label, row=self._kind.row, readers=self._kind.readers)
        if isinstance(source, Mapping):
            raise DataError(f"data are one table, not a mapping of {', '.join(map(repr, source))}; give one of them.")
        if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas, polars
            source = source.to_dict("records") if hasattr(source, "iloc") else source.to_dicts()
        rows = []
        for number, row in enumerate(source):
            if isinstance(row, str) and isinstance(column, str) and not self._kind.head.logits:
                row = {column: row}  # noqa: PLW2901
            if not isinstance(row, Mapping):
                raise DataError(f"sample {number}: expected a dict with text and label, got {type(row).__name__}.")
            value = dict(row)
            if label in value and self._names:
                value[label] = self._named(value[label], number)
            rows.append(self._kind.row(value, column, label, f"sample {number}"))
        return rows

    def _named(self, value: Any, sample: int) -> Any:
        """Class numbers in memory mean the model's labels by position; for words there is a list of them."""
        if isinstance(value, Integral):
            if not 0 <= int(value) < len(self._names):
                raise DataError(f"sample {sample}: label {value} is not in 0 .. {len(self._names) - 1}.")
            return self._names[int(value)]
        return [self._named(v, sample) for v in value] if isinstance(value, list | tuple) else value

    def describe(self) -> dict[str, Any]:
        """What of this run goes into its resolved recipe, so that a run of other models or data is noticed."""
        data = {
            k: f"given:{len(t)}:{getattr(t, '_fingerprint', '')}"
            for k, t in vars(self._data).items()
            if hasattr(t, "column_names")
        }
        files = {k: v for k, v in data.items() if k in ("train", "validation", "test", "unlabelled")}
        encoding = asdict(self._encoding)
        del encoding["pairs"], encoding["seed"]
        return {
            "data": {"files": files, "type": self._kind.name, "metric": self._data.metric, **encoding},
            **self.described_models(),
        }

    def load(self, recipe: Any, folder: Path | None = None) -> NlpData:
        """The given data."""
        return self._data

    def teacher(self, recipe: Any, data: NlpData, source: str | None = None) -> nn.Module:
        """The given teacher, or what it became in this run."""
        return self._teacher if source is None else models.load_model(source, data.labels, head=data.kind.head)

    def student(self, recipe: Any, data: NlpData, teacher: nn.Module, seed: int) -> nn.Module:
        """A copy of the given student."""
        return copy.deepcopy(self._student)


def _is_tokenized(source: Any) -> bool:
    import datasets

    return isinstance(source, datasets.Dataset) and "input_ids" in source.column_names


def _cut(source: Any) -> list[Any]:
    """Train, validation and test: a tenth of all samples each for the latter two.

    Raises:
        DataError: there are under ten samples.
    """
    import datasets

    if len(source) < 10:
        raise DataError(f"{len(source)} samples are too few to hold out a validation and a test set; give eval=...")
    cut = datasets.Dataset.from_dict({"index": list(range(len(source)))}).train_test_split(0.2, seed=0)
    held = cut["test"].train_test_split(0.5, seed=0)
    parts = [list(part["index"]) for part in (cut["train"], held["train"], held["test"])]
    return [source.select(p) if _is_tokenized(source) else [source[i] for i in p] for p in parts]
