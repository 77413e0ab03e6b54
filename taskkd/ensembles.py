"""Ensembles: several frozen teachers as one, by mean, fixed weights or a learned gate, some left out at random."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from taskkd.errors import ShapeError, TapError, TaskkdError, nearest
from taskkd.losses.primitives import log_softmax
from taskkd.suppliers import Supplier
from taskkd.taps import describe, parse_tap
from taskkd.teachers import Frozen, Teacher

__all__ = ["Combine", "Ensemble", "LatentGate", "named_members", "split_tap"]

Combine = Literal["mean", "probabilities"]


class Ensemble(Supplier):
    """Several frozen teachers as one: a tap is the mean of what the members give there.

    A member's own tensor is the tap with its name before it, `r110/layer3`; members without a name are called `0`, `1`
    and so on. Frozen members stay outside the module tree; a gate is a trained sub-module of the distiller.

    With `combine="probabilities"` the mean is that of the softened outputs (You, Xu, Xu, Tao 2017): the tap gives
    `T * log mean softmax(z / T)`, whose softmax at `T` it is. The sum of the divergences to each member (Son et al.
    2021, DGKD, who leave members out at random) has the same gradient, times the number of members.

    Args:
        *teachers: modules (wrapped in `Frozen`), `Frozen` or `Cached`.
        weights: one number for each member, not negative, of which the shares count. None: the same for all.
        gate: instead, a module that gives the weights of each sample, as `LatentGate`: its `student_taps` name what
            `forward(*tensors) -> (batch, members)` is given of the student's run.
        combine: "mean" of the tensors, or of the "probabilities"; or one for each tap, `{"out.logits":
            "probabilities"}`, "mean" for the others.
        temperature: `T` of "probabilities", that of the loss which follows.
        dim: the class dimension of "probabilities".
        drop: how many members, drawn anew in each training step from torch's random state, are left out of every mean.
        **named: members with a name.

    Raises:
        TaskkdError: an option is out of range, or a member learns (`Cohort` is for these).

    Example:
        >>> teacher = Ensemble(a=nn.Linear(2, 3), b=nn.Linear(2, 3), weights=[3, 1])
        >>> teacher.attach(["out", "a/out"])
        >>> {tap: value.shape for tap, value in teacher({"input": torch.ones(4, 2)}).items()}
        {'out': torch.Size([4, 3]), 'a/out': torch.Size([4, 3])}
    """

    def __init__(
        self,
        *teachers: nn.Module | Teacher,
        weights: Sequence[float] | None = None,
        gate: nn.Module | None = None,
        combine: Combine | Mapping[str, Combine] = "mean",
        temperature: float = 1.0,
        dim: int = 1,
        drop: int = 0,
        **named: nn.Module | Teacher,
    ) -> None:
        members = named_members({str(i): t for i, t in enumerate(teachers)}, named, "Ensemble")
        self.members = {n: m if isinstance(m, Teacher) else Frozen(m) for n, m in members.items()}
        for name, member in self.members.items():
            if isinstance(member, Supplier):
                raise TaskkdError(
                    f"`Ensemble`: member {name!r} is a {type(member).__name__}, which learns or follows the student; "
                    "use a `Cohort`."
                )
        count = len(self.members)
        if weights is not None and gate is not None:
            raise TaskkdError("`Ensemble` takes `weights` or a `gate`, not both.")
        if weights is not None and (len(weights) != count or min(weights) < 0 or not sum(weights) > 0):
            raise TaskkdError(f"`Ensemble`: `weights` must be {count} numbers >= 0 and not all 0, got {weights}.")
        modes = set(combine.values()) if isinstance(combine, Mapping) else {combine}
        if not modes <= set(get_args(Combine)):
            raise TaskkdError(f"`Ensemble`: `combine` is 'mean' or 'probabilities', got {combine!r}.")
        if not temperature > 0:
            raise TaskkdError(f"`Ensemble`: `temperature` must be positive, got {temperature}.")
        if not 0 <= drop < count:
            raise TaskkdError(f"`Ensemble`: `drop` must leave one of {count} members, got {drop}.")
        if drop and weights is not None and sum(sorted(weights)[: count - drop]) <= 0:
            raise TaskkdError(f"`Ensemble`: with drop={drop} the weights {weights} could all be 0.")
        shares = [1.0] * count if weights is None else [float(w) for w in weights]
        self.shares, self.gate, self.drop = [w / sum(shares) for w in shares], gate, drop
        self.combine, self.temperature, self.dim = combine, float(temperature), dim

    @property
    def module(self) -> nn.Module | None:
        """The gate."""
        return self.gate

    @property
    def needs_run(self) -> bool:
        """Whether it must run after the student: a gate or a member reads the student's run."""
        return self.gate is not None or any(getattr(m, "needs_run", False) for m in self.members.values())

    def attach(self, taps: Iterable[str]) -> None:
        """Set the hooks for these taps in all members, or in the one that is named.

        Raises:
            TapError: there is no such member, or a name is not in a model.
        """
        self._routes = {tap: split_tap(tap, self.members) for tap in taps}
        self._shared = [tap for tap, (name, _) in self._routes.items() if name is None]
        self._named = {tap: (n, t) for tap, (n, t) in self._routes.items() if n is not None}
        for tap in self._shared:
            if parse_tap(tap).root == "batch":
                raise TapError(f"tap {tap!r} reads the batch, of which there is no mean over members; name a member.")
        try:
            for name, member in self.members.items():
                own = [tap for n, tap in self._named.values() if n == name]
                member.attach(dict.fromkeys([*self._shared, *own]))
        except BaseException:
            self.close()
            raise
        self.student_taps = tuple(getattr(self.gate, "student_taps", ()))

    def columns(self) -> set[str]:
        """The names of the batch entries that any member reads."""
        return set().union(*(m.columns() for m in self.members.values()))

    def __call__(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The value of every tap for a training batch.

        Raises:
            ShapeError: members' tensors of one tap, or the gate's weights, do not fit each other.
            TapError: what is to be averaged is not a tensor.
        """
        kept = list(range(len(self.members)))
        if self.drop:
            kept = sorted(torch.randperm(len(kept))[self.drop :].tolist())
        return self._supply(batch, run, kept, dry=False)

    def prepare(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """One eager dry run of all members."""
        return self._supply(batch, run, list(range(len(self.members))), dry=True)

    def _supply(self, batch: Mapping[str, Any], run: Any, kept: list[int], dry: bool) -> dict[str, Any]:
        asked = {n for n, _ in self._named.values()}
        given: dict[str, dict[str, Any]] = {}
        for index, (name, member) in enumerate(self.members.items()):
            if index in kept or name in asked:
                given[name] = member.prepare(batch, run) if dry else member(batch, run)
        names = list(self.members)
        weights = self._weights(run, kept) if self._shared else []
        values = {
            tap: self._combined(tap, [given[names[i]][tap] for i in kept], weights, [names[i] for i in kept])
            for tap in self._shared
        }
        return values | {tap: given[name][own] for tap, (name, own) in self._named.items()}

    def _weights(self, run: Any, kept: list[int]) -> list[Any]:
        """The share of each member that is left: a number, or (batch,) of a gate."""
        if self.gate is None:
            total = sum(self.shares[i] for i in kept)
            return [self.shares[i] / total for i in kept]
        weights = self.gate(*(run.student[tap] for tap in self.student_taps))
        if weights.ndim != 2 or weights.shape[1] != len(self.members):
            raise ShapeError(
                f"`Ensemble`: the gate must give (batch, {len(self.members)}) weights, got {tuple(weights.shape)}."
            )
        left = weights[:, kept]
        if self.drop:
            left = left / left.sum(1, keepdim=True).clamp(min=1e-12)
        return list(left.unbind(1))

    def _combined(self, tap: str, values: list[Any], weights: list[Any], names: list[str]) -> Tensor:
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else describe(value)
                raise TapError(f"tap {tap!r}: member {name!r} gives {what}, of which there is no mean; select an item.")
            if value.shape != values[0].shape:
                raise ShapeError(
                    f"tap {tap!r}: members differ in shape, {tuple(values[0].shape)} of {names[0]!r} and "
                    f"{tuple(value.shape)} of {name!r}; name one, as '{name}/{tap}'."
                )
        mode = self.combine if isinstance(self.combine, str) else self.combine.get(tap, "mean")
        with torch.autocast(values[0].device.type, enabled=False):
            values = [v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for v in values]
            weights = [_along(w, values[0]) if isinstance(w, Tensor) else w for w in weights]
            if mode == "mean":
                return torch.stack([v * w for v, w in zip(values, weights, strict=True)]).sum(0)
            # w * softmax as a sum of logarithms: nothing is rounded to 0 on the way
            logs = [log_softmax(v, self.temperature, self.dim) for v in values]
            return self.temperature * torch.logsumexp(
                torch.stack([x + _log(w) for x, w in zip(logs, weights, strict=True)]), 0
            )

    def close(self) -> None:
        """Remove the hooks of all members."""
        for member in self.members.values():
            member.close()


class LatentGate(nn.Module):
    """Weights of teachers for each sample: `softmax_t(v . (theta_t * x))`, `x` the student's feature.

    Source: Liu Y., Zhang, Wang 2020, "Adaptive multi-teacher multi-level knowledge distillation" (AMTML), whose mixture
    is one of softened outputs: `Ensemble(..., gate=LatentGate("layer3", 64, 3), combine="probabilities")`. Maps are
    reduced by their maximum over space, and gradient flows to the student's feature, as in the authors' code; they draw
    `theta` and `v` from a standard normal distribution, here `v` is smaller by the root of `features`, so that no
    teacher is chosen before training. It learns from the terms that read the ensemble.

    Args:
        tap: the student's feature, (batch, features) or (batch, features, ...).
        features: its size.
        teachers: how many members the ensemble has.
    """

    def __init__(self, tap: str, features: int, teachers: int) -> None:
        super().__init__()
        self.student_taps = (tap,)
        self.factors = nn.Parameter(torch.randn(teachers, features))
        self.vector = nn.Parameter(torch.randn(features) / features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The weights (batch, teachers), with a sum of 1 for each sample.

        Raises:
            ShapeError: the feature has another size.
        """
        if x.ndim < 2 or x.shape[1] != self.factors.shape[1]:
            raise ShapeError(
                f"`LatentGate`: tap {self.student_taps[0]!r} has shape {tuple(x.shape)}, expected (batch, "
                f"{self.factors.shape[1]}, ...)."
            )
        pooled = x.flatten(2).amax(2) if x.ndim > 2 else x
        with torch.autocast(x.device.type, enabled=False):
            scores = pooled.to(self.factors.dtype) @ (self.factors * self.vector).T
            return scores.softmax(1)


def _along(weight: Tensor, like: Tensor) -> Tensor:
    """(batch,) weights as a tensor that multiplies (batch, ...)."""
    if len(weight) != len(like):
        raise ShapeError(f"the gate gives weights of {len(weight)} samples, the teachers tensors of {len(like)}.")
    return weight.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def _log(weight: Tensor | float) -> Tensor | float:
    if isinstance(weight, Tensor):
        return weight.clamp(min=torch.finfo(weight.dtype).tiny).log()
    return math.log(weight) if weight > 0 else -math.inf


def named_members(numbered: Mapping[str, Any], named: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """All members by name, checked.

    Raises:
        TaskkdError: there is none, or a name is reserved.
        TypeError: one is neither a module nor a teacher.
    """
    members = {**numbered, **named}
    if not members:
        raise TaskkdError(f"`{whose}` needs at least one member.")
    for name, member in members.items():
        if name == "student" or hasattr(nn.ModuleDict, name):
            raise TaskkdError(f"`{whose}`: {name!r} cannot name a member.")
        if not isinstance(member, nn.Module | Teacher):
            raise TypeError(f"`{whose}`: member {name!r} is a {type(member).__name__}, not a module or a teacher.")
    return members


def split_tap(tap: str, members: Iterable[str]) -> tuple[str | None, str]:
    """`r110/layer3` -> ("r110", "layer3"); a tap without a member's name, as `./out` is one, -> (None, tap).

    Raises:
        TapError: there is no such member. (A module whose own name has a slash is written `./a/b`.)
    """
    name, slash, rest = tap.partition("/")
    if not slash or name == ".":
        return None, tap
    if name not in members:
        raise TapError(f"tap {tap!r}: there is no member {name!r}{nearest(name, members)}.")
    return name, rest
