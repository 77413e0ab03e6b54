"""Methods that compare embeddings, or relations between them, as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import taskkd as kd
from taskkd import losses
from taskkd.face.methods import METHODS
from taskkd.face.methods.embedding_mimic import unit_distance
from taskkd.terms import Run, Term
from tests.face.embedders import batch, no_task, pair


def terms_of(name: str, **options: Any) -> list[Term]:
    return list(METHODS[name](*pair(), **options).stages[0].terms)


def value_of(term: Term, student: torch.Tensor, teacher: torch.Tensor) -> float:
    run = Run({}, None, {"out.embeddings": student}, {"out.embeddings": teacher})
    return term.schedule.value * term(run).item()


def test_mimic_by_hand() -> None:
    s, t = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    cos = (24 / 25 + 0) / 2
    kinds = {"cosine": 1 - cos, "l2": 2 - 2 * cos, "mse": (1 + 1 + 1 + 4) / 4}
    for kind, want in kinds.items():
        (term,) = terms_of("embedding_mimic", kind=kind)
        assert value_of(term, s, t) == pytest.approx(64 * want, rel=1e-6)


def test_unit_distance_is_finite_at_zero_and_counts_what_the_mask_counts() -> None:
    s, t = torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3)
    unit_distance(s, t).backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    x = torch.randn(2, 3)
    assert unit_distance(x, t, mask=torch.tensor([1.0, 0.0])) == unit_distance(x[:1], t[:1])
    assert unit_distance(x.double(), t.double()).dtype == torch.float64


def test_mimic_needs_no_labels() -> None:
    for name, options in (("embedding_mimic", {}), ("relational", {"kind": "pkt"})):
        student, teacher = pair(8, 12)
        method = METHODS[name](student, teacher, task_weight=0.0, **options)
        assert method.needs == ()
        distiller = kd.Distiller(student, teacher, method.stages[0].terms, task_weight=0.0)
        data = {"images": batch()["images"]}
        distiller.prepare(data)
        distiller(**data)["loss"].backward()
        assert student.backbone[1].weight.grad.abs().sum() > 0
        assert bool(distiller.own_parameters()) == (name == "embedding_mimic")  # 8 mapped to 12


def test_weights_are_those_documented() -> None:
    def weights(name: str, **options: Any) -> dict[str, float]:
        return {t.name: t.schedule.value for t in terms_of(name, **options)}

    assert weights("embedding_mimic") == {"embedding": 64.0}
    assert weights("angular_distillation") == {"angle": 1.0}
    assert weights("relational") == {"distance": 25.0, "angle": 50.0}
    assert weights("relational", angle=0.0, weight=2.0) == {"distance": 50.0}
    assert weights("relational", kind="similarity") == {"similarity": 50.0}
    assert weights("relational", kind="darkrank") == {"rank": 1.0}


def test_relations_are_the_cores() -> None:
    s, t = torch.randn(5, 4), torch.randn(5, 7)
    wanted = {
        "similarity": 50 * losses.similarity_preserving(s, t, normalise="samples"),
        "correlation": losses.correlation_congruence(s, t, gamma=0.4, order=2),
        "pkt": losses.probabilistic_transfer(s, t, eps=1e-6),
        "darkrank": losses.dark_rank(s, t, length=3, normalise=True),
        "rkd": 25 * losses.relational_distance(s, t) + 50 * losses.relational_angle(s, t),
    }
    for kind, want in wanted.items():
        found = sum(value_of(term, s, t) for term in terms_of("relational", kind=kind))
        assert found == pytest.approx(want.item(), rel=1e-5), kind


@pytest.mark.parametrize("name", ["embedding_mimic", "angular_distillation"])
def test_beside_the_labels(name: str) -> None:
    student, teacher = pair()
    (stage,) = METHODS[name](student, teacher).stages
    distiller = kd.Distiller(student, teacher, stage.terms, task_loss=no_task, task_weight=stage.task_weight)
    distiller.prepare(batch())
    found = distiller(**batch())
    assert found.keys() >= {"loss", "task"}
    assert found["loss"].isfinite()


def test_a_teacher_is_untouched_and_a_cache_takes_its_place(tmp_path: Path) -> None:
    """Acceptance A9."""
    student, teacher = pair()
    teacher.backbone.insert(2, nn.BatchNorm1d(16))
    before = {n: v.clone() for n, v in teacher.state_dict().items()}
    terms = [*METHODS["embedding_mimic"](student, teacher).stages[0].terms]
    terms += METHODS["ada_distill"](student, teacher).stages[0].terms
    data = [batch(seed=step) | {"id": 16 * step + torch.arange(8)} for step in range(3)]

    def train(source: Any) -> list[float]:
        torch.manual_seed(0)
        distiller = kd.Distiller(pair()[0], source, copy.deepcopy(terms), task_loss=no_task)
        distiller.prepare(data[0])
        optimizer, seen = torch.optim.SGD(distiller.parameters(), lr=0.01), []
        distiller.train()
        for step in data:
            found = distiller(**step)
            optimizer.zero_grad()
            found["loss"].backward()
            optimizer.step()
            assert not teacher.training
            seen.append(found["embedding"].item())
        distiller.close()
        return seen

    live = train(kd.Frozen(teacher))
    cached = kd.Cached(teacher, tmp_path, dtype="float16")
    cached.attach(["out.embeddings"])
    cached.build(data, total=24, announce=lambda _: None)
    calls: list[Any] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    assert train(kd.Cached(teacher, tmp_path, dtype="float16")) == pytest.approx(live, abs=2e-3)
    assert not calls
    assert all(torch.equal(v, teacher.state_dict()[n]) for n, v in before.items())
