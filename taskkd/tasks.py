"""What a task package gives to the rest: how its recipes become data, models, terms and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from taskkd.caches import file_sha256, weights_sha256
from taskkd.checkpoints import load_student
from taskkd.portable import Portable
from taskkd.schema import Recipe
from taskkd.stages import Method
from taskkd.teachers import Frozen, Teacher
from taskkd.terms import Match, Term

__all__ = ["GivenModels", "Task", "groups_of"]

D = TypeVar("D")


def groups_of(items: Sequence[D], size: int) -> list[list[D]]:
    """Items in groups of `size`; a last one that is not full is left out, unless it is the only one."""
    groups = [list(items[i : i + size]) for i in range(0, len(items), size)]
    return groups[:-1] if len(groups) > 1 and len(groups[-1]) < size else groups


class Task(ABC):
    """The glue between recipes and a task package; each task overrides what it does otherwise.

    Recipes, data and tables are the task's own. Data has `train`, `validation`, `test`, `unlabelled` (or None),
    `everything` (all that is trained on), `further_tests`, `collator`, `full_length_collator`, `processing`,
    `first(table, count)`, `fingerprint()` and `summary()`.
    """

    #: as `task` in a recipe
    name: ClassVar[str]
    recipe: ClassVar[type[Recipe]]
    methods: ClassVar[Mapping[str, Callable[..., Method]]]
    #: what `kd.distill` uses where no method is named
    default_method: ClassVar[str]
    #: the key of a recipe that `by_task` goes by, and what it may say; most recipes have no `by_task`
    task_key: ClassVar[str] = "name"
    task_names: ClassVar[tuple[str, ...]] = ()
    #: what a term of a recipe becomes
    term: Any = Match
    #: in which order samples are drawn
    sampling: ClassVar[str] = "random"
    #: whether a last batch that is not full is left out
    drop_last: ClassVar[bool] = False
    #: what is to be checked of a trained teacher that is no better than chance
    at_chance: ClassVar[str] = "the names of the classes and their order"

    # ---- data

    @abstractmethod
    def load(self, recipe: Any, folder: Path | None = None) -> Any:
        """Read and divide the data; `folder` is the run's, None: a look."""

    @abstractmethod
    def shorthand(self, teacher: Any, student: Any, data: Any) -> dict[str, Any]:
        """The sections of a recipe that a name or a path stands for."""

    @abstractmethod
    def read(self, recipe: Any, path: str, student: Any, processing: Any) -> Any:
        """Another table to evaluate on, with the classes of a trained student."""

    @abstractmethod
    def latency_batches(self, data: Any, count: int, size: int = 1) -> list[dict[str, Any]]:
        """Real test samples in batches of `size`, as the models' keyword arguments."""

    def has_labels(self, data: Any) -> bool:
        """Whether a student can be trained without a teacher."""
        return True

    def teacher_data(self, data: Any) -> Any:
        """The data for what runs the teacher alone."""
        return data

    # ---- models

    @abstractmethod
    def teacher(self, recipe: Any, data: Any, source: str | None = None) -> nn.Module:
        """The teacher (from `source`, a folder of this run, once it is fine-tuned)."""

    @abstractmethod
    def student(self, recipe: Any, data: Any, teacher: nn.Module, seed: int) -> nn.Module:
        """The student at its start; the same for a seed, whatever it is then trained with."""

    @abstractmethod
    def given(self, *args: Any, **options: Any) -> Task:
        """This task with models and data that the caller holds."""

    @abstractmethod
    def portable(self, recipe: Any, student: nn.Module, processing: Any) -> Portable:
        """A trained student as it leaves a run; `recipe` is None for a look at a model."""

    @abstractmethod
    def named(self, name: str) -> tuple[nn.Module, Any]:
        """A model by what a recipe calls it, and its tokenizer, for a look at it."""

    @abstractmethod
    def trained(self, folder: Path) -> tuple[nn.Module, Any]:
        """A trained student and its processing (or None), from the folder it was saved in."""

    def processing(self, folder: Path) -> Any:
        """What was saved beside a trained student: a tokenizer; None for images."""
        return None

    @abstractmethod
    def pair(self, data: Any, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        """What is to be known of a pair of models before they are distilled: (title, words)."""

    def fingerprint(self, recipe: Any) -> str:
        """What tells that the teacher's files are the ones a run was started with; "" for what is downloaded."""
        own = recipe.teacher
        paths = [Path(p) for p in (own.model, own.weights) if p is not None and Path(p).exists()]
        return " ".join(digests(paths))

    def reload(self, student: nn.Module, folder: Path) -> nn.Module:
        """Load a trained student of this run into one of the same architecture."""
        load_student(student, folder)
        return student

    def supplier(self, recipe: Any, student: nn.Module, teacher: nn.Module) -> Teacher:
        """The frozen teacher, on the same inputs; it stops after the last tensor that is asked for."""
        return Frozen(teacher, dtype=recipe.teacher.dtype)

    # ---- training and evaluation

    @abstractmethod
    def loss(self, recipe: Any, student: nn.Module | None = None, seed: int = 0) -> Any:
        """The task loss, `(output, batch) -> scalar`; None: the student's own."""

    @abstractmethod
    def metric(self, data: Any, table: Any) -> Any:
        """A fresh metric for a table of the data."""

    @abstractmethod
    def metric_of(self, recipe: Any, student: nn.Module, table: Any) -> Any:
        """A fresh metric for a trained student on a table that `read` gave."""

    @abstractmethod
    def collator(self, recipe: Any, processing: Any) -> Any:
        """Makes a batch of a table that `read` gave."""

    @abstractmethod
    def chance(self, data: Any) -> float:
        """The main metric on the validation set without looking at the input."""

    @abstractmethod
    def predict(
        self, recipe: Any, student: Any, processing: Any, inputs: Sequence[str]
    ) -> Iterator[tuple[str, float | None, str]]:
        """(answer, its score or None, what it is of) for inputs of the command line."""

    def fit_terms(self, data: Any, terms: Sequence[Term]) -> list[Term]:
        """A stage's terms as they suit the data."""
        return list(terms)

    def check_terms(self, data: Any, terms: Sequence[Term], student: nn.Module, batch: Mapping[str, Any]) -> None:  # noqa: B027
        """Refuse terms that the data does not go with; else terms say themselves what they cannot do."""

    def main_metric(self, data: Any) -> str:
        """The metric that models are selected by."""
        name: str = data.config.metric
        return name


def digests(paths: Sequence[Path]) -> list[str]:
    """The SHA-256 of files; of a folder those of its safetensors."""
    files = [f for p in paths for f in (sorted(p.glob("*.safetensors")) if p.is_dir() else [p])]
    return [file_sha256(f) for f in files]


class GivenModels:
    """What a task has whose student and teacher the caller holds (`kd.distill`); goes before the task's own class."""

    _student: nn.Module
    _teacher: nn.Module

    def described_models(self) -> dict[str, Any]:
        """The sections of the resolved recipe, by which a run of other models is noticed."""
        both = {"teacher": self._teacher, "student": self._student}
        return {who: {"model": f"given:{weights_sha256(model)[:16]}"} for who, model in both.items()}

    def fingerprint(self, recipe: Any) -> str:
        """The digest of the given teacher."""
        return weights_sha256(self._teacher)
