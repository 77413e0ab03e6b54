"""Terms: one weighted loss of a distillation each.

`Match` compares tapped tensors of student and teacher. A paper that needs more (boxes, banks, discriminators)
subclasses `Term` and reads what it needs from the `Run`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from taskkd.adapters import AdapterSpec, build_adapter
from taskkd.errors import ShapeError, TapError, TaskkdError, nearest
from taskkd.schedules import Progress, Schedule, constant

__all__ = ["Match", "Run", "Term", "Weight"]

Weight: TypeAlias = "float | Schedule | Literal['auto']"
Mask: TypeAlias = "str | Callable[[Mapping[str, Any], Tensor], Tensor]"
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
Gate: TypeAlias = Callable[["Run"], Tensor]


@dataclass
class Run:
    """One forward of student and teacher, as a term sees it: tapped values by tap name, the batch, the output."""

    batch: Mapping[str, Any]
    output: Any
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)


class Term(nn.Module):
    """Base of all terms: a name, a weight over time, the taps it reads. Subclasses define `forward(run) -> scalar`.

    Args:
        name: letters, digits, `_` and `-`; unique in a distiller, not `loss` or `task`.
        weight: a number >= 0, a schedule, or "auto" (`prepare` makes the term's gradient on the student as large as
            the task loss's).
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    #: the teacher must be run after the student, on what its run produced (proposals, resized images)
    needs_student_run = False

    def __init__(self, name: str, weight: Weight = 1.0) -> None:
        super().__init__()
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in ("loss", "task") or hasattr(nn.ModuleDict, name):
            raise TaskkdError(
                f"{name!r} cannot name a term: expected letters, digits, '_' and '-', not 'loss', 'task' or a method "
                "of a dictionary."
            )
        if isinstance(weight, str):
            if weight != "auto":
                raise TaskkdError(f"term {name!r}: weight {weight!r} is neither a number, a schedule nor 'auto'.")
        elif not isinstance(weight, Schedule) and not 0 <= weight < math.inf:
            raise TaskkdError(f"term {name!r}: its weight must be a finite number >= 0, got {weight}.")
        self.name = name
        self.automatic = weight == "auto"
        self.schedule = weight if isinstance(weight, Schedule) else constant(1.0 if weight == "auto" else float(weight))
        self.scheduled = isinstance(weight, Schedule)

    def weight(self, progress: Progress) -> float:
        """The weight at this progress."""
        return self.schedule(progress)

    def build(self, run: Run) -> None:
        """Create what depends on shapes (adapters); called once by `prepare`, with a dry run."""

    @property
    def built(self) -> bool:
        """Whether everything trainable exists."""
        return True

    def forward(self, run: Run) -> Tensor:
        """The loss of this run: a scalar, fp32 or fp64."""
        raise NotImplementedError


class Match(Term):
    """The plain pairwise term: a loss of tapped student and teacher tensors.

    Args:
        name: see `Term`.
        loss: any `loss(student, teacher, **options) -> scalar`, as those in `taskkd.losses`.
        student: a tap, or several, which the loss then receives as tuples.
        teacher: the teacher's tap or taps; the same as the student's if left out.
        adapter: a kind ("linear", "conv1x1"), a module or a function of both tensors, applied to the student's tensor;
            one for each tap. None: tensors are compared as they are.
        mask: a tap (`batch.attention_mask`) or `(batch, tensor) -> mask`, handed to the loss as `mask`.
        select: applied to each tensor after the tap: an index such as `(slice(None), 0)`, or a function.
        gate: `run -> (batch,)` weights in [0, 1] of the samples; the loss is the mean of `gate * loss` over samples.
        weight: see `Term`.
        **loss_options: further options of the loss, checked against its signature.

    Raises:
        TaskkdError: an option that the loss does not have, or a mask or gate for a loss without `mask`.
        TapError: a tap is malformed, or the numbers of taps differ.
    """

    def __init__(
        self,
        name: str,
        loss: Callable[..., Tensor],
        student: str | Sequence[str],
        teacher: str | Sequence[str] | None = None,
        *,
        adapter: AdapterSpec | None = None,
        mask: Mask | None = None,
        select: Any = None,
        gate: Gate | None = None,
        weight: Weight = 1.0,
        **loss_options: Any,
    ) -> None:
        super().__init__(name, weight)
        teacher = student if teacher is None else teacher
        self.several = not isinstance(student, str)
        self.student_pairs = (student,) if isinstance(student, str) else tuple(student)
        self.teacher_taps = (teacher,) if isinstance(teacher, str) else tuple(teacher)
        if len(self.student_pairs) != len(self.teacher_taps) or not self.student_pairs:
            raise TapError(
                f"term {name!r}: {len(self.student_pairs)} student taps and {len(self.teacher_taps)} teacher taps; "
                "expected as many of each, at least one."
            )
        self.student_taps = self.student_pairs + ((mask,) if isinstance(mask, str) else ())
        self._check_options(loss, loss_options, masked=mask is not None or gate is not None)
        self.loss, self.options = loss, loss_options
        self.mask, self.select, self.gate = mask, select, gate
        self.adapters = nn.ModuleList()
        self.adapted = adapter is not None
        self.adapter_spec: AdapterSpec | None = None
        if isinstance(adapter, nn.Module):
            if len(self.student_pairs) > 1:
                raise TaskkdError(
                    f"term {name!r}: one adapter module for several taps; name a kind or give a function."
                )
            self.adapters.append(adapter)
        else:
            self.adapter_spec = adapter

    def _check_options(self, loss: Callable[..., Tensor], options: Mapping[str, Any], masked: bool) -> None:
        parameters = inspect.signature(loss).parameters
        title = getattr(loss, "__name__", repr(loss))
        names = [p.name for p in list(parameters.values())[2:] if p.kind is not p.VAR_KEYWORD]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for option in options:
                if option not in names:
                    raise TaskkdError(
                        f"term {self.name!r}: `{title}` has no option {option!r}{nearest(option, names)}; "
                        f"it has {', '.join(names) or 'none'}."
                    )
        needed = [p.name for p in list(parameters.values())[2:] if p.default is p.empty and p.kind in NAMED]
        for option in needed:
            if option not in options and not (option == "mask" and masked):
                raise TaskkdError(f"term {self.name!r}: `{title}` needs {option!r}, which has no default.")
        if masked and "mask" not in names:
            raise TaskkdError(f"term {self.name!r}: a mask or gate was given, but `{title}` takes no `mask`.")

    @property
    def built(self) -> bool:
        return self.adapter_spec is None or len(self.adapters) == len(self.student_pairs)

    def _values(self, values: Mapping[str, Any], taps: Sequence[str]) -> list[Tensor]:
        tensors = []
        select = self.select
        for tap in taps:
            if tap not in values:
                raise TapError(
                    f"term {self.name!r}: nothing supplies tap {tap!r} any more; was the teacher given to a second "
                    "distiller? Each needs a `Frozen` of its own (they may share the model)."
                )
            value = values[tap]
            if select is not None:
                value = select(value) if callable(select) else value[select]
            if not isinstance(value, Tensor):
                raise TapError(
                    f"term {self.name!r}: tap {tap!r} is a {type(value).__name__}, not a tensor; select an item."
                )
            tensors.append(value)
        return tensors

    def build(self, run: Run) -> None:
        if self.built or self.adapter_spec is None:
            return
        pairs = zip(
            self._values(run.student, self.student_pairs), self._values(run.teacher, self.teacher_taps), strict=True
        )
        adapters = []
        for tap, (s, t) in zip(self.student_pairs, pairs, strict=True):
            try:
                adapter = build_adapter(self.adapter_spec, s, t).to(s.device)
                adapters.append(adapter.double() if s.dtype == torch.float64 else adapter)
            except ShapeError as error:
                raise ShapeError(f"term {self.name!r}, tap {tap!r}: {error}") from None
        self.adapters.extend(adapters)

    def forward(self, run: Run) -> Tensor:
        students = self._values(run.student, self.student_pairs)
        teachers = self._values(run.teacher, self.teacher_taps)
        options = self.options
        if self.mask is not None or self.gate is not None:
            options, scale = self._masked(run, students[0])
        if self.adapted and self.adapters:
            students = [a(_as_weights(s, a)) for a, s in zip(self.adapters, students, strict=True)]
        try:
            value = (
                self.loss(tuple(students), tuple(teachers), **options)
                if self.several
                else self.loss(students[0], teachers[0], **options)
            )
        except ShapeError as error:
            raise ShapeError(f"term {self.name!r}: {error}") from None
        except ValueError as error:  # an option out of range
            raise TaskkdError(f"term {self.name!r}: {error}") from error
        return value if self.gate is None else value * scale

    def _masked(self, run: Run, student: Tensor) -> tuple[dict[str, Any], Tensor | float]:
        mask: Tensor | None = None
        if isinstance(self.mask, str):
            mask = run.student[self.mask]
        elif self.mask is not None:
            mask = self.mask(run.batch, student)
        if self.gate is None:
            return {**self.options, "mask": mask}, 1.0
        # A loss is a mean over the mask; gated samples must count 0 and still be counted, so the mean over the gated
        # mask is scaled back by the share that the gate leaves.
        gate = self.gate(run).to(student.device).float()
        full = gate.new_ones(gate.shape) if mask is None else mask.to(gate.dtype)
        gated = full * gate.reshape(gate.shape + (1,) * (full.ndim - gate.ndim))
        total = full.sum()
        return {**self.options, "mask": gated}, gated.sum() / total.clamp(min=1e-12)


def _as_weights(x: Tensor, adapter: nn.Module) -> Tensor:
    """`x` in the precision of the adapter's weights, which stay fp32 under a half-precision student."""
    weight = next(adapter.parameters(), None)
    if weight is None or weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)
