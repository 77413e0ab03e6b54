"""Cohorts: networks that learn with the student, whose gradient goes where, what is saved, and teachers by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses
from taskkd.errors import ShapeError, TapError, TaskkdError
from tests import small
from tests.test_suppliers import moved
from tests.test_teachers import same_state, state_of

LOGITS = "out.logits"


def nets(count: int, seed: int = 3) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [small.ConvNet(4) for _ in range(count)]


def kl(name: str, student: str, teacher: str, **options: Any) -> kd.Match:
    return kd.Match(name, losses.kl_divergence, student, teacher, **options)


def outputs(models: list[nn.Module], batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits in train mode, statistics left as they were."""
    found = []
    for model in copy.deepcopy(models):
        model.train()
        with torch.no_grad():
            found.append(model(batch["image"])["logits"])
    return found


def ready(cohort: Any, terms: list[kd.Term], **options: Any) -> kd.Distiller:
    distiller = kd.Distiller(nets(1, 9)[0], cohort, terms, **options)
    distiller.prepare(small.conv_batch())
    return distiller.train()


def steps(distiller: kd.Distiller, numbers: range, optimiser: torch.optim.Optimizer) -> None:
    for step in numbers:
        distiller(**small.conv_batch(seed=step))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        distiller.step()


def test_mutual_learning_is_the_formula_of_its_authors() -> None:
    """Zhang Y. 2018: each network's loss is its cross entropy and the mean of KL(other || own) over the others."""
    peers = nets(2)
    distiller = ready(kd.Cohort(*peers), kd.mutual(["student", "peer1", "peer2"], losses.kl_divergence, LOGITS))
    batch = small.conv_batch()
    z = [x.clone().requires_grad_() for x in outputs([distiller.student, *peers], batch)]
    total = torch.zeros(())
    for a in range(3):
        total = total + F.cross_entropy(z[a], batch["labels"])
        for b in range(3):
            if a != b:
                p = z[b].detach().softmax(1)
                total = total + (p * (p.log() - z[a].log_softmax(1))).sum() / len(p) / 2
    found = distiller(**batch)
    torch.testing.assert_close(found["loss"], total)
    assert len(found) == 2 + 6
    found["loss"].backward()
    total.backward()
    for model, x in zip([distiller.student, *peers], z, strict=True):
        torch.testing.assert_close(model.head.bias.grad, x.grad.sum(0))


def test_nobody_is_moved_by_whom_it_teaches() -> None:
    (peer,) = nets(1)
    for detach in (True, False):
        peer.zero_grad()
        distiller = ready(kd.Cohort(peer, detach=detach), [kl("t", LOGITS, f"peer1/{LOGITS}")], task_weight=0.0)
        distiller(**small.conv_batch())["loss"].backward()
        assert moved(distiller.student)
        assert moved(peer) is not detach
        distiller.close()


def test_a_term_trains_the_member_that_it_names() -> None:
    (peer,) = nets(1)
    distiller = ready(kd.Cohort(peer), [kl("t", f"peer1/{LOGITS}", f"student/{LOGITS}")], task_weight=0.0)
    distiller(**small.conv_batch())["loss"].backward()
    assert moved(peer)
    assert not moved(distiller.student)


def test_the_task_is_the_sum_over_all_networks() -> None:
    peers = nets(2)
    batch = small.conv_batch()
    distiller = ready(kd.Cohort(*peers), [kl("t", LOGITS, LOGITS)])
    expected = sum(F.cross_entropy(z, batch["labels"]) for z in outputs([distiller.student, *peers], batch))
    torch.testing.assert_close(distiller(**batch)["task"], expected)

    def doubled(output: Any, batch: Any) -> Tensor:
        return 2 * output["loss"]

    other = ready(kd.Cohort(*nets(2)), [kl("t", LOGITS, LOGITS)], task_loss=doubled)
    torch.testing.assert_close(other(**batch)["task"], 2 * expected)


def test_a_tap_without_a_name_is_the_mean_of_the_networks() -> None:
    peers, batch = nets(2), small.conv_batch()
    distiller = ready(kd.Cohort(*peers, big=kd.Frozen(small.ConvNet(4))), [kd.Match("t", losses.mse, LOGITS)])
    own, a, b = outputs([distiller.student, *peers], batch)
    torch.testing.assert_close(distiller(**batch)["t"], losses.mse(own, (a + b) / 2))


def test_peers_are_trained_while_no_term_is_active() -> None:
    (peer,) = nets(1)
    late = kd.schedules.Schedule(1.0, lambda p: float(p.step >= 1))
    distiller = ready(kd.Cohort(peer), [kl("t", LOGITS, LOGITS, weight=late)])
    distiller(**small.conv_batch())["loss"].backward()
    assert moved(peer)


