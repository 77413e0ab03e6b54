"""Learned attention over layers and channels (`taskkd/attention.py`), and the losses under it by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses
from taskkd.attention import ChannelAttention, LayerAttention
from taskkd.errors import ShapeError, TapError, TaskkdError
from taskkd.losses import channels, features
from tests.small import ConvNet, conv_batch


def maps(*channels: int, size: int = 4, count: int = 3) -> list[Tensor]:
    return [torch.randn(count, c, size, size) for c in channels]


def test_layer_attention_sums_to_one_over_the_students_layers() -> None:
    attention = LayerAttention((3, 5), (4, 6, 2), features=8)
    weights = attention(maps(3, 5), maps(4, 6, 2))
    assert weights.shape == (3, 3, 2)
    torch.testing.assert_close(weights.sum(2), torch.ones(3, 3))


def test_a_batch_of_one_has_no_statistics_and_is_finite() -> None:
    attention = LayerAttention((3, 5), (4,), features=8)
    students, teachers = maps(3, 5, count=1), maps(4, count=1)
    before = {n: b.clone() for n, b in attention.named_buffers() if "queries" in n}
    weights = attention(students, teachers)
    assert weights.isfinite().all()
    weights[0, 0, 0].backward()
    assert all(torch.equal(b, before[n]) for n, b in attention.named_buffers() if n in before)


def test_channel_attention_sums_to_one() -> None:
    weights = ChannelAttention(6)(maps(6)[0].half())
    assert weights.shape == (3, 6)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert ChannelAttention(1)(maps(1)[0]).shape == (3, 1)


def test_attention_based_features_by_hand() -> None:
    students, teachers = [*maps(3, 5), *maps(4, size=8)], maps(6, 2)
    attention = torch.softmax(torch.randn(3, 2, 3), 2)
    total = torch.zeros(())
    for i, t in enumerate(teachers):
        q_t = F.normalize(t.square().mean(1).flatten(1))
        for j, s in enumerate(students):
            q_s = F.normalize(F.adaptive_avg_pool2d(s.square().mean(1), 4).flatten(1))
            total = total + (attention[:, i, j] * (q_s - q_t).square().mean(1)).mean() / 2
    torch.testing.assert_close(losses.attention_based_features(students, teachers, attention=attention), total)
    with pytest.raises(ShapeError, match=r"attention of shape \(3, 2, 2\) for 2 teacher and 3 student maps"):
        losses.attention_based_features(students, teachers, attention=attention[..., :2])


def test_channel_weighted_by_hand() -> None:
    s, t = maps(3)[0], maps(3)[0]
    weights = torch.softmax(torch.randn(3, 3), 1)
    distance = (s - t).square().mean((2, 3))
    torch.testing.assert_close(losses.channel_weighted(s, t), F.mse_loss(s, t))
    torch.testing.assert_close(losses.channel_weighted(s, t, channels=weights), (weights * distance).sum(1).mean())
    small = F.adaptive_avg_pool2d(t, 2)
    up = F.interpolate(small, size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(losses.channel_weighted(s, small), F.mse_loss(s, up))
    scaled = losses.channel_weighted(3 * s, t, normalise=True)
    torch.testing.assert_close(scaled, losses.channel_weighted(s, t, normalise=True), rtol=1e-5, atol=0)
    with pytest.raises(ShapeError, match=r"weights of shape \(2,\) for channels \(3, 3\)"):
        losses.channel_weighted(s, t, channels=torch.ones(2))


# ---- matching channels


def test_match_channels_finds_a_permutation() -> None:
    student = maps(5)[0]
    order = torch.tensor([3, 0, 4, 1, 2, 8, 9, 5, 7, 6])
    twice = torch.cat([student, 0.5 * student], 1)
    teacher = torch.empty_like(twice)
    teacher[:, order] = twice  # the student's channel c lies at order[c] and order[5 + c]
    found = channels.match_channels(student, teacher)
    assert sorted(found.tolist()) == list(range(10))
    assert torch.equal(found.reshape(2, 5).sort(0).values, order.reshape(2, 5).sort(0).values)
    reduced = channels.reduce_channels(teacher, 5, found)
    assert torch.equal(reduced, student)  # the larger of both
    assert losses.matching_guided(student, teacher, assignment=found, margin=-9.0).item() == 0


def test_match_channels_is_the_least_of_all_assignments() -> None:
    from itertools import permutations

    for _ in range(5):
        student, teacher = maps(3)[0], maps(6)[0]
        s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
        cost = (2 - 2 * s @ t.mT).mean(0).repeat(2, 1)
        least = min(sum(cost[i, p[i]].item() for i in range(6)) for p in permutations(range(6)))
        found = channels.match_channels(student, teacher)
        assert cost[torch.arange(6), found].sum().item() == pytest.approx(least, rel=1e-5)


def test_reduced_channels_keep_their_sign_and_margins_are_averaged() -> None:
    teacher = torch.tensor([1.0, -5.0, -2.0, 3.0]).reshape(1, 4, 1, 1)
    assert channels.reduce_channels(teacher, 2).flatten().tolist() == [-2.0, -5.0]
    student = torch.tensor([0.0, 0.0]).reshape(1, 2, 1, 1)
    margin = torch.tensor([-1.0, -2.0, -3.0, -6.0])
    # max(-2, -2) and max(-5, -4), student above both
    assert losses.matching_guided(student, teacher, margin=margin).item() == pytest.approx((4 + 16) / 2)
    with pytest.raises(ShapeError, match="cannot be reduced to 3 channels: expected a multiple"):
        channels.reduce_channels(teacher, 3)
    with pytest.raises(ShapeError, match="`match_channels` needs maps of one batch and size and a multiple"):
        channels.match_channels(maps(3)[0], maps(4)[0])


# ---- other losses of layers and features


def test_singular_vectors_ignore_how_positions_are_arranged() -> None:
    students, teachers = maps(3, 4, 5, size=3), maps(3, 4, 5, size=4)
    value = losses.singular_vectors(students, teachers)
    turned = [x.flip(2).transpose(2, 3) for x in students]
    torch.testing.assert_close(losses.singular_vectors(turned, teachers), value, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        losses.singular_vectors(students, teachers, count=0)


@pytest.mark.parametrize("size", [(1, 2), (3, 3)])  # fewer positions than channels, and more
def test_singular_vectors_of_equal_values_have_a_finite_gradient(size: tuple[int, int]) -> None:
    student = [torch.ones(2, 4, *size, requires_grad=True), torch.eye(4)[None, :, :, None].repeat(2, 1, 1, 2)]
    teacher = [torch.randn(2, 4, *size), torch.randn(2, 4, 3, 3)]
    value = losses.singular_vectors([student[0], student[1].requires_grad_()], teacher)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, student))


def test_euclidean_of_samples_and_of_the_batch() -> None:
    s, t = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 12.0]])
    assert losses.euclidean(s, t).item() == pytest.approx((5 + 12) / 2)
    assert losses.euclidean(s, t, over="batch").item() == pytest.approx(13)
    assert losses.euclidean(s, t, over="batch", mask=torch.tensor([1, 0])).item() == pytest.approx(5)
    same = s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.euclidean(same, s, over="batch"), same)
    assert gradient.eq(0).all()
    with pytest.raises(ValueError, match="`over` must be 'sample' or 'batch', got 'all'"):
        losses.euclidean(s, t, over="all")  # type: ignore[arg-type]


def test_orthogonal_penalty() -> None:
    q, _ = torch.linalg.qr(torch.randn(4, 4))
    assert features.orthogonal_penalty(q).item() == pytest.approx(0, abs=1e-5)
    assert features.orthogonal_penalty(2 * q).item() == pytest.approx(2 * 6, rel=1e-5)  # |3 * 1|, both ways
    assert features.orthogonal_penalty(q[:3]).item() == pytest.approx(1, rel=1e-5)  # one direction is lost
    with pytest.raises(ShapeError, match=r"needs the weight \(out, in\) of a linear map, got \(4,\)"):
        features.orthogonal_penalty(q[0])


# ---- the terms


def test_terms_build_their_attention_and_train_it() -> None:
    student, teacher = ConvNet(4), ConvNet(4)
    terms = [
        kd.AttentionBasedFeatures("afd", ["stem", "block"], ["block"], features=8, weight=10.0),
        kd.ChannelAttentive("afds", "block"),
    ]
    made = kd.Distiller(student, teacher, terms)
    assert not made.built
    made.prepare(conv_batch())
    assert made.built
    out = made(**conv_batch())
    assert out["afd"] > 0
    assert out["afds"] > 0
    out["loss"].backward()
    for name in ("attention.keys.1.linear.weight", "attention.student_positions"):
        assert terms[0].get_parameter(name).grad.abs().sum() > 0  # type: ignore[union-attr]
    assert all(p.grad is not None for p in terms[1].parameters())
    again = kd.Distiller(ConvNet(4), ConvNet(4), [kd.AttentionBasedFeatures("afd", ["stem"], ["block"])])
    again.prepare(conv_batch(1))


def test_errors_of_terms_are_sentences() -> None:
    with pytest.raises(TaskkdError, match="term 'afd' attends over layers and needs lists of student"):
        kd.AttentionBasedFeatures("afd", "x", ["y"])
    flat: dict[str, Any] = {"out": torch.randn(2, 3)}
    with pytest.raises(TapError, match="term 'afds': tap 'out' gives no map"):
        kd.ChannelAttentive("afds", "out").build(kd.Run({}, None, flat, flat))
    wide = kd.Distiller(ConvNet(4), ConvNet(6), [kd.ChannelAttentive("afds", "block")])
    with pytest.raises(ShapeError, match="term 'afds': `channel_weighted` needs student and teacher tensors of one"):
        wide.prepare(conv_batch())
