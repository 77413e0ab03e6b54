"""Weights that change during training: functions of a host-side progress, never of the wall clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "Schedule", "constant", "warmup"]


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
    if (steps is None) == (fraction is None):
        raise ValueError("`warmup` takes exactly one of `steps` and `fraction`.")
    if steps is not None and steps < 0:
        raise ValueError(f"`steps` must not be negative, got {steps}.")
    if fraction is not None and not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be in [0, 1], got {fraction}.")

    def shape(progress: Progress) -> float:
        length = steps if steps is not None else (fraction or 0.0) * (progress.total or 0)
        return min((progress.step + 1) / length, 1.0) if length > 0 else 1.0

    return Schedule(value, shape, needs_total=fraction is not None)