def test_the_student_alone_is_evaluated_and_exported() -> None:
    (peer,) = nets(1)
    distiller = ready(kd.Cohort(peer), [kl("t", LOGITS, LOGITS)])
    batch = small.conv_batch()
    distiller.eval()
    assert not peer.training
    assert torch.equal(distiller(**batch)["logits"], distiller.student(batch["image"])["logits"])
    assert not any("peer" in k for k in distiller.student.state_dict())
    assert {f"supplier.peer1.{k}" for k in peer.state_dict()} <= set(distiller.state_dict())
    assert {id(p) for p in peer.parameters()} <= {id(p) for p in distiller.own_parameters()}
    distiller.close()
    assert not any(m._forward_hooks for model in (peer, distiller.student) for m in model.modules())


def test_prepare_changes_nothing() -> None:
    cohort = kd.Cohort(*nets(2), mean=kd.EMA(nets(1)[0]))
    distiller = kd.Distiller(nets(1, 9)[0], cohort, [kl("t", LOGITS, LOGITS), kl("m", LOGITS, f"mean/{LOGITS}")])
    before, random = state_of(distiller), torch.get_rng_state()
    distiller.prepare(small.conv_batch())
    assert same_state(distiller, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_prepare_sees_the_gradient_of_a_term_that_trains_a_peer() -> None:
    terms = [kl("there", LOGITS, LOGITS), kl("back", f"peer1/{LOGITS}", f"student/{LOGITS}")]
    distiller = kd.Distiller(nets(1, 9)[0], kd.Cohort(*nets(1)), terms)
    report = {t.name: t for t in distiller.prepare(small.conv_batch()).terms}
    assert report["there"].gradient_norm > 0
    assert report["back"].gradient_norm > 0


def test_a_tapped_peer_that_overwrites_in_place() -> None:
    """`norm` of the small network is overwritten by the ReLU behind it; `prepare` finds that for peers, too."""
    (peer,) = nets(1)
    distiller = kd.Distiller(nets(1, 9)[0], kd.Cohort(peer), [kd.Match("t", losses.mse, "norm", "peer1/norm")])
    distiller.prepare(small.conv_batch())
    distiller(**small.conv_batch())


# ---- members that are teachers


def test_members_of_all_kinds_by_name() -> None:
    scratch, expert = nets(2)
    before, batch = state_of(expert), small.conv_batch()
    terms = [
        kl("steps", LOGITS, f"scratch/{LOGITS}"),
        kd.Match("maps", losses.attention_transfer, "block", "expert/block"),
    ]
    distiller = ready(kd.Cohort(scratch=scratch, expert=kd.Frozen(expert)), terms)
    assert expert not in list(distiller.modules())
    assert scratch in list(distiller.modules())
    steps(distiller, range(3), torch.optim.SGD(distiller.parameters(), 0.1))
    assert same_state(expert, before)
    assert not expert.training
    with torch.no_grad():
        maps = expert(batch["image"])
    assert maps["logits"].shape == (4, 3)


def test_targets_read_members_before_them() -> None:
    big, batch = nets(1)[0], small.conv_batch()
    shift = kd.Targets(losses.targets.probability_shift, f"big/{LOGITS}", "batch.labels")
    distiller = ready(kd.Cohort(big=kd.Frozen(big), target=shift), [kd.Match("t", losses.mse, LOGITS, "target/out")])
    with torch.no_grad():
        expected = losses.targets.probability_shift(big(batch["image"])["logits"], batch["labels"])
    (own,) = outputs([distiller.student], batch)
    torch.testing.assert_close(distiller(**batch)["t"], losses.mse(own, expected))
    with pytest.raises(TapError, match=r"tap 'big/out.logits': 'target' can read members before it"):
        ready(kd.Cohort(target=shift, big=kd.Frozen(big)), [kd.Match("t", losses.mse, LOGITS, "target/out")])


def test_a_snapshot_in_a_cohort_is_inactive_in_its_first_cycle() -> None:
    (student,) = nets(1, 9)
    cohort = kd.Cohort(nets(1)[0], old=kd.Snapshot(student, period=2))
    terms = [kl("peer", LOGITS, f"peer1/{LOGITS}"), kl("old", LOGITS, f"old/{LOGITS}")]
    distiller = kd.Distiller(student, cohort, terms)
    optimiser = torch.optim.SGD(distiller.parameters(), 0.1)
    assert distiller.weights() == {"task": 1.0, "peer": 1.0, "old": 0.0}
    steps(distiller, range(2), optimiser)
    assert distiller.weights()["old"] == 1.0
    assert same_state(cohort.teachers["old"].model, state_of(student))


# ---- OKDDip


def group(peers: list[nn.Module]) -> tuple[kd.Cohort, list[kd.Term]]:
    torch.manual_seed(4)
    names = [f"peer{i + 1}" for i in range(len(peers))]
    taps = [f"{p}/{t}" for t in (LOGITS, "head:in") for p in names]
    cohort = kd.Cohort(*peers, group=kd.Targets(kd.PeerAttention(4, 2), *taps, detach=False))
    terms = [kl(p, f"{p}/{LOGITS}", f"group/out[:, {i}]", temperature=3.0) for i, p in enumerate(names)]
    return cohort, [*terms, kl("leader", LOGITS, LOGITS, temperature=3.0)]


def test_peers_and_leader_by_the_formula() -> None:
    """Chen D. 2020: targets softmax(q k') z of the peers, not divided by a root, and for the leader their mean."""
    peers, batch = nets(3), small.conv_batch()
    cohort, terms = group(peers)
    distiller = ready(cohort, terms)
    attention = cohort.teachers["group"].function
    features, z = [], []
    for model in copy.deepcopy(peers):
        model.head.register_forward_pre_hook(lambda m, a: features.append(a[0].detach()))
        z.append(model.train()(batch["image"])["logits"].detach())
    f = torch.stack(features, 1)
    share = (attention.query(f) @ attention.key(f).transpose(1, 2)).softmax(2)
    expected = share @ torch.stack(z, 1)
    found = distiller(**batch)
    for i in range(3):
        loss = losses.kl_divergence(z[i], expected[:, i], temperature=3.0)
        torch.testing.assert_close(found[f"peer{i + 1}"], loss.detach())
    (own,) = outputs([distiller.student], batch)
    torch.testing.assert_close(found["leader"], losses.kl_divergence(own, sum(z) / 3, temperature=3.0))
    found["loss"].backward()
    assert moved(attention)


def test_the_leader_teaches_nobody() -> None:
    peers = nets(3)
    cohort, terms = group(peers)
    distiller = ready(cohort, terms[-1:], task_weight=0.0)
    distiller(**small.conv_batch())["loss"].backward()
    assert moved(distiller.student)
    assert not any(moved(p) for p in peers)


def test_peer_attention_says_what_it_needs() -> None:
    with pytest.raises(ShapeError, match=r"needs logits, then features \(batch, 4\), of each peer, got"):
        kd.PeerAttention(4, 2)(torch.ones(2, 3), torch.ones(2, 5))


# ---- state


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_bit_equal(stop: int) -> None:
    def fresh(seed: int) -> tuple[kd.Distiller, torch.optim.Optimizer]:
        cohort, terms = group(nets(2, seed))
        distiller = kd.Distiller(nets(1, seed + 1)[0], cohort, terms)
        distiller.prepare(small.conv_batch())
        distiller.train()
        return distiller, torch.optim.AdamW(distiller.parameters(), 0.01)

    whole, optimiser = fresh(0)
    steps(whole, range(stop), optimiser)
    saved = copy.deepcopy((whole.state_dict(), optimiser.state_dict()))
    steps(whole, range(stop, 6), optimiser)
    resumed, other = fresh(10)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    steps(resumed, range(stop, 6), other)
    assert same_state(resumed, state_of(whole))


def test_a_deep_copy_is_independent() -> None:
    cohort, terms = group(nets(2))
    distiller = ready(cohort, terms)
    other = copy.deepcopy(distiller)
    assert other.teacher.networks["peer1"] is other.supplier["peer1"]
    assert other.teacher.networks["peer1"] is not cohort.networks["peer1"]
    before = state_of(distiller)
    assert other(**small.conv_batch())["loss"].item() == distiller(**small.conv_batch())["loss"].item()
    distiller.load_state_dict(before)
    steps(other, range(3), torch.optim.SGD(other.parameters(), 0.1))
    assert same_state(distiller, before)


# ---- sentences


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (kd.Cohort, TaskkdError, "`Cohort` needs at least one member."),
        (lambda: kd.Cohort(keys=nn.Identity()), TaskkdError, "`Cohort`: 'keys' cannot name a member."),
        (
            lambda: ready(kd.Cohort(*nets(1)), [kl("t", LOGITS, "peer2/out.logits")]),
            TapError,
            "tap 'peer2/out.logits': there is no member 'peer2' (did you mean 'peer1'",
        ),
        (
            lambda: ready(kd.Cohort(*nets(1)), [kl("t", "pear1/out.logits", LOGITS)]),
            TapError,
            "there is no member 'pear1' (did you mean 'peer1'",
        ),
        (
            lambda: ready(kd.Cohort(*nets(1)), [kl("t", LOGITS, "peer1/hed")]),
            TapError,
            "the network 'peer1' has no module 'hed' (did you mean 'head'",
        ),
        (
            lambda: ready(kd.Cohort(big=kd.Frozen(nets(1)[0])), [kl("t", LOGITS, LOGITS)]),
            TapError,
            "name the member, as 'big/out.logits'",
        ),
        (
            lambda: ready(kd.Cohort(small.ConvNet(4), small.ConvNet(6)), [kd.Match("t", losses.mse, "block")]),
            ShapeError,
            "there is no mean over peer1/block, peer2/block: they are not tensors of one shape.",
        ),
    ],
)
def test_errors_are_sentences(make: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert sentence in str(caught.value)


def test_a_wrong_tap_leaves_no_hooks() -> None:
    models = nets(3)
    with pytest.raises(TapError):
        kd.Distiller(
            models[0], kd.Cohort(models[1], models[2]), [kl("t", LOGITS, "head"), kl("u", LOGITS, "peer2/hed")]
        )
    assert not any(m._forward_hooks for model in models for m in model.modules())


def test_columns_are_those_of_all_members() -> None:
    cohort = kd.Cohort(small.ConvNet(4), text=kd.Frozen(small.bert()))
    assert cohort.columns() >= {"image", "labels", "teacher_input_ids"}
