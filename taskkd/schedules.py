"""Weights and options that change during training: functions of a host-side progress, never of the wall clock.

Lengths are in optimiser steps (`steps`) or a share of the training (`fraction`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskkd.errors import nearest

__all__ = [
    "Progress",
    "Schedule",
    "anneal",
    "constant",
    "cosine",
    "from_config",
    "polynomial",
    "sigmoid_ramp",
    "step",
    "stop_after",
    "warmup",
]


@dataclass(frozen=True)
class Progress:
    """How far training is: `step` optimiser steps done of `total` (None while unknown)."""

    step: int = 0
    total: int | None = None


@dataclass(frozen=True)
class Schedule:
    """A value over time: `value * shape(progress)`.

    Args:
        value: the full value.
        shape: progress -> factor.
        needs_total: whether `shape` needs the total number of steps (`distiller.set_total`).
    """

    value: float
    shape: Callable[[Progress], float]
    needs_total: bool = False

    def __call__(self, progress: Progress) -> float:
        if self.needs_total and progress.total is None:
            raise ValueError(
                "this schedule is a fraction of the training: call `distiller.set_total(optimiser_steps)` before the "
                "first step (the trainer does it)."
            )
        return self.value * self.shape(progress)

    def known(self, progress: Progress) -> float:
        """The value at this progress; the full value while the total that it needs is unknown (for reports)."""
        return self.value if self.needs_total and progress.total is None else self(progress)


def constant(value: float) -> Schedule:
    """`value` at every step."""
    return Schedule(value, lambda _: 1.0)


def warmup(value: float, *, steps: int | None = None, fraction: float | None = None) -> Schedule:
    """Linear warm-up: `value * min((step + 1) / length, 1)`.

    Source: Chen et al. 2021 (ReviewKD) and Zhao et al. 2022 (DKD), who count epochs from 1: `min(epoch / 20, 1)`.

    Args:
        value: the weight after the warm-up.
        steps: its length in optimiser steps; or
        fraction: its length as a share of the training, in [0, 1].

    Raises:
        ValueError: neither or both lengths are given, or one is out of range.
    """
    length = _length("warmup", steps, fraction)

    def shape(progress: Progress) -> float:
        n = length(progress)
        return min((progress.step + 1) / n, 1.0) if n > 0 else 1.0

    return Schedule(value, shape, needs_total=fraction is not None)


def sigmoid_ramp(value: float, *, steps: int | None = None, fraction: float | None = None) -> Schedule:
    """`value * exp(-5 (1 - x)^2)` with `x = min(step / length, 1)`: 0.0067 of the value at first.

    Source: Laine & Aila 2017; the ramp over 80 epochs, counted from 0, of Lan et al. 2018 (ONE), Chen D. et al. 2020
    (OKDDip) and Kim et al. 2021 (FFL).

    Args, raises: as `warmup`.
    """
    length = _length("sigmoid_ramp", steps, fraction)
    return Schedule(value, lambda p: math.exp(-5 * (1 - _share(p, length)) ** 2), needs_total=fraction is not None)


def cosine(value: float, *, end: float = 0.0, steps: int | None = None, fraction: float | None = None) -> Schedule:
    """Half a cosine from `value` to `end`: `end + (value - end) (1 + cos(pi x)) / 2`, `x = min(step / length, 1)`.

    Args:
        value: at the beginning.
        end: after the length.
        steps, fraction: as for `warmup`; the whole training if both are left out.

    Raises:
        ValueError: both lengths are given, or one is out of range.
    """
    steps, fraction = _whole(steps, fraction)
    length = _length("cosine", steps, fraction)
    return _between(value, end, lambda p: (1 - math.cos(math.pi * _share(p, length))) / 2, fraction is not None)


def polynomial(
    value: float, *, power: float = 0.9, end: float = 0.0, steps: int | None = None, fraction: float | None = None
) -> Schedule:
    """From `value` down to `end`: `end + (value - end) (1 - x)^power` with `x = min(step / length, 1)`.

    Source: the "poly" learning rate of segmentation networks, Chen L. et al. 2018 (DeepLab), power 0.9.

    Args:
        value: at the beginning.
        power: positive.
        end: after the length.
        steps, fraction: as for `warmup`; the whole training if both are left out.

    Raises:
        ValueError: `power` is not positive, both lengths are given, or one is out of range.
    """
    if not power > 0:
        raise ValueError(f"`power` must be positive, got {power}.")
    steps, fraction = _whole(steps, fraction)
    length = _length("polynomial", steps, fraction)
    return _between(value, end, lambda p: 1 - (1 - _share(p, length)) ** power, fraction is not None)


def anneal(start: float, end: float, *, steps: int | None = None, fraction: float | None = None) -> Schedule:
    """Linear from `start` to `end`: `start + (end - start) x` with `x = min(step / length, 1)`.

    Source: the temperature of Zhang L. et al. 2020 (TOFD), `anneal(1.0, 4.0)`: `1 + 3 epoch / epochs`.

    Args:
        start: at the beginning.
        end: after the length.
        steps, fraction: as for `warmup`; the whole training if both are left out.

    Raises:
        ValueError: both lengths are given, or one is out of range.
    """
    steps, fraction = _whole(steps, fraction)
    length = _length("anneal", steps, fraction)
    return _between(start, end, lambda p: _share(p, length), fraction is not None)


def step(
    value: float,
    *,
    steps: Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    factors: float | Sequence[float] = 0.1,
) -> Schedule:
    """`value`, multiplied by a factor at every milestone.

    Args:
        value: before the first milestone.
        steps: the milestones in optimiser steps, rising; or
        fractions: the milestones as shares of the training, in [0, 1], rising.
        factors: of every milestone, or one for each; each multiplies what was before.

    Raises:
        ValueError: neither or both kinds of milestones are given, they do not rise or are out of range, or the
            number of factors is another one.
    """
    if (steps is None) == (fractions is None):
        raise ValueError("`step` takes exactly one of `steps` and `fractions`.")
    name, given = ("steps", steps) if steps is not None else ("fractions", fractions)
    milestones = list(given or ())
    if (
        not milestones
        or milestones != sorted(milestones)
        or milestones[0] < 0
        or (steps is None and milestones[-1] > 1)
    ):
        where = "not negative" if steps is not None else "in [0, 1]"
        raise ValueError(f"`{name}` must be rising milestones, {where}, got {milestones}.")
    each = [float(factors)] * len(milestones) if isinstance(factors, int | float) else [float(f) for f in factors]
    if len(each) != len(milestones):
        raise ValueError(f"`factors` must be one number or one for each milestone, got {len(each)} for {milestones}.")

    def shape(progress: Progress) -> float:
        scale = 1.0 if steps is not None else float(progress.total or 0)
        return math.prod(f for m, f in zip(milestones, each, strict=True) if progress.step >= m * scale)

    return Schedule(value, shape, needs_total=steps is None)


def stop_after(value: float, *, steps: int | None = None, fraction: float | None = None, ramp: float = 0.0) -> Schedule:
    """`value` for a length, then 0: distillation that stops early, so that the end of training is the task's alone.

    Source: Cho & Hariharan 2019, "On the Efficacy of Knowledge Distillation" (ESKD).

    Args:
        value: before.
        steps, fraction: the length, as for `warmup`.
        ramp: how long the linear way down to 0 after it takes, in the same unit.

    Raises:
        ValueError: neither or both lengths are given, or one is out of range.
    """
    length = _length("stop_after", steps, fraction)
    if not ramp >= 0:
        raise ValueError(f"`ramp` must not be negative, got {ramp}.")

    def shape(progress: Progress) -> float:
        over = progress.step - length(progress)
        down = ramp if steps is not None else ramp * (progress.total or 0)
        if over < 0:
            return 1.0
        return max(1 - over / down, 0.0) if down > 0 else 0.0

    return Schedule(value, shape, needs_total=fraction is not None)


def _whole(steps: int | None, fraction: float | None) -> tuple[int | None, float | None]:
    return steps, 1.0 if steps is None and fraction is None else fraction


def _length(name: str, steps: int | None, fraction: float | None) -> Callable[[Progress], float]:
    if (steps is None) == (fraction is None):
        raise ValueError(f"`{name}` takes exactly one of `steps` and `fraction`.")
    if steps is not None and steps < 0:
        raise ValueError(f"`steps` must not be negative, got {steps}.")
    if fraction is not None and not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be in [0, 1], got {fraction}.")
    return lambda progress: steps if steps is not None else (fraction or 0.0) * (progress.total or 0)


def _share(progress: Progress, length: Callable[[Progress], float]) -> float:
    """How much of the length is done, at most 1; a length of 0 is done from the start."""
    n = length(progress)
    return min(progress.step / n, 1.0) if n > 0 else 1.0


def _between(start: float, end: float, share: Callable[[Progress], float], needs_total: bool) -> Schedule:
    full = start if abs(start) > abs(end) else end
    if full == 0:
        return Schedule(0.0, lambda _: 1.0, needs_total)
    return Schedule(full, lambda p: (start + (end - start) * share(p)) / full, needs_total)


# ---- in recipes

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "anneal": anneal,
    "constant": constant,
    "cosine": cosine,
    "polynomial": polynomial,
    "sigmoid_ramp": sigmoid_ramp,
    "step": step,
    "stop_after": stop_after,
    "warmup": warmup,
}


def from_config(config: Mapping[str, Any]) -> Schedule:
    """A schedule from plain data: `{"warmup": 2.0, "fraction": 0.1}`, `{"anneal": [1.0, 4.0]}`.

    Args:
        config: one key is the name of a schedule and holds its value (a list where it takes two), the others are its
            options.

    Raises:
        ValueError: no schedule or several are named, an option is unknown, or a value is no number or out of range.
    """
    named = [key for key in config if key in SCHEDULES]
    if len(named) != 1:
        hint = nearest(str(next(iter(config), "")), SCHEDULES)
        raise ValueError(
            f"a schedule is one name with its value, as in {{warmup: 2.0, fraction: 0.1}}, got {dict(config)}{hint}; "
            f"known: {', '.join(SCHEDULES)}"
        )
    make, value = SCHEDULES[named[0]], config[named[0]]
    options = {key: item for key, item in config.items() if key != named[0]}
    parameters = inspect.signature(make).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"schedule {named[0]!r} has no option {option!r}{nearest(option, known)}; it has {has}")
    values = value if isinstance(value, list) else [value]
    if len(values) != len(positional):
        raise ValueError(f"schedule {named[0]!r} takes {' and '.join(positional)}, got {value!r}")
    for item in (*values, *(x for o in options.values() for x in (o if isinstance(o, list) else [o]))):
        if isinstance(item, bool) or not isinstance(item, int | float):
            raise ValueError(f"schedule {named[0]!r} is made of numbers, got {item!r}")
    for option, item in options.items():
        several = make is step and option != "factors"
        if isinstance(item, list) != several and not (make is step and option == "factors"):
            raise ValueError(f"schedule {named[0]!r}: {option} must be {'a list' if several else 'a number'}")
    return make(*values, **options)
