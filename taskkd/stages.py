"""Stages and methods: what is trained with which terms for how long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from taskkd.errors import TapError, nearest
from taskkd.perturbation import GradientPerturbation
from taskkd.terms import Term

__all__ = ["Method", "Stage", "training_only"]


@dataclass(frozen=True)
class Stage:
    """One training run of a method.

    Args:
        name: for folders and logs.
        terms: what is distilled.
        task_weight: factor of the task loss in this stage; 0: labels are not needed.
        trains: module paths of the student that are trained; None: all of it.
        overrides: training arguments that differ in this stage (`{"num_train_epochs": 10}`).
        share: of the epochs that are asked for; the stages of a method may share them.
        keep: which epoch's student is handed on: the "best" on validation, or the "last" where the task's metric says
            nothing yet (no head is trained).
        perturbation: see `GradientPerturbation`.
    """

    name: str
    terms: Sequence[Term]
    task_weight: float = 1.0
    trains: tuple[str, ...] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    keep: Literal["best", "last"] = "best"
    perturbation: GradientPerturbation | None = None

    def epochs(self, asked: float) -> float:
        """How long this stage is, in a training for which `asked` epochs are asked."""
        return float(self.overrides.get("num_train_epochs", asked * self.share))


@dataclass(frozen=True)
class Method:
    """A paper's method, ready for one pair of student and teacher.

    FitNets (Romero et al. 2015) has two stages, a hint that trains the student up to a layer, then distillation; Gao et
    al. 2019 ("embarrassingly simple") one for each part, the parts before it frozen, and the head on the labels::

        Method("fitnets", [Stage("hint", [Match("hint", losses.mse, "layer2", adapter="conv1x1")], task_weight=0.0,
                                 trains=("stem", "layer1", "layer2")),
                           Stage("kd", [Match("kd", losses.kl_divergence, "out.logits", temperature=4.0)])])
        Method("stage_wise", [*(Stage(p, [Match(p, losses.mse, p, adapter="conv1x1")], task_weight=0.0, trains=(p,))
                                for p in ("layer1", "layer2", "layer3")), Stage("head", [], trains=("head",))])

    A stage is one run: `for i in range(len(method.stages)): Trainer(student, teacher=Frozen(teacher), method=method,
    stage=i, ...).train()`. A chain of teacher assistants (Mirzadeh et al. 2019) is a loop of whole runs, in which each
    student is the next one's teacher.

    Args:
        name: its key in the task's `METHODS`.
        stages: in order; most methods have one.
        needs: what the data must have: "labels"; "full_length", every batch padded to the longest text that there may
            be, on which the teacher runs live, since the losses look at padding.
    """

    name: str
    stages: Sequence[Stage]
    needs: tuple[str, ...] = ()


@contextmanager
def training_only(student: nn.Module, parts: Sequence[str] | None) -> Iterator[None]:
    """During this block, let only these parts of the student train; None: all that trains already.

    What was frozen before stays frozen, and what the block froze is freed at its end.

    Raises:
        TapError: a part is not in the student.
    """
    frozen: list[nn.Parameter] = []
    if parts is not None:
        modules = dict(student.named_modules())
        for part in parts:
            if part not in modules:
                raise TapError(f"stage: the student has no module {part!r}{nearest(part, modules)}.")
        inside = {id(p) for part in parts for p in modules[part].parameters()}
        frozen = [p for p in student.parameters() if p.requires_grad and id(p) not in inside]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
