"""How a recipe of task `nlp` becomes data, models and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from taskkd.nlp import metrics, models, text, tokenization
from taskkd.nlp.augment import augmented, describe
from taskkd.nlp.data import PARTS, NlpData, beside, encoded, encoding_of, select_by, two_tokenizers
from taskkd.nlp.glue import GLUE_TASKS, HIDDEN_LABELS
from taskkd.nlp.kinds import ComparesWithTeacher
from taskkd.nlp.kinds.sentences import texts_row
from taskkd.nlp.kinds.sequences import CLASSIFICATION
from taskkd.nlp.methods import METHODS
from taskkd.nlp.pairs import describe_pair
from taskkd.nlp.portable import portable
from taskkd.nlp.schema import Data, NlpRecipe
from taskkd.nlp.sentence import SentenceEncoder, load_sentence_encoder
from taskkd.nlp.splits import read_splits
from taskkd.portable import Portable
from taskkd.tasks import Task, digests, groups_of
from taskkd.terms import Term

if TYPE_CHECKING:
    from taskkd.nlp.given import GivenNlp

__all__ = ["TASK", "NlpTask"]

logger = logging.getLogger(__name__)


class NlpTask(Task):
    """The glue between recipes and this package."""

    name = "nlp"
    recipe = NlpRecipe
    methods = METHODS
    default_method = "soft_targets"
    task_key = "data.glue.task"
    task_names = tuple(GLUE_TASKS)
    #: texts of like length together
    sampling = "group_by_length"
    at_chance = "the label names and their order"
    tells_examples = True

    # ---- data

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
            tables = encoded(kind, splits, encoder, names, encoding)
            one = NlpData(**tables, labels=names, tokenizer=student, kind=kind, encoding=encoding, copies=copies)
            return self.complete(one, lambda: self.teacher(recipe, one))
        tokenization.check_kind(kind.head)
        found = []
        for who, tokenizer in (("student", student), ("teacher", teacher)):
            encoding = encoding_of(config, tokenizer, {who: configs[who]})
            tables = encoded(kind, splits, tokenizer, names, encoding)
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
        own = {t: beside(getattr(data, t), table) for t, table in tables.items()}
        return replace(data, **own, of_teacher=replace(source, **tables))

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
            table = beside(table, kind.with_teacher(other, teacher, reads))
        return table

    def examples(self, data: NlpData, networks: Mapping[str, nn.Module]) -> dict[str, Any] | None:
        """Test texts on which the models (the teacher first) disagree; None for other kinds than classification."""
        if data.kind is not CLASSIFICATION:
            return None
        from taskkd.nlp.disagreements import disagreements

        return disagreements(data, networks)

    def latency_batches(self, data: NlpData, count: int, size: int = 1) -> list[dict[str, Any]]:
        """Real test samples in batches of `size`, as the models' keyword arguments."""
        rows = [data.test[i] for i in range(min(count, len(data.test)))]
        keep = {n for name in data.tokenizer.model_input_names for n in (name, f"teacher_{name}")}
        kept = [{k: v for k, v in row.items() if k in keep} for row in rows]
        return [dict(data.collator(group)) for group in groups_of(kept, size)]

    def has_labels(self, data: NlpData) -> bool:
        """Whether a student can be trained without a teacher."""
        return bool(data.kind.head.logits)

    def teacher_data(self, data: NlpData) -> NlpData:
        """The data for what runs the teacher alone."""
        return data.of_teacher or data

    # ---- models

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

    def given(self, *args: Any, **options: Any) -> GivenNlp:
        """This task with models and data that the caller holds; see `GivenNlp`."""
        from taskkd.nlp.given import GivenNlp

        return GivenNlp(*args, **options)

    def trained(self, folder: Path) -> tuple[nn.Module, Any]:
        """A trained student and its tokenizer, from the folder it was saved in."""
        return models.load_model(str(folder)).eval(), self.processing(folder)

    def processing(self, folder: Path) -> Any:
        """The tokenizer of a trained student."""
        return models.load_tokenizer(str(folder))

    def fingerprint(self, recipe: NlpRecipe) -> str:
        """What tells that the teacher's files are the ones a run was started with; "" for a hub name."""
        folder = Path(models.resolve(recipe.teacher.model))
        return " ".join(digests([folder] if folder.is_dir() else []))

    def portable(self, recipe: NlpRecipe | None, student: nn.Module, processing: Any) -> Portable:
        """A trained student as it leaves a run."""
        length = None if recipe is None else encoding_of(recipe.data, processing).max_length
        return portable(student, processing, length)

    def named(self, name: str) -> tuple[nn.Module, Any]:
        """A model and its tokenizer by what a recipe calls it, for a look at it."""
        return models.load_model(name).eval(), models.load_tokenizer(name)

    def pair(self, data: NlpData, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        """What is to be known of a pair of models before they are distilled."""
        return describe_pair(data, student, teacher)

    # ---- training and evaluation

    def fit_terms(self, data: NlpData, terms: Sequence[Term]) -> list[Term]:
        """A stage's terms as they suit the data: with two tokenizers they are aligned by words, or answers."""
        if data.of_teacher is None:
            return list(terms)
        return [tokenization.by_answers(tokenization.by_words(term)) for term in terms]

    def check_terms(self, data: NlpData, terms: Sequence[Term], student: nn.Module, batch: Mapping[str, Any]) -> None:
        """Refuse terms that compare tokens of different tokenizers, or read [CLS] where there may be padding.

        Raises:
            RecipeError: there is such a term.
        """
        tokenization.check_side(terms, data.tokenizer)
        if data.of_teacher is not None:
            tokenization.check_terms(terms, student, batch)

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

    def predict(
        self, recipe: NlpRecipe, student: Any, tokenizer: Any, inputs: Sequence[str]
    ) -> Iterator[tuple[str, float | None, str]]:
        """(answer, its probability or None, text) of each text; the two of a pair are tab-separated."""
        yield from recipe.data.kind.predict(student, tokenizer, inputs, encoding_of(recipe.data, tokenizer))


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
