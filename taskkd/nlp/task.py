"""What a recipe of task `nlp` may say, and how it becomes data, models and metrics."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from taskkd.caches import file_sha256
from taskkd.checkpoints import load_student
from taskkd.errors import DataError
from taskkd.nlp import data as text
from taskkd.nlp import metrics, models, tokenization
from taskkd.nlp.augment import Augment, augmented, describe
from taskkd.nlp.collation import FullLength
from taskkd.nlp.glue import GLUE_TASKS, HIDDEN_LABELS, Glue
from taskkd.nlp.heads import TOKENS
from taskkd.nlp.kinds import KINDS, Encoding, Kind
from taskkd.nlp.kinds.sequences import CLASSIFICATION, task_loss
from taskkd.nlp.masking import Masked
from taskkd.nlp.methods import METHODS
from taskkd.nlp.pairs import describe_pair
from taskkd.schema import Model, Recipe, TeacherConfig
from taskkd.terms import Term

__all__ = ["NlpData", "NlpRecipe", "task_loss"]

Size = int | float
#: kinds whose labels stand at words, which augmentation replaces
NOT_AUGMENTED = ("token_classification", "question_answering")
PARTS = ("train", "unlabelled", "validation", "test", "mismatched")
#: what the embedded sample has labels for
SAMPLE_TYPES = ("classification", "regression", "masked_lm")
#: keys of `Data` that are of one type
OWNED = {
    "stride": "question_answering",
    "no_answer": "question_answering",
    "masking": "masked_lm",
    "mask_share": "masked_lm",
}


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
    """Where the text comes from: exactly one of `files`, `sample`, `hub`, `glue`."""

    files: Files | None = None
    sample: Sample | None = None
    hub: Hub | None = None
    glue: Glue | None = None
    type: Literal["classification", "regression", "token_classification", "question_answering", "masked_lm"] = (
        "classification"
    )
    text: str | list[str] = ""  # what is left out is as `type` has it
    label: str = ""
    labels: list[str] | None = None
    metric: str | None = None  # that models are selected by; None: as `type` has it
    max_length: int | None = Field(None, ge=2)  # None: as `type` has it, or what the teacher takes if that is less
    stride: int | None = Field(None, ge=0)  # tokens that windows of a context share; None: a third of max_length
    no_answer: bool = False
    masking: Literal["dynamic", "static"] = "dynamic"
    mask_share: float = Field(0.15, gt=0, lt=1)
    train_size: int | None = Field(None, ge=1)
    validation_size: Size = Field(0.1, gt=0)
    test_size: Size = Field(0.1, gt=0)
    unlabelled_size: int | None = Field(None, ge=0)
    split_seed: int = 0
    augment: Augment | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if sum(s is not None for s in (self.files, self.sample, self.hub, self.glue)) != 1:
            raise ValueError("exactly one of files, sample, hub and glue must be given")
        if self.glue is not None:
            self._fill(self.glue.task)
        if isinstance(self.text, list) and len(self.text) != 2:
            raise ValueError("text takes one column, or a list of two for pairs")
        if self.sample is not None and self.type not in SAMPLE_TYPES:
            raise ValueError(f"the embedded sample is for {', '.join(SAMPLE_TYPES)}, not for {self.type}")
        if self.augment is not None and self.type in NOT_AUGMENTED:
            raise ValueError(f"augment replaces words of whole texts; with {self.type} labels are of words")
        for key, owner in OWNED.items():
            if self.type != owner and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for the type {owner}, not for {self.type}")
        own = self.kind.text
        self.text = self.text or (own if isinstance(own, str) else list(own))
        self.label = self.label or self.kind.label
        return self

    def _fill(self, task: str) -> None:
        """Set what a task of GLUE says."""
        for key, value in GLUE_TASKS[task].columns.items():
            given = getattr(self, key)
            if key in self.model_fields_set and given != value:
                raise ValueError(f"{key} is {value!r} in GLUE's {task}, got {given!r}; leave it out")
            setattr(self, key, value)
        for key, value in GLUE_TASKS[task].defaults.items():
            if key not in self.model_fields_set:
                setattr(self, key, value)

    @property
    def kind(self) -> Kind:
        """What knows this type of data."""
        return KINDS[self.type]


class Student(Model):
    """The student: exactly one of `layers` (of the teacher), `config` (its architecture, other sizes), `model`."""

    layers: list[int] | None = None
    config: dict[str, Any] | None = None
    model: str | None = None
    start: str = "teacher"  # whose layers: the "teacher"'s, its own before it was fine-tuned ("pretrained"), a model's

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

    @model_validator(mode="after")
    def _no_cache_of_random_masks(self) -> NlpRecipe:
        if self.data.type == "masked_lm" and self.data.masking == "dynamic" and self.teacher.cache is not None:
            if "cache" in self.teacher.model_fields_set:
                raise ValueError(
                    "the teacher cannot be cached, as masks are drawn anew in each epoch: say `cache: null` in "
                    "teacher, or `masking: static` in data"
                )
            self.teacher.cache = None
        return self


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

    def summary(self) -> str:
        """One line with the numbers of samples."""
        free = 0 if self.unlabelled is None else len(self.unlabelled)
        held = f"{len(self.validation)} validation, {len(self.test)} test"
        held += "".join(f", {len(table)} {name} test" for name, table in self.further_tests.items())
        kind = self.kind.describe(self.labels)
        return f"{len(self.train)} labelled, {free} unlabelled{self.copies}, {held}; {kind}{self.note}"


logger = logging.getLogger(__name__)


class NlpTask:
    """The glue between recipes and this package."""

    name = "nlp"
    recipe = NlpRecipe
    methods = METHODS
    #: the key of a recipe that `by_task` goes by, and what it may say
    task_key = "data.glue.task"
    task_names = tuple(GLUE_TASKS)

    def load(self, recipe: NlpRecipe, folder: Path | None = None) -> NlpData:
        """Read, split and tokenize the data.

        Args:
            recipe: says which.
            folder: of the run, where augmented texts are kept; None: a look, none are made.

        Raises:
            DataError: a file, column, label or split is wrong.
            RecipeError: models cannot be selected by `data.metric`.
        """
        data = self._loaded(recipe, folder)
        if recipe.data.glue is not None:
            data.note = HIDDEN_LABELS
        return select_by(data, recipe.data.metric)

    def _loaded(self, recipe: NlpRecipe, folder: Path | None) -> NlpData:
        config, kind = recipe.data, recipe.data.kind
        splits = _splits(config)
        for line in text.shared_texts(splits):
            logger.warning(line)
        copies = _augment(config, splits, recipe.teacher.model, folder)
        names = kind.names(splits.train, config.labels)
        names = models.same_order(
            recipe.teacher.model, names, trained=recipe.teacher.finetune is None, head=kind.head
        )  # fmt: skip
        teacher, student = _tokenizers(recipe)
        configs = {"teacher": models.load_config(recipe.teacher.model), "student": _student_config(recipe)}
        if tokenization.same(teacher, student):
            encoder, encoding = tokenization.richer(teacher, student), encoding_of(config, student, configs)
            tables = _encoded(kind, splits, encoder, names, encoding)
            return NlpData(**tables, labels=names, tokenizer=student, kind=kind, encoding=encoding, copies=copies)
        tokenization.check_kind(kind.head)
        found = []
        for who, tokenizer in (("student", student), ("teacher", teacher)):
            encoding = encoding_of(config, tokenizer, {who: configs[who]})
            tables = _encoded(kind, splits, tokenizer, names, encoding)
            found.append(
                NlpData(**tables, labels=names, tokenizer=tokenizer, kind=kind, encoding=encoding, copies=copies)
            )
        return two_tokenizers(found[0], found[1], {part: getattr(splits, part) for part in PARTS})

    def fingerprint(self, recipe: NlpRecipe) -> str:
        """What tells that the teacher's files are the ones a run was started with; "" for a hub name."""
        folder = Path(models.resolve(recipe.teacher.model))
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        return " ".join(file_sha256(f) for f in files)

    def teacher(self, recipe: NlpRecipe, data: NlpData, source: str | None = None) -> nn.Module:
        """The teacher (from `source`, a folder of this run, once it is fine-tuned)."""
        own = recipe.teacher
        if source is not None:
            return models.load_model(source, data.labels, head=data.kind.head)
        return models.load_model(own.model, data.labels, head=data.kind.head, sha256=own.sha256)

    def student(self, recipe: NlpRecipe, data: NlpData, teacher: nn.Module, seed: int) -> nn.Module:
        """The student at its start; the same for a seed, whatever it is then trained with."""
        own, head = recipe.student, data.kind.head
        if own.model is not None:
            return models.load_model(own.model, data.labels, head=head, seed=seed)
        if own.config is not None:
            return models.student_from_config(teacher, own.config, seed=seed)
        if own.start != "teacher":
            source = recipe.teacher.model if own.start == "pretrained" else own.start
            teacher = models.load_model(source, data.labels, head=head, seed=seed)
        return models.student_from_layers(teacher, own.layers or [])

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
        config, kind = recipe.data, recipe.data.kind
        rows = text.read_rows(path, config.text, config.label, row=kind.row, readers=kind.readers)
        encoding = encoding_of(config, tokenizer)
        return kind.encode(rows, tokenizer, models.label_names(student), encoding, training=False)

    def predict(
        self, recipe: NlpRecipe, student: Any, tokenizer: Any, inputs: Sequence[str]
    ) -> Iterator[tuple[str, float | None, str]]:
        """(answer, its probability or None, text) of each text; the two of a pair are tab-separated."""
        yield from recipe.data.kind.predict(student, tokenizer, inputs, encoding_of(recipe.data, tokenizer))

    def teacher_data(self, data: NlpData) -> NlpData:
        """The data for what runs the teacher alone."""
        return data.of_teacher or data

    def fit_terms(self, data: NlpData, terms: Sequence[Term]) -> list[Term]:
        """A stage's terms as they suit the data: with two tokenizers those over words are aligned by words."""
        return list(terms) if data.of_teacher is None else [tokenization.by_words(term) for term in terms]

    def check_terms(self, data: NlpData, terms: Sequence[Term], student: nn.Module, batch: Mapping[str, Any]) -> None:
        """Refuse terms that compare tokens of different tokenizers.

        Raises:
            RecipeError: there is such a term.
        """
        if data.of_teacher is not None:
            tokenization.check_terms(terms, student, batch)

    def pair(self, data: NlpData, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        """What is to be known of a pair of models before they are distilled."""
        return describe_pair(data, student, teacher)

    def loss(self, recipe: NlpRecipe) -> Any:
        """The task loss, `(output, batch) -> scalar`."""
        return recipe.data.kind.loss

    def metric(self, data: NlpData) -> Any:
        """A fresh metric."""
        return data.kind.metric(data.labels, [data.validation, data.test])

    def metric_of(self, recipe: NlpRecipe, student: nn.Module, table: Any) -> Any:
        """A fresh metric for a trained student on a table."""
        return recipe.data.kind.metric(models.label_names(student), [table])

    def collator(self, recipe: NlpRecipe, tokenizer: Any) -> Any:
        """Pads a batch to its longest text."""
        return recipe.data.kind.collator(tokenizer)

    def main_metric(self, data: NlpData) -> str:
        """The metric that models are selected by."""
        return data.metric or data.kind.main_metric(data.labels)

    def chance(self, data: NlpData) -> float:
        """The main metric on the validation set without looking at the text; 0 where that is not known."""
        name = self.main_metric(data)
        if name == data.kind.main_metric(data.labels):
            return data.kind.chance(data.labels, data.validation)
        known = data.kind is CLASSIFICATION
        return metrics.best_constant(name, self.metric(data), data.validation["labels"]) if known else 0.0

    def latency_batches(self, data: NlpData, count: int) -> list[dict[str, Any]]:
        """Real test samples, one by one, as the models' keyword arguments."""
        rows = [data.test[i] for i in range(min(count, len(data.test)))]
        keep = {n for name in data.tokenizer.model_input_names for n in (name, f"teacher_{name}")}
        return [dict(data.collator([{k: v for k, v in row.items() if k in keep}])) for row in rows]


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
            if data.kind.head is TOKENS:
                words = [row.words or () for row in rows[part]]
                for name, side in zip(tokenization.WORDS, (data, teacher), strict=True):
                    index = tokenization.word_index(words, side.tokenizer, side.encoding.max_length)
                    own = own.add_column(name, index)
        tables[part] = own
    return replace(data, **tables, of_teacher=teacher)


def _tokenizers(recipe: NlpRecipe) -> tuple[Any, Any]:
    """The teacher's and the student's; a student that is saved without one takes the teacher's."""
    options = recipe.data.kind.tokenizer_options
    teacher, source = models.load_tokenizer(recipe.teacher.model, options), recipe.student.model
    if source is None or not models.has_tokenizer(source):
        return teacher, teacher
    return teacher, models.load_tokenizer(source, options)


def _student_config(recipe: NlpRecipe) -> Any:
    """The student's config, as far as it is known before there is a teacher."""
    own = recipe.student
    config = models.load_config(own.model or recipe.teacher.model)
    if own.config and "max_position_embeddings" in own.config:
        config.max_position_embeddings = own.config["max_position_embeddings"]
    return config


def _encoded(
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


def _splits(config: Data) -> text.Splits:
    splits, kind = text.Splits(), config.kind
    if config.sample is not None:
        own = config.sample
        splits.train = text.sentiment_rows(own.domains, label="none" if config.type == "masked_lm" else own.label)
        taken = {text.same_text(r.text) for r in splits.train}
        extra = text.sentiment_rows(own.unlabelled_domains, label="none") if own.unlabelled_domains else []
        splits.unlabelled = [r for r in extra if text.same_text(r.text) not in taken]
    elif config.files is not None:
        files = config.files
        read = functools.partial(text.read_rows, text=config.text, row=kind.row, readers=kind.readers)
        splits.train = read(files.train, label=config.label)
        splits.validation = read(files.validation, label=config.label) if files.validation else []
        splits.test = read(files.test, label=config.label) if files.test else []
        free = [files.unlabelled] if isinstance(files.unlabelled, str) else files.unlabelled or []
        splits.unlabelled = [r for f in free for r in read(f, label=None)]
    elif config.hub is not None:
        hub = config.hub
        for part in ("train", "validation", "test", "unlabelled"):
            name = getattr(hub, part)
            if name:
                label = None if part == "unlabelled" else config.label
                setattr(splits, part, text.hub_rows(hub.name, hub.subset, name, config.text, label, row=kind.row))
    elif config.glue is not None:
        splits = config.glue.read()
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
    has_label = config.kind.has_label
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
    stripped = [replace(r, label=None) for r in unlabelled]
    return text.Splits(train, splits.validation or validation, splits.test or test, stripped, splits.mismatched)


def _count(size: Size, total: int) -> int:
    return max(1, round(size * total)) if isinstance(size, float) and size < 1 else int(size)


TASK = NlpTask()
