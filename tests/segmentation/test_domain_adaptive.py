"""Domain-adaptive distillation: each domain's share, what is missing counts 0, and that it helps on a toy."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses
from taskkd.errors import RecipeError, TaskkdError
from taskkd.segmentation.methods import METHODS
from taskkd.segmentation.methods.domain_adaptive import DomainAdversarial, DomainTerm, log_probability_mse
from taskkd.terms import Run
from tests.engine import weights
from tests.segmentation.domains import CLASSES, Net, Pictures, batch, picture, task_loss

KL = partial(losses.kl_divergence, dim=1)
GAMES = ("adversarial", "adversarial-aux")


def terms_of(student: Any, teacher: Any, **options: Any) -> dict[str, kd.Term]:
    found = METHODS["domain_adaptive"](student, teacher, **{"width": 4, **options}).stages[0].terms
    return {t.name: t for t in found}


def prepared(**options: Any) -> kd.Distiller:
    student, teacher = Net(), Net(8, seed=1)
    torch.manual_seed(0)
    pair = kd.Distiller(student, teacher, terms_of(student, teacher, **options).values(), task_loss=task_loss)
    pair.prepare(batch())
    pair.set_total(50)
    return pair


def test_terms_and_weights_are_the_published_ones() -> None:
    found = {n: t.schedule.value for n, t in terms_of(Net(), Net()).items()}
    assert found == pytest.approx(
        {
            "pseudo-labels": 1.0,
            "kl": 0.1 / CLASSES,
            "kl-aux": 0.01 / CLASSES,
            "log-probabilities-aux": 0.01,
            "adversarial": 1e-3,
            "adversarial-aux": 2e-4,
        }
    )
    assert terms_of(Net(), Net(aux=False)).keys() == {"pseudo-labels", "kl", *GAMES}
    assert terms_of(Net(aux=False), Net()).keys() == {"pseudo-labels", "kl", "adversarial"}
    assert terms_of(Net(), Net(), kl_weight=0.0, mse_weight=0.0).keys() == {"pseudo-labels", *GAMES}
    with pytest.raises(RecipeError, match="the student has 3 classes, the teacher 4"):
        terms_of(Net(), Net(classes=4))


def test_pseudo_labels_below_the_threshold_are_left_out_of_the_mean_of_their_own_domain() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, CLASSES, 4, 4), 3 * torch.randn(2, CLASSES, 4, 4)
    t[1, :, 1:] = 0  # of the target domain little is sure
    pseudo = partial(losses.pseudo_label_cross_entropy, dim=1, threshold=0.7)
    found = DomainTerm("pseudo", pseudo, "x", "x")(
        Run({"unlabelled": torch.tensor([False, True])}, None, {"x": s}, {"x": t})
    )
    assert found.item() == pytest.approx((pseudo(s[:1], t[:1]) + pseudo(s[1:], t[1:])).item())


def test_a_domain_term_is_the_sum_of_the_means_of_both_domains() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(5, 3, 8, 6).double(), torch.randn(5, 3, 8, 6).double()
    target = torch.tensor([True, False, True, True, False])
    valid = torch.ones(5, 8, 6, dtype=torch.bool)
    valid[0, 4:], valid[4, :, :3] = False, False

    def value(ignore: Any = "padding", **data: Tensor) -> Tensor:
        term = DomainTerm("kl", KL, "x", "x", target=0.3, ignore=ignore)
        return term(Run({"unlabelled": target, **data}, None, {"x": s}, {"x": t}))

    by_hand = KL(s[~target], t[~target]) + 0.3 * KL(s[target], t[target])
    torch.testing.assert_close(value(), by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(value("none", valid=valid), by_hand, rtol=1e-12, atol=0)
    source, other = (KL(s[d], t[d], mask=valid[d]) for d in (~target, target))
    torch.testing.assert_close(value(valid=valid), source + 0.3 * other, rtol=1e-12, atol=0)
    empty = value(valid=torch.zeros_like(valid))
    assert empty == 0


@pytest.mark.parametrize("targets", ["none", "all", "mixed"])
def test_a_domain_that_is_missing_counts_exactly_0(targets: str) -> None:
    pair, data = prepared(), batch(targets=targets, size=(52, 39))
    out = pair(**data)
    out["loss"].backward()
    assert all(v.isfinite() for v in out.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.student.parameters())
    judged = pair.auxiliary_step()
    for game in GAMES:
        assert (out[game] == 0) == (targets == "none")
        assert judged[f"{game}_discriminator"].isfinite() and judged[f"{game}_discriminator"] > 0
    assert (out["task"] == 0) == (targets == "all")
    alone = prepared()
    if targets == "all":
        for name in ("kl", "kl-aux", "pseudo-labels", "log-probabilities-aux"):
            run = alone._run(data)
            factor = alone.terms[name]
            factor.target = 0.0  # type: ignore[assignment]
            assert factor(run) == 0


def test_only_the_target_misleads_and_without_target_distill_only_the_source_is_taught() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 8, 8, requires_grad=True)
    data = batch(size=(32, 32))
    target = data["unlabelled"]
    run = Run(data, None, {"head": logits}, {"head": torch.randn(4, 3, 8, 8)})
    terms = terms_of(Net(), Net(), target_distill=0.0)
    game = terms["adversarial"]
    game.build(run)
    for name, moved in (("adversarial", target), ("kl", ~target), ("pseudo-labels", ~target)):
        (slope,) = torch.autograd.grad(terms[name](run), logits)
        assert torch.equal(slope.abs().sum((1, 2, 3)) > 0, moved)
    assert isinstance(game, DomainAdversarial)
    seen: list[tuple[int, ...]] = []
    game.discriminator.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    loss = game.auxiliary_step(kd.schedules.Progress(0, 10))
    assert seen == [(4, 3, 32, 32)]  # at the images' size, both domains in one call
    assert loss is not None and loss > 0


def test_the_judge_learns_to_tell_the_domains_and_the_loss_is_that_of_both() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 8, 8)
    logits[1::2, 0] += 4
    data = batch(size=(32, 32))
    run = Run(data, None, {"head": logits.requires_grad_()}, {})
    game = terms_of(Net(), Net(), learning_rate=3e-3)["adversarial"]
    assert isinstance(game, DomainAdversarial)
    game.build(run)
    losses_ = []
    for step in range(30):
        game(run)
        losses_.append(game.auxiliary_step(kd.schedules.Progress(step, 100)))
    scores = game._judge(game._sides(run)[0], ())[0].mean((1, 2, 3))
    assert scores[0::2].min() > scores[1::2].max()  # the source's are high
    assert losses_[0].item() == pytest.approx(0.693, abs=0.1)  # half of both sides' log 2
    assert losses_[-1] < 0.2


def test_a_batch_that_does_not_say_which_is_told_so() -> None:
    pair, data = prepared(), batch()
    del data["unlabelled"]
    with pytest.raises(
        TaskkdError, match=r"term 'pseudo-labels' needs `unlabelled` \(batch,\).*has images, labels, id"
    ):
        pair(**data)
    game = DomainAdversarial("g", "x", discriminator=lambda x: torch.nn.Conv2d(3, 1, 1))
    with pytest.raises(TaskkdError, match=r"term 'g': the batch has no tensor `images`; size='logits' needs none"):
        game._sides(Run({}, None, {"x": torch.zeros(1, 3, 2, 2)}, {}))


def test_mean_squared_log_probabilities() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 2, 3, 4, 5).unbind()
    by_hand = F.mse_loss(s.log_softmax(1), t.log_softmax(1))
    torch.testing.assert_close(log_probability_mse(s, t), by_hand)
    torch.testing.assert_close(log_probability_mse(s + 7, t), by_hand)  # of probabilities: a shift is nothing
    mask = torch.tensor([True, False])
    torch.testing.assert_close(log_probability_mse(s, t, mask=mask), log_probability_mse(s[:1], t[:1]))


# ---- on a toy


def steps(pair: kd.Distiller, count: int, samples: Pictures, rate: float = 0.02) -> list[dict[str, float]]:
    optimizer = torch.optim.Adam(pair.parameters(), rate)
    generator, logged = torch.Generator().manual_seed(0), []
    for _ in range(count):
        chosen = [samples[int(i)] for i in torch.randint(len(samples), (4,), generator=generator)]
        chosen[0], chosen[1] = samples[0], samples[1]  # of each domain one
        data = {k: torch.stack([s[k] for s in chosen]) for k in ("images", "labels", "unlabelled")}
        out = pair(**data)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        logged.append({k: v.item() for k, v in {**out, **pair.auxiliary_step()}.items()})
        pair.step()
    return logged


def test_fifty_steps_of_everything() -> None:
    """KL not 0 and finite, the judges move (A11); the student learns the teacher's answers on the target."""
    pair = prepared(learning_rate=2e-3)
    judge = pair.terms["adversarial"]
    assert isinstance(judge, DomainAdversarial)
    before = weights(judge.discriminator)
    logged = steps(pair, 50, Pictures(8))
    assert all(0 < log["kl"] < 10 and 0 < log["kl-aux"] < 10 for log in logged)
    assert any(not torch.equal(v, before[n]) for n, v in weights(judge.discriminator).items())
    values = [log["adversarial_discriminator"] for log in logged]
    assert max(values) - min(values) > 0.01
    first, last = (sum(log["pseudo-labels"] for log in part) for part in (logged[:5], logged[-5:]))
    assert last < 0.7 * first


