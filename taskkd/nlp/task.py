"""What a recipe of task `nlp` may say, and how it becomes data, models and metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.caches import file_sha256
from taskkd.checkpoints import load_student
from taskkd.errors import DataError, RecipeError
from taskkd.nlp import data as text
from taskkd.nlp import models
from taskkd.nlp.augment import Augment, augmented, describe
from taskkd.nlp.methods import METHODS
from taskkd.nlp.metrics import Classification, Regression
from taskkd.schema import Model, Recipe, TeacherConfig

__all__ = ["NlpData", "NlpRecipe", "task_loss"]

Size = int | float


class Files(Model):
    """Files by use; what is missing of validation and test is held out from train."""

    train: str
    validation: str | None = None
    test: str | None = None
    unlabelled: str | list[str] | None = None


class Sample(Model):
    """The embedded sentiment sample."""

    name: Literal["sentiment"] = "sentiment"
    domains: list[str] = Field(["movie"], min_length=1)
    unlabelled_domains: list[str] = Field([])
    label: Literal["binary", "score"] = "binary"


class Hub(Model):
    """An HF data set by name or folder."""

    name: str
    subset: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    unlabelled: str | None = None


class Data(Model):
    """Where the text comes from: exactly one of `files`, `sample`, `hub`."""

    files: Files | None = None
    sample: Sample | None = None
    hub: Hub | None = None
    text: str | list[str] = "text"
    label: str = "label"
    type: Literal["classification", "regression"] = "classification"
    labels: list[str] | None = None
    max_length: int | None = Field(None, ge=2)  # None: 128, or what the teacher takes if that is less
    train_size: int | None = Field(None, ge=1)
    validation_size: Size = Field(0.1, gt=0)
    test_size: Size = Field(0.1, gt=0)
    unlabelled_size: int | None = Field(None, ge=0)
    split_seed: int = 0
    augment: Augment | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if sum(s is not None for s in (self.files, self.sample, self.hub)) != 1:
            raise ValueError("exactly one of files, sample and hub must be given")
        if isinstance(self.text, list) and len(self.text) != 2:
            raise ValueError("text takes one column, or a list of two for pairs")
        return self


class Student(Model):
    """The student: exactly one of `layers` (of the teacher), `config` (its architecture, other sizes), `model`."""

    layers: list[int] | None = None
    config: dict[str, Any] | None = None
    model: str | None = None
    start: Literal["teacher", "pretrained"] = "teacher"

    @model_validator(mode="after")
    def _one_kind(self) -> Student:
        if sum(s is not None for s in (self.layers, self.config, self.model)) != 1:
            raise ValueError("exactly one of layers, config and model must be given")
        return self


class Teacher(TeacherConfig):
    """A teacher by hub name, path or `package:name/folder`."""

    model: str
    sha256: str | None = None


class NlpRecipe(Recipe):
    """A recipe of task `nlp`."""

    task: Literal["nlp"] = "nlp"
    data: Data
    teacher: Teacher
    student: Student


@dataclass
class NlpData:
    """Tokenized data of a run. `train` is labelled; `unlabelled` has labels -100 or NaN, its ids follow on.

    `copies` says which of the unlabelled texts are augmented ones, for the summary.
    """

    train: Any
    validation: Any
    test: Any
    unlabelled: Any | None
    labels: list[str]
    tokenizer: Any
    max_length: int
    copies: str = ""

    @property
    def everything(self) -> Any:
        """Labelled and unlabelled training text as one data set."""
        import datasets

        return self.train if self.unlabelled is None else datasets.concatenate_datasets([self.train, self.unlabelled])

    @property
    def collator(self) -> Any:
        """Pads a batch to its longest text."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the teacher's inputs depend on beside the text, for the key of a cache."""
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "vocabulary": len(self.tokenizer),
            "max_length": self.max_length,
        }

    def summary(self) -> str:
        """One line with the numbers of samples."""
        free = 0 if self.unlabelled is None else len(self.unlabelled)
        kind = f"{len(self.labels)} labels" if self.labels else "regression"
        held = f"{len(self.validation)} validation, {len(self.test)} test"
        return f"{len(self.train)} labelled, {free} unlabelled{self.copies}, {held}; {kind}"


