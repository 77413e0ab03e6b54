"""The adversarial term: the student's tensors are to pass for the teacher's before a discriminator that learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from taskkd.adapters import AdapterSpec
from taskkd.auxiliary import Auxiliary, MakeOptimizer
from taskkd.errors import ShapeError, TapError, TaskkdError
from taskkd.losses.adversarial import Game, class_loss, discriminator_loss, generator_loss, gradient_penalty
from taskkd.losses.primitives import check_same_shape
from taskkd.schedules import Progress, Schedule
from taskkd.terms import Match, Run, Weight, _adapt

__all__ = ["Adversarial", "DiscriminatorSpec"]

DiscriminatorSpec: TypeAlias = "nn.Module | Callable[..., nn.Module]"
Tensors: TypeAlias = tuple[Tensor, ...]


@dataclass
class _Seen:
    """What the last forward leaves for the discriminator's step, detached."""

    student: Tensors
    teacher: Tensors
    conditions: Tensors
    labels: Tensor | None
    masks: tuple[Tensor | None, Tensor | None]


class Adversarial(Match):
    """A term that is a game: a discriminator learns to tell the teacher's tensors from the student's, the student to
    be taken for the teacher.

    The discriminator is outside `parameters()`, with an optimiser of its own. In a loop by hand::

        out = distiller(**batch); out["loss"].backward()
        optimizer.step(); optimizer.zero_grad()
        distiller.auxiliary_step()      # the discriminator, on the detached tensors of the last forward
        distiller.step()

    Source: Goodfellow et al. 2014; on logits Xu et al. 2018, on feature maps Chung et al. 2020 (AFD), on maps of scores
    with the image as condition Liu et al. 2019 (structured knowledge distillation).

    Args:
        name: see `Term`; the discriminator's loss is logged as `<name>_discriminator`.
        student, teacher, adapter, select, weight: see `Match`. A term of weight 0 is not computed, and its
            discriminator rests.
        discriminator: a module, or a function of the tensors that it will get which makes one (in `prepare`). It is
            called with the tapped tensors of one side (the student's after the adapter), then the conditions; it
            returns scores of any shape, with `labels` the pair (scores, class logits (batch, classes)). Always in
            train mode, in its own precision, without autocast. It gets the teacher's tensors first.
        game: the losses of both players, see `taskkd.losses.adversarial.discriminator_loss`.
        penalty: weight of `gradient_penalty` in the discriminator's loss (10 for "wasserstein").
        condition: a tap of the student's run, or several, that the discriminator sees too (`batch.image`), detached.
        penalise_conditions: the penalty's gradient is that with respect to the conditions as well, which must then be
            float tensors. Default False.
        labels: a tap (`batch.labels`): the discriminator also learns to classify, and the student to be classified
            rightly by it (the auxiliary classifier of Xu et al. 2018).
        class_weight: of that classification beside the game, in both players' losses. Default 1.
        discriminator_weight: factor of the discriminator's whole loss, which matters to SGD and hardly to Adam.
            Default 1.
        optimizer: makes the discriminator's optimiser from a list of parameters. Default: Adam, betas (0.5, 0.999).
        learning_rate: a number or a schedule, for every group of that optimiser. Default: 2e-4 for the default Adam, as
            it was made for yours.
        steps: steps of the discriminator for one of the student, all on the same tensors. Default 1.

    Raises:
        TaskkdError: an option is out of range.
        TapError: as `Match`.
    """

    def __init__(
        self,
        name: str,
        student: str | Sequence[str],
        teacher: str | Sequence[str] | None = None,
        *,
        discriminator: DiscriminatorSpec,
        game: Game = "hinge",
        penalty: float = 0.0,
        adapter: AdapterSpec | None = None,
        select: Any = None,
        condition: str | Sequence[str] = (),
        penalise_conditions: bool = False,
        labels: str | None = None,
        class_weight: float = 1.0,
        discriminator_weight: float = 1.0,
        optimizer: MakeOptimizer | None = None,
        learning_rate: float | Schedule | None = None,
        steps: int = 1,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, generator_loss, student, teacher, adapter=adapter, select=select, weight=weight)
        numbers = {"penalty": penalty, "class_weight": class_weight, "discriminator_weight": discriminator_weight}
        for option, value, least in (*((o, v, 0) for o, v in numbers.items()), ("steps", steps, 1)):
            if not value >= least:
                raise TaskkdError(f"term {name!r}: `{option}` must be at least {least}, got {value}.")
        try:
            generator_loss(torch.zeros(1), game=game)
        except ValueError as error:
            raise TaskkdError(f"term {name!r}: {error}") from None
        self.conditions = (condition,) if isinstance(condition, str) else tuple(condition)
        self.labels = labels
        self.student_taps = (*self.student_taps, *self.conditions, *((labels,) if labels else ()))
        self.game, self.penalty, self.class_weight, self.steps = game, penalty, class_weight, steps
        self.penalise_conditions, self.discriminator_weight = penalise_conditions, discriminator_weight
        if learning_rate is None and optimizer is None:
            learning_rate = 2e-4
        self._optimizer = (optimizer or _adam, learning_rate)
        self.discriminator_spec: Callable[..., nn.Module] | None = None
        self.auxiliary: Auxiliary | None = None
        self._seen: _Seen | None = None
        if isinstance(discriminator, nn.Module):
            self.auxiliary = Auxiliary(discriminator, *self._optimizer, name)
        else:
            self.discriminator_spec = discriminator

    @property
    def discriminator(self) -> nn.Module:
        """The discriminator.

        Raises:
            TaskkdError: it is not built yet.
        """
        return self._built().module

    def _built(self) -> Auxiliary:
        if self.auxiliary is None:
            raise TaskkdError(f"the discriminator of term {self.name!r} does not exist yet: call `distiller.prepare`.")
        return self.auxiliary

    @property
    def built(self) -> bool:
        return self.auxiliary is not None and super().built

    @property
    def needs_total(self) -> bool:
        rate = self._optimizer[1]
        return super().needs_total or (isinstance(rate, Schedule) and rate.needs_total)

    def build(self, run: Run) -> None:
        """Create adapter and discriminator; every rank gets the discriminator of rank 0."""
        super().build(run)
        if self.auxiliary is None:
            assert self.discriminator_spec is not None
            students, teachers, conditions = self._sides(run)
            module = self.discriminator_spec(*teachers, *conditions).to(teachers[0].device)
            double = students[0].dtype == torch.float64
            self.auxiliary = Auxiliary(module.double() if double else module, *self._optimizer, self.name)
        self.auxiliary.share()

    # ---- the student's move

    def forward(self, run: Run) -> Tensor:
        """The student's loss; what the discriminator needs for its step is kept, detached."""
        auxiliary = self._built()
        students, teachers, conditions = self._sides(run)
        if not torch.compiler.is_compiling():
            auxiliary.to(students[0].device)
            if not auxiliary.module.training:
                auxiliary.module.train()
        labels, masks = run.student[self.labels] if self.labels else None, self._masks(run)
        if torch.is_grad_enabled():
            self._seen = _Seen(tuple(s.detach() for s in students), teachers, conditions, labels, masks)
        scores, classes = self._judge(students, conditions)
        value = generator_loss(scores, game=self.game, mask=masks[0])
        if classes is None or labels is None:
            return value
        return value + self.class_weight * class_loss(classes, labels)

    def _sides(self, run: Run) -> tuple[Tensors, Tensors, Tensors]:
        """The student's tensors after the adapter, the teacher's and the conditions without gradient."""
        students: Sequence[Tensor] = self._values(run.student, self.student_pairs)
        teachers = [t.detach() for t in self._values(run.teacher, self.teacher_pairs)]
        if self.adapts_student:
            students = _adapt(self.adapters, students, teachers)
        for tap, s, t in zip(self.student_pairs, students, teachers, strict=True):
            try:
                check_same_shape(s, t, "Adversarial")
            except ShapeError as error:
                raise ShapeError(f"term {self.name!r}, tap {tap!r}: {error}") from None
        conditions = []
        for tap in self.conditions:
            value = run.student[tap]
            if not isinstance(value, Tensor):
                raise TapError(f"term {self.name!r}: condition {tap!r} is a {type(value).__name__}, not a tensor.")
            conditions.append(value.detach())
        return tuple(students), tuple(teachers), tuple(conditions)

    def _masks(self, run: Run) -> tuple[Tensor | None, Tensor | None]:
        """Which scores count as the student's and which as the teacher's, (batch,); None: all. For subclasses."""
        return None, None

    def _judge(self, side: Sequence[Tensor], conditions: Tensors) -> tuple[Tensor, Tensor | None]:
        """Scores, and with `labels` class logits; in the discriminator's precision, without autocast."""
        auxiliary = self._built()
        tensors = [x.to(auxiliary.dtype) if x.is_floating_point() else x for x in (*side, *conditions)]
        try:
            with torch.autocast(tensors[0].device.type, enabled=False):
                found = auxiliary.module(*tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's words for shapes that do not fit
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            raise ShapeError(f"term {self.name!r}: its discriminator does not take {shapes}: {error}") from error
        if self.labels is None and isinstance(found, Tensor):
            return found, None
        if self.labels is not None and isinstance(found, tuple | list) and len(found) == 2:
            return found[0], found[1]
        wanted = "a tensor of scores" if self.labels is None else "the pair (scores, class logits), as `labels` is set"
        got = f"{len(found)} items" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
        raise TaskkdError(f"term {self.name!r}: its discriminator must return {wanted}, it returned {got}.")

    # ---- the discriminator's move

    def auxiliary_step(self, progress: Progress) -> Tensor | None:
        """Train the discriminator on the tensors of the last forward, which are let go of; never compiled.

        Returns:
            Its loss before its last step, detached; None: there was no forward since the last call.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return None
        value = None
        for _ in range(self.steps):
            value = self._built().step(lambda: self._discriminator_loss(seen), progress)
        return value

    def _discriminator_loss(self, seen: _Seen) -> Tensor:
        real, real_classes = self._judge(seen.teacher, seen.conditions)
        fake, fake_classes = self._judge(seen.student, seen.conditions)
        own, other = seen.masks
        value = discriminator_loss(fake, real, game=self.game, mask=own, teacher_mask=other)
        if real_classes is not None and fake_classes is not None and seen.labels is not None:
            both = class_loss(real_classes, seen.labels) + class_loss(fake_classes, seen.labels)
            value = value + self.class_weight * both
        if self.penalty:
            value = value + self.penalty * self._gradient_penalty(seen)
        return self.discriminator_weight * value

    def _gradient_penalty(self, seen: _Seen) -> Tensor:
        dtype = self._built().dtype
        moved, fixed = (seen.conditions, ()) if self.penalise_conditions else ((), seen.conditions)
        sides = [[x.to(dtype) for x in (*side, *moved)] for side in (seen.student, seen.teacher)]
        return gradient_penalty(lambda *x: self._judge(x, fixed)[0], *sides)

    @property
    def waiting(self) -> bool:
        """Whether there was a forward that the discriminator has not stepped on."""
        return self._seen is not None

    def forget(self) -> None:
        """Let go of the tensors of the last forward: the discriminator does not step on them."""
        self._seen = None

    # ---- checkpoints

    def get_extra_state(self) -> Tensor:
        """Discriminator and its optimiser as a tensor of bytes; empty before they are built."""
        return torch.empty(0, dtype=torch.uint8) if self.auxiliary is None else self.auxiliary.state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` gave."""
        if len(state):
            self._built().load(state)


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999))
