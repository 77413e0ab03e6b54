"""Which samples, tokens and pixels count."""

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
from taskkd import gates, losses
from taskkd.errors import ShapeError, TapError, TaskkdError
from taskkd.losses.primitives import masked_mean
from tests import small

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 1.5, 4.0], [2.0, 0.0, 1.0]])


def run_of(teacher: Tensor, labels: Tensor, student: Tensor | None = None) -> kd.Run:
    student = torch.zeros_like(teacher) if student is None else student
    return kd.Run({}, None, {"out.logits": student, "batch.labels": labels}, {"out.logits": teacher})


def test_where_the_teacher_is_right() -> None:
    run = run_of(LOGITS, torch.tensor([0, 0, 2, -100]))
    assert gates.teacher_correct()(run).tolist() == [True, False, True, False]
    assert gates.teacher_wrong()(run).tolist() == [False, True, False, False]
    ours = gates.teacher_correct(ignore_index=0)(run)
    assert ours.tolist() == [False, False, True, False]


def test_taps_that_gates_read() -> None:
    gate = gates.teacher_correct("head", "batch.y")
    assert (gate.student_taps, gate.teacher_taps) == (("batch.y",), ("head",))
    assert gates.confidence("head", whose="student").student_taps == ("head",)
    assert gates.entropy("head").teacher_taps == ("head",)
    assert gates.entropy("head").student_taps == ()


@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3), -1), ((2, 5, 3), 2), ((2, 3, 4, 5), 1)])
def test_tokens_and_pixels(shape: tuple[int, ...], dim: int) -> None:
    logits = torch.randn(shape)
    best = logits.argmax(dim)
    labels = best.clone()
    labels[0, 0] = -100
    labels[1, 1] = (best[1, 1] + 1) % 3
    right = gates.teacher_correct(dim=dim)(run_of(logits, labels))
    expected = torch.ones_like(best, dtype=torch.bool)
    expected[0, 0] = expected[1, 1] = False
    assert torch.equal(right, expected)
    top = gates.confidence(dim=dim)(run_of(logits, labels))
    torch.testing.assert_close(top, logits.softmax(dim).amax(dim))
    assert gates.entropy(dim=dim)(run_of(logits, labels)).shape == best.shape


def test_confidence() -> None:
    run = run_of(LOGITS, torch.zeros(4, dtype=torch.int64))
    p = LOGITS.softmax(1).amax(1)
    torch.testing.assert_close(gates.confidence()(run), p)
    assert gates.confidence(threshold=0.8)(run).tolist() == [True, False, True, False]
    certain = run_of(torch.tensor([[200.0, 0.0]]), torch.zeros(1))
    assert gates.confidence(threshold=1.0)(certain).tolist() == [True]


def test_entropy() -> None:
    logits = torch.stack([torch.zeros(3), torch.tensor([100.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -100.0])])
    run = run_of(logits, torch.zeros(3, dtype=torch.int64))
    two = math.log(2) / math.log(3)
    torch.testing.assert_close(gates.entropy()(run), torch.tensor([0.0, 1.0, 1 - two]))
    torch.testing.assert_close(gates.entropy(high=True)(run), torch.tensor([1.0, 0.0, two]))
    assert gates.entropy(threshold=0.7)(run).tolist() == [False, True, True]
    assert gates.entropy(threshold=0.7, high=True)(run).tolist() == [True, False, False]
    same = gates.entropy()(run_of(torch.zeros(2, 1), torch.zeros(2)))  # one class: nothing is uncertain
    assert same.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("make", [gates.confidence, gates.entropy])
def test_a_gate_has_no_gradient_and_full_precision(make: Callable[..., gates.Gate]) -> None:
    student = LOGITS.clone().requires_grad_()
    run = run_of(LOGITS, torch.zeros(4), student)
    assert not make(whose="student")(run).requires_grad
    half = run_of(LOGITS.half(), torch.zeros(4))
    assert make()(half).dtype == torch.float32
    assert make()(run_of(LOGITS.double(), torch.zeros(4))).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: gates.confidence(threshold=1.5), "gate `confidence`: `threshold` must be in (0, 1], got 1.5."),
        (lambda: gates.confidence(threshold=0.0), "gate `confidence`: `threshold` must be in (0, 1], got 0.0."),
        (lambda: gates.entropy(threshold=-1), "gate `entropy`: `threshold` must be in [0, 1], got -1."),
        (
            lambda: gates.entropy(whose="peer"),  # type: ignore[arg-type]
            "gate `entropy`: `whose` must be 'teacher' or 'student', got 'peer'.",
        ),
    ],
)
def test_options_out_of_range(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(TaskkdError) as caught:
        make()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("gate", "logits", "labels", "sentence"),
    [
        (gates.teacher_correct(), torch.zeros(2, 3), torch.zeros(2), "needs classes as labels, 'batch.labels' holds"),
        (
            gates.teacher_correct(),
            torch.zeros(2, 3, 4),
            torch.zeros(2, 3, dtype=torch.int64),
            "got logits of shape (2, 3, 4): say which dimension holds the classes, dim=1",
        ),
        (
            gates.teacher_wrong(dim=1),
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2, 8, 8, dtype=torch.int64),
            "labels of shape (2, 8, 8) do not fit logits that are, without their classes, (2, 4, 4).",
        ),
        (gates.confidence(), torch.zeros(3), torch.zeros(3), "tap 'out.logits' must give logits (batch, classes, ...)"),
        (gates.entropy(), torch.zeros(2, 3, 4), torch.zeros(2), "gate `entropy` got logits of shape (2, 3, 4): say"),
    ],
)
def test_what_does_not_fit_is_a_sentence(gate: gates.Gate, logits: Tensor, labels: Tensor, sentence: str) -> None:
    with pytest.raises(ShapeError) as caught:
        gate(run_of(logits, labels))
    assert sentence in str(caught.value)


