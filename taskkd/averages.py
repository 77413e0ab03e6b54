"""Teachers that are the student at an earlier time: a running average of it, or the last of its snapshots.

They are frozen models outside the module tree, as every frozen teacher, but follow the student once per optimiser step
(`distiller.step()`) and are saved with the run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.errors import TaskkdError
from taskkd.schedules import Progress
from taskkd.suppliers import Supplier
from taskkd.teachers import Call, Frozen

__all__ = ["EMA", "Snapshot"]


class _Follower(Frozen, Supplier):
    """A frozen copy of a student, which it reads again after optimiser steps."""

    def __init__(self, student: nn.Module, *, call: Call | None = None) -> None:
        if not isinstance(student, nn.Module):
            raise TypeError(f"`{type(self).__name__}` takes the student, got {type(student).__name__}.")
        super().__init__(copy.deepcopy(student), call=call)
        self.student = student
        # In half precision small changes are lost: what is averaged is kept in single precision beside the model.
        self._masters = {
            name: p.detach().float() for name, p in self.model.named_parameters() if p.dtype in HALF and self.averages
        }

    #: whether parameters are averaged rather than copied
    averages = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    @torch.no_grad()
    def _follow(self, keep: float) -> None:
        """`own = keep * own + (1 - keep) * student`; buffers are copied."""
        device = next((p.device for p in self.student.parameters()), None)
        if device is not None and any(p.device != device for p in self.model.parameters()):
            self.model.to(device)
            self._device = device
        self._masters = {n: m.to(device) for n, m in self._masters.items()}
        theirs = [p.detach() for p in self.student.parameters()]
        own = [p.detach() for p in self.model.parameters()]
        if keep == 0:
            torch._foreach_copy_(own, theirs)
        else:
            named = dict(self.model.named_parameters())
            averaged = [self._masters.get(n, p.detach()) for n, p in named.items()]
            theirs = [t.to(a.dtype) for t, a in zip(theirs, averaged, strict=True)]
            torch._foreach_lerp_(averaged, theirs, 1 - keep)
            for name, master in self._masters.items():
                named[name].copy_(master)
        buffers = list(self.model.buffers())
        if buffers:
            torch._foreach_copy_(buffers, [b.detach() for b in self.student.buffers()])
            _as_on_rank_0(buffers)

    def state(self) -> dict[str, Tensor]:
        """Parameters (in the precision in which they are averaged) and buffers of the copy."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {f"model.{name}": t.detach() for name, t in tensors} | {
            f"model.{name}": m for name, m in self._masters.items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            tensor.copy_(state[f"model.{name}"])
        for name, master in self._masters.items():
            master.copy_(state[f"model.{name}"])


HALF = (torch.float16, torch.bfloat16)


class EMA(_Follower):
    """An exponential moving average of the student's weights as teacher: `own = decay * own + (1 - decay) * student`.

    Source: Tarvainen, Valpola 2017, "Mean teachers are better role models".

    Buffers (statistics of batch norm) are copied. It is updated by `distiller.step()`, once per optimiser step, and is
    part of the distiller's state, so that a resumed run is bit-equal; it is no parameter of it, and never trained.

    Args:
        student: the model that the distiller trains.
        decay: in [0, 1).
        warmup: the first steps average what there has been so far: the decay is at most `1 - 1 / (step + 1)`, `step`
            the optimiser steps done. Else the teacher stays near the untrained student for about `1 / (1 - decay)`
            steps.
        call: as for `Frozen`.

    Raises:
        TaskkdError: `decay` is out of range.
    """

    averages = True

    def __init__(
        self, student: nn.Module, *, decay: float = 0.999, warmup: bool = True, call: Call | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise TaskkdError(f"`EMA`: `decay` must be in [0, 1), got {decay}.")
        super().__init__(student, call=call)
        self.decay, self.warmup = decay, warmup

    def step(self, progress: Progress) -> bool:
        """Take the student's present weights into the average."""
        self._follow(min(self.decay, 1 - 1 / (progress.step + 1)) if self.warmup else self.decay)
        return False


class Snapshot(_Follower):
    """The student at the end of the last cycle teaches it in the next one; in the first cycle nobody does.

    Source: Yang, Xie, Su, Yuille 2019, "Snapshot Distillation: Teacher-Student Optimization in One Generation".

    Terms that read it are inactive until the first snapshot is taken. A cycle should end at a low learning rate and the
    next begin at a high one, which is the optimiser's business: with `cycles=4` in the trainer
    `lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 4}` and no warm-up, whose restarts
    fall on the same steps; in a loop `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts` with `T_0=period`.

    Args:
        student: the model that the distiller trains.
        period: optimiser steps of a cycle; or
        cycles: their number in the whole training.
        call: as for `Frozen`.

    Raises:
        TaskkdError: not exactly one of `period` and `cycles` is given, or it is out of range.
    """

    def __init__(
        self, student: nn.Module, *, period: int | None = None, cycles: int | None = None, call: Call | None = None
    ) -> None:
        if (period is None) == (cycles is None) or (period or cycles or 0) < 1:
            raise TaskkdError(
                f"`Snapshot` takes one of `period` and `cycles`, at least 1, got period={period}, cycles={cycles}."
            )
        super().__init__(student, call=call)
        self.period, self.cycles = period, cycles
        self.taken = False

    def supplies(self, tap: str) -> bool:
        """Whether there is a snapshot yet."""
        return self.taken

    def step(self, progress: Progress) -> bool:
        """Take a snapshot where a cycle ends; True for the first.

        Raises:
            TaskkdError: `cycles` without the number of steps (`distiller.set_total`).
        """
        if self._cycle(progress.step, progress.total) == self._cycle(progress.step - 1, progress.total):
            return False
        self._follow(0.0)
        first, self.taken = not self.taken, True
        return first

    def _cycle(self, step: int, total: int | None) -> int:
        if self.period is not None:
            return step // self.period
        if total is None:
            raise TaskkdError("`Snapshot(cycles=...)`: call `distiller.set_total(optimiser_steps)` first.")
        return step * (self.cycles or 1) // total

    def state(self) -> dict[str, Tensor]:
        """The snapshot, and whether it is one."""
        return {**super().state(), "taken": torch.tensor(self.taken)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        super().load(state)
        self.taken = bool(state["taken"])


def _as_on_rank_0(buffers: list[Tensor]) -> None:
    """The same statistics on all ranks: DDP makes the student's own equal at its next forward only."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for buffer in buffers:
            torch.distributed.broadcast(buffer, 0)
