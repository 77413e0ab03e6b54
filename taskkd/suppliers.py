"""Suppliers: teachers that do more than give tensors for a batch, and the two that read the student's own run.

They may read taps of the student, learn with it, follow it step by step, or have something to save. What a distiller
asks for that is `Supplier`, whose defaults are "nothing of the kind".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from taskkd.errors import ShapeError, TapError, TaskkdError, nearest
from taskkd.schedules import Progress
from taskkd.taps import parse_tap
from taskkd.teachers import Teacher
from taskkd.terms import Run

__all__ = ["SelfTeacher", "Supplier", "Targets"]

#: `(output, batch) -> scalar`: the task loss of one network
Task = Callable[[Any, Mapping[str, Any]], Tensor]


class Supplier(Teacher):
    """Base of the teachers of which a distiller asks more than `Teacher` says."""

    #: the taps of the student that it reads; known after `attach`
    student_taps: tuple[str, ...] = ()

    @property
    def needs_run(self) -> bool:
        """Whether it must run after the student."""
        return True

    @property
    def module(self) -> nn.Module | None:
        """What of it is trained: the distiller registers it, so that it is optimised, saved and moved with the rest."""
        return None

    def claim(self, taps: Iterable[str]) -> set[str]:
        """Those of the terms' student taps that it supplies itself, of networks which learn; asked before `attach`."""
        return set()

    def supplies(self, tap: str) -> bool:
        """Whether it has this tap at present; terms for which it has not are inactive."""
        return True

    def task(self, run: Run, loss: Task) -> Tensor | None:
        """The task losses of its own networks, to be added to the student's."""
        return None

    def step(self, progress: Progress) -> bool:
        """Follow an optimiser step; `progress.step` are done.

        Returns:
            True if `supplies` has changed.
        """
        return False

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it, beside `module`."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""

    def columns(self) -> set[str]:
        """The names of the batch entries that it reads."""
        return set()

    def prepare(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """One eager dry run: the same values."""
        return self(batch, run)

    def close(self) -> None:
        """Remove hooks."""


class SelfTeacher(Supplier):
    """The student as its own teacher: the teacher's taps are read from the student's run of the same batch.

    For branches that learn from the deepest one (Zhang L. et al. 2019, BYOT), from a gated ensemble of all (Lan et al.
    2018, ONE), or a light branch from a booster beside it (Zhou et al. 2018, Rocket Launching): the student is a module
    with several outputs, which taps name, and whose task loss is of all of them.

    Args:
        detach: no gradient flows into what teaches. False: it moves towards what learns from it, too.

    Example:
        >>> import taskkd as kd
        >>> exits = [kd.Match(f"exit{i}", kd.losses.kl_divergence, f"out.exits[{i}]", "out.logits") for i in range(3)]
        >>> teacher = SelfTeacher()  # kd.Distiller(student, teacher, exits)
    """

    def __init__(self, *, detach: bool = True) -> None:
        self.detach = detach

    def attach(self, taps: Iterable[str]) -> None:
        """Be ready to supply these taps of the student."""
        self.student_taps = tuple(taps)

    def __call__(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The values of the taps in the student's run."""
        return {tap: detached(run.student[tap]) if self.detach else run.student[tap] for tap in self.student_taps}


class Targets(Supplier):
    """Targets computed from tapped tensors: `function(*tensors, **options)`, which is the tap `out`.

    With the functions of `taskkd.losses.targets`: a student that learns from the ensemble of its own batch (Ge et al.
    2021, BAKE) is `Targets(batch_ensemble, "out.logits", "pool", omega=0.5, temperature=4.0)`, with terms whose
    teacher's tap is `out`. A sequence or a tensor is taken apart by the tap: `out[1]`, `out[:, 1]`. In a `Cohort` the
    taps may be those of members named before it (`peer1/out.logits`).

    Args:
        function: of as many tensors as there are taps; a module with parameters (`PeerAttention`) is trained.
        *taps: taps of the student, entries of the batch among them (`batch.labels`).
        detach: no gradient flows through the targets. With a function that is trained it must be False.
        **options: further arguments of the function.

    Raises:
        TaskkdError: the function does not take these arguments, or could not learn.
    """

    def __init__(self, function: Callable[..., Any], *taps: str, detach: bool = True, **options: Any) -> None:
        call = function.forward if isinstance(function, nn.Module) else function
        title = getattr(function, "__name__", type(function).__name__)
        try:
            signature = inspect.signature(call)
            signature.bind(*taps, **options)
        except ValueError:  # functions of torch itself have no signature
            pass
        except TypeError as error:
            known = list(signature.parameters)
            hint = next((nearest(o, known) for o in options if o not in known), "")
            raise TaskkdError(f"`Targets`: `{title}` with {len(taps)} taps and {options}: {error}{hint}.") from None
        self.function, self.inputs, self.detach, self.options = function, taps, detach, options
        if detach and self.module is not None:
            raise TaskkdError(f"`Targets`: nothing would train the parameters of `{title}`; use detach=False.")

    @property
    def module(self) -> nn.Module | None:
        """The function, where it has parameters to train."""
        function = self.function
        learns = isinstance(function, nn.Module) and any(p.requires_grad for p in function.parameters())
        return function if learns and isinstance(function, nn.Module) else None

    def attach(self, taps: Iterable[str]) -> None:
        """Be ready to supply these taps.

        Raises:
            TapError: one is not `out` or a part of it.
        """
        self._taps = {tap: parse_tap(tap) for tap in taps}
        for tap, parsed in self._taps.items():
            if parsed.root != "out":
                raise TapError(
                    f"tap {tap!r}: computed targets are 'out' or a part of it, as 'out[0]'; the student's own tensors "
                    "are taps of a `SelfTeacher`."
                )
        self.student_taps = self.inputs

    def __call__(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The targets for this batch.

        Raises:
            ShapeError: the tensors do not fit the function.
        """
        tensors = [run.student[tap] for tap in self.inputs]
        try:
            output = self.function(*tensors, **self.options)
        except ShapeError as error:
            raise ShapeError(f"targets of {', '.join(self.inputs)}: {error}") from None
        values = {tap: parsed.select(output) for tap, parsed in self._taps.items()}
        return {tap: detached(v) for tap, v in values.items()} if self.detach else values


def detached(value: Any) -> Any:
    """The value without gradient, wherever tensors are in it."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [detached(item) for item in value]
    return value
