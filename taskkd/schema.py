"""The frame of recipes: what every task's recipe has, typed and checked by pydantic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from taskkd.errors import RecipeError, nearest
from taskkd.schedules import from_config

__all__ = [
    "Baseline",
    "CacheConfig",
    "Finetune",
    "HubData",
    "MethodConfig",
    "Model",
    "Recipe",
    "TeacherConfig",
    "TermConfig",
    "Training",
    "VisionRecipe",
    "check_one_source",
    "model_of",
    "options_of",
    "own_part",
    "own_settings",
]

M = TypeVar("M", bound="Model")


class Model(BaseModel):
    """Base of all parts of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Training(Model):
    """How a student is trained.

    `optimizer` is AdamW, or SGD with `momentum`. The schedule "step" multiplies the learning rate by 0.1 at each of
    `milestones`, shares of the training; "polynomial" is `(1 - progress) ** power`.
    """

    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)  # at most so many optimiser steps in each stage
    learning_rate: float = Field(1e-4, gt=0)
    batch_size: int = Field(32, ge=1)
    eval_batch_size: int = Field(128, ge=1)
    accumulation: int = Field(1, ge=1)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant", "step", "polynomial"] = "linear"
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field([2 / 3, 11 / 12], min_length=1)
    power: float = Field(0.9, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    dropout: float | None = Field(None, ge=0, lt=1)  # None: as the student's config says
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = Field(0, ge=0)
    # hours that one start of the run may take, all its trainings together; no part of what the run is
    wall_time: float | None = Field(None, gt=0, exclude=True)


class Finetune(Model):
    """How a teacher is fine-tuned on the labelled data first."""

    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    batch_size: int = Field(32, ge=1)


class CacheConfig(Model):
    """The teacher's outputs on disk."""

    dtype: Literal["float32", "float16"] = "float32"
    budget_gb: float | None = Field(None, gt=0)


class TeacherConfig(Model):
    """What every task's teacher has.

    `dtype` is what it computes in; None: as the training does (a cache: float32). "auto" is bfloat16 on a device that
    has instructions for it, but never for a cache, which is built once. Then cached no longer equals live.
    """

    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    finetune: Finetune | None = None
    cache: CacheConfig | None = CacheConfig()


class Baseline(Model):
    """The student alone: the same start and data with labels, its own search, the best epoch on validation."""

    learning_rates: list[float] = Field([5e-5, 1e-4, 2e-4], min_length=1)
    dropouts: list[float | None] = Field([None], min_length=1)
    epochs: float = Field(8.0, gt=0)


class MethodConfig(BaseModel):
    """A method by name, and its own options."""

    model_config = ConfigDict(extra="allow")
    name: str


def _schedule(config: dict[str, Any]) -> dict[str, Any]:
    """A schedule in plain data, which is one (`taskkd.schedules.from_config`)."""
    try:
        from_config(config)
    except ValueError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return config


def _weight(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"auto"}:
        share = value["auto"]
        if isinstance(share, bool) or not isinstance(share, int | float) or share <= 0:
            raise ValueError(f"the share of an automatic weight is a positive number, got {share!r}")
        return value
    if isinstance(value, dict):
        return _schedule(value)
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"a weight is a number, 'auto' or a schedule as {{warmup: 2.0, fraction: 0.1}}, got {value!r}")
    return value if value == "auto" else float(value)


class TermConfig(BaseModel):
    """A term by hand, beside or instead of a method's: a loss of `taskkd.losses` on tapped tensors.

    Keys that are none of these are options of the loss; its weight and those that are numbers may be schedules.
    """

    model_config = ConfigDict(extra="allow")
    name: str
    loss: str
    student: str | list[str]
    teacher: str | list[str] | None = None
    adapter: str | None = None
    teacher_adapter: str | None = None
    mask: str | None = None
    weight: Annotated[float | Literal["auto"] | dict[str, Any], PlainValidator(_weight)] = 1.0

    @model_validator(mode="after")
    def _check_schedules(self) -> TermConfig:
        for option, value in (self.model_extra or {}).items():
            if isinstance(value, dict):
                try:
                    _schedule(value)
                except ValueError as error:
                    raise ValueError(f"{option}: {error}") from None
        return self


class Recipe(Model):
    """The frame of every task's recipe.

    `by_task` has changes (dotted key -> value) for tasks of a benchmark. They are made when a recipe is read; what
    a run writes holds their values instead.
    """

    schema_: Literal[1] = Field(1, alias="schema")
    name: str = "run"
    task: str
    by_task: dict[str, dict[str, Any]] = Field({}, exclude=True)
    method: MethodConfig | None = None
    terms: list[TermConfig] = Field([])
    training: Training = Training()
    baseline: Baseline | None = Baseline()
    seeds: list[int] = Field([0], min_length=1)


class VisionRecipe(Recipe):
    """The frame of the recipes of vision tasks: the student alone is trained as the distilled one is.

    What the recipe says of the baseline goes before.
    """

    @model_validator(mode="after")
    def _as_long_alone(self) -> VisionRecipe:
        if self.baseline is not None:
            own = {"epochs": self.training.epochs, "learning_rates": [self.training.learning_rate]}
            given = {name: getattr(self.baseline, name) for name in self.baseline.model_fields_set}
            self.baseline = Baseline(**{**own, **given})
        return self


class HubData(Model):
    """An HF data set by name or folder, and the names of its splits; each task adds its columns."""

    name: str
    subset: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None


def check_one_source(data: Model, kinds: Sequence[str]) -> None:
    """See that one of these keys is given, and no other.

    Raises:
        ValueError: none is, or several are.
    """
    if sum(getattr(data, kind) is not None for kind in kinds) != 1:
        raise ValueError(f"exactly one of {', '.join(kinds[:-1])} and {kinds[-1]} must be given")


# ---- what a model is, in plain data, without a recipe around it


def own_settings(config: Model, kind: type[Model]) -> list[str]:
    """The keys of `kind` that are given with other values than the defaults; a teacher of a recipe has more keys."""
    fields = kind.model_fields
    return sorted(k for k in config.model_fields_set & set(fields) if getattr(config, k) != fields[k].default)


def own_part(config: Model, kind: type[M]) -> M:
    """Only what is said of the model itself, without what a recipe says of a teacher beside it."""
    return kind(**{k: getattr(config, k) for k in sorted(config.model_fields_set & set(kind.model_fields))})


def model_of(kind: type[M], given: M | Mapping[str, Any], title: str) -> M:
    """What a model is, from plain data.

    Args:
        kind: of the config.
        given: it, or its keys and values.
        title: what it is of, for errors: "detector".

    Raises:
        RecipeError: an unknown key, a wrong type, or settings that do not go together.
    """
    if isinstance(given, kind):
        return given
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        raise RecipeError(f"{title}: unknown key {name!r}{nearest(name, kind.model_fields)}.")
    message = first["msg"].removeprefix("Value error, ")
    where = f"{title}: {name}: " if name else f"{title}: "
    got = f", got {first['input']!r}" if name else ""
    raise RecipeError(f"{where}{message[0].lower()}{message[1:]}{got}.")


def options_of(kind: type[M], **given: Any) -> M:
    """A recipe's section from the options of `kd.distill`; None: left out.

    Raises:
        RecipeError: a value is none that it takes.
    """
    try:
        return kind.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if not first["loc"]:  # values that do not go together; the sentence says which
        raise RecipeError(f"distill: {first['msg'].removeprefix('Value error, ')}.")
    where = ".".join(str(part) for part in first["loc"])
    raise RecipeError(f"distill: {where}: {first['msg']}, got {first['input']!r}.")
