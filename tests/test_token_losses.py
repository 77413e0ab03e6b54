"""What the grid of tests/test_losses.py does not say of losses on tokens: padding, options, values by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd import losses
from taskkd.errors import ShapeError
from taskkd.losses.embeddings import candidate_scores

LENGTHS = torch.tensor([9, 5, 1])


def mask_of(length: int) -> Tensor:
    return torch.arange(length) < LENGTHS[:, None]


def padded(x: Tensor, length: int, *dims: int) -> Tensor:
    """`x` with its token dimensions made longer; the padding holds what it likes."""
    for dim in dims:
        shape = list(x.shape)
        shape[dim] = length - shape[dim]
        x = torch.cat([x, torch.randn(shape) * 50], dim)
    return x


def scores(heads: int = 4) -> Tensor:
    return torch.randn(3, heads, 9, 9)


PADDED: list[tuple[Callable[..., Tensor], dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    (losses.attention_scores, {}, (4, 9, 9), (2, 3)),
    (losses.attention_scores, {"heads": "mean", "clip": -1.0}, (4, 9, 9), (2, 3)),
    (losses.attention_cross_entropy, {}, (4, 9, 9), (2, 3)),
    (losses.attention_kl, {}, (4, 9, 9), (2, 3)),
    (losses.self_attention_relation, {"heads": 2}, (4, 9, 6), (2,)),
    (losses.self_attention_relation, {}, (4, 9, 6), (2,)),
    (losses.token_similarity, {}, (9, 6), (1,)),
    (losses.universal_logits, {"temperature": 2.0}, (9, 6), (1,)),
    (losses.generalised_jsd, {"dim": -1, "beta": 0.1}, (9, 6), (1,)),
    (losses.feature_map_transfer, {}, (9, 6), (1,)),
    (losses.feature_statistics, {}, (9, 6), (1,)),
    (losses.mse, {}, (9, 6), (1,)),
    (losses.cosine, {}, (9, 6), (1,)),
    (losses.kl_divergence, {"dim": -1, "temperature": 2.0}, (9, 6), (1,)),
]
names = [f"{loss.__name__}-{','.join(options)}" for loss, options, *_ in PADDED]


@pytest.mark.parametrize(("loss", "options", "shape", "dims"), PADDED, ids=names)
def test_padding_changes_nothing(
    loss: Callable[..., Tensor], options: dict[str, Any], shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    """Acceptance A4, value and gradient."""
    s, t = torch.randn(3, *shape).requires_grad_(), torch.randn(3, *shape)
    value = loss(s, t, mask=mask_of(9), **options)
    (gradient,) = torch.autograd.grad(value, s)
    assert value > 0
    for length in (32, 64, 128):
        longer = loss(padded(s, length, *dims), padded(t, length, *dims), mask=mask_of(length), **options)
        torch.testing.assert_close(longer, value, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(longer, s)[0], gradient, rtol=1e-5, atol=1e-8)


def test_padding_does_not_change_the_flow_between_layers() -> None:
    students, teachers = torch.randn(3, 3, 9, 6), torch.randn(3, 3, 9, 6)
    value = losses.flow_of_solution(list(students), list(teachers), mask=mask_of(9))
    for length in (32, 64, 128):
        longer = [[padded(x, length, 1) for x in layers] for layers in (students, teachers)]
        torch.testing.assert_close(losses.flow_of_solution(*longer, mask=mask_of(length)), value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ordered", [True, False])
def test_padding_does_not_change_the_layers_that_match(ordered: bool) -> None:
    students, teachers = torch.randn(4, 3, 9, 6), torch.randn(2, 3, 9, 6)
    value = losses.dynamic_layers(list(students), list(teachers), ordered=ordered, mask=mask_of(9))
    for length in (32, 64, 128):
        longer = [[padded(x, length, 1) for x in layers] for layers in (students, teachers)]
        got = losses.dynamic_layers(*longer, ordered=ordered, mask=mask_of(length))
        torch.testing.assert_close(got, value, rtol=1e-6, atol=0)


def test_infinite_scores_of_masked_keys_leave_the_gradient_finite() -> None:
    out = ~mask_of(9)[:, None, None, :]
    s, t = scores().requires_grad_(), scores().masked_fill(out, -torch.inf)
    for loss in (losses.attention_scores, losses.attention_cross_entropy, losses.attention_kl):
        value = loss(s.masked_fill(out, -torch.inf), t, mask=mask_of(9))
        assert value.isfinite()
        assert torch.autograd.grad(value, s)[0].isfinite().all()


def test_the_official_average_depends_on_the_padding_and_is_the_clip_of_masked_scores() -> None:
    s, t, mask = scores(), scores(), mask_of(9)
    official = losses.attention_scores(s, t, average="official", mask=mask)
    additive = torch.zeros(3, 1, 1, 9).masked_fill(~mask[:, None, None, :], -10000.0)
    torch.testing.assert_close(
        losses.attention_scores(s + additive, t + additive, clip=-100.0), official, rtol=1e-4, atol=0
    )
    by_hand = ((s - t).square() * mask[:, None, None, :]).sum() / s.numel()
    torch.testing.assert_close(official, by_hand)
    longer = [padded(x, 32, 2, 3) for x in (s, t)]
    assert not torch.isclose(losses.attention_scores(*longer, average="official", mask=mask_of(32)), official, rtol=0.1)
    everything = torch.ones(3, 9)
    torch.testing.assert_close(losses.attention_scores(s, t, average="official", mask=everything), F.mse_loss(s, t))
    assert losses.attention_scores(s, t, average="official", mask=0 * everything) == 0


def test_clip_sets_to_zero_on_both_sides() -> None:
    s, t = torch.tensor([[[[1.0, -3.0, -2.0, 4.0]]]]), torch.tensor([[[[2.0, -1.0, 3.0, -5.0]]]])
    assert losses.attention_scores(s, t, clip=-2.0).item() == pytest.approx((1 + 1 + 9 + 16) / 4)


def test_heads_of_different_number_are_compared_by_their_mean() -> None:
    s, t = scores(4), scores(6)
    torch.testing.assert_close(losses.attention_scores(s, t, heads="mean"), F.mse_loss(s.mean(1), t.mean(1)))
    p, q = s.mean(1).log_softmax(-1), t.mean(1).softmax(-1)
    torch.testing.assert_close(losses.attention_cross_entropy(s, t, heads="mean"), -(p * q).sum(-1).mean())
    for loss in (losses.attention_scores, losses.attention_cross_entropy, losses.attention_kl):
        with pytest.raises(ShapeError, match=r"the student has 4 heads and the teacher 6.*heads='mean'.*_relation`"):
            loss(s, t)


def test_attention_kl_is_the_cross_entropy_less_the_entropy_and_takes_probabilities() -> None:
    s, t, mask = scores().requires_grad_(), scores(), torch.ones(3, 9)
    entropy = losses.attention_cross_entropy(t, t)
    torch.testing.assert_close(losses.attention_kl(s, t), losses.attention_cross_entropy(s, t) - entropy)
    mask[:, 6:] = 0  # of one length, so that the mean over examples is that over queries
    out = mask[:, None, None, :] == 0
    p, q = (x.masked_fill(out, -1e4).softmax(-1) for x in (s, t))
    of_scores = losses.attention_kl(s, t, mask=mask)
    torch.testing.assert_close(losses.attention_kl(p, q, probabilities=True, mask=mask), of_scores)
    zero = torch.zeros(1, 1, 1, 2, requires_grad=True)
    value = losses.attention_kl(zero, torch.tensor([[[[0.0, 1.0]]]]), probabilities=True)
    assert value.isfinite()
    assert torch.autograd.grad(value, zero)[0].isfinite().all()


def test_the_softmax_over_all_keys_loses_what_falls_on_padding() -> None:
    s, t = scores(), scores()
    p, logp = t.softmax(-1), s.log_softmax(-1)
    mask = mask_of(9).float()
    rows = -(p * logp * mask[:, None, None, :]).sum(-1) * mask[:, None, :]
    by_hand = rows.sum() / (4 * mask.sum())
    torch.testing.assert_close(losses.attention_cross_entropy(s, t, keys="all", mask=mask), by_hand)
    additive = torch.zeros(3, 1, 1, 9).masked_fill(mask[:, None, None, :] == 0, -10000.0)
    both = [losses.attention_cross_entropy(s + additive, t + additive, keys=k, mask=mask) for k in ("all", "valid")]
    torch.testing.assert_close(*both)


def test_relations_by_hand_one_example_after_the_other() -> None:
    s, t = torch.randn(3, 4, 9, 6), torch.randn(3, 2, 9, 24)
    values = []
    for i, n in enumerate(LENGTHS.tolist()):
        p, q = (
            x[i, :, :n].transpose(0, 1).reshape(n, 8, -1).transpose(0, 1) for x in (s, t)
        )  # 8 relation heads of the concatenated heads
        p, q = (torch.log_softmax(x @ x.mT / x.shape[-1] ** 0.5, -1) for x in (p, q))
        values.append((q.exp() * (q - p)).sum(-1).mean())
    expected = torch.stack(values).mean()
    torch.testing.assert_close(losses.self_attention_relation(s, t, heads=8, mask=mask_of(9)), expected)
    own = losses.self_attention_relation(s, s + 1, mask=mask_of(9))  # their own heads: no new split
    torch.testing.assert_close(losses.self_attention_relation(s, s + 1, heads=4, mask=mask_of(9)), own)
    with pytest.raises(ShapeError, match=r"got 4 heads of the student and 2 of the teacher: say how many"):
        losses.self_attention_relation(s, t)
    with pytest.raises(ShapeError, match=r"cannot split 4 heads of size 6, 24 features, into 7 relation heads"):
        losses.self_attention_relation(s, t, heads=7)


def test_a_sample_without_tokens_is_no_example() -> None:
    s, t = torch.randn(3, 4, 9, 6), torch.randn(3, 4, 9, 6)
    mask = mask_of(9) & torch.tensor([[True], [True], [False]])
    kept = losses.self_attention_relation(s[:2], t[:2], mask=mask[:2])
    torch.testing.assert_close(losses.self_attention_relation(s, t, mask=mask), kept)
    torch.testing.assert_close(
        losses.self_attention_relation(s, t, mask=torch.tensor([1, 1, 0])),
        losses.self_attention_relation(s[:2], t[:2]),
    )


def test_layer_norm_without_parameters_and_the_statistics_it_forgets() -> None:
    s, t = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    unit = [(x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) for x in (s, t)]
    torch.testing.assert_close(losses.feature_map_transfer(s, t), F.mse_loss(*unit))
    assert losses.feature_map_transfer(s, 4 * s - 2).item() == pytest.approx(0, abs=1e-20)
    means = (s.mean(-1) - t.mean(-1)).square().mean()
    variances = (s.var(-1, correction=0) - t.var(-1, correction=0)).abs().mean()
    value = losses.feature_statistics(s, t, mean=5000.0, variance=5.0)
    torch.testing.assert_close(value, 5000 * means + 5 * variances)


def test_layers_that_match_keep_their_order() -> None:
    teachers = [torch.full((2, 3, 4), float(x)) for x in (1, 5, 9)]
    students = [torch.full((2, 3, 4), float(x)) for x in (9, 1, 5, 8)]
    # From the top: 9 -> the first of all, then nothing is below it.
    assert losses.dynamic_layers(students, teachers, ordered=False) == 0
    assert losses.dynamic_layers(students, teachers).item() == pytest.approx((64 + 16 + 0) / 3)
    students[0] = torch.zeros(2, 3, 4)  # now 9 -> 8, 5 -> 5, 1 -> 1
    assert losses.dynamic_layers(students, teachers).item() == pytest.approx((0 + 0 + 1) / 3)
    assert all(
        losses.dynamic_layers(students[:n], teachers) >= losses.dynamic_layers(students[:n], teachers, ordered=False)
        for n in (1, 2, 3, 4)
    )
    with pytest.raises(ShapeError, match="at least one of each"):
        losses.dynamic_layers([], teachers)
    with pytest.raises(ShapeError, match=r"`dynamic_layers` needs student and teacher tensors of one shape"):
        losses.dynamic_layers([students[0][..., :3]], teachers)


def test_cosine_nce_by_hand() -> None:
    s, t = torch.randn(4, 5), torch.randn(4, 5)

    def g(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a, b, dim=-1)

    rows = []
    for i in range(4):
        others = torch.stack([t[j] for j in range(4) if j != i])
        rows.append(1 + 1.5 * g(t[i], s[i]) - g(others, s[i]).mean() / 2)
    value = losses.cosine_nce(s, t)
    torch.testing.assert_close(value, torch.stack(rows).mean())
    negatives = torch.stack([t[[j for j in range(4) if j != i]] for i in range(4)])
    torch.testing.assert_close(losses.cosine_nce(s, t, negatives=negatives), value)
    torch.testing.assert_close(losses.cosine_nce(s[:1], t[:1]), g(s[0], t[0]))  # nothing to contrast with
    torch.testing.assert_close(losses.cosine_nce(s, t, negatives=negatives[:, :0]), losses.cosine(s, t))
    masked = losses.cosine_nce(s, t, mask=torch.tensor([1, 0, 1, 1]))
    torch.testing.assert_close(masked, losses.cosine_nce(s[[0, 2, 3]], t[[0, 2, 3]]))
    with pytest.raises(ShapeError, match=r"negatives of shape \(4, 3, 4\) for \(4, 5\)"):
        losses.cosine_nce(s, t, negatives=negatives[..., :4])


def test_similarities_of_tokens_and_flow_between_layers_by_hand() -> None:
    s, t = torch.randn(2, 3, 9, 6), torch.randn(2, 3, 9, 4)
    grams = [s[0] @ s[1].mT / 6, t[0] @ t[1].mT / 4]
    value = losses.token_similarity(list(s), list(t))
    torch.testing.assert_close(value, F.mse_loss(*grams))
    mask = mask_of(9)
    pairs = mask[:, None] & mask[:, :, None]
    by_hand = ((grams[0] - grams[1]).square() * pairs).sum() / (LENGTHS**2).sum()
    torch.testing.assert_close(losses.token_similarity(list(s), list(t), mask=mask), by_hand)
    one = losses.token_similarity([s[0], s[0]], [t[0], t[0]])
    torch.testing.assert_close(losses.token_similarity(s[0], t[0]), one)
    with pytest.raises(ShapeError, match="of one layer or of two"):
        losses.token_similarity([s[0]], [t[0]])
    t = torch.randn(2, 3, 9, 6)
    flows = [
        torch.stack([x[0, i, :n].T @ x[1, i, :n] / n for i, n in enumerate(LENGTHS.tolist())]) for x in (s, t)
    ]  # the inner products over the valid tokens
    torch.testing.assert_close(losses.flow_of_solution(list(s), list(t), mask=mask), F.mse_loss(*flows))
    with pytest.raises(ShapeError, match=r"or states \(batch, tokens, features\), got"):
        losses.flow_of_solution([s[0], s[0][..., None]], [t[0], t[0]])


def test_generalised_jsd_between_its_ends() -> None:
    s, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    options = {"temperature": 2.0}
    forward = losses.kl_divergence(s, t, **options)
    torch.testing.assert_close(losses.generalised_jsd(s, t, beta=0, **options), forward)
    reverse = losses.kl_divergence(s, t, direction="reverse", **options)
    torch.testing.assert_close(losses.generalised_jsd(s, t, beta=1, **options), reverse)
    middle = losses.kl_divergence(s, t, direction="jensen_shannon", **options)
    torch.testing.assert_close(losses.generalised_jsd(s, t, **options), middle)
    p, q = (s / 2).softmax(1), (t / 2).softmax(1)
    m = 0.3 * q + 0.7 * p
    by_hand = 0.3 * (q * (q / m).log()).sum(1) + 0.7 * (p * (p / m).log()).sum(1)
    torch.testing.assert_close(losses.generalised_jsd(s, t, beta=0.3, **options), 4 * by_hand.mean())
    for beta in (0.0, 0.3, 1.0):  # what a schedule gives a compiled graph
        got = losses.generalised_jsd(s, t, beta=torch.tensor(beta, dtype=torch.float64))
        torch.testing.assert_close(got, losses.generalised_jsd(s, t, beta=beta))
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\], got 1.5"):
        losses.generalised_jsd(s, t, beta=1.5)


def test_universal_logits_pairs_the_tokens_that_count_in_their_order() -> None:
    s, t = torch.randn(2, 6, 9), torch.randn(2, 5, 4)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]])
    others = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 0, 1]])

    def one(i: int, j: int, k: int) -> Tensor:
        p, q = (x.softmax(-1).sort(descending=True).values for x in (s[i, j], t[i, k]))
        return (p - F.pad(q, (0, 5))).abs().sum()

    by_hand = ((one(0, 1, 0) + one(0, 3, 2)) / 2 + one(1, 0, 2)) / 2
    torch.testing.assert_close(losses.universal_logits(s, t, teacher_mask=others, mask=mask), by_hand)
    plain = torch.stack([one(i, j, j) for i in range(2) for j in range(5)]).mean()  # without masks: in their places
    torch.testing.assert_close(losses.universal_logits(s, t), plain)
    with pytest.raises(ShapeError, match="got a mask of 6 tokens of the student; the teacher has 5"):
        losses.universal_logits(s, t, mask=mask)


def test_margins_and_rankings_of_candidates() -> None:
    query, candidates = torch.randn(4, 6), torch.randn(4, 3, 6)
    scores = candidate_scores(query, candidates)
    torch.testing.assert_close(scores, (query[:, None] * candidates).sum(-1))
    torch.testing.assert_close(candidate_scores(query, candidates.unbind(1)), scores)
    cosines = candidate_scores(query, candidates, normalise=True)
    torch.testing.assert_close(cosines, F.cosine_similarity(query[:, None], candidates, dim=-1))
    teacher = torch.randn(4, 3)
    margins = teacher[:, :1] - teacher[:, 1:]
    expected = F.mse_loss(scores[:, :1] - scores[:, 1:], margins)
    torch.testing.assert_close(losses.margin_mse(scores, teacher), expected)
    torch.testing.assert_close(losses.margin_mse(scores, margins), expected)
    one = losses.margin_mse(scores, teacher, mask=torch.tensor([[1, 0], [1, 0], [1, 0], [1, 0]]))
    torch.testing.assert_close(one, losses.margin_mse(scores[:, :2], teacher[:, :2]))
    with pytest.raises(ShapeError, match=r"or margins \(batch, negatives\) of the teacher"):
        losses.margin_mse(scores, torch.randn(4, 1))
    with pytest.raises(ShapeError, match=r"`candidate_scores` needs queries \(batch, features\)"):
        candidate_scores(query, candidates[..., :5])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: losses.attention_scores(x, x, heads="sum"), "`heads` is 'each' or 'mean', got 'sum'."),
        (lambda x: losses.attention_scores(x, x, average="all"), "`average` is 'valid' or 'official', got 'all'."),
        (lambda x: losses.attention_cross_entropy(x, x, keys="some"), "`keys` is 'valid' or 'all', got 'some'."),
    ],
)
def test_options_are_refused_in_sentences(call: Callable[[Tensor], Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(scores())
