"""What task packages have in common between recipes and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from taskkd.caches import file_sha256, weights_sha256
from taskkd.checkpoints import load_student
from taskkd.teachers import Frozen, Teacher
from taskkd.terms import Match, Term

__all__ = ["GivenModels", "VisionTask", "groups_of"]

D = TypeVar("D")


def groups_of(items: Sequence[D], size: int) -> list[list[D]]:
    """Items in groups of `size`; a last one that is not full is left out, unless it is the only one."""
    groups = [list(items[i : i + size]) for i in range(0, len(items), size)]
    return groups[:-1] if len(groups) > 1 and len(groups[-1]) < size else groups


class VisionTask:
    """The glue that the tasks on images share; each overrides what it does otherwise."""

    #: recipes have no `by_task`
    task_key = "name"
    task_names: tuple[str, ...] = ()
    #: what a term of a recipe becomes
    term: Any = Match
    #: in which order samples are drawn
    sampling = "random"
    #: what is to be checked of a trained teacher that is no better than chance
    at_chance = "the names of the classes and their order"

    def has_labels(self, data: Any) -> bool:
        """Whether a student can be trained without a teacher."""
        return True

    def teacher_data(self, data: D) -> D:
        """The data for what runs the teacher alone."""
        return data

    def fingerprint(self, recipe: Any) -> str:
        """What tells that the teacher's files are the ones a run was started with; "" for what is downloaded."""
        own = recipe.teacher
        paths = [Path(p) for p in (own.model, own.weights) if p is not None and Path(p).exists()]
        files = [f for p in paths for f in (sorted(p.glob("*.safetensors")) if p.is_dir() else [p])]
        return " ".join(file_sha256(f) for f in files)

    def reload(self, student: nn.Module, folder: Path) -> nn.Module:
        """Load a trained student of this run into one of the same architecture."""
        load_student(student, folder)
        return student

    def supplier(self, recipe: Any, student: nn.Module, teacher: nn.Module) -> Teacher:
        """The frozen teacher, on the same images; it stops after the last tensor that is asked for."""
        return Frozen(teacher, dtype=recipe.teacher.dtype)

    def fit_terms(self, data: Any, terms: Sequence[Term]) -> list[Term]:
        """A stage's terms as they are."""
        return list(terms)

    def check_terms(self, data: Any, terms: Sequence[Term], student: nn.Module, batch: Mapping[str, Any]) -> None:
        """Terms say themselves what they cannot do."""

    def main_metric(self, data: Any) -> str:
        """The metric that models are selected by."""
        name: str = data.config.metric
        return name


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
