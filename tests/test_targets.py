"""What is made of a teacher's logits before a loss sees them (`taskkd/losses/targets.py`)."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd import losses
from taskkd.errors import ShapeError
from taskkd.losses import targets


def test_probability_shift_makes_the_teacher_right_and_changes_nothing_else() -> None:
    teacher, labels = torch.randn(40, 5), torch.arange(40) % 5
    shifted = targets.probability_shift(teacher, labels)
    assert torch.equal(shifted.argmax(1), labels)
    assert torch.equal(shifted.sort(1).values, teacher.sort(1).values)
    right = teacher.argmax(1) == labels
    assert right.any()
    assert torch.equal(shifted[right], teacher[right])
    untouched = torch.ones(40, 5, dtype=torch.bool).scatter(1, labels[:, None], False)
    untouched = untouched.scatter(1, teacher.argmax(1, keepdim=True), False)
    assert torch.equal(shifted[untouched], teacher[untouched])


def test_probability_shift_over_pixels_leaves_ignored_ones() -> None:
    teacher, labels = torch.randn(2, 5, 3, 2), torch.randint(0, 5, (2, 3, 2))
    labels[0, 0, 0] = 255
    shifted = targets.probability_shift(teacher, labels, ignore_index=255)
    assert torch.equal(shifted[0, :, 0, 0], teacher[0, :, 0, 0])
    labels[0, 0, 0] = teacher[0, :, 0, 0].argmax()
    assert torch.equal(shifted.argmax(1), labels)
    flat = targets.probability_shift(teacher.movedim(1, -1), labels, dim=-1)
    assert torch.equal(flat.movedim(-1, 1), shifted)


def test_label_smoothing_replaces_what_is_wrong_only() -> None:
    teacher, labels = torch.randn(40, 5), torch.arange(40) % 5
    smooth = targets.label_smoothing(teacher, labels, smoothing=0.2, temperature=3.0)
    right = teacher.argmax(1) == labels
    assert right.any()
    assert not right.all()
    assert torch.equal(smooth[right], teacher[right])
    expected = 0.8 * F.one_hot(labels, 5).float() + 0.04
    torch.testing.assert_close(torch.softmax(smooth / 3, 1)[~right], expected[~right])


def test_a_temperature_for_each_sample() -> None:
    s, t = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    each = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    labels = torch.arange(4)
    options: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
        (losses.kl_divergence, {}),
        (losses.kl_divergence, {"direction": "reverse"}),
        (losses.kl_divergence, {"direction": "jensen_shannon"}),
        (losses.soft_cross_entropy, {}),
    ]
    for loss, option in options:
        by_hand = [loss(s[i : i + 1], t[i : i + 1], temperature=each[i].item(), **option) for i in range(4)]
        torch.testing.assert_close(loss(s, t, temperature=each, **option), torch.stack(by_hand).mean())
        torch.testing.assert_close(loss(s, t, temperature=each[:1].repeat(4), **option), loss(s, t, **option))
    by_hand = [
        losses.decoupled(s[i : i + 1], t[i : i + 1], labels=labels[i : i + 1], temperature=each[i].item())
        for i in range(4)
    ]
    torch.testing.assert_close(losses.decoupled(s, t, labels=labels, temperature=each), torch.stack(by_hand).mean())
    square = s[:, :4], t[:, :4]  # as many classes as samples: nothing would broadcast by mistake
    one = losses.kl_divergence(square[0][3:], square[1][3:], temperature=4.0)
    got = losses.kl_divergence(*square, temperature=each, mask=torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(got, one)
    pixels = torch.randn(2, 2, 5, 3, 3, dtype=torch.float64)
    first, second = (losses.kl_divergence(*pixels[:, i : i + 1], dim=1, temperature=i + 1.0) for i in range(2))
    both = losses.kl_divergence(*pixels, dim=1, temperature=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(both, (first + second) / 2)
    with pytest.raises(ShapeError, match=r"a temperature of shape \(3,\) does not fit logits of shape \(4, 5\)"):
        losses.kl_divergence(s, t, temperature=torch.ones(3))
    with pytest.raises(ValueError, match="takes one temperature for all"):
        losses.dist(s, t, temperature=each)


def test_dynamic_temperature_is_lower_where_student_and_teacher_disagree() -> None:
    sure = torch.eye(3) * 8
    student, teacher = sure[[0, 1, 2]], sure[[0, 1, 1]]  # the last one disagrees
    found = targets.dynamic_temperature(student, teacher, base=4.0, spread=1.5)
    assert found.argmin() == 2
    assert found.mean().item() == pytest.approx(4.0)
    assert found[2].item() == pytest.approx(4 + 1.5 * (1 / 3 - 1), abs=0.01)  # nearly all of the weight
    unsure = torch.stack([sure[0], sure[0] / 8])
    by_confidence = targets.dynamic_temperature(unsure, unsure, base=4.0, spread=40.0, by="confidence", least=2.0)
    w = 1 / unsure.softmax(1).amax(1)
    w = w / w.sum()
    torch.testing.assert_close(by_confidence, (4 + 40 * (w.mean() - w)).clamp(min=2.0))
    assert by_confidence.min() == 2
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    w = (1 - F.cosine_similarity(s, t)) ** 2
    by_logits = targets.dynamic_temperature(s, t, base=4.0, spread=0.5, by="cosine", power=2.0, normalise=False)
    torch.testing.assert_close(by_logits, 4 + 0.5 * (w.mean() - w))
    zeros = targets.dynamic_temperature(0 * s, t, base=4.0, spread=0.5, by="cosine", eps=1e-4)
    assert zeros.tolist() == [4.0] * 4
    equal = targets.dynamic_temperature(torch.zeros(2, 1), torch.zeros(2, 1), base=4.0, spread=1.0)  # weights of 0
    assert equal.tolist() == [4.0, 4.0]


def test_batch_ensemble_is_the_limit_of_its_propagation() -> None:
    logits, features = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, 2, dtype=torch.float64)
    unit = F.normalize(features.flatten(1))
    scores = (unit @ unit.T).fill_diagonal_(-torch.inf)
    own = torch.softmax(logits / 4, 1)
    q = own
    for _ in range(200):
        q = 0.7 * scores.softmax(1) @ q + 0.3 * own
    ensemble = targets.batch_ensemble(logits, features, omega=0.7)
    torch.testing.assert_close(torch.softmax(ensemble / 4, 1), q)
    assert losses.kl_divergence(4 * q.log(), ensemble, temperature=4.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_ensemble_of_half_and_confident_logits_is_finite(dtype: torch.dtype) -> None:
    logits, features = (torch.randn(6, 5) * 1000).to(dtype), torch.randn(6, 4).to(dtype)
    features[1] = features[0]
    features[2] = 0
    ensemble = targets.batch_ensemble(logits, features)
    assert ensemble.dtype == torch.float32
    assert ensemble.isfinite().all()
    assert not ensemble.requires_grad


def test_gated_ensemble_is_a_weighted_sum_of_branches() -> None:
    branches = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
    gate = torch.softmax(torch.randn(4, 3), 1).requires_grad_()
    expected = sum(gate[:, i : i + 1] * branches[i] for i in range(3))
    found = targets.gated_ensemble(branches, gate)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(targets.gated_ensemble(torch.stack(branches, 1), gate), found)
    assert len(torch.autograd.grad(found.square().sum(), [*branches, gate])) == 4


def test_group_targets_attend_between_peers() -> None:
    logits = torch.randn(4, 3, 5, requires_grad=True)
    q, k = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    found = targets.group_targets(logits, q, k)
    for b in range(4):
        for a in range(3):
            share = torch.softmax(torch.stack([q[b, a] @ k[b, p] for p in range(3)]), 0)
            torch.testing.assert_close(found[b, a], sum(share[p] * logits[b, p] for p in range(3)))
    assert found.requires_grad
    detached = targets.group_targets(list(logits.unbind(1)), q, k, detach=True)
    assert torch.equal(detached, found)
    assert not detached.requires_grad


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda z: targets.probability_shift(z, torch.zeros(3)), ShapeError, "labels of shape (3,) do not fit logits"),
        (lambda z: targets.label_smoothing(z, z[:, 0], smoothing=0.0), ValueError, "`smoothing` must be in (0, 1]"),
        (lambda z: targets.label_smoothing(z, z[:, 0], temperature=0.0), ValueError, "`temperature` must be positive"),
        (lambda z: targets.batch_ensemble(z, z[:2]), ShapeError, "of as many samples, got (4, 5) and (2, 5)."),
        (lambda z: targets.batch_ensemble(z, z, omega=1.0), ValueError, "`omega` must be in [0, 1), got 1.0."),
        (lambda z: targets.batch_ensemble(z, z, temperature=0.0), ValueError, "`temperature` must be positive"),
        (lambda z: targets.gated_ensemble(z, z), ShapeError, "a gate (batch, branches), got (4, 5) and (4, 5)."),
        (lambda z: targets.group_targets(z[None], z[None], z[None, :2]), ShapeError, "queries and keys (batch, peers,"),
        (lambda z: targets.dynamic_temperature(z[0], z[0], base=1.0, spread=1.0), ShapeError, "(batch, classes), got"),
        (lambda z: targets.dynamic_temperature(z, z, base=0.0, spread=1.0), ValueError, "`base` and `least` must be"),
        (
            lambda z: targets.dynamic_temperature(z, z, base=1.0, spread=1.0, by="entropy"),
            ValueError,
            "`by` is one of agreement, confidence, cosine, got 'entropy'.",
        ),
    ],
)
def test_errors_are_sentences(call: Callable[[Tensor], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call(torch.randn(4, 5))
    assert sentence in str(caught.value)


def test_docstring_examples_run() -> None:
    result = doctest.testmod(targets, extraglobs={"torch": torch})
    assert result.failed == 0
    assert result.attempted > 0
