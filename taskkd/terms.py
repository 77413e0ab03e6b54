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
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn

from taskkd.adapters import AdapterSpec, build_adapter, maps_all_levels
from taskkd.deprecations import translate
from taskkd.errors import ShapeError, TapError, TaskkdError, nearest
from taskkd.ranks import gather_ranks, join_ranks, whole_loss
from taskkd.schedules import Progress, Schedule, constant
from taskkd.taps import describe

__all__ = ["Auto", "Match", "Run", "Term", "Weight"]

Weight: TypeAlias = "float | Schedule | Auto | Literal['auto']"
Mask: TypeAlias = "str | Callable[[Mapping[str, Any], Tensor], Tensor]"
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
Gate: TypeAlias = Callable[["Run"], Tensor]


@dataclass(frozen=True)
class Auto:
    """A weight that `prepare` chooses: the term pulls at the student with `share` times the task loss's gradient.

    It is measured on one batch, stays as it is from then on, and is checkpointed. The weight "auto" is `Auto(1.0)`.

    Args:
        share: of the task loss's gradient norm.

    Raises:
        TaskkdError: it is not positive.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise TaskkdError(f"the share of an automatic weight must be positive, got {self.share}.")


@dataclass
class Run:
    """One forward of student and teacher, as a term sees it: tapped values by tap name, the batch, the output.

    `notes` is for what terms and teacher of a task work out of these once and share (the proposals of detectors).
    """

    batch: Mapping[str, Any]
    output: Any
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Term(nn.Module):
    """Base of all terms: a name, a weight over time, the taps it reads. Subclasses define `forward(run) -> scalar`.

    Args:
        name: letters, digits, `_` and `-`; unique in a distiller, not `loss` or `task`.
        weight: a number >= 0, a schedule, "auto" (`prepare` makes the term's gradient on the student as large as the
            task loss's), or `Auto(share)` of it.
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    #: the teacher must be run after the student, on what its run produced (proposals, resized images)
    needs_student_run = False
    #: names of batch entries that the term reads where they are there, beside its taps
    columns: tuple[str, ...] = ()

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
        elif (
            not isinstance(weight, Auto)
            and not 0 <= (full := weight.value if isinstance(weight, Schedule) else weight) < math.inf
        ):
            raise TaskkdError(f"term {name!r}: its weight must be a finite number >= 0, got {full}.")
        self.name = name
        self.automatic = weight if isinstance(weight, Auto) else Auto() if isinstance(weight, str) else None
        if isinstance(weight, Schedule):
            self.schedule = weight
        else:
            self.schedule = constant(float(weight) if isinstance(weight, int | float) else 1.0)
        self.scheduled = isinstance(weight, Schedule)

    def weight(self, progress: Progress) -> float:
        """The weight at this progress."""
        return self.schedule(progress)

    @property
    def needs_total(self) -> bool:
        """Whether a schedule of the term needs the total number of steps."""
        return self.schedule.needs_total

    def advance(self, progress: Progress) -> None:
        """Take note of the progress; called by the distiller whenever it changes, never in a compiled graph."""

    def build(self, run: Run) -> None:
        """Create what depends on shapes (adapters); called once by `prepare`, with a dry run."""

    @property
    def built(self) -> bool:
        """Whether everything trainable exists."""
        return True

    def shown(self, run: Run) -> tuple[dict[str, str], dict[str, str]]:
        """What the term compares, in words: of student and of teacher the name of a value -> what it is."""
        return (
            {name: describe(run.student[name]) for name in self.student_taps},
            {name: describe(run.teacher[name]) for name in self.teacher_taps},
        )

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
            one for each tap, or one for all where it maps all levels together ("abf"). None: tensors are compared as
            they are.
        teacher_adapter: the same for the teacher's tensor, built first. It is trained too, unless it is a module whose
            parameters do not require grad, which then stays in eval mode (a paraphraser).
        mask: a tap (`batch.attention_mask`) or `(batch, tensor) -> mask`, handed to the loss as `mask`.
        select: applied to each tensor after the tap: an index such as `(slice(None), 0)`, or a function.
        gate: `run -> (batch,)` weights in [0, 1] of the samples (or of their tokens or pixels); the loss is the mean
            of `gate * loss` over them. See `taskkd.gates`, whose gates say which taps they read.
        gather: on several ranks compute the loss on the samples of all of them, as one process would: for losses that
            relate the samples of a batch, which otherwise see those of their rank. Tensors of all ranks must be alike
            but for the batch; not with `torch.compile(fullgraph=True)`.
        weight: see `Term`.
        **loss_options: further options of the loss, checked against its signature. A number may be a schedule:
            `temperature=schedules.anneal(1.0, 4.0)`. A tensor may be a tap of the student: `labels="batch.labels"`.

    Raises:
        TaskkdError: an option that the loss does not have or that cannot follow a schedule, or a mask or gate for a
            loss without `mask`.
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
        teacher_adapter: AdapterSpec | None = None,
        mask: Mask | None = None,
        select: Any = None,
        gate: Gate | None = None,
        gather: bool = False,
        weight: Weight = 1.0,
        **loss_options: Any,
    ) -> None:
        super().__init__(name, weight)
        teacher = student if teacher is None else teacher
        self.several = not isinstance(student, str)
        self.student_pairs = (student,) if isinstance(student, str) else tuple(student)
        self.teacher_pairs = (teacher,) if isinstance(teacher, str) else tuple(teacher)
        if len(self.student_pairs) != len(self.teacher_pairs) or not self.student_pairs:
            raise TapError(
                f"term {name!r}: {len(self.student_pairs)} student taps and {len(self.teacher_pairs)} teacher taps; "
                "expected as many of each, at least one."
            )
        if gate is not None and not callable(gate):
            raise TaskkdError(
                f"term {name!r}: a gate is a function of the run, as those of `taskkd.gates`; got {gate!r}."
            )
        if gather and gate is not None:
            raise TaskkdError(
                f"term {name!r}: `gather` does not go with a gate, which scales by its rank's own samples."
            )
        masks = (mask,) if isinstance(mask, str) else ()
        loss_options = translate(loss, loss_options)
        self.option_taps = {n: o for n, o in loss_options.items() if isinstance(o, str) and _takes_tensor(loss, n)}
        self.student_taps = (
            *self.student_pairs, *masks, *self.option_taps.values(), *getattr(gate, "student_taps", ())
        )  # fmt: skip
        self.teacher_taps = (*self.teacher_pairs, *getattr(gate, "teacher_taps", ()))
        self._check_options(loss, loss_options, masked=mask is not None or gate is not None)
        self.loss = loss
        self.options = {n: o for n, o in loss_options.items() if not isinstance(o, Schedule)}
        self.option_schedules = {n: o for n, o in loss_options.items() if isinstance(o, Schedule)}
        self.scheduled = self.scheduled or bool(self.option_schedules)
        self._numbers: dict[str, float] = {}
        # What a compiled graph reads: the same tensors in every step, so that it is not compiled anew.
        self._tensors = {n: torch.zeros(()) for n in self.option_schedules}
        self.advance(Progress())
        self.mask, self.select, self.gate, self.gather = mask, select, gate, gather
        self.adapters, self.adapter_spec = self._given(adapter, "adapter")
        self.teacher_adapters, self.teacher_adapter_spec = self._given(teacher_adapter, "teacher_adapter")
        #: options are the same in every step
        self.plain = not (self.option_schedules or self.option_taps or mask is not None or gate is not None or gather)
        # plain flags: attributes that are modules are looked up slowly
        self.adapts_student, self.adapts_teacher = adapter is not None, teacher_adapter is not None
        self.train()

    def _given(self, adapter: AdapterSpec | None, side: str) -> tuple[nn.ModuleList, AdapterSpec | None]:
        """The adapters that exist already, and what is still to be built."""
        if not isinstance(adapter, nn.Module):
            return nn.ModuleList(), adapter
        if len(self.student_pairs) > 1 and not maps_all_levels(adapter):
            raise TaskkdError(
                f"term {self.name!r}: one {side} module for several taps; name a kind or give a function."
            )
        return nn.ModuleList([adapter]), None

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
        fixed = [n for n in names if parameters[n].default is not inspect.Parameter.empty]
        fixed = [n for n in fixed if not isinstance(parameters[n].default, float)]
        for option, value in options.items():
            if isinstance(value, Schedule) and option in fixed:
                able = ", ".join(n for n in names if n not in fixed) or "none"
                raise TaskkdError(
                    f"term {self.name!r}: {option!r} of `{title}` cannot follow a schedule; those that can: {able}."
                )

    @property
    def built(self) -> bool:
        sides = (self.adapter_spec, self.adapters), (self.teacher_adapter_spec, self.teacher_adapters)
        return all(spec is None or len(adapters) > 0 for spec, adapters in sides)

    @property
    def needs_total(self) -> bool:
        return super().needs_total or any(s.needs_total for s in self.option_schedules.values())

    def advance(self, progress: Progress) -> None:
        for option, schedule in self.option_schedules.items():
            number = schedule.known(progress)
            if number != self._numbers.get(option):
                self._numbers[option] = number
                self._tensors[option].fill_(number)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for adapter in self.teacher_adapters:
            if not any(p.requires_grad for p in adapter.parameters()):
                adapter.eval()
        return self

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
        students = self._values(run.student, self.student_pairs)
        teachers = self._values(run.teacher, self.teacher_pairs)
        self._tensors_like(students[0])
        if self.built:
            return
        self._build(self.teacher_adapters, self.teacher_adapter_spec, self.teacher_pairs, teachers, students)
        with torch.no_grad():  # in eval mode, so that a look at the shapes leaves no trace in its buffers
            self.teacher_adapters.eval()
            teachers = _adapt(self.teacher_adapters, teachers, students)
            self.train(self.training)
        self._build(self.adapters, self.adapter_spec, self.student_pairs, students, teachers)

    def _build(
        self,
        adapters: nn.ModuleList,
        spec: AdapterSpec | None,
        taps: Sequence[str],
        own: Sequence[Tensor],
        other: Sequence[Tensor],
    ) -> None:
        if spec is None or len(adapters) > 0:
            return
        pairs: list[Any] = list(zip(own, other, strict=True))
        if maps_all_levels(spec):
            taps, pairs = [", ".join(taps)], [(tuple(own), tuple(other))]
        built = []
        for tap, (x, y) in zip(taps, pairs, strict=True):
            try:
                adapter = build_adapter(spec, x, y).to(own[0].device)
                built.append(adapter.double() if own[0].dtype == torch.float64 else adapter)
            except ShapeError as error:
                raise ShapeError(f"term {self.name!r}, tap {tap!r}: {error}") from None
        adapters.extend(built)

    def forward(self, run: Run) -> Tensor:
        students = self._values(run.student, self.student_pairs)
        teachers = self._values(run.teacher, self.teacher_pairs)
        options, scale = self.options if self.plain else self._options(run, students[0]), None
        if self.mask is not None or self.gate is not None:
            options["mask"], scale = self._masked(run, students[0])
        try:
            if self.adapts_teacher:
                teachers = _adapt(self.teacher_adapters, teachers, students)
            if self.adapts_student:
                students = _adapt(self.adapters, students, teachers)
            if self.gather:
                students, teachers = [join_ranks(s) for s in students], [gather_ranks(t) for t in teachers]
                joined = [n for n in options if n == "mask" or n in self.option_taps]
                options |= {n: gather_ranks(options[n]) for n in joined if options[n] is not None}
            value = (
                self.loss(tuple(students), tuple(teachers), **options)
                if self.several
                else self.loss(students[0], teachers[0], **options)
            )
        except ShapeError as error:
            raise ShapeError(f"term {self.name!r}: {error}") from None
        except ValueError as error:  # an option out of range
            raise TaskkdError(f"term {self.name!r}: {error}") from error
        if self.gather:
            value = whole_loss(value)
        return value if scale is None else value * scale

    def _options(self, run: Run, like: Tensor) -> dict[str, Any]:
        """The loss's options at this step: numbers, which the loss checks, or in a compiled graph 0-dim tensors."""
        options = dict(self.options)
        if self.option_schedules:
            options |= self._tensors_like(like) if torch.compiler.is_compiling() else self._numbers
        for name, tap in self.option_taps.items():
            options[name] = run.student[tap]
        return options

    def _tensors_like(self, like: Tensor) -> dict[str, Tensor]:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        for option, tensor in list(self._tensors.items()):
            if tensor.device == like.device and tensor.dtype == dtype:
                continue
            eager = not torch.compiler.is_compiling()  # then exact, also in double precision
            exact = torch.tensor(self._numbers[option], dtype=torch.float64) if eager else tensor
            self._tensors[option] = exact.to(like.device, dtype)
        return self._tensors

    def _masked(self, run: Run, student: Tensor) -> tuple[Tensor | None, Tensor | None]:
        mask: Tensor | None = None
        if isinstance(self.mask, str):
            mask = run.student[self.mask]
        elif self.mask is not None:
            mask = self.mask(run.batch, student)
        if self.gate is None:
            return mask, None
        # A loss is a mean over the mask; gated samples must count 0 and still be counted, so the mean over the gated
        # mask is scaled back by the share that the gate leaves.
        gate = self.gate(run).to(student.device, torch.float64 if student.dtype == torch.float64 else torch.float32)
        full = gate.new_ones(gate.shape) if mask is None else mask.to(gate.dtype)
        dimensions = max(gate.ndim, full.ndim)
        gate, full = (x.reshape(x.shape + (1,) * (dimensions - x.ndim)) for x in (gate, full))
        try:
            gated = full * gate
        except RuntimeError:
            raise ShapeError(
                f"term {self.name!r}: a gate of shape {tuple(gate.shape)} does not fit a mask of shape "
                f"{tuple(full.shape)}."
            ) from None
        return gated, gated.sum() / full.expand_as(gated).sum().clamp(min=1e-12)


def _takes_tensor(loss: Callable[..., Tensor], option: str) -> bool:
    """Whether an option of a loss is a tensor, as far as its annotation says."""
    parameter = inspect.signature(loss).parameters.get(option)
    return parameter is not None and (parameter.annotation is parameter.empty or "Tensor" in str(parameter.annotation))


def _adapt(adapters: nn.ModuleList, own: Sequence[Tensor], other: Sequence[Tensor]) -> list[Any]:
    """Each tensor through its adapter, or all of them through the one that maps all levels together."""
    if not len(adapters):
        return list(own)
    first = adapters[0]
    if maps_all_levels(first):
        return list(first(tuple(_as_weights(x, first) for x in own), tuple(other)))
    pairs = zip(adapters, own, other, strict=True)
    return [a(_as_weights(x, a), y) if getattr(a, "takes_target", False) else a(_as_weights(x, a)) for a, x, y in pairs]


def _as_weights(x: Tensor, adapter: nn.Module) -> Tensor:
    """`x` in the precision of the adapter's weights, which stay fp32 under a half-precision student."""
    weight = next(adapter.parameters(), None)
    if weight is None or weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)
