"""The margin functions: their variants, what happens at the ends of the cosine, samples without a class."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from taskkd.errors import TaskkdError
from taskkd.face import margins

Z = torch.tensor([-1.0, 0.0, 0.5, 1.0])
FUNCTIONS: dict[str, Any] = {
    **{f"arcface {v}": lambda c, y, v=v: margins.arcface(c, y, variant=v) for v in margins.VARIANTS["arcface"]},
    "arcface easy": lambda c, y: margins.arcface(c, y, easy_margin=True),
    **{f"cosface {v}": lambda c, y, v=v: margins.cosface(c, y, variant=v) for v in margins.VARIANTS["cosface"]},
    **{
        f"adaface {v}": lambda c, y, v=v: margins.adaface(c, y, Z[: len(c)], variant=v)
        for v in margins.VARIANTS["adaface"]
    },
    "curricularface": lambda c, y: margins.curricularface(c, y, 0.3),
}
each = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def gradient(function: Any, cosines: Tensor, labels: Tensor) -> Tensor:
    cosines = cosines.clone().requires_grad_()
    function(cosines, labels).sum().backward()
    assert cosines.grad is not None
    return cosines.grad


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradient_are_finite_at_the_ends_of_the_cosine(function: Any, dtype: torch.dtype) -> None:
    ends = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.5], [1.0000001, 0.2, -1.0], [-1.0000001, 1.0, 1.0]]).to(dtype)
    logits = function(ends, torch.zeros(4, dtype=torch.int64))
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.isfinite().all()
    assert gradient(function, ends, torch.zeros(4, dtype=torch.int64)).isfinite().all()


@each
def test_a_row_without_a_class_is_scaled_and_no_more(function: Any) -> None:
    cosines = torch.tensor([[0.3, -0.2, 0.6], [0.3, -0.2, 0.6]])
    logits = function(cosines, torch.tensor([-1, 2]))
    torch.testing.assert_close(logits[0], 64 * cosines[0])
    assert logits[1, 2] < 64 * cosines[1, 2]


def test_the_three_arcfaces_are_one_below_and_three_beyond_pi_less_m() -> None:
    label = torch.zeros(1, dtype=torch.int64)
    values, slopes = {}, {}
    for angle in (1.0, math.pi - 0.2):
        cosine = torch.tensor([[math.cos(angle), 0.1]], dtype=torch.float64)
        for variant in margins.VARIANTS["arcface"]:
            one = FUNCTIONS[f"arcface {variant}"]
            values[angle, variant] = one(cosine, label)[0, 0].item() / 64
            slopes[angle, variant] = gradient(one, cosine, label)[0, 0].item() / 64
    below = [values[1.0, v] for v in margins.VARIANTS["arcface"]]
    assert below == pytest.approx([math.cos(1.5)] * 3)
    exact = math.sin(1.5) / math.sin(1.0)
    assert [slopes[1.0, v] for v in margins.VARIANTS["arcface"]] == pytest.approx([exact, 1.0, exact])
    angle = math.pi - 0.2
    beyond = [math.cos(angle) - 0.5 * math.sin(0.5), math.cos(angle + 0.5), math.cos(math.pi - 1e-4)]
    assert [values[angle, v] for v in margins.VARIANTS["arcface"]] == pytest.approx(beyond)
    assert [slopes[angle, v] for v in margins.VARIANTS["arcface"]] == pytest.approx([1.0, 1.0, 0.0])


def test_easy_margin_spares_what_is_beyond_a_right_angle() -> None:
    cosines = torch.tensor([[0.4, 0.0], [-0.4, 0.0]])
    logits = margins.arcface(cosines, torch.tensor([0, 0]), s=1.0, easy_margin=True)
    assert logits[0, 0] == pytest.approx(math.cos(math.acos(0.4) + 0.5), abs=1e-6)
    assert logits[1, 0] == cosines[1, 0]


def test_curricularface_weighs_the_negatives_beyond_the_margin() -> None:
    cosines = torch.tensor([[0.8, 0.6, 0.1]])
    label = torch.tensor([0])
    logits = margins.curricularface(cosines, label, 0.3, s=1.0)
    assert math.cos(math.acos(0.8) + 0.5) < 0.6
    torch.testing.assert_close(logits[0, 1:], torch.tensor([0.6 * (0.3 + 0.6), 0.1]))
    elsewhere = margins.curricularface(cosines, torch.tensor([-1]), 0.3, s=1.0, targets=torch.tensor([0.8]))
    torch.testing.assert_close(elsewhere[0, 1:], logits[0, 1:])


def test_adaface_is_arcface_on_poor_images_and_cosface_on_average_ones() -> None:
    cosines, label = torch.tensor([[0.5, 0.1]], dtype=torch.float64), torch.tensor([0])
    poor = margins.adaface(cosines, label, torch.tensor([-1.0], dtype=torch.float64))
    torch.testing.assert_close(poor, margins.arcface(cosines, label, m=0.4))
    average = margins.adaface(cosines, label, torch.tensor([0.0], dtype=torch.float64))
    torch.testing.assert_close(average, margins.cosface(cosines, label, m=0.4))


@pytest.mark.parametrize("name", ["arcface", "cosface", "adaface"])
def test_close_negatives_are_left_out_where_wished(name: str) -> None:
    cosines = torch.tensor([[0.7, 0.6, 0.1]])
    more = (torch.zeros(1),) if name == "adaface" else ()
    function = getattr(margins, name)

    def kept(c: Tensor, y: Tensor) -> Tensor:
        return function(c, y, *more, filter_above=0.5)

    logits = kept(cosines, torch.tensor([0]))
    assert logits[0, 1] == 0
    assert logits[0, 0] == function(cosines, torch.tensor([0]), *more)[0, 0]
    assert gradient(kept, cosines, torch.tensor([0]))[0, 1] == 0


def test_a_wrong_variant_is_told_the_nearest() -> None:
    with pytest.raises(TaskkdError, match=r"`variant` of 'arcface'.*got 'insigthface' .did you mean 'insight"):
        margins.arcface(torch.zeros(1, 2), torch.tensor([0]), variant="insigthface")
    with pytest.raises(TaskkdError, match="`variant` of 'cosface'"):
        margins.cosface(torch.zeros(1, 2), torch.tensor([0]), variant="cvlface")