def task_loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy (or squared error) over the labelled samples of a batch; 0 if there are none.

    Samples with label -100 (NaN for regression) are text without a label. The mean is over the labelled ones.

    Args:
        output: with `logits`, (batch, classes) or (batch, 1).
        batch: with `labels`, (batch,).
    """
    logits, labels = output["logits"].float(), batch["labels"]
    if labels.is_floating_point():
        known = ~labels.isnan()
        error = (logits.reshape(-1) - torch.where(known, labels, 0.0)).square() * known
        total: Tensor = error.sum()
    else:
        known = labels >= 0
        total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    loss: Tensor = total / known.sum().clamp(min=1)
    return loss


logger = logging.getLogger(__name__)


class NlpTask:
    """The glue between recipes and this package."""

    name = "nlp"
    recipe = NlpRecipe
    methods = METHODS
    task_loss = staticmethod(task_loss)

    def load(self, recipe: NlpRecipe, folder: Path | None = None) -> NlpData:
        """Read, split and tokenize the data.

        Args:
            recipe: says which.
            folder: of the run, where augmented texts are kept; None: a look, none are made.

        Raises:
            DataError: a file, column, label or split is wrong.
        """
        config = recipe.data
        splits = _splits(config)
        for line in text.shared_texts(splits):
            logger.warning(line)
        copies = _augment(config, splits, recipe.teacher.model, folder)
        names: list[str] | None = None
        if config.type == "classification":
            names = config.labels or text.label_names(splits.train)
            if len(names) < 2:
                raise DataError(f"classification needs two labels or more, the training data has {names}.")
            names = models.same_order(recipe.teacher.model, names, trained=recipe.teacher.finetune is None)
        tokenizer = models.load_tokenizer(recipe.teacher.model)
        max_length = fitting_length(config.max_length, tokenizer)
        start, tables = 0, {}
        for part in ("train", "unlabelled", "validation", "test"):
            rows = getattr(splits, part)
            tables[part] = (
                text.tokenized(rows, tokenizer, names, max_length=max_length, first_id=start) if rows else None
            )
            start += len(rows)
        return NlpData(**tables, labels=names or [], tokenizer=tokenizer, max_length=max_length, copies=copies)

    def fingerprint(self, recipe: NlpRecipe) -> str:
        """What tells that the teacher's files are the ones a run was started with; "" for a hub name."""
        folder = Path(models.resolve(recipe.teacher.model))
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        return " ".join(file_sha256(f) for f in files)

    def teacher(self, recipe: NlpRecipe, data: NlpData, source: str | None = None) -> nn.Module:
        """The teacher (from `source`, a folder of this run, once it is fine-tuned)."""
        own = recipe.teacher
        if source is not None:
            return models.load_model(source, data.labels)
        return models.load_model(own.model, data.labels, sha256=own.sha256)

    def student(self, recipe: NlpRecipe, data: NlpData, teacher: nn.Module, seed: int) -> nn.Module:
        """The student at its start; the same for a seed, whatever it is then trained with."""
        own = recipe.student
        if own.model is not None:
            return models.load_model(own.model, data.labels, seed=seed)
        if own.config is not None:
            return models.student_from_config(teacher, own.config, seed=seed)
        origin = teacher if own.start == "teacher" else models.load_model(recipe.teacher.model, data.labels, seed=seed)
        return models.student_from_layers(origin, own.layers or [])

    def reload(self, student: nn.Module, folder: Path) -> nn.Module:
        """Load a trained student of this run into one of the same architecture."""
        load_student(student, folder)
        return student

    def given(self, *args: Any, **options: Any) -> NlpTask:
        """This task with models and data that the caller holds; see `GivenTask`."""
        from taskkd.nlp.given import GivenTask

        return GivenTask(*args, **options)

    def trained(self, folder: Path) -> tuple[nn.Module, Any]:
        """A trained student and its tokenizer, from the folder it was saved in."""
        return models.load_model(str(folder)).eval(), models.load_tokenizer(str(folder))

    def read(self, recipe: NlpRecipe, path: str, student: Any, tokenizer: Any) -> Any:
        """Another file with the recipe's columns, tokenized, with the labels of a trained student."""
        names = (
            None
            if models.is_regression(student)
            else [str(student.config.id2label[i]) for i in range(student.config.num_labels)]
        )
        rows = text.read_rows(path, recipe.data.text, recipe.data.label)
        return text.tokenized(rows, tokenizer, names, max_length=fitting_length(recipe.data.max_length, tokenizer))

    def predict(
        self, recipe: NlpRecipe, student: Any, tokenizer: Any, inputs: Sequence[str]
    ) -> Iterator[tuple[str, float | None, str]]:
        """(label, probability, text) of each text, or (value, None, text) for regression; pairs are tab-separated."""
        for start in range(0, len(inputs), 32):
            chunk = list(inputs[start : start + 32])
            first, second = chunk, None
            if isinstance(recipe.data.text, list):
                pairs = [t.partition("\t") for t in chunk]
                first, second = [p[0] for p in pairs], [p[2] for p in pairs]
            length = fitting_length(recipe.data.max_length, tokenizer)
            batch = tokenizer(first, second, truncation=True, max_length=length, padding=True, return_tensors="pt")
            with torch.no_grad():
                logits = student(**batch).logits.float()
            if models.is_regression(student):
                for content, value in zip(chunk, logits.reshape(-1).tolist(), strict=True):
                    yield f"{value:.4f}", None, content
            else:
                for content, row in zip(chunk, logits.softmax(-1), strict=True):
                    best = int(row.argmax())
                    yield str(student.config.id2label[best]), float(row[best]), content

    def metric(self, data: NlpData) -> Classification | Regression:
        """A fresh metric."""
        return Classification(len(data.labels)) if data.labels else Regression()

    def metric_of(self, student: nn.Module) -> Classification | Regression:
        """A fresh metric for a trained student."""
        return Regression() if models.is_regression(student) else Classification(models.number_of_labels(student))

    def collator(self, tokenizer: Any) -> Any:
        """Pads a batch to its longest text."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def main_metric(self, data: NlpData) -> str:
        """The metric that models are selected by."""
        return "accuracy" if data.labels else "pearson"

    def chance(self, data: NlpData) -> float:
        """The main metric without looking at the text: the share of the commonest label of the validation set."""
        if not data.labels:
            return 0.0
        labels = torch.tensor(data.validation["labels"])
        return float(torch.bincount(labels[labels >= 0], minlength=2).max()) / max(int((labels >= 0).sum()), 1)

    def latency_batches(self, data: NlpData, count: int) -> list[dict[str, Any]]:
        """Real test samples, one by one, as the student's keyword arguments."""
        rows = [data.test[i] for i in range(min(count, len(data.test)))]
        drop = {"id", "labels"}
        return [dict(data.collator([{k: v for k, v in row.items() if k not in drop}])) for row in rows]