def mean_iou(net: Net, count: int = 20) -> float:
    """Of the target domain."""
    samples = [picture(1000 + i, (48, 48), target=True) for i in range(count)]
    net.eval()
    with torch.no_grad():
        logits = F.interpolate(net(torch.stack([s["images"] for s in samples]))["logits"], (48, 48), mode="bilinear")
    truth, found = torch.stack([s["truth"] for s in samples]), logits.argmax(1)
    shares = [((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum() for c in range(CLASSES)]
    return float(torch.stack(shares).mean())


@pytest.mark.slow
def test_the_target_is_learnt_better_than_from_the_source_alone() -> None:
    """A teacher that was adapted to the target, a student that sees labels of the source alone (A11)."""
    samples = Pictures(48, (48, 48))
    teacher = Net(16, seed=9)
    adapted = kd.Distiller(teacher, None, task_loss=task_loss)
    known = Pictures(48, (48, 48))
    for sample in known.samples:
        sample["labels"] = sample["truth"]
    steps(adapted, 300, known)
    results = {}
    for name in ("source", "domain_adaptive"):
        found = []
        for seed in range(2):
            student = Net(6, seed=seed)
            chosen = terms_of(student, teacher).values() if name == "domain_adaptive" else ()
            torch.manual_seed(seed)
            pair = kd.Distiller(student, teacher, chosen, task_loss=task_loss)
            pair.prepare(batch(size=(48, 48)))
            pair.set_total(200)
            steps(pair, 200, samples)
            found.append(mean_iou(student))
        results[name] = found
    print(mean_iou(teacher), results)
    assert mean_iou(teacher) > 0.6
    assert min(results["domain_adaptive"]) > max(results["source"]) + 0.1
