"""Progress of everything that takes long: one bar, or on something that is not a terminal one line an epoch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ProgressBar", "track"]


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=sys.stderr),
        transient=True,
    )


@contextmanager
def track(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that vanishes when done; the block gets a function to be called with how much is done."""
    with _bar() as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done: bar.update(task, completed=done)


class ProgressBar(transformers.TrainerCallback):  # type: ignore[misc]
    """Optimiser steps of one training, the last loss and the last value of the main metric."""

    def __init__(self, title: str, metric: str) -> None:
        self.title, self.metric = title, metric
        self.bar: Progress | None = None
        self.loss = self.value = ""
        self.terminal = sys.stderr.isatty()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if not self.terminal:
            print(f"{self.title}: {state.max_steps} steps, from step {state.global_step}", file=sys.stderr, flush=True)
            return
        self.bar = _bar()
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, note="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, note=f"{self.loss} {self.value}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
        value = logs.get(f"eval_{self.metric}")
        if value is not None:
            self.value = f"{self.metric} {value:.4f}"
            if not self.terminal and state.is_world_process_zero:
                where = f"epoch {logs.get('epoch', 0):.2f}, step {state.global_step}/{state.max_steps}"
                print(f"  {where}: {self.loss}, validation {self.value}", file=sys.stderr, flush=True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.terminal and state.is_world_process_zero and args.eval_strategy == "no":
            print(f"  step {state.global_step}/{state.max_steps}: {self.loss}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
