"""Contrastive losses by hand, and the terms with memories (`taskkd/contrastive.py`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses
from taskkd.errors import ShapeError, TapError, TaskkdError
from taskkd.losses import contrastive

TERMS = [kd.ContrastiveRepresentation, kd.ContrastiveRelation]
both_terms = pytest.mark.parametrize("kind", TERMS, ids=lambda k: k.__name__)


# ---- the losses


def test_info_nce_is_a_cross_entropy_of_cosines() -> None:
    s, t = torch.randn(5, 4), torch.randn(5, 4)
    scores = F.normalize(s, dim=1) @ F.normalize(t, dim=1).T / 0.2
    forth, back = F.cross_entropy(scores, torch.arange(5)), F.cross_entropy(scores.T, torch.arange(5))
    torch.testing.assert_close(losses.info_nce(s, t, temperature=0.2), forth)
    torch.testing.assert_close(losses.info_nce(s, t, temperature=0.2, symmetric=True), (forth + back) / 2)


def test_triplet_by_hand() -> None:
    s, t = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [3.0, 3.0]])
    away = [(9 + 9) ** 0.5, (9 + 9) ** 0.5]  # of each teacher's output to the other student's
    by_hand = sum(max(0.0, 1 - d + 4) for d in away) / 2
    assert losses.triplet(s, t, margin=4.0).item() == pytest.approx(by_hand)
    assert losses.triplet(s, t, margin=1.0).item() == 0
    same = losses.triplet(s, t, margin=4.0, labels=torch.zeros(2))
    assert same.item() == 0


def test_noise_contrastive_by_hand() -> None:
    s, c = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    p = torch.exp((c * s[:, None]).sum(2) / 0.5) / 7.0
    noise = 5 / 20
    by_hand = -(p[:, 0] / (p[:, 0] + noise)).log() - (noise / (p[:, 1:] + noise)).log().sum(1)
    found = losses.noise_contrastive(s, c, samples=20, temperature=0.5, log_z=math.log(7.0))
    torch.testing.assert_close(found, by_hand.mean(), rtol=1e-5, atol=0)  # the authors' eps of 1e-7


@pytest.mark.parametrize("samples", [4, 500])
def test_candidates_out_of_a_bank_are_those_candidates(samples: int) -> None:
    bank, rows = torch.randn(samples, 4), torch.randint(samples, (3, 6))
    s = torch.randn(3, 4, requires_grad=True)
    options: dict[str, Any] = {"samples": samples, "temperature": 0.5}
    torch.testing.assert_close(
        losses.noise_contrastive(s, (bank, rows), **options), losses.noise_contrastive(s, bank[rows], **options)
    )
    options["anchors"] = bank[:2]
    torch.testing.assert_close(
        losses.relation_contrastive(s, (bank, rows), **options), losses.relation_contrastive(s, bank[rows], **options)
    )
    value = losses.noise_contrastive(s, (bank, rows), samples=samples)
    bank.zero_()  # it changes before the backward
    assert torch.autograd.grad(value, s)[0].abs().sum() > 0


def test_relation_contrastive_by_hand() -> None:
    s, c, a = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (3, 6, 4), (2, 4)))
    total = 0.0
    for b in range(3):
        for anchor in a:
            relations = F.normalize(c[b] - anchor, dim=1) @ F.normalize(s[b] - anchor, dim=0)
            total += contrastive.noise_contrast(relations / 0.5, 0.0, 20).item() / 6
    found = losses.relation_contrastive(s, c, anchors=a, samples=20, temperature=0.5)
    assert found.item() == pytest.approx(total, rel=1e-4)  # the authors' 1e-6


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda s, c: losses.info_nce(s, s, temperature=0.0), ValueError, "`temperature` must be positive, got 0.0."),
        (lambda s, c: losses.triplet(s, s, margin=-1.0), ValueError, "`margin` must not be negative, got -1.0."),
        (lambda s, c: losses.triplet(s, s, labels=s), ShapeError, "labels of shape (3, 4) for 3 samples"),
        (lambda s, c: losses.noise_contrastive(s, c, samples=0), ValueError, "`samples` must be positive, got 0."),
        (
            lambda s, c: losses.noise_contrastive(s[:, :2], c, samples=9),
            ShapeError,
            "`noise_contrastive` needs as many rows of candidates (batch, 1 + negatives, features), the positive first",
        ),
        (
            lambda s, c: losses.relation_contrastive(s, c, anchors=s[:, :2], samples=9),
            ShapeError,
            "`relation_contrastive` needs anchors (anchors, 4), got (3, 2).",
        ),
    ],
)
def test_errors_are_sentences(call: Callable[[Tensor, Tensor], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call(torch.randn(3, 4), torch.randn(3, 6, 4))
    assert sentence in str(caught.value)


# ---- the terms


class Net(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(6, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).relu())
        return out


def batch(step: int, samples: int = 24, count: int = 4) -> dict[str, Tensor]:
    data = torch.randn(samples, 6, generator=torch.Generator().manual_seed(9))
    ids = torch.randperm(samples, generator=torch.Generator().manual_seed(step))[:count]
    return {"id": ids, "x": data[ids]}


def distiller(kind: type[kd.Term], **options: Any) -> kd.Distiller:
    """Prepared, with the same random weights every time."""
    options = {"samples": 24, "negatives": 5, "features": 4, **options}
    made = kd.Distiller(Net(8, 0), Net(12, 1), [kind("crd", "body", **options)], task_weight=0.0)
    made.prepare(batch(0))
    return made


def steps(made: kd.Distiller, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    found = []
    for step in numbers:
        out = made(**batch(step))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        made.step()
        found.append(out["crd"].item())
    return found


def sgd(made: kd.Distiller) -> torch.optim.Optimizer:
    return torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9)


@both_terms
def test_it_trains_student_and_embeddings_and_remembers(kind: type[kd.Term]) -> None:
    made = distiller(kind)
    before = copy.deepcopy(made.state_dict())
    values = steps(made, sgd(made), range(1, 30))
    assert all(math.isfinite(v) for v in values)
    if kind is kd.ContrastiveRepresentation:  # the other one's anchors move with every batch
        assert sum(values[-5:]) < sum(values[:5])
    after = made.state_dict()
    moved = [n for n in before if n != "_extra_state" and not torch.equal(before[n], after[n])]
    for part in (
        "student.body.weight",
        "embeddings.0.map",
        "embeddings.1.map",
        "banks.0.rows",
        "banks.1.rows",
        "log_z",
    ):
        assert any(part in name for name in moved), part
    for rows in (after["terms.crd.banks.0.rows"], after["terms.crd.banks.1.rows"]):
        seen = torch.cat([batch(s)["id"] for s in range(1, 30)]).unique()
        torch.testing.assert_close(rows[seen].norm(dim=1), torch.ones(len(seen)))


@both_terms
def test_prepare_leaves_memories_and_constant_as_they_begin(kind: type[kd.Term]) -> None:
    made = distiller(kind)
    term: Any = made.terms["crd"]
    assert term.log_z.isinf().all()
    rows = [bank.rows.clone() for bank in term.banks]
    made.prepare(batch(1))
    assert term.log_z.isinf().all()
    assert all(torch.equal(bank.rows, r) for bank, r in zip(term.banks, rows, strict=True))


@both_terms
def test_the_constant_is_that_of_the_first_batch(kind: type[kd.Term]) -> None:
    made = distiller(kind)
    term: Any = made.terms["crd"]
    optimizer = sgd(made)
    steps(made, optimizer, range(1, 2))
    first = term.log_z.clone()
    assert first.isfinite().all()
    steps(made, optimizer, range(2, 5))
    assert torch.equal(term.log_z, first)


@both_terms
def test_a_run_goes_on_from_its_state_bit_by_bit(kind: type[kd.Term]) -> None:
    whole = distiller(kind)
    optimizer = sgd(whole)
    torch.manual_seed(5)
    steps(whole, optimizer, range(1, 4))
    state, moments = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    values = steps(whole, optimizer, range(4, 8))
    again = distiller(kind)
    again.load_state_dict(state)
    other = sgd(again)
    other.load_state_dict(moments)
    torch.set_rng_state(random)
    assert steps(again, other, range(4, 8)) == values
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_negatives_of_other_classes() -> None:
    labels = torch.tensor([2, 0, 2, 2, 1, 0, 2, 2])
    term = kd.ContrastiveRepresentation("crd", "x", samples=8, negatives=400, labels=labels)
    ids = torch.arange(8)
    drawn = term._draw(ids)
    assert drawn.shape == (8, 400)
    assert (labels[drawn] != labels[:, None]).all()
    for i in ids:
        assert set(drawn[i].tolist()) == {j for j in range(8) if labels[j] != labels[i]}
    any_ = kd.ContrastiveRepresentation("crd", "x", samples=8, negatives=400)._draw(ids)
    assert set(any_[0].tolist()) == set(range(8))


def test_negatives_of_ones_own() -> None:
    drawn = []

    def draw(ids: Tensor) -> Tensor:
        drawn.append(ids)
        return (ids[:, None] + torch.arange(1, 4)) % 24

    made = distiller(kd.ContrastiveRepresentation, draw=draw)
    values = steps(made, sgd(made), range(1, 2))
    again = distiller(kd.ContrastiveRepresentation, draw=draw)
    assert values == steps(again, sgd(again), range(1, 2))
    assert torch.equal(drawn[-1], batch(1)["id"])


@both_terms
def test_a_batch_without_samples_is_zero_and_fixes_nothing(kind: type[kd.Term]) -> None:
    made = distiller(kind)
    term: Any = made.terms["crd"]
    out = made(x=torch.randn(0, 6), id=torch.empty(0, dtype=torch.long))
    assert out["loss"].item() == 0
    out["loss"].backward()
    assert term.log_z.isinf().all()


def test_half_and_double_precision_students() -> None:
    made = distiller(kd.ContrastiveRepresentation)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(**batch(1))
    assert out["loss"].dtype == torch.float32
    out["loss"].backward()
    double = kd.Distiller(
        Net(8, 0).double(), Net(12, 1).double(),
        [kd.ContrastiveRelation("crd", "body", samples=24, negatives=5, features=4)], task_weight=0.0,
    )  # fmt: skip
    doubled = {**batch(0), "x": batch(0)["x"].double()}
    double.prepare(doubled)
    assert double(**doubled)["loss"].dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples": 1}, "term 'crd': `samples` must be at least 2, `negatives` and `temperature` positive, got 1,"),
        ({"samples": 9, "negatives": 0}, "term 'crd': `samples` must be at least 2, `negatives` and"),
        ({"samples": 9, "labels": torch.zeros(3)}, "term 'crd': labels of shape (3,) for 9 samples."),
        ({"samples": 9, "labels": torch.zeros(9)}, "term 'crd': all samples are of one class, none has a negative of"),
    ],
)
@both_terms
def test_construction_errors_are_sentences(kind: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskkdError) as caught:
        kind("crd", "x", **options)
    assert sentence in str(caught.value)


@both_terms
def test_batches_are_checked(kind: type[kd.Term]) -> None:
    made = distiller(kind)
    with pytest.raises(TaskkdError, match="term 'crd' remembers samples by their number and needs `id`"):
        made(x=torch.randn(4, 6))
    with pytest.raises(TaskkdError, match="term 'crd': sample id 24 is outside the memory of 24 samples"):
        made(x=torch.randn(2, 6), id=torch.tensor([3, 24]))
    with pytest.raises(ShapeError, match="term 'crd': 3 ids for 4 samples"):
        made(x=torch.randn(4, 6), id=torch.arange(3))
    term: Any = made.terms["crd"]
    with pytest.raises(TapError, match="tap 'body' gives no tensor"):
        term(kd.Run({"id": torch.arange(2)}, None, {"body": 3}, {"body": torch.randn(2, 12)}))