def hard(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy on what the batch says, which a live teacher's taps can read."""
    return masked_mean(F.cross_entropy(student, teacher, reduction="none"), mask)


def test_conditional_learning_of_meng(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    """Soft targets where the teacher is right, the label elsewhere."""
    terms = [
        kd.Match("soft", losses.kl_divergence, "out.logits", gate=gates.teacher_correct()),
        kd.Match("hard", hard, "out.logits", "batch.labels", gate=gates.teacher_wrong()),
    ]
    pair = kd.Distiller(*conv_pair, terms, task_weight=0)
    batch = small.conv_batch(8)
    pair.prepare(batch)
    pair.student.eval()  # BatchNorm moves otherwise
    out = pair(**batch)
    with torch.no_grad():
        s, t = conv_pair[0](batch["image"])["logits"], conv_pair[1](batch["image"])["logits"]
    right = t.argmax(1) == batch["labels"]
    assert 0 < right.sum() < 8
    kl = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)
    ce = F.cross_entropy(s, batch["labels"], reduction="none")
    torch.testing.assert_close(out["loss"].detach(), torch.where(right, kl, ce).mean())
    assert "labels" in pair.columns()


def test_a_gate_records_what_no_term_taps(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    term = kd.Match("block", losses.mse, "block", adapter="conv1x1", gate=gates.teacher_correct())
    assert (term.student_taps, term.teacher_taps) == (("block", "batch.labels"), ("block", "out.logits"))
    pair = kd.Distiller(*conv_pair, [term])
    batch = small.conv_batch(8)
    pair.prepare(batch)
    other = copy.deepcopy(pair)
    with pytest.raises(TapError, match="no item 'labels'"):
        pair(image=batch["image"])
    assert other(**batch)["block"] > 0


def test_a_gate_of_ones_own(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    seen: list[Tensor] = []

    def function(run: kd.Run) -> Tensor:
        seen.append(run.teacher["stem"])
        return run.student["batch.id"] % 2

    gate = gates.Gate(function, student_taps=("batch.id",), teacher_taps=("stem",))
    pair = kd.Distiller(*conv_pair, [kd.Match("l", losses.kl_divergence, "out.logits", gate=gate)])
    batch = small.conv_batch()
    pair.prepare(batch)
    pair(**batch)["loss"].backward()
    assert seen[-1].shape == (4, 6, 6, 6)
    plain = kd.Match("l", losses.mse, "x", gate=lambda run: torch.ones(2))
    assert (plain.student_taps, plain.teacher_taps) == (("x",), ("x",))


def test_a_gate_over_tokens_beside_a_mask_over_samples() -> None:
    s, t = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    labels = t.argmax(-1)
    labels[:, 2:] = -100
    run = kd.Run(
        {}, None, {"out.logits": s, "batch.labels": labels, "batch.m": torch.tensor([1, 0])}, {"out.logits": t}
    )
    gate = gates.teacher_correct(dim=-1)
    each = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    alone = kd.Match("a", losses.kl_divergence, "out.logits", dim=-1, gate=gate)(run)
    torch.testing.assert_close(alone, each[:, :2].sum() / 10)
    masked = kd.Match("a", losses.kl_divergence, "out.logits", dim=-1, gate=gate, mask="batch.m")(run)
    torch.testing.assert_close(masked, each[0, :2].sum() / 5)
    labelled = kd.Match(
        "a", losses.kl_divergence, "out.logits", dim=-1, gate=gate, mask=lambda batch, x: labels != -100
    )(run)
    torch.testing.assert_close(labelled, each[:, :2].mean())


def test_a_gate_that_does_not_fit_its_mask() -> None:
    run = kd.Run({}, None, {"x": torch.randn(4, 3), "batch.m": torch.ones(4)}, {"x": torch.randn(4, 3)})
    term = kd.Match("a", losses.mse, "x", mask="batch.m", gate=lambda run: torch.ones(3))
    with pytest.raises(ShapeError, match=r"term 'a': a gate of shape \(3,\) does not fit a mask of shape \(4,\)"):
        term(run)


def test_gates_compile_and_stay_double(fresh_dynamo: None, conv_pair: tuple[nn.Module, nn.Module]) -> None:
    made = [
        gates.teacher_correct(), gates.confidence(), gates.entropy(threshold=0.9, whose="student"),
    ]  # fmt: skip
    terms = [kd.Match(f"g{i}", losses.kl_divergence, "out.logits", gate=g) for i, g in enumerate(made)]
    pair = kd.Distiller(*copy.deepcopy(conv_pair), terms)
    batch = small.conv_batch()
    pair.prepare(batch)
    pair.student.eval()
    compiled = torch.compile(pair, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch)["loss"], pair(**batch)["loss"])
    s, t = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    value = kd.Match("a", losses.kl_divergence, "out.logits", gate=gates.confidence())(run_of(t, torch.zeros(4), s))
    each = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, (t.softmax(1).amax(1) * each).mean(), rtol=1e-12, atol=0)
