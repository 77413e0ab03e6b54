"""Auxiliary networks: what their optimiser steps on, and that their state comes back exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskkd.auxiliary import Auxiliary
from taskkd.errors import CheckpointError, TaskkdError
from taskkd.schedules import Progress
from tests.engine import distance, weights

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


class Counting(torch.optim.SGD):
    """Counts in its parameter group, as schedule-free optimisers do: the rate halves with every step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1.0)
        self.param_groups[0]["k"] = 0

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["k"] += 1
        self.param_groups[0]["lr"] = 0.5 ** self.param_groups[0]["k"]
        return super().step(closure)


def net(width: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1))


def auxiliary(optimizer: Any = torch.optim.Adam, width: int = 4) -> Auxiliary:
    return Auxiliary(net(width), optimizer, None, "adv")


def advance(one: Auxiliary, steps: int) -> Tensor:
    for _ in range(steps):
        loss = one.step(lambda: (one.module(X) - 1).square().mean(), Progress())
    return loss


OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "counting": Counting,
    "groups": lambda p: torch.optim.Adam([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_exactly(name: str) -> None:
    one, other = auxiliary(OPTIMIZERS[name]), auxiliary(OPTIMIZERS[name])
    other.load(one.state())  # before any step
    assert advance(one, 3) == advance(other, 3)
    fresh = auxiliary(OPTIMIZERS[name])
    fresh.load(one.state())
    twin = copy.deepcopy(one)
    assert distance(weights(fresh.module), weights(one.module)) == 0
    after = advance(one, 4)
    assert after == advance(fresh, 4) == advance(twin, 4)
    for again in (fresh, twin):
        assert distance(weights(again.module), weights(one.module)) == 0
        assert again.optimizer.param_groups[0]["lr"] == one.optimizer.param_groups[0]["lr"]


def test_a_step_trains_what_was_trainable_and_asks_nobody_else() -> None:
    module = net()
    module[0].requires_grad_(False)  # type: ignore[index]
    one = Auxiliary(module, lambda p: torch.optim.SGD(p, lr=0.1), 0.2, "adv")
    by_hand, before = copy.deepcopy(module), weights(module)
    by_hand[3].requires_grad_(True)  # type: ignore[index]
    loss = (by_hand(X) - 1).square().mean()
    loss.backward()
    assert advance(one, 1) == loss.detach()
    torch.testing.assert_close(module[3].weight, before["3.weight"] - 0.2 * by_hand[3].weight.grad)  # type: ignore[index]
    assert torch.equal(module[0].weight, before["0.weight"])  # type: ignore[index]
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    copied = copy.deepcopy(one)
    assert [p.shape for p in copied.parameters] == [p.shape for p in one.parameters]
    advance(copied, 1)
    assert torch.equal(copied.module[0].weight, before["0.weight"])  # type: ignore[index]
    with pytest.raises(TaskkdError, match="term 'adv': no parameter of its Sequential requires a gradient"):
        Auxiliary(net().requires_grad_(False), torch.optim.Adam, None, "adv")


def test_a_gradient_that_is_not_finite_counts_as_0() -> None:
    one = auxiliary(OPTIMIZERS["sgd"])
    before = weights(one.module)
    loss = one.step(lambda: next(one.module.parameters()).sum() * torch.inf, Progress())
    assert not loss.isfinite()
    assert distance(before, weights(one.module)) == 0


def test_after_an_error_in_the_loss_no_parameter_asks_for_a_gradient() -> None:
    one = auxiliary()
    with pytest.raises(ZeroDivisionError):
        one.step(lambda: torch.tensor(1 / 0), Progress())
    assert not any(p.requires_grad for p in one.module.parameters())


def test_states_of_something_else_are_refused() -> None:
    one = auxiliary()
    advance(one, 1)
    with pytest.raises(
        CheckpointError, match=r"term 'adv': this state is not of its auxiliary network: .*size mismatch"
    ):
        auxiliary(width=5).load(one.state())
    with pytest.raises(CheckpointError, match="this state is not of its auxiliary network"):
        auxiliary(OPTIMIZERS["groups"]).load(one.state())
    with pytest.raises(CheckpointError, match="this state is not of its auxiliary network"):
        one.load(torch.arange(40, dtype=torch.uint8))
    one.optimizer.state[one.parameters[0]]["what"] = object()
    with pytest.raises(CheckpointError, match=r"the state of Adam cannot be saved: .*object"):
        one.state()
