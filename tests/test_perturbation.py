"""Gradient perturbation: what the second forward sees, and what a step costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
from taskkd import losses
from taskkd.errors import TapError
from taskkd.perturbation import GradientPerturbation


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.embed(x)))}


def pair() -> tuple[Student, Student, Tensor]:
    torch.manual_seed(0)
    return Student().double(), Student().double(), torch.randn(5, 3, dtype=torch.float64)


def distiller(student: nn.Module, teacher: nn.Module, **options: Any) -> kd.Distiller:
    term = kd.Match("logits", losses.logit_mse, "out.logits", weight=2.0)
    made = kd.Distiller(student, kd.Frozen(teacher), [term], task_weight=0.0, **options)
    made.prepare({"x": torch.zeros(2, 3, dtype=torch.float64)})
    return made


@pytest.mark.parametrize(("norm", "size"), [("none", 0.5), ("l2", 0.1)])
def test_the_loss_is_that_of_the_perturbed_embeddings(norm: Any, size: float) -> None:
    student, teacher, x = pair()
    states = student.embed(x).detach().requires_grad_()
    target = teacher(x)["logits"]

    def loss(states: Tensor) -> Tensor:
        return 2 * losses.logit_mse(student.head(torch.tanh(states)), target)

    (gradient,) = torch.autograd.grad(loss(states), states)
    if norm == "l2":
        gradient = gradient / gradient.norm(dim=1, keepdim=True)
    moved = student.embed(x) + size * gradient
    expected = torch.autograd.grad(loss(moved), list(student.parameters()))

    made = distiller(student, teacher, perturbation=GradientPerturbation("embed", size=size, norm=norm))
    result = made(x=x)["loss"]
    result.backward()
    torch.testing.assert_close(result, loss(moved))
    for parameter, own in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, own)
    assert not student.embed._forward_hooks


def test_the_teacher_runs_once_and_nothing_is_left() -> None:
    student, teacher, x = pair()
    made = distiller(student, teacher, perturbation=GradientPerturbation("embed"))
    calls: list[int] = []
    teacher.embed.register_forward_hook(lambda *_: calls.append(1))
    made(x=x)
    assert len(calls) == 1
    made.eval()
    assert torch.equal(made(x=x)["logits"], student(x)["logits"])


def test_equal_student_and_teacher_stay_finite() -> None:
    student, _, x = pair()
    made = distiller(student, copy.deepcopy(student), perturbation=GradientPerturbation("embed"))
    assert float(made(x=x)["loss"].detach()) == 0.0


def test_refusals() -> None:
    student, teacher, x = pair()
    with pytest.raises(TapError, match=r"no module 'embd'.*'embed'"):
        distiller(student, teacher, perturbation=GradientPerturbation("embd"))
    with pytest.raises(ValueError, match="must be positive, got 0"):
        GradientPerturbation("embed", size=0)
    with pytest.raises(ValueError, match="'l2' or 'none'"):
        GradientPerturbation("embed", norm="l1")  # type: ignore[arg-type]
    student.embed.requires_grad_(False)
    with pytest.raises(TapError, match="'embed' gives no tensor that gradient flows through"):
        distiller(student, teacher, perturbation=GradientPerturbation("embed"))(x=x)
