"""EC-KD: exclusivity of filters, consistency weighed by hardness."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taskkd as kd
from taskkd.errors import RecipeError, ShapeError
from taskkd.face.methods.ec_kd import WeightExclusivity, ec_kd, hardness_aware_consistency, weight_exclusivity
from taskkd.terms import Run
from tests.face.networks import TinyFace, batch


def test_exclusivity_is_the_sum_over_pairs_of_filters() -> None:
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    pairs = sum((weight[i] * weight[j]).abs().sum() for i in range(5) for j in range(5) if i != j)
    torch.testing.assert_close(weight_exclusivity(weight), pairs)
    assert weight_exclusivity(torch.eye(4)) == 0
    assert weight_exclusivity(torch.randn(1, 7)).abs() < 1e-5
    assert weight_exclusivity(torch.zeros(3, 2, requires_grad=True)).isfinite()
    with pytest.raises(ShapeError, match="filters"):
        weight_exclusivity(torch.zeros(3))


def test_filters_of_a_group_are_compared_among_themselves() -> None:
    network = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.Conv2d(6, 6, 3, groups=6), nn.Linear(2, 2))
    own = network[0].weight
    expected = (weight_exclusivity(own[:3]) + weight_exclusivity(own[3:])) / 2
    term = WeightExclusivity("exclusivity", network)
    torch.testing.assert_close(term(Run({}, None)), expected)
    assert not list(term.parameters())


def test_consistency_weighs_hard_samples_more() -> None:
    angles = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    student, teacher = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([[1.0, 0.0]]).double().expand(3, 2)
    distance = 2 - 2 * angles.cos()
    weight = (distance / distance.mean()).exp()
    expected = (weight / weight.mean() * distance).mean()
    torch.testing.assert_close(hardness_aware_consistency(student, teacher), expected)
    assert expected > distance.mean()
    raw = hardness_aware_consistency(3 * student, teacher, normalise=False)
    assert raw > expected


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.ones(1, 4), torch.zeros(0, 4), torch.full((2, 4), 1e18)])
def test_consistency_is_finite(x: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    for teacher in (x.detach(), torch.zeros_like(x)):
        value = hardness_aware_consistency(x, teacher)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()


def test_it_trains_the_student_and_maps_its_embedding() -> None:
    student, teacher = TinyFace(4, 8), TinyFace(8, 12, seed=1)
    (stage,) = ec_kd(student, teacher, exclusivity=0.01).stages
    distiller = kd.Distiller(student, kd.Frozen(teacher), stage.terms, task_weight=0.0)
    distiller.prepare(batch())
    distiller.train()
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.3)
    first = distiller(**batch())
    for _ in range(15):
        optimiser.zero_grad()
        last = distiller(**batch())
        last["loss"].backward()
        optimiser.step()
        distiller.step()
    assert last["consistency"] < 0.8 * first["consistency"]
    assert last["exclusivity"] < first["exclusivity"]


def test_a_student_without_convolutions_is_refused() -> None:
    student = nn.Linear(3, 3)
    student.embedding_size = 3  # type: ignore[assignment]
    with pytest.raises(RecipeError, match=r"has no convolution .* exclusivity=0"):
        ec_kd(student, student)
    assert [t.name for t in ec_kd(student, student, exclusivity=0).stages[0].terms] == ["consistency"]
    same = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match="one shape"):
        hardness_aware_consistency(same, F.pad(same, (0, 1)))
