"""Ensembles of frozen teachers: means, weights, gates, members left out, and that they stay outside the distiller."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
import taskkd.ensembles
from taskkd import losses
from taskkd.errors import ShapeError, TapError, TaskkdError
from tests import small
from tests.test_teachers import calls_of, same_state, state_of


def nets(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(5)
    return [small.ConvNet(4) for _ in range(count)]


def logits_of(models: list[nn.Module], batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [m.eval()(batch["image"])["logits"] for m in models]


def supplied(ensemble: kd.Ensemble, *taps: str, run: Any = None) -> dict[str, Any]:
    ensemble.attach(taps)
    return ensemble(small.conv_batch(), run)


def pair(teacher: Any, *taps: str) -> kd.Distiller:
    torch.manual_seed(1)
    terms = [kd.Match(f"t{i}", losses.mse, t.rpartition("/")[2], t) for i, t in enumerate(taps)]
    return kd.Distiller(small.ConvNet(4), teacher, terms)


def test_the_docstring_examples_run() -> None:
    torch.manual_seed(0)
    result = doctest.testmod(taskkd.ensembles, extraglobs={"torch": torch, "nn": nn})
    assert (result.failed, result.attempted >= 3) == (0, True)


def test_the_mean_of_any_tap() -> None:
    models, batch = nets(), small.conv_batch()
    found = supplied(kd.Ensemble(*models), "out.logits", "head:in")
    torch.testing.assert_close(found["out.logits"], torch.stack(logits_of(models, batch)).mean(0))
    pooled = [m.features(batch["image"]).mean((2, 3)) for m in models]
    torch.testing.assert_close(found["head:in"], torch.stack(pooled).mean(0))
    assert not found["out.logits"].requires_grad


def test_fixed_weights_are_shares() -> None:
    models, batch = nets(), small.conv_batch()
    a, b, c = logits_of(models, batch)
    found = supplied(kd.Ensemble(*models, weights=[4, 3, 1]), "out.logits")["out.logits"]
    torch.testing.assert_close(found, (4 * a + 3 * b + c) / 8)


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_probabilities_at_the_temperature_are_the_mean_of_those_of_the_members(weights: list[float] | None) -> None:
    models, batch, t = nets(), small.conv_batch(), 3.0
    ensemble = kd.Ensemble(*models, weights=weights, combine="probabilities", temperature=t)
    found = supplied(ensemble, "out.logits")["out.logits"]
    share = torch.tensor(weights or [1.0] * 3) / sum(weights or [1.0] * 3)
    expected = sum(w * (z / t).softmax(1) for w, z in zip(share, logits_of(models, batch), strict=True))
    torch.testing.assert_close((found / t).softmax(1), expected)


def test_the_gradient_of_the_sum_of_divergences_to_the_members() -> None:
    """DGKD sums the divergences to each; its gradient is that to the mean of the probabilities, times their number."""
    models, batch = nets(), small.conv_batch()
    z = torch.randn(4, 3, requires_grad=True)
    many = sum(losses.kl_divergence(z, t, temperature=2.0) for t in logits_of(models, batch))
    mixed = supplied(kd.Ensemble(*models, combine="probabilities", temperature=2.0), "out.logits")["out.logits"]
    one = losses.kl_divergence(z, mixed, temperature=2.0)
    expected = torch.autograd.grad(many, z)[0]
    torch.testing.assert_close(3 * torch.autograd.grad(one, z)[0], expected)


def test_extreme_logits_stay_finite() -> None:
    a, b = (nn.Linear(2, 3) for _ in range(2))
    with torch.no_grad():
        a.bias.copy_(torch.tensor([1e4, 0.0, -1e4]))
        b.bias.copy_(torch.tensor([-1e4, 0.0, 1e4]))
    ensemble = kd.Ensemble(a, b, combine="probabilities")
    ensemble.attach(["out"])
    found = ensemble({"input": torch.zeros(1, 2)})["out"]
    torch.testing.assert_close(found.softmax(1), torch.tensor([[0.5, 0.0, 0.5]]))


def test_one_mode_for_each_tap() -> None:
    models, batch = nets(2), small.conv_batch()
    found = supplied(kd.Ensemble(*models, combine={"out.logits": "probabilities"}), "out.logits", "head")
    a, b = logits_of(models, batch)
    torch.testing.assert_close(found["head"], (a + b) / 2)
    torch.testing.assert_close(found["out.logits"].softmax(1), (a.softmax(1) + b.softmax(1)) / 2)


def test_a_member_by_name() -> None:
    big, small_one = nets(2)
    found = supplied(kd.Ensemble(small_one, big=big), "big/head", "0/head", "./head")
    a, b = logits_of([big, small_one], small.conv_batch())
    torch.testing.assert_close(found["big/head"], a)
    torch.testing.assert_close(found["0/head"], b)


def test_a_module_with_the_name_of_a_member_or_a_slash_is_written_with_a_dot() -> None:
    model = nn.Sequential()
    model.add_module("a/b", nn.Linear(2, 2))
    ensemble = kd.Ensemble(a=model)
    for tap in ("./a/b", "a/./a/b"):
        ensemble.attach([tap])
        assert ensemble({"input": torch.ones(1, 2)})[tap].shape == (1, 2)
    with pytest.raises(TapError, match=r"there is no member 'b' \(did you mean 'a'|there is no member 'b'"):
        ensemble.attach(["b/out"])


def test_members_stay_outside_and_untouched() -> None:
    models = nets()
    before = [state_of(m) for m in models]
    distiller = pair(kd.Ensemble(*models, weights=[1, 2, 3]), "out.logits", "block")
    distiller.prepare(small.conv_batch())
    distiller.train()
    optimiser = torch.optim.SGD(distiller.parameters(), 0.1)
    start = state_of(distiller.student)
    for step in range(5):
        distiller(**small.conv_batch(seed=step))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        distiller.step()
    assert all(same_state(m, b) for m, b in zip(models, before, strict=True))
    assert not same_state(distiller.student, start)
    assert not any(m.training for m in models)
    assert set(distiller.state_dict()) == {f"student.{k}" for k in start} | {"_extra_state"}
    distiller.close()
    assert not any(m._forward_hooks for model in models for m in model.modules())


def test_a_deep_copy_shares_the_members_but_not_the_gate() -> None:
    gate = kd.LatentGate("head:in", 4, 2)
    distiller = pair(kd.Ensemble(*nets(2), gate=gate), "out.logits")
    other = copy.deepcopy(distiller)
    assert other.teacher.members["0"] is distiller.teacher.members["0"]
    assert other.supplier is other.teacher.gate
    assert other.supplier is not gate


# ---- drop


def test_drop_leaves_members_out_of_training_steps_only() -> None:
    models, batch = nets(), small.conv_batch()
    ensemble = kd.Ensemble(*models, weights=[1, 2, 5], drop=1)
    ensemble.attach(["out.logits"])
    a, b, c = logits_of(models, batch)
    expected = [(2 * b + 5 * c) / 7, (a + 5 * c) / 6, (a + 2 * b) / 3]
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        found = ensemble(batch)["out.logits"]
        seen |= {i for i, e in enumerate(expected) if torch.allclose(found, e, atol=1e-6)}
    assert seen == {0, 1, 2}
    torch.testing.assert_close(ensemble.prepare(batch)["out.logits"], (a + 2 * b + 5 * c) / 8)


def test_what_is_dropped_does_not_run_unless_it_is_named() -> None:
    models, batch = nets(), small.conv_batch()
    ensemble = kd.Ensemble(*models, drop=2)
    ensemble.attach(["out.logits", "2/head"])
    ran = [calls_of(m) for m in models]
    torch.manual_seed(0)
    for _ in range(10):
        ensemble(batch)
    counts = [r.count("") for r in ran]
    assert counts[2] == 10
    assert 0 < counts[0] + counts[1] <= 10


def test_drop_is_drawn_from_torchs_random_state() -> None:
    models, batch = nets(), small.conv_batch()
    ensemble = kd.Ensemble(*models, drop=1)
    ensemble.attach(["out.logits"])
    torch.manual_seed(3)
    first = [ensemble(batch)["out.logits"] for _ in range(3)]
    state = torch.get_rng_state()
    later = [ensemble(batch)["out.logits"] for _ in range(5)]
    torch.manual_seed(3)
    assert all(torch.equal(ensemble(batch)["out.logits"], x) for x in first)
    torch.set_rng_state(state)
    assert all(torch.equal(ensemble(batch)["out.logits"], x) for x in later)


# ---- gates


class FixedGate(nn.Module):
    student_taps = ("batch.share",)

    def forward(self, share: Tensor) -> Tensor:
        return torch.stack([share, 1 - share], 1)


def test_a_gate_weighs_each_sample() -> None:
    models, batch = nets(2), small.conv_batch()
    a, b = logits_of(models, batch)
    share = torch.tensor([0.0, 0.25, 0.5, 1.0])
    run = kd.Run(batch, None, {"batch.share": share})
    found = supplied(kd.Ensemble(*models, gate=FixedGate()), "out.logits", "block", run=run)
    w = share.unsqueeze(1)
    torch.testing.assert_close(found["out.logits"], w * a + (1 - w) * b)
    maps = [m.features(batch["image"]) for m in models]
    w = share.reshape(4, 1, 1, 1)
    torch.testing.assert_close(found["block"], w * maps[0] + (1 - w) * maps[1])


def test_the_latent_gate_is_its_formula() -> None:
    gate = kd.LatentGate("block", 4, 3)
    maps = torch.randn(5, 4, 2, 2)
    weights = gate(maps)
    pooled = maps.amax((2, 3))
    scores = torch.stack([(pooled * theta) @ gate.vector for theta in gate.factors], 1)
    torch.testing.assert_close(weights, F.softmax(scores, 1))
    torch.testing.assert_close(gate(pooled), weights)
    with pytest.raises(ShapeError, match=r"tap 'block' has shape \(5, 3\), expected \(batch, 4, ...\)"):
        gate(torch.ones(5, 3))


def test_the_gate_is_trained_saved_and_left_out_of_the_student() -> None:
    models = nets(2)
    gate = kd.LatentGate("head:in", 4, 2)
    distiller = pair(kd.Ensemble(*models, gate=gate, combine="probabilities"), "out.logits")
    assert {"supplier.factors", "supplier.vector"} == {n for n, _ in distiller.named_parameters() if "supplier" in n}
    assert set(distiller.own_parameters()) == set(gate.parameters())
    distiller.prepare(small.conv_batch())
    distiller(**small.conv_batch())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gate.parameters())
    assert not any("supplier" in n for n in distiller.student.state_dict())


# ---- sentences


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (kd.Ensemble, TaskkdError, "`Ensemble` needs at least one member."),
        (lambda: kd.Ensemble("x"), TypeError, "member '0' is a str, not a module or a teacher"),
        (lambda: kd.Ensemble(student=nn.Identity()), TaskkdError, "'student' cannot name a member"),
        (lambda: kd.Ensemble(kd.SelfTeacher()), TaskkdError, "member '0' is a SelfTeacher, which learns or follows"),
        (lambda: kd.Ensemble(nn.Identity(), weights=[1, 2]), TaskkdError, "`weights` must be 1 numbers >= 0"),
        (lambda: kd.Ensemble(nn.Identity(), drop=1), TaskkdError, "`drop` must leave one of 1 members, got 1"),
        (lambda: kd.Ensemble(*nets(), weights=[1, 0, 0], drop=1), TaskkdError, "with drop=1 the weights"),
        (lambda: kd.Ensemble(*nets(), combine="median"), TaskkdError, "`combine` is 'mean' or 'probabilities'"),
        (lambda: kd.Ensemble(*nets(), temperature=0), TaskkdError, "`temperature` must be positive, got 0"),
        (lambda: kd.Ensemble(*nets(), gate=FixedGate(), weights=[1, 1, 1]), TaskkdError, "not both"),
        (lambda: supplied(kd.Ensemble(*nets()), "batch.id"), TapError, "reads the batch, of which there is no mean"),
        (lambda: supplied(kd.Ensemble(*nets()), "out"), TapError, "member '0' gives a mapping with the keys"),
        (lambda: supplied(kd.Ensemble(*nets()), "hed"), TapError, "the teacher has no module 'hed'"),
        (
            lambda: supplied(kd.Ensemble(small.ConvNet(4), small.ConvNet(8)), "block"),
            ShapeError,
            "members differ in shape, (4, 4, 6, 6) of '0' and (4, 8, 6, 6) of '1'; name one, as '1/block'",
        ),
        (
            lambda: supplied(
                kd.Ensemble(*nets(), gate=FixedGate()), "head", run=kd.Run({}, None, {"batch.share": torch.ones(4)})
            ),
            ShapeError,
            "the gate must give (batch, 3) weights, got (4, 2)",
        ),
    ],
)
def test_errors_are_sentences(make: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert sentence in str(caught.value)


def test_a_wrong_tap_leaves_no_hooks() -> None:
    models = nets(2)
    with pytest.raises(TapError):
        pair(kd.Ensemble(*models), "head", "1/hed")
    assert not any(m._forward_hooks for model in models for m in model.modules())


def test_columns_are_those_of_all_members() -> None:
    assert kd.Ensemble(small.ConvNet(4), small.bert()).columns() >= {"image", "input_ids", "teacher_image"}


def test_a_frozen_ensemble_runs_before_the_student_a_gated_one_after() -> None:
    assert not kd.Ensemble(*nets(2)).needs_run
    assert kd.Ensemble(*nets(2), gate=FixedGate()).needs_run
    assert kd.Ensemble(kd.Frozen(nets(1)[0], call=lambda m, b, r: m(b["image"]))).needs_run


def test_half_precision_is_mixed_in_single() -> None:
    models = [nn.Linear(2, 3).bfloat16() for _ in range(2)]
    ensemble = kd.Ensemble(*models)
    ensemble.attach(["out"])
    assert ensemble({"input": torch.ones(1, 2, dtype=torch.bfloat16)})["out"].dtype == torch.float32
