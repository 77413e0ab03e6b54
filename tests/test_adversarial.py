"""Adversarial terms: the game's formulas, who gets which gradient, state, resuming, and what goes wrong."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import taskkd as kd
from taskkd.checkpoints import load_state, save_state
from taskkd.errors import CheckpointError, NonFiniteError, ShapeError, TapError, TaskkdError
from taskkd.losses.adversarial import class_loss, discriminator_loss, generator_loss, gradient_penalty
from taskkd.schedules import Schedule
from tests import small
from tests.engine import Mlp, Points, StopAfter, cross_entropy, distance, logits_term, point_trainer, weights

GAMES = ["cross_entropy", "hinge", "least_squares", "wasserstein"]


# ---- the losses

S, T = torch.tensor([[-2.0], [0.5]]), torch.tensor([[0.25], [3.0]])
# by hand, of the scores above: (discriminator, generator)
BY_HAND = {
    "cross_entropy": (
        (math.log1p(math.exp(-0.25)) + math.log1p(math.exp(-3.0))) / 2
        + (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(0.5))) / 2,
        (math.log1p(math.exp(2.0)) + math.log1p(math.exp(-0.5))) / 2,
    ),
    "hinge": (0.75 / 2 + 1.5 / 2, 0.75),
    "least_squares": ((0.75**2 + 2.0**2) / 2 + (2.0**2 + 0.5**2) / 2, (3.0**2 + 0.5**2) / 2),
    "wasserstein": (-3.25 / 2 - 1.5 / 2, 0.75),
}


@pytest.mark.parametrize("game", GAMES)
def test_values_of_every_game(game: Any) -> None:
    assert discriminator_loss(S, T, game=game).item() == pytest.approx(BY_HAND[game][0], rel=1e-6)
    assert generator_loss(S, game=game).item() == pytest.approx(BY_HAND[game][1], rel=1e-6)


@pytest.mark.parametrize("game", GAMES)
def test_masked_scores_count_nothing_and_precision_is_full(game: Any) -> None:
    mask = torch.tensor([True, False])
    for broken in (torch.inf, torch.nan):
        s, t = S.clone(), T.clone()
        s[1], t[1] = broken, broken
        assert generator_loss(s, game=game, mask=mask) == generator_loss(S[:1], game=game)
        assert discriminator_loss(s, t, game=game, mask=mask) == discriminator_loss(S[:1], T[:1], game=game)
    s = S.clone().requires_grad_()
    nothing = generator_loss(s, game=game, mask=torch.zeros(2))
    nothing.backward()
    assert nothing == 0 and s.grad is not None and s.grad.abs().max() == 0
    far = torch.full((4,), 300.0, dtype=torch.float16)  # its square is infinite in half precision
    assert discriminator_loss(far, -far, game=game).dtype == torch.float32
    assert discriminator_loss(far, -far, game=game).isfinite() and generator_loss(-far, game=game).isfinite()
    assert generator_loss(S.double(), game=game).dtype == torch.float64


@pytest.mark.parametrize("game", GAMES)
def test_the_student_wins_by_raising_its_scores(game: Any) -> None:
    scores = torch.tensor([0.2, 0.6], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(generator_loss(scores, game=game), scores)
    assert (slope < 0).all()
    (slope,) = torch.autograd.grad(discriminator_loss(scores, -scores.detach(), game=game), scores)
    assert (slope >= 0).all() and slope.max() > 0
    if game != "hinge":
        assert torch.autograd.gradcheck(lambda x: generator_loss(x, game=game), scores)


def test_no_such_game() -> None:
    with pytest.raises(ValueError, match=r"`game` must be one of .* got 'hing' \(did you mean 'hinge'"):
        generator_loss(S, game="hing")  # type: ignore[arg-type]
    with pytest.raises(TaskkdError, match=r"term 'adv': `game` must be one of"):
        kd.Adversarial("adv", "out", discriminator=nn.Linear(3, 1), game="hing")  # type: ignore[arg-type]


def test_class_loss_leaves_ignored_samples_out() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, -100, 1])
    torch.testing.assert_close(class_loss(logits, labels), F.cross_entropy(logits[[0, 1, 3]], labels[[0, 1, 3]]))
    logits.requires_grad_()
    nothing = class_loss(logits, torch.full((4,), -100))
    nothing.backward()
    assert nothing == 0 and logits.grad is not None and logits.grad.abs().max() == 0
    with pytest.raises(ShapeError, match=r"logits \(batch, classes\) and labels \(batch,\), got \(4, 3\) and \(3,\)"):
        class_loss(logits, torch.zeros(3, dtype=torch.int64))


def test_gradient_penalty_against_the_gradient_written_out() -> None:
    """D(x) = v tanh(Wx + b) has the gradient W'(v (1 - tanh^2)): the penalty without a double backward."""
    torch.manual_seed(1)
    w, b, v = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (5,), (5,)))
    s, t = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    a = torch.rand(7, dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        return torch.tanh(x @ w.T + b) @ v

    def ours(*_: Tensor) -> Tensor:
        return gradient_penalty(score, s, t, position=a)

    x = a[:, None] * t + (1 - a[:, None]) * s
    slopes = (v * (1 - torch.tanh(x @ w.T + b).square())) @ w
    explicit = (slopes.square().sum(1).sqrt() - 1).square().mean()
    torch.testing.assert_close(ours(), explicit, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(explicit, [w, b, v])
    for got, want in zip(torch.autograd.grad(ours(), [w, b, v]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (w, b, v))


def test_gradient_penalty_draws_positions_from_torch_and_is_finite_on_the_flat() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    s, t = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    torch.manual_seed(3)
    drawn = gradient_penalty(net, s, t)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, gradient_penalty(net, s, t, position=torch.rand(5)))
    assert drawn != gradient_penalty(net, s, t)
    drawn.backward()
    assert s.grad is None  # of the parameters only
    weight = torch.zeros(3, requires_grad=True)
    flat = gradient_penalty(lambda x: x @ weight, s, t)
    flat.backward()
    assert flat == 1 and weight.grad is not None and weight.grad.isfinite().all()
    assert gradient_penalty(lambda x: x @ weight, s, t, target=0.0) == 0
    # of two tensors, the norm of the whole gradient: 3-4-5
    both = gradient_penalty(lambda x, y: 3 * x[:, 0] + 4 * y[:, 0], (s, s), (t, t))
    assert both.item() == pytest.approx(16.0, rel=1e-6)
    with pytest.raises(ShapeError, match="`gradient_penalty` needs student and teacher tensors of one shape"):
        gradient_penalty(net, s, t[:, :2])
    with pytest.raises(ShapeError, match="got 2 student and 1 teacher tensors"):
        gradient_penalty(net, (s, s), (t,))


# ---- who gets which gradient


def critic(x: Tensor, *conditions: Tensor) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def term(**options: Any) -> kd.Adversarial:
    options = {"discriminator": critic, "learning_rate": 1e-2, "weight": 0.5, **options}
    return kd.Adversarial("adv", options.pop("student", "out.logits"), **options)


def distiller(*terms: kd.Term, seed: int = 0, **options: Any) -> kd.Distiller:
    torch.manual_seed(seed)
    return kd.Distiller(small.ConvNet(4), small.ConvNet(6), terms or (term(),), **options)


def prepared(*terms: kd.Term, **options: Any) -> tuple[kd.Distiller, torch.optim.Optimizer]:
    pair = distiller(*terms, **options)
    pair.prepare(small.conv_batch())
    return pair, torch.optim.SGD(pair.parameters(), 0.05, momentum=0.9)


def adversary(pair: kd.Distiller) -> kd.Adversarial:
    found = pair.terms["adv"]
    assert isinstance(found, kd.Adversarial)
    return found


def judge_of(pair: kd.Distiller) -> dict[str, Tensor]:
    return weights(adversary(pair).discriminator)


def step(pair: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> dict[str, Tensor]:
    out = pair(**small.conv_batch(seed=seed))
    out["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    found = {**out, **pair.auxiliary_step()}
    pair.step()
    return found


def test_the_discriminator_is_outside_parameters_and_the_students_export(tmp_path: Any) -> None:
    pair, optimizer = prepared()
    own = {id(p) for p in adversary(pair).discriminator.parameters()}
    assert len(own) == 4
    assert not own & {id(p) for p in pair.parameters()}
    assert not own & {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(m is adversary(pair).discriminator for m in pair.modules())
    step(pair, optimizer)
    plain = small.ConvNet(4)
    plain.load_state_dict(pair.student.state_dict())  # strict
    assert [k for k in pair.state_dict() if not k.startswith("student.")] == ["_extra_state", "terms.adv._extra_state"]


def test_the_students_gradient_flows_through_the_discriminator_and_leaves_none_there() -> None:
    pair, _ = prepared(term(game="cross_entropy", weight=0.5))
    batch, before = small.conv_batch(), judge_of(pair)
    judge = copy.deepcopy(adversary(pair).discriminator)
    twin = copy.deepcopy(pair.student)
    pair(**batch)["loss"].backward()
    output = twin(batch["image"], batch["labels"])
    (output["loss"] + 0.5 * F.softplus(-judge(output["logits"])).mean()).backward()
    for ours, by_hand in zip(pair.student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, by_hand.grad)
    assert all(p.grad is None and not p.requires_grad for p in adversary(pair).discriminator.parameters())
    assert distance(judge_of(pair), before) == 0


@pytest.mark.parametrize("penalty", [0.0, 10.0])
@pytest.mark.parametrize("game", GAMES)
def test_the_discriminators_step_is_its_optimisers_on_the_detached_tensors(game: Any, penalty: float) -> None:
    pair, _ = prepared(term(game=game, penalty=penalty))
    batch = small.conv_batch()
    judge = copy.deepcopy(adversary(pair).discriminator).requires_grad_(True)
    adam = torch.optim.Adam(judge.parameters(), lr=1e-2, betas=(0.5, 0.999))
    for seed in range(3):
        out = pair(**batch)
        student = pair.student(batch["image"])["logits"].detach()
        assert pair.teacher is not None
        teacher = pair.teacher(batch)["out.logits"]
        out["loss"].backward()
        gradients = [p.grad.clone() for p in pair.student.parameters() if p.grad is not None]
        torch.manual_seed(seed)
        losses = pair.auxiliary_step()
        for p, g in zip(pair.student.parameters(), gradients, strict=True):
            assert torch.equal(p.grad, g)  # type: ignore[arg-type]
        torch.manual_seed(seed)
        real, fake = judge(teacher), judge(student)  # in this order: it is that of the gradients' sum
        loss = discriminator_loss(fake, real, game=game)
        if penalty:
            loss = loss + penalty * gradient_penalty(judge, student, teacher)
        loss.backward()
        adam.step()
        adam.zero_grad()
        pair.step()
        assert losses["adv_discriminator"] == loss.detach()
        assert distance(judge_of(pair), weights(judge)) == 0


def test_it_learns_to_tell_fixed_tensors_apart() -> None:
    pair, _ = prepared()
    batch, losses = small.conv_batch(16), []
    for _ in range(150):
        pair(**batch)
        losses.append(pair.auxiliary_step()["adv_discriminator"].item())
        pair.step()
    assert losses[0] > 1.5
    assert losses[-1] < 0.2
    student, teacher = pair.student(batch["image"])["logits"], pair.teacher(batch)["out.logits"]  # type: ignore[misc]
    judge = adversary(pair).discriminator
    assert judge(teacher).min() > judge(student).max()


def test_before_or_after_the_optimisers_step_is_the_same() -> None:
    found = []
    for early in (True, False):
        pair, optimizer = prepared()
        for seed in range(4):
            pair(**small.conv_batch(seed=seed))["loss"].backward()
            for turn in (pair.auxiliary_step, optimizer.step)[:: 1 if early else -1]:
                turn()
            optimizer.zero_grad()
            pair.step()
        found.append({**weights(pair.student), **judge_of(pair)})
    assert distance(*found) == 0


def test_with_accumulation_the_last_micro_batch_counts_and_once() -> None:
    pair, _ = prepared()
    other = copy.deepcopy(pair)
    for seed in (0, 1):
        pair(**small.conv_batch(seed=seed))["loss"].backward()
    other.student(small.conv_batch(seed=0)["image"])  # its batch norm has seen as much
    other(**small.conv_batch(seed=1))
    assert pair.auxiliary_step() == other.auxiliary_step() != {}
    assert distance(judge_of(pair), judge_of(other)) == 0
    assert pair.auxiliary_step() == {}  # nothing to step on
    assert distance(judge_of(pair), judge_of(other)) == 0


def test_steps_and_a_schedule_of_the_learning_rate() -> None:
    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=123.0)

    rate = Schedule(0.1, lambda p: float(p.step < 2))
    pair, optimizer = prepared(term(optimizer=sgd, learning_rate=rate, steps=3))
    one, single = prepared(term(optimizer=sgd, learning_rate=rate))
    moved = []
    for _ in range(3):
        before = judge_of(pair)
        step(pair, optimizer)
        step(one, single)
        moved.append(distance(before, judge_of(pair)))
    assert moved[0] > 0 and moved[1] > 0 and moved[2] == 0
    assert distance(judge_of(pair), judge_of(one)) > 0
    late, _ = prepared(term(learning_rate=kd.schedules.warmup(0.1, fraction=0.5)))
    with pytest.raises(TaskkdError, match=r"call `distiller\.set_total"):
        late(**small.conv_batch())


def test_a_term_of_weight_0_rests_with_its_discriminator() -> None:
    pair, optimizer = prepared(term(weight=Schedule(1.0, lambda p: float(p.step >= 1))))
    before = judge_of(pair)
    assert "adv_discriminator" not in step(pair, optimizer)
    assert distance(before, judge_of(pair)) == 0
    assert "adv_discriminator" in step(pair, optimizer)
    assert distance(before, judge_of(pair)) > 0


def test_forgetting_the_call_is_an_error_and_no_term_costs_nothing() -> None:
    pair, _ = prepared()
    pair(**small.conv_batch())
    with pytest.raises(TaskkdError, match=r"call `distiller.auxiliary_step\(\)` after the backward pass and before"):
        pair.step()
    with torch.no_grad():  # a look at the losses is no training
        pair.forward(**small.conv_batch())
    pair.auxiliary_step()
    pair.step()
    plain, optimizer = prepared(logits_term())
    assert step(plain, optimizer).keys() == {"loss", "task", "logits"}
    assert plain.auxiliary_step() == {}


# ---- what the discriminator sees


class Conditional(nn.Module):
    """The image (resized by the mean) beside the tensor, as Liu et al. 2019 do; keeps what it was called with."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.seen: list[list[Tensor]] = []
        self.score = nn.Linear(sum(self._flat(t).shape[1] for t in tensors), 1)

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.ndim == 4 else x

    def forward(self, *tensors: Tensor) -> Tensor:
        self.seen.append(list(tensors))
        out: Tensor = self.score(torch.cat([self._flat(t) for t in tensors], 1))
        return out


def test_conditions_adapters_and_several_taps() -> None:
    spec = term(
        student=["out.logits", "block"],
        discriminator=Conditional,
        condition="batch.image",
        adapter="conv1x1",
        penalty=1.0,
    )
    with pytest.raises(ShapeError, match=r"term 'adv', tap 'out\.logits'"):  # conv1x1 is for maps
        prepared(spec)
    pair, optimizer = prepared(
        term(student=["out.logits", "block"], discriminator=Conditional, condition="batch.image", penalty=1.0,
             adapter=lambda s, t: nn.Conv2d(s.shape[1], t.shape[1], 1) if s.ndim == 4 else nn.Identity())
    )  # fmt: skip
    judge = adversary(pair).discriminator
    assert isinstance(judge, Conditional)
    judge.seen.clear()
    batch = small.conv_batch()
    step(pair, optimizer)
    generator, teacher, student, between = judge.seen
    for call in judge.seen:
        assert [tuple(t.shape) for t in call] == [(4, 3), (4, 6, 6, 6), (4, 3, 6, 6)]
        assert torch.equal(call[2], batch["image"])
    assert all(t.requires_grad for t in generator[:2]) and not any(t.requires_grad for t in [*teacher, *student])
    assert torch.equal(generator[1], student[1]) and not torch.equal(generator[1], teacher[1])
    assert between[0].requires_grad
    adapters = list(pair.terms.parameters())
    assert len(adapters) == 2  # the adapter is the main optimiser's


def test_the_penalty_may_be_on_the_conditions_too_and_the_discriminators_loss_has_a_weight() -> None:
    found = []
    for options in ({}, {"penalise_conditions": True}, {"discriminator_weight": 0.25}):
        judge = Conditional(torch.zeros(1, 3), torch.zeros(1, 3, 6, 6))
        nn.init.constant_(judge.score.weight, 2.0)
        pair, _ = prepared(
            term(discriminator=judge, condition="batch.image", penalty=1.0, game="wasserstein", **options)
        )
        pair(**small.conv_batch())
        judge.seen.clear()
        found.append(pair.auxiliary_step()["adv_discriminator"])
        assert judge.seen[-1][1].requires_grad is ("penalise_conditions" in options)
    # of 3 numbers by 2 each, and of the image's mean over 36 pixels
    norms = [(3 * 4) ** 0.5, (3 * 4 + 3 * 36 * (2 / 36) ** 2) ** 0.5]
    wanted = (norms[1] - 1) ** 2 - (norms[0] - 1) ** 2
    assert (found[1] - found[0]).item() == pytest.approx(wanted, rel=1e-4)
    assert found[2].item() == pytest.approx(0.25 * found[0].item())


def test_each_side_may_have_a_mask_of_its_own() -> None:
    s, t, ones = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), torch.tensor([True, False])
    value = discriminator_loss(s, t, game="wasserstein", mask=ones, teacher_mask=~ones)
    assert value == 1.0 - 5.0
    assert discriminator_loss(s, t, game="wasserstein", mask=torch.zeros(2), teacher_mask=ones) == -3.0


class TwoHeads(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.body, self.score, self.classes = nn.Linear(x.shape[1], 16), nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.body(x))
        return self.score(hidden), self.classes(hidden)


def test_an_auxiliary_classifier_is_trained_by_both() -> None:
    pair, _ = prepared(term(discriminator=TwoHeads, labels="batch.labels", class_weight=0.25, game="cross_entropy"))
    batch, judge = small.conv_batch(), copy.deepcopy(adversary(pair).discriminator)
    out = pair(**batch)
    student, teacher = pair.student(batch["image"])["logits"].detach(), pair.teacher(batch)["out.logits"]  # type: ignore[misc]
    (real, real_classes), (fake, fake_classes) = judge(teacher), judge(student)
    by_hand = generator_loss(fake, game="cross_entropy") + 0.25 * F.cross_entropy(fake_classes, batch["labels"])
    torch.testing.assert_close(out["adv"], by_hand)
    classes = F.cross_entropy(real_classes, batch["labels"]) + F.cross_entropy(fake_classes, batch["labels"])
    by_hand = discriminator_loss(fake, real, game="cross_entropy") + 0.25 * classes
    torch.testing.assert_close(pair.auxiliary_step()["adv_discriminator"], by_hand)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"discriminator": TwoHeads}, TaskkdError, "must return a tensor of scores, it returned 2 items"),
        ({"labels": "batch.labels"}, TaskkdError, r"must return the pair \(scores, class log.*returned a Tensor"),
        ({"student": "block"}, ShapeError, "term 'adv', tap 'block': `Adversarial` needs student and teacher tensors"),
        ({"condition": "batch.names"}, TapError, "condition 'batch.names' is a list, not a tensor"),
        ({"discriminator": lambda x: nn.Flatten()}, TaskkdError, "no parameter of its Flatten requires a gradient"),
        ({"discriminator_weight": -1.0}, TaskkdError, "`discriminator_weight` must be at least 0, got -1.0"),
        ({"penalty": -1.0}, TaskkdError, "`penalty` must be at least 0, got -1.0"),
        ({"steps": 0}, TaskkdError, "`steps` must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_errors_are_sentences(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        distiller(term(**options)).prepare({**small.conv_batch(), "names": ["a"] * 4})


def test_names_and_what_is_not_built() -> None:
    with pytest.raises(TaskkdError, match="'adv_discriminator' names a term and the discriminator of another"):
        distiller(term(), kd.Match("adv_discriminator", kd.losses.mse, "out.logits"))
    with pytest.raises(TaskkdError, match=r"of 'adv' does not exist yet: call `distiller\.prepare"):
        distiller()(**small.conv_batch())
    with pytest.raises(TaskkdError, match="the discriminator of term 'adv' does not exist yet"):
        _ = term().discriminator
    ready, optimizer = distiller(term(discriminator=nn.Linear(3, 1))), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert "adv_discriminator" in step(ready, optimizer)  # a module needs no dry run


# ---- precision, preparation, copies, compilation


class Normed(nn.Module):
    """State that every forward changes: batch norm's averages and the vectors of spectral normalisation."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(x.shape[1]), nn.Dropout(0.2)
        self.score = spectral_norm(nn.Linear(x.shape[1], 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.score(self.drop(self.norm(x)))
        return out


def test_prepare_leaves_the_discriminator_as_it_was_built() -> None:
    torch.manual_seed(4)
    judge = Normed(torch.zeros(1, 3)).eval()
    before = weights(judge)
    pair, optimizer = prepared(term(discriminator=judge))
    assert distance(before, weights(judge)) == 0
    assert judge.training
    assert pair.auxiliary_step() == {}  # the dry run is nothing to learn from
    step(pair, optimizer)
    after = judge_of(pair)
    assert distance(before, after) > 0
    assert int(after["norm.num_batches_tracked"]) == 3  # the student's move, then both sides of its own
    pair.prepare(small.conv_batch())
    assert distance(after, judge_of(pair)) == 0
    judge.eval()  # somebody evaluates
    pair(**small.conv_batch())
    assert judge.training


def test_a_copy_has_a_discriminator_and_an_optimiser_of_its_own() -> None:
    pair, optimizer = prepared(term(discriminator=Normed))
    step(pair, optimizer)
    twin = copy.deepcopy(pair)
    assert distance(judge_of(pair), judge_of(twin)) == 0
    second = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9)
    second.load_state_dict(optimizer.state_dict())
    before = judge_of(pair)
    torch.manual_seed(9)
    step(twin, second, seed=1)
    assert distance(before, judge_of(pair)) == 0
    torch.manual_seed(9)
    step(pair, optimizer, seed=1)
    assert distance(judge_of(pair), judge_of(twin)) == 0


def test_half_precision_and_double() -> None:
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    pair, _ = prepared(term(discriminator=lambda x: Spy(3, 1), penalty=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        out = pair(**small.conv_batch())
        out["loss"].backward()
        pair.auxiliary_step()
    assert seen and set(seen) == {(torch.float32, False)}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.student.parameters())
    seen.clear()
    torch.manual_seed(0)
    exact = kd.Distiller(
        small.ConvNet(4).double(), small.ConvNet(6).double(), [term(discriminator=lambda x: Spy(3, 1))]
    )
    batch = small.conv_batch()
    batch["image"] = batch["image"].double()
    exact.prepare(batch)
    assert exact(**batch)["adv"].dtype == torch.float64
    assert exact.auxiliary_step()["adv_discriminator"].dtype == torch.float64
    assert {dtype for dtype, _ in seen} == {torch.float64}


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_whole_and_once_and_its_step_never() -> None:
    pair, optimizer = prepared(term(penalty=10.0, game="wasserstein"))
    eager, plain = copy.deepcopy(pair), torch.optim.SGD
    second = plain(eager.parameters(), 0.05, momentum=0.9)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pair, backend=counter, fullgraph=True)
    for seed in range(4):
        torch.manual_seed(seed)
        one = step(compiled, optimizer, seed)
        torch.manual_seed(seed)
        other = step(eager, second, seed)
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1  # the forward; neither a graph of the auxiliary step nor a second one
    assert distance(judge_of(pair), judge_of(eager)) < 1e-6


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_loop_runs_the_auxiliary_step_eagerly() -> None:
    pair, optimizer = prepared(term(penalty=10.0))
    compiled = torch.compile(lambda: step(pair, optimizer), backend="aot_eager")
    before = judge_of(pair)
    for _ in range(2):
        assert compiled()["adv_discriminator"].isfinite()  # aot refuses the double backward of a compiled penalty
    assert distance(before, judge_of(pair)) > 0


# ---- finiteness


class Breaks(nn.Linear):
    """Finite for the student's move, NaN in its own (where the teacher's turn comes second) from the third step on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (torch.nan if self.calls == self.broken_call else 1.0)

    broken_call = -1


def breaking(on_nonfinite: Any) -> tuple[kd.Distiller, torch.optim.Optimizer, Breaks]:
    judge = Breaks(3, 1)
    pair, optimizer = prepared(term(discriminator=judge), on_nonfinite=on_nonfinite)
    judge.calls, judge.broken_call = 0, 5  # student's move, teacher, student; student's move, teacher
    return pair, optimizer, judge


def test_a_nan_of_the_discriminator_is_named_at_the_next_look_and_its_weights_stay_finite() -> None:
    pair, optimizer, judge = breaking("raise")
    step(pair, optimizer)
    assert step(pair, optimizer)["adv_discriminator"].isnan()
    assert all(p.isfinite().all() for p in judge.parameters())
    student = weights(pair.student)
    with pytest.raises(NonFiniteError, match=r"'adv_discriminator' \(of the auxiliary step before\) is nan at step 2"):
        pair(**small.conv_batch())
    assert {n for n, p in pair.student.named_parameters() if not torch.equal(p, student[n])} == set()


def test_a_step_that_is_left_out_is_so_for_the_discriminator() -> None:
    pair, optimizer, _ = breaking("skip")
    taken, moved = [], []
    for _ in range(4):
        before = judge_of(pair)
        pair(**small.conv_batch())["loss"].backward()
        taken.append(pair.check_finite())
        if taken[-1]:
            optimizer.step()
        optimizer.zero_grad()
        pair.auxiliary_step()
        pair.step()
        moved.append(distance(before, judge_of(pair)) > 0)
    assert taken == [True, True, False, True]
    assert moved == [True, True, False, True]  # the second by Adam's momentum alone


# ---- checkpoints


def twenty(halfway: bool) -> dict[str, Tensor]:
    """Twenty steps by hand; `halfway` saves state dicts after ten and goes on in new objects."""

    def build() -> tuple[kd.Distiller, torch.optim.Optimizer]:
        spec = term(discriminator=Normed, penalty=10.0, learning_rate=kd.schedules.warmup(1e-2, fraction=0.8))
        pair, optimizer = prepared(spec, seed=5)
        pair.set_total(20)
        return pair, optimizer

    pair, optimizer = build()
    torch.manual_seed(8)
    for seed in range(20):
        if seed == 10 and halfway:
            state = copy.deepcopy((pair.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
            assert all(isinstance(v, Tensor) for v in state[0].values())
            pair, optimizer = build()
            pair.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            torch.set_rng_state(state[2])
        step(pair, optimizer, seed)
    return weights(pair)


def test_resuming_by_hand_is_bit_exact() -> None:
    whole, resumed = twenty(False), twenty(True)
    assert len(whole["terms.adv._extra_state"]) > 0
    assert distance(whole, resumed) == 0


def resumable(folder: Any, *callbacks: Any, **options: Any) -> kd.Trainer:
    terms = [
        logits_term(tap="out"),
        kd.Adversarial("adv", "body", adapter="linear", discriminator=Normed, penalty=10.0, learning_rate=1e-2),
    ]
    options = {"num_train_epochs": 4, "gradient_accumulation_steps": 1, **options}
    student = Mlp(8, 0, dropout=0.2)
    return point_trainer(
        folder, train=Points(20), student=student, terms=terms, callbacks=list(callbacks), logging_strategy="steps",
        logging_steps=5, **options,
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_resumes_bit_exactly_at_step_10_of_20(tmp_path: Any, accumulate: int) -> None:
    options = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 4 * accumulate}
    whole = resumable(tmp_path / "whole", **options)
    whole.train()
    resumable(tmp_path / "again", StopAfter(10), **options).train()
    again = resumable(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=True)
    # five batches are three steps at an accumulation of two, the last of them short
    assert whole.state.global_step == again.state.global_step == (20 if accumulate == 1 else 24)
    assert distance(weights(whole.distiller), weights(again.distiller)) == 0
    assert len(weights(whole.distiller)["terms.adv._extra_state"]) > 0
    logs = [log for log in whole.state.log_history if "loss" in log]
    assert all(log["loss_adv_discriminator"] > 0 and "loss_adv" in log for log in logs)
    assert logs[1:] and logs[-1].keys() == [log for log in again.state.log_history if "loss" in log][-1].keys()
    files = {p.name for p in (tmp_path / "again" / "checkpoint-10").rglob("*")}
    assert "taskkd_state.safetensors" in files
    found = again.state.log_history
    for one, other in zip(logs[-2:], [log for log in found if "loss" in log][-2:], strict=True):
        assert one["loss_adv_discriminator"] == other["loss_adv_discriminator"]


def test_a_state_of_another_discriminator_is_refused(tmp_path: Any) -> None:
    pair, optimizer = prepared()
    step(pair, optimizer)
    save_state(pair, tmp_path / "state.safetensors")
    fresh, _ = prepared(seed=1)  # its optimiser has made no step: its state is smaller
    load_state(fresh, tmp_path / "state.safetensors")
    assert distance(judge_of(pair), judge_of(fresh)) == 0
    other, _ = prepared(term(discriminator=Normed))
    with pytest.raises(CheckpointError, match=r"term 'adv': this state is not of its auxiliary network: .*norm"):
        load_state(other, tmp_path / "state.safetensors")
    with pytest.raises(TaskkdError, match="the discriminator of term 'adv' does not exist yet"):
        distiller().load_state_dict(pair.state_dict())
    with pytest.raises(CheckpointError, match="belongs to other terms"):
        load_state(prepared(logits_term())[0], tmp_path / "state.safetensors")
    state = pair.state_dict()
    state["terms.adv._extra_state"] = state["terms.adv._extra_state"][:-9]
    with pytest.raises(CheckpointError, match="term 'adv': this state is not of its auxiliary network"):
        pair.load_state_dict(state)


def test_the_trainer_stops_at_a_nan_of_the_discriminator(tmp_path: Any) -> None:
    judge = Breaks(3, 1)
    adv = kd.Adversarial("adv", "out", discriminator=judge, weight=0.1)
    trainer = point_trainer(tmp_path, terms=[adv], task_loss=cross_entropy, train=Points(12))
    trainer.prepare()
    judge.calls, judge.broken_call = 0, 8  # in the last of three steps: nobody looks after it but the end
    with pytest.raises(NonFiniteError, match="'adv_discriminator'"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert all(p.isfinite().all() for p in judge.parameters())


def test_a_discriminator_of_another_size() -> None:
    student, teacher = small.ConvNet(), small.ConvNet()
    term = kd.Adversarial("game", "out.logits", discriminator=nn.Linear(4, 1))
    with pytest.raises(ShapeError, match=r"term 'game': its discriminator does not take \(4, 3\)"):
        kd.Distiller(student, teacher, [term]).prepare(small.conv_batch())
