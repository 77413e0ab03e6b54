"""Weights and options over time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import taskkd as kd
from taskkd import losses, schedules
from taskkd.errors import TaskkdError
from taskkd.schedules import (
    Progress,
    Schedule,
    anneal,
    constant,
    cosine,
    from_config,
    polynomial,
    sigmoid_ramp,
    step,
    stop_after,
    warmup,
)
from tests import small


def test_constant() -> None:
    schedule = constant(0.3)
    assert [schedule(Progress(step, total)) for step, total in ((0, None), (7, 10), (100, 10))] == [0.3] * 3
    assert not schedule.needs_total


def test_warmup_by_steps() -> None:
    schedule = warmup(2.0, steps=4)
    assert not schedule.needs_total
    assert [schedule(Progress(step)) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warmup_by_fraction() -> None:
    schedule = warmup(2.0, fraction=0.5)
    assert schedule.needs_total
    assert [schedule(Progress(step, 8)) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warmup_of_review_kd_counts_epochs_from_one() -> None:
    schedule = warmup(1.0, steps=20)
    assert [schedule(Progress(epoch - 1)) for epoch in (1, 10, 20, 240)] == [1 / 20, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("options", [{"steps": 0}, {"fraction": 0.0}])
def test_a_warmup_of_no_length_is_the_full_weight(options: dict[str, float]) -> None:
    assert warmup(3.0, **options)(Progress(0, 10)) == 3.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "`warmup` takes exactly one of `steps` and `fraction`."),
        ({"steps": 3, "fraction": 0.1}, "`warmup` takes exactly one of `steps` and `fraction`."),
        ({"steps": -1}, "`steps` must not be negative, got -1."),
        ({"fraction": 1.5}, "`fraction` must be in [0, 1], got 1.5."),
        ({"fraction": -0.1}, "`fraction` must be in [0, 1], got -0.1."),
    ],
)
def test_errors_are_sentences(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^`") as caught:
        warmup(1.0, **options)
    assert str(caught.value) == sentence


def test_a_fraction_needs_the_total() -> None:
    with pytest.raises(ValueError, match=r"call `distiller.set_total\(optimiser_steps\)` before the first step"):
        warmup(1.0, fraction=0.1)(Progress(0))


def test_a_shape_of_ones_own() -> None:
    drop = Schedule(5.0, lambda progress: float(progress.step < 3))
    assert [drop(Progress(step)) for step in (2, 3)] == [5.0, 0.0]


# ---- the other shapes


def values(schedule: Schedule, steps: range, total: int | None = None) -> list[float]:
    return [schedule(Progress(s, total)) for s in steps]


def test_the_ramp_of_one_and_okddip() -> None:
    schedule = sigmoid_ramp(2.0, steps=80)
    expected = [2 * math.exp(-5 * (1 - min(e / 80, 1)) ** 2) for e in (0, 1, 40, 80, 300)]
    assert [schedule(Progress(e)) for e in (0, 1, 40, 80, 300)] == pytest.approx(expected, rel=1e-12)
    assert values(sigmoid_ramp(2.0, fraction=0.5), range(3), 4) == pytest.approx(
        [2 * math.exp(-5), 2 * math.exp(-1.25), 2.0]
    )
    assert sigmoid_ramp(2.0, steps=0)(Progress(0)) == 2.0


def test_polynomial() -> None:
    assert values(polynomial(0.1, steps=4), range(6)) == pytest.approx(
        [0.1 * (1 - i / 4) ** 0.9 for i in range(5)] + [0]
    )
    assert values(polynomial(4.0, power=2, end=2.0), range(0, 5, 2), 4) == pytest.approx([4.0, 2.5, 2.0])


def test_half_a_cosine() -> None:
    assert values(cosine(4.0, steps=4), range(6)) == pytest.approx([4.0, 2 + 2**1.5 / 2, 2.0, 2 - 2**1.5 / 2, 0.0, 0.0])
    assert values(cosine(1.0, end=3.0), range(0, 5, 2), 4) == pytest.approx([1.0, 2.0, 3.0])
    assert values(cosine(0.0, end=0.0), range(2), 4) == [0.0, 0.0]


def test_the_temperature_of_tofd() -> None:
    schedule = anneal(1.0, 4.0)
    assert schedule.needs_total
    epochs = (0, 1, 100, 249)
    assert [schedule(Progress(e, 250)) for e in epochs] == pytest.approx([1 + 3 * e / 250 for e in epochs], rel=1e-12)
    assert schedule(Progress(250, 250)) == 4.0
    assert values(anneal(4.0, 0.0, steps=4), range(6)) == [4.0, 3.0, 2.0, 1.0, 0.0, 0.0]
    assert values(anneal(-3.0, -1.0, steps=2), range(4)) == pytest.approx([-3.0, -2.0, -1.0, -1.0])
    assert values(anneal(0.0, 0.0, steps=2), range(2)) == [0.0, 0.0]


def test_steps_with_factors() -> None:
    assert values(step(8.0, steps=[2, 4], factors=0.5), range(6)) == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0]
    assert values(step(8.0, steps=[2, 4], factors=[0.5, 3]), range(1, 6)) == [8.0, 4.0, 4.0, 12.0, 12.0]
    by_share = step(1.0, fractions=[0.5, 0.75], factors=0)
    assert by_share.needs_total
    assert values(by_share, range(4, 6), 10) == [1.0, 0.0]
    assert values(step(1.0, steps=[1]), range(2)) == [1.0, 0.1]


def test_distillation_that_stops_early() -> None:
    assert values(stop_after(2.0, steps=2), range(4)) == [2.0, 2.0, 0.0, 0.0]
    assert values(stop_after(2.0, steps=2, ramp=4), range(8)) == [2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert values(stop_after(2.0, fraction=0.5, ramp=0.5), range(0, 10, 2), 8) == [2.0, 2.0, 2.0, 1.0, 0.0]


def test_the_full_value_before_the_total_is_known() -> None:
    assert anneal(1.0, 4.0).known(Progress(3)) == 4.0
    assert anneal(1.0, 4.0).known(Progress(3, 6)) == 2.5
    assert warmup(2.0, steps=4).known(Progress(0)) == 0.5


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: sigmoid_ramp(1.0), "`sigmoid_ramp` takes exactly one of `steps` and `fraction`."),
        (lambda: stop_after(1.0), "`stop_after` takes exactly one of `steps` and `fraction`."),
        (lambda: anneal(1, 2, steps=1, fraction=0.5), "`anneal` takes exactly one of `steps` and `fraction`."),
        (lambda: polynomial(1.0, power=0), "`power` must be positive, got 0."),
        (lambda: cosine(1.0, fraction=2), "`fraction` must be in [0, 1], got 2."),
        (lambda: stop_after(1.0, steps=1, ramp=-1), "`ramp` must not be negative, got -1."),
        (lambda: step(1.0), "`step` takes exactly one of `steps` and `fractions`."),
        (lambda: step(1.0, steps=[3, 2]), "`steps` must be rising milestones, not negative, got [3, 2]."),
        (lambda: step(1.0, steps=[]), "`steps` must be rising milestones, not negative, got []."),
        (lambda: step(1.0, fractions=[0.5, 2]), "`fractions` must be rising milestones, in [0, 1], got [0.5, 2]."),
        (
            lambda: step(1.0, steps=[1, 2], factors=[0.1]),
            "`factors` must be one number or one for each milestone, got 1 for [1, 2].",
        ),
    ],
)
def test_more_errors_are_sentences(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^`") as caught:
        make()
    assert str(caught.value) == sentence


# ---- from recipes


@pytest.mark.parametrize(
    ("config", "same"),
    [
        ({"warmup": 2.0, "fraction": 0.1}, warmup(2.0, fraction=0.1)),
        ({"anneal": [1.0, 4.0]}, anneal(1.0, 4.0)),
        ({"steps": [2, 4], "step": 1, "factors": [0.1, 0.5]}, step(1, steps=[2, 4], factors=[0.1, 0.5])),
        ({"step": 1, "fractions": [0.5], "factors": 0.3}, step(1, fractions=[0.5], factors=0.3)),
        ({"constant": 3}, constant(3)),
        ({"cosine": 1, "end": 0.5, "steps": 4}, cosine(1, end=0.5, steps=4)),
        ({"sigmoid_ramp": 1, "steps": 7}, sigmoid_ramp(1, steps=7)),
        ({"stop_after": 1, "fraction": 0.5, "ramp": 0.1}, stop_after(1, fraction=0.5, ramp=0.1)),
    ],
)
def test_plain_data_becomes_a_schedule(config: dict[str, Any], same: Schedule) -> None:
    made = from_config(config)
    assert values(made, range(12), 10) == values(same, range(12), 10)
    assert made.needs_total == same.needs_total


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"warmp": 2.0}, "got {'warmp': 2.0} (did you mean 'warmup'?); known: anneal, constant, cosine, polynomial"),
        ({}, "a schedule is one name with its value, as in {warmup: 2.0, fraction: 0.1}, got {}; known"),
        ({"warmup": 1, "cosine": 2}, "a schedule is one name with its value"),
        ({"warmup": 2.0, "fracton": 1}, "schedule 'warmup' has no option 'fracton' (did you mean 'fraction'?)"),
        ({"anneal": 1.0}, "schedule 'anneal' takes start and end, got 1.0"),
        ({"warmup": [1, 2], "steps": 1}, "schedule 'warmup' takes value, got [1, 2]"),
        ({"warmup": "x", "steps": 1}, "schedule 'warmup' is made of numbers, got 'x'"),
        ({"warmup": True, "steps": 1}, "schedule 'warmup' is made of numbers, got True"),
        ({"warmup": 1, "steps": [1, 2]}, "schedule 'warmup': steps must be a number"),
        ({"step": 1, "steps": 2}, "schedule 'step': steps must be a list"),
        ({"warmup": 1, "steps": None}, "schedule 'warmup' is made of numbers, got None"),
        ({"warmup": 1}, "`warmup` takes exactly one of `steps` and `fraction`"),
    ],
)
def test_plain_data_that_is_none(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        from_config(config)
    assert sentence in str(caught.value)


# ---- as options of a loss


def scheduled(pair: tuple[nn.Module, nn.Module], **options: Any) -> kd.Distiller:
    options = {"temperature": anneal(1.0, 4.0, steps=10), **options}
    return kd.Distiller(*copy.deepcopy(pair), [kd.Match("l", losses.kl_divergence, "out.logits", **options)])


def test_a_temperature_follows_its_schedule(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = scheduled(conv_pair)
    batch = small.conv_batch()
    pair.prepare(batch)
    pair.student.eval()  # BatchNorm moves otherwise
    with torch.no_grad():
        s, t = (model(batch["image"])["logits"] for model in (pair.student, pair.teacher.model))
    for number in range(12):
        expected = losses.kl_divergence(s, t, temperature=1 + 3 * min(number / 10, 1))
        torch.testing.assert_close(pair(**batch)["l"], expected)
        pair.step()


def test_an_option_that_is_a_fraction_needs_the_total(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = scheduled(conv_pair, temperature=anneal(1.0, 4.0))
    batch = small.conv_batch()
    pair.prepare(batch)
    with pytest.raises(TaskkdError, match=r"a schedule is a fraction of the training: call `distiller\.set_total"):
        pair(**batch)
    pair.set_total(10)
    assert pair(**batch)["l"] > 0


def test_a_resumed_option_is_where_it_was(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    batch = small.conv_batch()

    def fresh() -> kd.Distiller:
        pair = scheduled(conv_pair, temperature=cosine(1.0, end=4.0), weight=warmup(2.0, steps=5))
        pair.prepare(batch)
        return pair

    whole, other = fresh(), fresh()
    whole.set_total(10)
    for _ in range(4):
        whole(**batch)
        whole.step()
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert torch.equal(whole(**batch)["loss"], other(**batch)["loss"])
    whole.load_state_dict(copy.deepcopy(other.state_dict()))  # BatchNorm moved
    copied = copy.deepcopy(whole)
    whole.step()
    assert not torch.equal(copied(**batch)["l"], whole(**batch)["l"])


def test_a_term_alone_stands_at_the_start() -> None:
    s, t = torch.randn(4, 3), torch.randn(4, 3)
    term = kd.Match("l", losses.kl_divergence, "x", temperature=anneal(2.0, 4.0, steps=4))
    run = kd.Run({}, None, {"x": s}, {"x": t})
    assert torch.equal(term(run), losses.kl_divergence(s, t, temperature=2.0))
    term.advance(Progress(2))
    assert torch.equal(term(run), losses.kl_divergence(s, t, temperature=3.0))
    assert (term.scheduled, term.needs_total) == (True, False)


@pytest.mark.parametrize(
    ("loss", "options", "sentence"),
    [
        (
            losses.kl_divergence,
            {"dim": constant(1)},
            "term 'l': 'dim' of `kl_divergence` cannot follow a schedule; those that can: temperature.",
        ),
        (
            losses.correlation_congruence,
            {"order": constant(2)},
            "term 'l': 'order' of `correlation_congruence` cannot follow a schedule; those that can: gamma.",
        ),
        (
            losses.mse,
            {"normalise": constant(1)},
            "'normalise' of `mse` cannot follow a schedule; those that can: none.",
        ),
        (losses.mse, {"weight": constant(-1)}, "term 'l': its weight must be a finite number >= 0, got -1."),
    ],
)
def test_what_cannot_follow_a_schedule(loss: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskkdError) as caught:
        kd.Match("l", loss, "x", **options)
    assert sentence in str(caught.value)


def test_a_value_out_of_range_is_named_when_it_comes(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = scheduled(conv_pair, temperature=anneal(1.0, 0.0, steps=2))
    batch = small.conv_batch()
    pair.prepare(batch)
    pair(**batch)
    for _ in range(2):
        pair.step()
    with pytest.raises(TaskkdError, match=r"term 'l': `temperature` must be positive, got 0\.0\."):
        pair(**batch)


def test_a_scheduled_temperature_compiles_once(fresh_dynamo: None, conv_pair: tuple[nn.Module, nn.Module]) -> None:
    """A8: at most one recompilation in 10 steps, no graph break, the eager loss."""
    pair = kd.Distiller(
        *conv_pair,
        [
            kd.Match(
                "soft", losses.kl_divergence, "out.logits", temperature=anneal(1.0, 4.0), weight=cosine(2.0, end=1.0)
            ),
            kd.Match(
                "hard", losses.kl_divergence, "out.logits", temperature=schedules.step(4.0, steps=[5]), weight=0.5
            ),
            kd.Match("at", losses.attention_transfer, "block", power=anneal(2.0, 3.0, steps=8)),
        ],
    )
    batch = small.conv_batch()
    pair.prepare(batch)
    pair.set_total(10)
    other = copy.deepcopy(pair)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    optimiser = torch.optim.SGD(other.parameters(), 0.05)
    seen = set()
    for number in range(10):
        batch = small.conv_batch(seed=number)
        pair.load_state_dict(other.state_dict())
        out, expected = compiled(**batch), pair(**batch)
        for name, value in expected.items():
            torch.testing.assert_close(out[name], value, rtol=1e-6, atol=1e-8)
        seen.add(round(float(other.terms["soft"]._tensors["temperature"]), 3))
        out["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        other.step()
    assert len(seen) == 10
    assert counter.frame_count <= 2
