"""Suppliers under the trainer: resuming is bit-exact, the checkpoint's student is the student alone, ranks agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import taskkd as kd
from taskkd import losses
from tests import ranks_job
from tests.engine import Mlp, Points, StopAfter, changed, cross_entropy, distance, point_trainer, weights
from tests.test_checkpoints import everything


def supplied(kind: str) -> dict[str, Any]:
    """A student with dropout, its supplier and terms."""
    student = Mlp(8, 0, dropout=0.2)
    return {"student": student, **ranks_job.suppliers(student)[kind]}


def trainer(folder: Any, kind: str, **options: Any) -> kd.Trainer:
    defaults = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "adapter_learning_rate": 3e-3}
    return point_trainer(folder, **{**defaults, **supplied(kind), **options})


KINDS = list(ranks_job.suppliers(Mlp(8)))


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bit_exact(tmp_path, kind):
    whole = trainer(tmp_path / "whole", kind)
    whole.train()
    first = trainer(tmp_path / "run", kind, callbacks=[StopAfter(4)])
    first.train()
    assert first.state.global_step == 4
    assert distance(everything(first), everything(whole)) > 1e-4
    again = trainer(tmp_path / "run", kind)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 9
    assert changed(everything(whole), everything(again)) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_student_alone_and_the_rest_beside_it(tmp_path, kind):
    run = trainer(tmp_path / "run", kind, callbacks=[StopAfter(2)])
    run.train()
    saved = tmp_path / "run" / "checkpoint-2"
    assert set(load_file(saved / "student" / "model.safetensors")) == set(Mlp(8).state_dict())
    state = set(load_file(saved / "taskkd_state.safetensors"))
    assert any(k.startswith(("supplier.", "teacher.")) for k in state) is (kind not in ("drop", "self"))
    run.save_model(str(tmp_path / "alone"))
    alone = Mlp(8, 5)
    alone.load_state_dict(load_file(tmp_path / "alone" / "model.safetensors"))
    x = Points().x
    assert torch.equal(alone.eval()(x), run.distiller.student.eval()(x))


def test_an_optimiser_of_the_users_own_trains_the_peers(tmp_path):
    options = supplied("cohort")
    optimiser = torch.optim.SGD(options["student"].parameters(), 0.1)
    run = point_trainer(tmp_path, **options, optimizers=(optimiser, None))
    before = weights(run.distiller.supplier)
    run.train()
    assert changed(before, weights(run.distiller.supplier)) == set(before)


def test_caches_in_an_ensemble_are_built_and_equal_live(tmp_path):
    def teacher(cached: bool) -> kd.Ensemble:
        models = [Mlp(12, 1), Mlp(12, 2)]
        return kd.Ensemble(*(kd.Cached(m, tmp_path / f"cache{i}") if cached else m for i, m in enumerate(models)))

    found = []
    for cached in (True, False):
        terms = [kd.Match("t", losses.kl_divergence, "out", temperature=2.0)]
        run = point_trainer(tmp_path / "run", student=Mlp(8), teacher=teacher(cached), terms=terms)
        run.train()
        found.append(weights(run.distiller))
    assert all((tmp_path / f"cache{i}" / "index.json").exists() for i in (0, 1))
    assert distance(*found) <= 1e-6


def test_the_metric_sees_the_student_alone(tmp_path):
    def count(prediction: Any) -> dict[str, float]:
        return {"classes": float(prediction.predictions.shape[-1]), "count": float(len(prediction.predictions))}

    run = point_trainer(tmp_path, **supplied("cohort"), eval_dataset=Points(10, 1), compute_metrics=count)
    found = run.evaluate()
    assert (found["eval_count"], found["eval_classes"]) == (10.0, 3.0)
    x = Points(10, 1)
    expected = cross_entropy(run.distiller.student.eval()(x.x), {"labels": x.labels}).item()
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)
