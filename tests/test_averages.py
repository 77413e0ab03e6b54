"""EMA and snapshots: what they are after each step, outside the module tree, saved and resumed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
from taskkd import losses
from taskkd.errors import TaskkdError
from tests import small
from tests.test_teachers import same_state, state_of


def pair(make: Any, **options: Any) -> kd.Distiller:
    torch.manual_seed(1)
    student = small.ConvNet(4)
    terms = [kd.Match("t", losses.mse, "out.logits"), kd.Match("f", losses.mse, "block")]
    return kd.Distiller(student, make(student), terms, **options)


def train(
    distiller: kd.Distiller, steps: range, optimiser: torch.optim.Optimizer | None = None
) -> list[dict[str, Any]]:
    optimiser = torch.optim.SGD(distiller.parameters(), 0.1) if optimiser is None else optimiser
    distiller.train()
    states = []
    for step in steps:
        distiller(**small.conv_batch(seed=step))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        distiller.step()
        states.append(state_of(distiller.student))
    return states


def test_the_average_is_its_recursion() -> None:
    distiller = pair(lambda s: kd.EMA(s, decay=0.7, warmup=False))
    expected = {n: p.detach().clone() for n, p in distiller.student.named_parameters()}
    states = train(distiller, range(4))
    for state in states:
        expected = {n: 0.7 * e + 0.3 * state[n] for n, e in expected.items()}
    own = dict(distiller.teacher.model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(own[name].detach(), value)
    for name, buffer in distiller.teacher.model.named_buffers():
        assert torch.equal(buffer, states[-1][name])


def test_the_warm_up_averages_what_there_has_been() -> None:
    distiller = pair(lambda s: kd.EMA(s, decay=0.999))
    first = state_of(distiller.student)
    states = [first, *train(distiller, range(4))]
    own = dict(distiller.teacher.model.named_parameters())
    for name, value in own.items():
        torch.testing.assert_close(value.detach(), torch.stack([s[name] for s in states]).mean(0))


def test_they_are_outside_the_module_tree_and_in_the_state() -> None:
    for make in (kd.EMA, lambda s: kd.Snapshot(s, period=2)):
        distiller = pair(make)
        copied = distiller.teacher.model
        assert copied not in list(distiller.modules())
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in distiller.parameters()}
        assert not any(p.requires_grad for p in copied.parameters())
        distiller.train()
        assert not any(m.training for m in copied.modules())
        keys = {k for k in distiller.state_dict() if k.startswith("teacher.")}
        assert keys >= {f"teacher.model.{n}" for n in copied.state_dict()}


def test_prepare_and_evaluation_change_nothing() -> None:
    distiller = pair(kd.EMA)
    before = {k: v.clone() for k, v in distiller.state_dict().items()}
    distiller.prepare(small.conv_batch())
    distiller.eval()
    distiller(**small.conv_batch())
    assert all(torch.equal(v, before[k]) for k, v in distiller.state_dict().items() if k != "_extra_state")


def test_a_student_in_half_precision_is_averaged_in_single() -> None:
    student = nn.Linear(1, 1, bias=False).bfloat16()
    ema = kd.EMA(student, decay=0.99, warmup=False)
    with torch.no_grad():
        ema.model.weight.fill_(1.0)
        ema._masters["weight"].fill_(1.0)
        student.weight.fill_(1.1015625)
    for _ in range(100):
        ema.step(kd.schedules.Progress(1))
    expected = 1.1015625 - 0.1015625 * 0.99**100
    assert ema._masters["weight"].item() == pytest.approx(expected, abs=1e-5)
    assert ema.model.weight.dtype == torch.bfloat16
    assert ema.model.weight.item() == pytest.approx(expected, abs=4e-3)
    assert ema.state()["model.weight"].dtype == torch.float32


def test_tied_weights_stay_tied() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[1].weight = student[0].weight
    ema = kd.EMA(student)
    ema.step(kd.schedules.Progress(1))
    assert ema.model[1].weight is ema.model[0].weight


# ---- snapshots


def test_the_first_cycle_has_no_teacher_the_next_has_the_last_snapshot() -> None:
    distiller = pair(lambda s: kd.Snapshot(s, period=3))
    distiller.train()
    assert distiller.weights() == {"task": 1.0, "t": 0.0, "f": 0.0}
    assert set(distiller(**small.conv_batch())) == {"loss", "task"}
    states = train(distiller, range(3))
    assert distiller.weights() == {"task": 1.0, "t": 1.0, "f": 1.0}
    assert same_state(distiller.teacher.model, states[2])
    assert set(distiller(**small.conv_batch())) == {"loss", "task", "t", "f"}
    more = train(distiller, range(3, 8))
    assert same_state(distiller.teacher.model, more[2])  # of step 6


def test_in_the_first_cycle_it_does_not_run() -> None:
    distiller = pair(lambda s: kd.Snapshot(s, period=3))
    ran: list[int] = []
    distiller.teacher.model.register_forward_pre_hook(lambda m, a: ran.append(1))
    train(distiller, range(5))
    assert len(ran) == 2


def test_cycles_of_the_whole_training_end_where_the_learning_rate_restarts() -> None:
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

    total, cycles = 10, 3
    distiller = pair(lambda s: kd.Snapshot(s, cycles=cycles))
    distiller.set_total(total)
    optimiser = torch.optim.SGD(distiller.parameters(), 0.1)
    scheduler = get_cosine_with_hard_restarts_schedule_with_warmup(optimiser, 0, total, cycles)
    taken, restarts = [], []
    for step in range(total):
        rate = scheduler.get_last_lr()[0]
        before = {n: p.clone() for n, p in distiller.teacher.model.named_parameters()}
        train(distiller, range(step, step + 1), optimiser)
        scheduler.step()
        if any(not torch.equal(p, before[n]) for n, p in distiller.teacher.model.named_parameters()):
            taken.append(step + 1)
        if scheduler.get_last_lr()[0] > rate:
            restarts.append(step + 1)
    assert taken == [4, 7, 10]
    assert restarts == taken[:-1]


def test_cycles_need_the_total() -> None:
    with pytest.raises(TaskkdError, match=r"`Snapshot\(cycles=...\)`: call `distiller.set_total"):
        train(pair(lambda s: kd.Snapshot(s, cycles=2)), range(1))


# ---- resuming


@pytest.mark.parametrize(
    "make",
    [kd.EMA, lambda s: kd.Snapshot(s, period=3), lambda s: kd.Cohort(old=kd.Snapshot(s, period=3), mean=kd.EMA(s))],
    ids=["ema", "snapshot", "both"],
)
@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_is_bit_equal(make: Any, stop: int) -> None:
    def fresh(seed: int) -> tuple[kd.Distiller, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        student = small.ConvNet(4)
        teacher = make(student)
        start = "old/" if isinstance(teacher, kd.Cohort) else ""
        terms = [kd.Match("t", losses.mse, "out.logits", f"{start}out.logits")]
        if start:
            terms.append(kd.Match("m", losses.mse, "block", "mean/block"))
        distiller = kd.Distiller(student, teacher, terms)
        distiller.prepare(small.conv_batch())
        return distiller, torch.optim.AdamW(distiller.parameters(), 0.01)

    whole, optimiser = fresh(0)
    train(whole, range(stop), optimiser)
    saved = copy.deepcopy((whole.state_dict(), optimiser.state_dict()))
    train(whole, range(stop, 8), optimiser)
    resumed, other = fresh(1)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, range(stop, 8), other)
    end = resumed.state_dict()
    assert all(torch.equal(v, end[k]) for k, v in whole.state_dict().items() if k != "_extra_state")


def test_a_state_without_the_average_is_refused() -> None:
    distiller, bare = pair(kd.EMA), pair(lambda s: small.ConvNet(4))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"teacher.model.stem.weight\""):
        distiller.load_state_dict(bare.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"teacher.model.stem.weight\""):
        bare.load_state_dict(distiller.state_dict())


def test_a_deep_copy_follows_its_own_student() -> None:
    distiller = pair(kd.EMA)
    train(distiller, range(2))
    other = copy.deepcopy(distiller)
    assert other.teacher.student is other.student
    before = state_of(distiller.teacher.model)
    train(other, range(2, 5))
    assert same_state(distiller.teacher.model, before)
    assert not same_state(other.teacher.model, before)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda s: kd.EMA(s, decay=1.0), TaskkdError, r"`decay` must be in \[0, 1\), got 1.0"),
        (lambda s: kd.EMA("net"), TypeError, "`EMA` takes the student, got str"),
        (kd.Snapshot, TaskkdError, "one of `period` and `cycles`, at least 1, got period=None"),
        (lambda s: kd.Snapshot(s, period=2, cycles=2), TaskkdError, "one of `period` and `cycles`"),
        (lambda s: kd.Snapshot(s, period=0), TaskkdError, "at least 1, got period=0"),
    ],
)
def test_errors_are_sentences(make: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        make(small.ConvNet(4))


def test_the_trained_student_is_plain_after_close() -> None:
    distiller = pair(kd.EMA)
    train(distiller, range(2))
    distiller.close()
    models: list[nn.Module] = [distiller.student, distiller.teacher.model]
    assert not any(m._forward_hooks for model in models for m in model.modules())
    fresh = small.ConvNet(4)
    fresh.load_state_dict(distiller.student.state_dict())
    image: Tensor = small.conv_batch()["image"]
    assert torch.equal(fresh.eval()(image)["logits"], distiller.student.eval()(image)["logits"])
