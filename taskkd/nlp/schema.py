"""What a recipe of task `nlp` may say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from taskkd.nlp.augment import Augment
from taskkd.nlp.glue import GLUE_TASKS, Glue
from taskkd.nlp.kinds import KINDS, Kind
from taskkd.nlp.kinds.sentences import SCORED_PAIRS
from taskkd.schema import HubData, Model, Recipe, TeacherConfig

__all__ = ["Data", "NlpRecipe", "ScoredPairs", "Size"]

Size = int | float
#: kinds whose labels stand at words, which augmentation replaces
NOT_AUGMENTED = ("token_classification", "question_answering", "causal_lm")
#: what the embedded sample has labels for
SAMPLE_TYPES = ("classification", "regression", "masked_lm", "causal_lm", "sentence_embedding")
#: keys of `Data` that are of one type
OWNED = {
    "stride": "question_answering",
    "no_answer": "question_answering",
    "masking": "masked_lm",
    "mask_share": "masked_lm",
    "scored_pairs": "sentence_embedding",
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


class Hub(HubData):
    """With columns of texts, and perhaps a split without labels."""

    unlabelled: str | None = None


class ScoredPairs(Model):
    """Files of two texts and how alike they are, to evaluate sentence embeddings on (STS)."""

    validation: str
    test: str
    text: list[str] = Field(["sentence1", "sentence2"], min_length=2, max_length=2)
    label: str = "score"


class Data(Model):
    """Where the text comes from: exactly one of `files`, `sample`, `hub`, `glue`."""

    files: Files | None = None
    sample: Sample | None = None
    hub: Hub | None = None
    glue: Glue | None = None
    type: Literal[
        "classification",
        "regression",
        "token_classification",
        "question_answering",
        "masked_lm",
        "causal_lm",
        "sentence_embedding",
    ] = "classification"
    text: str | list[str] = ""  # what is left out is as `type` has it
    label: str = ""
    labels: list[str] | None = None
    metric: str | None = None  # that models are selected by; None: as `type` has it
    scored_pairs: ScoredPairs | None = None  # sentence_embedding: what is validated and tested on
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
        several = self.type == "sentence_embedding"
        if isinstance(self.text, list) and (len(self.text) < 2 or (len(self.text) > 2 and not several)):
            raise ValueError("text takes one column, or a list of two for pairs")
        if self.sample is not None and self.type not in SAMPLE_TYPES:
            raise ValueError(f"the embedded sample is for {', '.join(SAMPLE_TYPES)}, not for {self.type}")
        if self.augment is not None and self.type in NOT_AUGMENTED:
            raise ValueError(f"augment replaces words of whole texts; with {self.type} labels are of words")
        if self.augment is not None and several and isinstance(self.text, list):
            raise ValueError("augment replaces words of one text; with sentence_embedding a sample here is several")
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
        if self.scored_pairs is not None:
            return SCORED_PAIRS
        return KINDS[self.type]


class Student(Model):
    """The student: exactly one of `layers` (of the teacher), `config` (its architecture, other sizes), `model`."""

    layers: list[int] | None = None
    config: dict[str, Any] | None = None
    model: str | None = None
    architecture: Literal["distilbert"] | None = None  # None: the teacher's
    start: str = "teacher"  # whose layers: the "teacher"'s, its own before it was fine-tuned ("pretrained"), a model's

    @model_validator(mode="after")
    def _one_kind(self) -> Student:
        if sum(s is not None for s in (self.layers, self.config, self.model)) != 1:
            raise ValueError("exactly one of layers, config and model must be given")
        if self.architecture is not None and self.layers is None:
            raise ValueError("architecture goes with layers")
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
    def _labels_to_learn(self) -> NlpRecipe:
        if self.teacher.finetune is not None and not self.data.kind.head.logits:
            raise ValueError(f"teacher.finetune: {self.data.type} has no labels to fine-tune on")
        return self

    @model_validator(mode="after")
    def _no_cache_of_random_masks(self) -> NlpRecipe:
        if self.data.type == "masked_lm" and self.data.masking == "dynamic" and self.teacher.cache is not None:
            if "cache" in self.teacher.model_fields_set:
                raise ValueError(
                    "the teacher cannot be cached, as masks are drawn anew in each epoch: say `cache: null` in "
                    "teacher, or `masking: static` in data"
                )
            self.teacher.cache = None
        if self.data.type == "causal_lm" and "cache" not in self.teacher.model_fields_set:
            self.teacher.cache = None  # logits of a whole vocabulary at every token
        return self
