"""Stopping a training by a signal, or when its time is up, so that it can go on later."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

import transformers

__all__ = ["TIME_UP", "Budget", "Interrupted", "SignalStop", "TimeUp"]

#: the exit code of a run whose time is up: EX_TEMPFAIL of sysexits.h, "try again later"
TIME_UP = 75


class Interrupted(SystemExit):
    """Training was asked to stop by a signal, and has saved a checkpoint; the exit code is 128 + signal."""


class TimeUp(Interrupted):
    """The time that a run was given is up, or SIGUSR1 said so; the exit code is `TIME_UP`."""

    def __init__(self) -> None:
        super().__init__(TIME_UP)


class Budget:
    """The time that a run may take, from here on. Entered, SIGUSR1 ends it, as schedulers send it before they kill.

    Args:
        hours: None: as long as it takes.
    """

    def __init__(self, hours: float | None = None) -> None:
        self._end = None if hours is None else time.monotonic() + 3600 * hours
        self._told = False
        self._previous: Any = None

    @property
    def up(self) -> bool:
        """Whether the time is up."""
        return self._told or (self._end is not None and time.monotonic() >= self._end)

    def check(self) -> None:
        """Stop between two steps of a run, or in one that has nothing to save.

        Raises:
            TimeUp: the time is up.
        """
        if self.up:
            raise TimeUp

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGUSR1, self._tell)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGUSR1, self._previous)


class SignalStop(transformers.TrainerCallback):  # type: ignore[misc]
    """On SIGINT, SIGTERM or SIGUSR1, or when the time is up: finish the optimiser step, save a checkpoint, stop.

    A second SIGINT or SIGTERM stops at once. With several processes a signal to one of them, or the clock of one, stops
    all after the same step.

    Args:
        budget: the time that there is; None: no limit.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget
        self.received: int | None = None
        self._within = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            raise Interrupted(128 + number)
        self.received = self.received or number

    def _wish(self) -> int:
        """The signal that this process has got; the end of its time counts as SIGUSR1; 0: it may go on."""
        up = self.budget is not None and self.budget.up
        return self.received or (signal.SIGUSR1 if up else 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.received, self._within = None, False
        model.stop_wish = model.stop_agreed = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.stop_wish = self._wish()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        asked = model.stop_agreed or (self._wish() if args.world_size == 1 else 0)
        if asked:
            self.received = asked
            control.should_training_stop = True
            # The end of an epoch is evaluated and, where each is, saved as ever.
            self._within = not float(state.epoch).is_integer() and state.global_step < state.max_steps
            control.should_save = self._within or args.save_strategy != "epoch" or control.should_save
            if args.save_total_limit == 1:
                args.save_total_limit = 2  # with 1 the engine keeps the best alone, not what is saved now

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.received is not None and self._within:
            # The engine takes the stop for the end of the epoch: what it would measure would count among the epochs
            # of which the best is kept.
            control.should_evaluate = control.should_save = control.should_log = False

    def stopped(self) -> Interrupted | None:
        """What is to be raised after a training that was stopped."""
        if self.received is None:
            return None
        return TimeUp() if self.received == signal.SIGUSR1 else Interrupted(128 + self.received)

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not of Python
        self._previous = {}
