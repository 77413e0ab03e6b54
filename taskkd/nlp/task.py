"""How a recipe of task `nlp` becomes data, models and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from taskkd.caches import file_sha256
from taskkd.checkpoints import load_student
from taskkd.nlp import data as text
from taskkd.nlp import metrics, models, tokenization
from taskkd.nlp.augment import augmented, describe
from taskkd.nlp.collation import FullLength
from taskkd.nlp.glue import GLUE_TASKS, HIDDEN_LABELS
from taskkd.nlp.heads import CAUSAL_LM, TOKENS
from taskkd.nlp.kinds import ComparesWithTeacher, Encoding, Kind
from taskkd.nlp.kinds.sentences import texts_row
from taskkd.nlp.kinds.sequences import CLASSIFICATION, task_loss
from taskkd.nlp.masking import Masked
from taskkd.nlp.methods import METHODS
from taskkd.nlp.pairs import describe_pair
from taskkd.nlp.portable import portable
from taskkd.nlp.schema import Data, NlpRecipe
from taskkd.nlp.sentence import SentenceEncoder, load_sentence_encoder
from taskkd.nlp.splits import read_splits
from taskkd.portable import Portable
from taskkd.teachers import Frozen, Teacher
from taskkd.terms import Match, Term

__all__ = ["NlpData", "NlpRecipe", "task_loss"]

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


logger = logging.getLogger(__name__)


class NlpTask:
    """The glue between recipes and this package."""

    name = "nlp"
    #: what is to be checked of a trained teacher that is no better than chance
    at_chance = "the label names and their order"
    recipe = NlpRecipe
    methods = METHODS
    #: the key of a recipe that `by_task` goes by, and what it may say
    task_key = "data.glue.task"
    task_names = tuple(GLUE_TASKS)
    #: what `kd.distill` uses where no method is named
    default_method = "soft_targets"
    #: what a term of a recipe becomes
    term = Match
    #: in which order samples are drawn: texts of like length together
    sampling = "group_by_length"

    def shorthand(self, teacher: Any, student: Any, data: Any) -> dict[str, Any]:
        """The sections of a recipe that a name or a path stands for.

        Args:
            teacher: a model's name or path, trained on the labels.
            student: the same, or the list of the teacher's layers that it is to have.
            data: a csv, tsv, jsonl or parquet file with the columns `text` and `label`.
        """
        return {
            "data": {"files": {"train": str(data)}},
            "teacher": {"model": str(teacher)},
            "student": {"layers": student} if isinstance(student, list) else {"model": str(student)},
            "method": {"name": self.default_method},
        }

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
        splits = read_splits(config)
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
            one = NlpData(**tables, labels=names, tokenizer=student, kind=kind, encoding=encoding, copies=copies)
            return self.complete(one, lambda: self.teacher(recipe, one))
        tokenization.check_kind(kind.head)
        found = []
        for who, tokenizer in (("student", student), ("teacher", teacher)):
            encoding = encoding_of(config, tokenizer, {who: configs[who]})
            tables = _encoded(kind, splits, tokenizer, names, encoding)
            found.append(
                NlpData(**tables, labels=names, tokenizer=tokenizer, kind=kind, encoding=encoding, copies=copies)
            )
        loaded = two_tokenizers(found[0], found[1], {part: getattr(splits, part) for part in PARTS})
        return self.complete(loaded, lambda: self.teacher(recipe, loaded))

    def complete(self, data: NlpData, teacher: Callable[[], nn.Module]) -> NlpData:
        """The data, with the teacher's answers beside what is evaluated on where the kind of task needs them."""
        kind, source = data.kind, data.of_teacher or data
        if not isinstance(kind, ComparesWithTeacher):
            return data
        model = teacher()
        tables = {t: kind.with_teacher(getattr(source, t), model, source.tokenizer) for t in ("validation", "test")}
        if data.of_teacher is None:
            return replace(data, **tables)
        own = {t: _beside(getattr(data, t), table) for t, table in tables.items()}
        return replace(data, **own, of_teacher=replace(source, **tables))

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
        if own.model is not None and isinstance(teacher, SentenceEncoder):
            return load_sentence_encoder(own.model, like=teacher)
        if own.model is not None:
            return models.load_model(own.model, data.labels, head=head, seed=seed)
        if own.config is not None:
            return models.student_from_config(teacher, own.config, seed=seed)
        if own.start != "teacher":
            source = recipe.teacher.model if own.start == "pretrained" else own.start
            teacher = models.load_model(source, data.labels, head=head, seed=seed)
        return models.student_from_layers(teacher, own.layers or [], architecture=own.architecture, seed=seed)

    def supplier(self, recipe: NlpRecipe, student: nn.Module, teacher: nn.Module) -> Teacher:
        """The teacher, run live."""
        return Frozen(teacher, dtype=recipe.teacher.dtype)

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

    def portable(self, recipe: NlpRecipe | None, student: nn.Module, tokenizer: Any) -> Portable:
        """A trained student as it leaves a run."""
        length = None if recipe is None else encoding_of(recipe.data, tokenizer).max_length
        return portable(student, tokenizer, length)

    def named(self, name: str) -> tuple[nn.Module, Any]:
        """A model and its tokenizer by what a recipe calls it, for a look at it."""
        return models.load_model(name).eval(), models.load_tokenizer(name)

    def read(self, recipe: NlpRecipe, path: str, student: Any, tokenizer: Any) -> Any:
        """Another file with the recipe's columns, tokenized, with the labels of a trained student."""
        config, kind = recipe.data, recipe.data.kind
        columns, label, row = config.text, config.label, kind.row
        if config.scored_pairs is not None:
            columns, label, row = config.scored_pairs.text, config.scored_pairs.label, texts_row
        rows = text.read_rows(path, columns, label, row=row, readers=kind.readers)
        encoding = encoding_of(config, tokenizer)
        table = kind.encode(rows, tokenizer, models.label_names(student), encoding, training=False)
        if isinstance(kind, ComparesWithTeacher):
            own = recipe.teacher
            reads = models.load_tokenizer(own.model, kind.tokenizer_options)
            teacher = models.load_model(own.model, head=kind.head, sha256=own.sha256)
            other = kind.encode(rows, reads, models.label_names(student), encoding_of(config, reads), training=False)
            table = _beside(table, kind.with_teacher(other, teacher, reads))
        return table

    def predict(
        self, recipe: NlpRecipe, student: Any, tokenizer: Any, inputs: Sequence[str]
    ) -> Iterator[tuple[str, float | None, str]]:
        """(answer, its probability or None, text) of each text; the two of a pair are tab-separated."""
        yield from recipe.data.kind.predict(student, tokenizer, inputs, encoding_of(recipe.data, tokenizer))

    def has_labels(self, data: NlpData) -> bool:
        """Whether a student can be trained without a teacher."""
        return bool(data.kind.head.logits)

    def teacher_data(self, data: NlpData) -> NlpData:
        """The data for what runs the teacher alone."""
        return data.of_teacher or data

    def fit_terms(self, data: NlpData, terms: Sequence[Term]) -> list[Term]:
        """A stage's terms as they suit the data: with two tokenizers they are aligned by words, or answers."""
        if data.of_teacher is None:
            return list(terms)
        return [tokenization.by_answers(tokenization.by_words(term)) for term in terms]

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

    def loss(self, recipe: NlpRecipe, student: nn.Module | None = None, seed: int = 0) -> Any:
        """The task loss, `(output, batch) -> scalar`."""
        return recipe.data.kind.loss

    def metric(self, data: NlpData, table: Any) -> Any:
        """A fresh metric for a table of the data."""
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
        return (
            metrics.best_constant(name, self.metric(data, data.validation), data.validation["labels"]) if known else 0.0
        )

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
            if data.kind.head is CAUSAL_LM:
                own = own.add_column("teacher_next_mask", tokenization.next_mask(other["labels"]))
            if data.kind.head is TOKENS:
                words = [row.words or () for row in rows[part]]
                for name, side in zip(tokenization.WORDS, (data, teacher), strict=True):
                    index = tokenization.word_index(words, side.tokenizer, side.encoding.max_length)
                    own = own.add_column(name, index)
        tables[part] = own
    return replace(data, **tables, of_teacher=teacher)


def _beside(table: Any, other: Any) -> Any:
    """A table with the columns of another of the same samples that it has not."""
    for column in other.column_names:
        if column not in table.column_names:
            table = table.add_column(column, other[column])
    return table


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


TASK = NlpTask()
