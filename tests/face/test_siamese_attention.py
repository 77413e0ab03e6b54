"""Siamese networks: pairs, attention of stages, embeddings."""

from __future__ import annotations

import pytest
import torch

import taskkd as kd
from taskkd.errors import RecipeError, ShapeError
from taskkd.face.methods.siamese_attention import pair_contrastive, siamese_attention
from tests.face.networks import TinyFace, batch


def test_pairs_are_drawn_together_and_pushed_apart() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.6, 0.8], [5.0, 5.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, -1])
    distance = [(2 - 2 * c) ** 0.5 for c in (0.6, 0.8)]
    found = pair_contrastive(x, x, labels=labels, margin=1.2)
    assert found.item() == pytest.approx(2.0 + sum(max(0.0, 1.2 - d) ** 2 for d in distance) / 2)


@pytest.mark.parametrize("labels", [[], [0], [0, 0], [0, 1], [-1, -1]])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_embeddings_and_single_samples_are_finite(labels: list[int], value: float) -> None:
    x = torch.full((len(labels), 4), value, requires_grad=True)
    loss = pair_contrastive(x, x, labels=torch.tensor(labels, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    if labels != [0, 1] and (value or labels != [0, 0]):
        assert loss.abs() < 1e-6


def test_it_trains_on_pairs_stages_and_embeddings() -> None:
    student, teacher = TinyFace(4, 8), TinyFace(8, 12, seed=1)
    teacher.views.stages = ("head", "layer1", "layer2")  # stages are paired from the last
    (stage,) = siamese_attention(student, teacher, attention=10.0).stages
    assert [t.name for t in stage.terms] == ["pairs", "attention0", "attention1", "mimic"]
    distiller = kd.Distiller(student, kd.Frozen(teacher), stage.terms, task_weight=0.0)
    distiller.prepare(batch())
    distiller.train()
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.1)
    values = []
    for _ in range(15):
        optimiser.zero_grad()
        found = distiller(**batch())
        found["loss"].backward()
        optimiser.step()
        distiller.step()
        values.append(found["loss"].item())
    assert values[-1] < 0.9 * values[0]


def test_wrong_use() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match="labels"):
        pair_contrastive(x, x, labels=torch.zeros(3))
    with pytest.raises(ValueError, match="`margin`"):
        pair_contrastive(x, x, labels=torch.zeros(2), margin=0.0)
    student = TinyFace()
    student.views.stages = ()
    with pytest.raises(RecipeError, match=r"the student's `views.stages`.*attention=0"):
        siamese_attention(student, TinyFace())
    assert [t.name for t in siamese_attention(student, TinyFace(), attention=0).stages[0].terms] == ["pairs", "mimic"]
