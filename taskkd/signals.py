"""Stopping a training by a signal so that it can go on later."""

from __future__ import annotations

import signal
from typing import Any

import transformers

__all__ = ["Interrupted", "SignalStop"]


class Interrupted(SystemExit):
    """Training was asked to stop by a signal, and has saved a checkpoint; the exit code is 128 + signal."""


class SignalStop(transformers.TrainerCallback):  # type: ignore[misc]
    """On SIGINT or SIGTERM: finish the optimiser step, save a checkpoint, stop. A second signal stops at once.

    With several processes a signal to one of them stops all after the same step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            raise Interrupted(128 + number)
        self.received = number

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.received = None
        model.stop_wish = model.stop_agreed = False
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.stop_wish = self.received is not None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if model.stop_agreed or (self.received is not None and args.world_size == 1):
            self.received = self.received or signal.SIGTERM  # another process got it
            control.should_save = control.should_training_stop = True
            if args.save_total_limit == 1:
                args.save_total_limit = 2  # with 1 the engine keeps the best alone, not what is saved now

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not of Python
        self._previous = {}