def fitting_length(asked: int | None, tokenizer: Any) -> int:
    """The length that texts are cut to.

    Raises:
        RecipeError: more is asked for than the model has positions.
    """
    longest = int(min(getattr(tokenizer, "model_max_length", 128), 2**31))
    if asked is not None and asked > longest:
        raise RecipeError(f"data.max_length {asked} is more than the teacher's {longest} positions.")
    return asked or min(128, longest)


def _splits(config: Data) -> text.Splits:
    splits = text.Splits()
    if config.sample is not None:
        own = config.sample
        splits.train = text.sentiment_rows(own.domains, label=own.label)
        taken = {text.same_text(r.text) for r in splits.train}
        extra = text.sentiment_rows(own.unlabelled_domains, label="none") if own.unlabelled_domains else []
        splits.unlabelled = [r for r in extra if text.same_text(r.text) not in taken]
    elif config.files is not None:
        files = config.files
        splits.train = text.read_rows(files.train, config.text, config.label)
        splits.validation = text.read_rows(files.validation, config.text, config.label) if files.validation else []
        splits.test = text.read_rows(files.test, config.text, config.label) if files.test else []
        free = [files.unlabelled] if isinstance(files.unlabelled, str) else files.unlabelled or []
        splits.unlabelled = [r for f in free for r in text.read_rows(f, config.text, None)]
    elif config.hub is not None:
        hub = config.hub
        for part in ("train", "validation", "test", "unlabelled"):
            name = getattr(hub, part)
            if name:
                label = None if part == "unlabelled" else config.label
                setattr(splits, part, text.hub_rows(hub.name, hub.subset, name, config.text, label))
    return _cut(config, splits)


def _augment(config: Data, splits: text.Splits, teacher: str, folder: Path | None) -> str:
    """Add copies of the training texts to the unlabelled ones; words about it for the summary."""
    if config.augment is None:
        return ""
    if folder is None:
        return f" (a run adds {describe(splits.train, config.augment, teacher)})"
    held = [*splits.validation, *splits.test]
    copies = augmented(splits.train, held, config.augment, teacher=teacher, folder=folder)
    splits.unlabelled = [*splits.unlabelled, *copies]
    return f" ({len(copies)} of them copies with replaced words)"


def _cut(config: Data, splits: text.Splits) -> text.Splits:
    """Hold out what is missing, then limit the sizes; training rows that are left over serve as unlabelled text."""
    labelled = [r for r in splits.train if has_label(r)]
    left = [r for r in splits.train if not has_label(r)]
    for part in ("validation", "test"):
        rows = getattr(splits, part)
        kept = [r for r in rows if has_label(r)]
        if rows and not kept:
            raise DataError(f"{rows[0].where.partition(', ')[0]}: no row of the {part} data has a label.")
        setattr(splits, part, kept)
    total = len(labelled)
    sizes = [_count(config.test_size, total) if not splits.test else 0]
    sizes.append(_count(config.validation_size, total) if not splits.validation else 0)
    sizes.append(config.train_size if config.train_size is not None else total - sum(sizes))
    if sizes[2] < 1:
        raise DataError(
            f"{total} labelled rows are too few for a test set of {sizes[0]} and a validation set of {sizes[1]}."
        )
    test, validation, train, rest = text.holdout(labelled, sizes, config.split_seed)
    unlabelled = [*rest, *left, *splits.unlabelled]
    if config.unlabelled_size is not None:
        if config.unlabelled_size > len(unlabelled):
            raise DataError(
                f"data.unlabelled_size is {config.unlabelled_size}, but only {len(unlabelled)} rows are left for it."
            )
        unlabelled = text.holdout(unlabelled, [config.unlabelled_size], config.split_seed + 1)[0]
    stripped = [text.Row(r.text, r.pair, None, r.where) for r in unlabelled]
    return text.Splits(train, splits.validation or validation, splits.test or test, stripped)


def has_label(row: text.Row) -> bool:
    """Whether a row is labelled."""
    return row.label is not None and str(row.label) != ""


def _count(size: Size, total: int) -> int:
    return max(1, round(size * total)) if isinstance(size, float) and size < 1 else int(size)


TASK = NlpTask()
