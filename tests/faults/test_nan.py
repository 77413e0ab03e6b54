"""NaN is named where it comes from, before the optimiser steps (contract 7, R8, R9), and the exit code is 4."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import taskkd as kd
from taskkd.__main__ import main
from taskkd.errors import NonFiniteError
from tests import tiny
from tests.engine import Mlp, Points, hidden_term, logits_term, point_trainer
from tests.faults import worlds


class Turned(Mlp):
    """A teacher that gives NaN from its n-th call on."""

    def __init__(self, call: int) -> None:
        super().__init__(12, 1)
        self.calls, self.call = 0, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * (float("nan") if self.calls >= self.call else 1.0)


def test_nan_of_the_teacher_is_named_as_the_teachers(tmp_path: Path) -> None:
    trainer = point_trainer(tmp_path, terms=[logits_term(tap="out"), hidden_term(tap="body")], teacher=Turned(4))
    with pytest.raises(
        NonFiniteError, match=r"'logits' .* is nan at step \d.* comes from the teacher: its 'out' is"
    ) as e:
        trainer.train()
    assert "'body'" not in str(e.value)
    assert all(p.isfinite().all() for p in trainer.distiller.student.parameters())


def test_nan_of_the_teacher_on_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteError, match=r"'logits' is nan on the first batch.* from the teacher: its 'out' is not"
    ):
        point_trainer(tmp_path, teacher=Turned(1)).train()


def test_nan_of_the_data_is_not_the_teachers_alone(tmp_path: Path) -> None:
    data = Points()
    data.x[9] = float("nan")
    with pytest.raises(NonFiniteError, match=r"sample ids \[[\d, ]*9[\d, ]*\]"):
        point_trainer(tmp_path, train=data, terms=[logits_term(tap="out")]).train()


def test_no_tensor_of_the_teacher_is_kept() -> None:
    distiller = kd.Distiller(Mlp(8, 0), Mlp(12, 1), [logits_term(tap="out")], task_weight=0)
    batch = {"x": torch.randn(4, 6), "id": torch.arange(4)}
    distiller.prepare(batch)
    distiller.train()
    distiller(**batch)["loss"].backward()
    assert distiller._taught == {}


def test_the_exit_code_of_nan_is_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher on disk with NaN in its weights, where its outputs are not cached: a cache refuses to hold them."""
    recipe = worlds.write("nlp", tmp_path)
    teacher = tiny.teacher()
    with torch.no_grad():
        teacher.bert.encoder.layer[1].output.dense.bias[0] = float("nan")
    teacher.save_pretrained(tmp_path / "model")
    from taskkd.nlp.task import NlpTask

    monkeypatch.setattr(NlpTask, "chance", lambda *_: -1.0)
    import signal

    monkeypatch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)
    words = ["teacher.cache=null", "data.augment=null", "baseline=null", "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["taskkd", "distill", str(recipe), *words])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert (stop.value.code, "Traceback" in said) == (4, False)
    assert "It comes from the teacher" in said
