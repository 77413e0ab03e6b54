"""A training that is stopped by a signal measures and trains what one that is not does, no more and no less (R6)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import taskkd as kd
from taskkd.signals import Interrupted, SignalStop
from tests.engine import Points, Recorder, changed, point_trainer, weights


class Send(Recorder):
    """A signal within the step after these."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def on_step_begin(self, args, state, control, **_) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.after:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch_end(self, args, state, control, **_) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.after:  # after the last step: the training ends, and is stopped all the same
            os.kill(os.getpid(), signal.SIGTERM)


def trainer(folder: Path, *callbacks: Recorder, steps: int = -1) -> kd.Trainer:
    """Two epochs of six steps, or so many steps; each epoch is evaluated, the best one kept."""
    made = point_trainer(
        folder,
        eval_dataset=Points(8, 1),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        num_train_epochs=2,
        max_steps=steps,
        callbacks=[SignalStop(), *callbacks],
    )
    assert isinstance(made, kd.Trainer)
    return made


def measured(done: kd.Trainer) -> list[tuple[int, float]]:
    return [(h["step"], h["eval_loss"]) for h in done.state.log_history if "eval_loss" in h]


@pytest.mark.parametrize(("after", "steps"), [(2, -1), (5, -1), (6, -1), (8, -1), (12, -1), (3, 9), (8, 9), (9, 9)])
def test_a_stopped_training_ends_as_one_that_was_not(after: int, steps: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", steps=steps)
    whole.train()
    first = trainer(tmp_path / "run", Send(after), steps=steps)
    with pytest.raises(Interrupted):
        first.train()
    assert measured(first) == [m for m in measured(whole) if m[0] <= first.state.global_step]
    again = trainer(tmp_path / "run", steps=steps)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step
    assert measured(again) == measured(whole)
    assert changed(weights(whole.distiller), weights(again.distiller)) == set()
