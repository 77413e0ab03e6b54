"""Relations between pixels, classes, channels and layers: the losses, in float64 against their plain forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.generation import conv_generator, masked_generative_loss
from taskkd.segmentation.methods.af_dcd import kept_border, omni_contrastive
from taskkd.segmentation.methods.dsd import category_similarity, residual_attention
from taskkd.segmentation.methods.ifvd import class_means, intra_class_variation
from taskkd.segmentation.similarity import average_pool, cross_image_similarity, queue_similarity, similarity_kl

Loss = Callable[..., Tensor]
SHAPE = (2, 8, 9, 7)
LABELS = (torch.arange(2 * 9 * 7).reshape(2, 9, 7) // 11) % 3


def maps(
    shape: tuple[int, ...] = SHAPE, channels: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    s = torch.randn(shape, dtype=dtype, requires_grad=True)
    return s, torch.randn(shape[0], channels or shape[1], *shape[2:], dtype=dtype)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


def same(got: Tensor, want: Tensor, of: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient(got, of), gradient(want, of), rtol=1e-9, atol=1e-13)


def ifv(s: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
    labels = LABELS[:1].repeat(len(s), 1, 1) if len(s) != 2 else LABELS
    labels = labels[:, : s.shape[2]]
    known = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    return intra_class_variation(s, t, labels=labels.masked_fill(~known, 255), classes=3)


def two_layers(s: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
    return residual_attention([s[:, :3], s[:, 3:]], [t[:, :5], t[:, 5:]], mask=mask)


def generation(s: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
    torch.manual_seed(1)
    generator, kept = conv_generator(s.shape[1]).to(s.dtype), torch.ones_like(s[:, :1])
    return masked_generative_loss(s, t, generator=generator, kept=kept, mask=mask)


LOSSES: dict[str, Loss] = {
    "ifv": ifv,
    "images": cross_image_similarity,
    "images pooled": partial(cross_image_similarity, pool=2),
    "layers": two_layers,
    "categories": category_similarity,
    "generation": generation,
    "contrast": partial(omni_contrastive, groups=4, pool=2, patch=2, temperature=1.0),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
class TestEveryLoss:
    """What holds for all of them."""

    def test_doubling_the_batch_changes_nothing(self, loss: Loss) -> None:
        s, t = maps((1, *SHAPE[1:]))
        torch.testing.assert_close(loss(s, t), loss(s.repeat(4, 1, 1, 1), t.repeat(4, 1, 1, 1)))

    def test_what_is_left_out_changes_nothing(self, loss: Loss) -> None:
        s, t = maps()
        mask = torch.ones(2, 9, 7, dtype=torch.bool)
        mask[0, 4:] = False
        changed = s.detach().clone()
        changed[0, :, 4:] = 1e3
        changed.requires_grad_()
        assert loss(changed, t, mask=mask) == loss(s, t, mask=mask)
        given = gradient(loss(changed, t, mask=mask), changed)
        assert given[0, :, 4:].abs().max() == 0
        assert given[0, :, :4].abs().max() > 0

    def test_it_is_finite_and_0_where_nothing_counts(self, loss: Loss) -> None:
        s, t = maps()
        value = loss(s, t, mask=torch.zeros(2, 9, 7, dtype=torch.bool))
        assert value == 0
        assert gradient(value, s).abs().max() == 0
        flat = torch.zeros_like(s).requires_grad_()
        assert gradient(loss(flat, torch.zeros_like(t)), flat).isfinite().all()

    def test_half_precision_is_computed_in_full(self, loss: Loss) -> None:
        s, t = maps(dtype=torch.float32)
        half = s.detach().half().requires_grad_(), t.half()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(*half) if loss is not generation else generation(half[0].float(), half[1].float())
        torch.testing.assert_close(value, loss(half[0].float(), half[1].float()), rtol=1e-5, atol=1e-7)


# ---- similarities


def dense(s: Tensor, t: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """All pairs of images one after the other, each with its whole matrix."""
    keep = torch.ones(len(s), s[0, 0].numel(), dtype=torch.bool) if mask is None else mask.flatten(1)
    s, t = (F.normalize(x, dim=1).flatten(2) for x in (s, t))
    total, rows = s.new_zeros(()), 0
    for i, j in itertools.product(range(len(s)), repeat=2):
        if not keep[j].any():
            continue
        logs = [(x[i][:, keep[i]].T @ x[j][:, keep[j]] / temperature).log_softmax(1) for x in (s, t)]
        total = total + F.kl_div(logs[0], logs[1], log_target=True, reduction="sum")
        rows += int(keep[i].sum())
    return total / rows


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_rows_equal_the_whole_matrix(masked: bool) -> None:
    s, t = maps((3, 8, 5, 7), channels=5)
    mask = torch.rand(3, 5, 7) > 0.4 if masked else None
    if mask is not None:
        mask[1] = False
    same(cross_image_similarity(s, t, temperature=0.3, mask=mask), dense(s, t, 0.3, mask), s)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_the_size_of_a_block_changes_nothing(block: int) -> None:
    torch.manual_seed(0)
    rows, columns = (torch.randn(20, 4).double().requires_grad_(), torch.randn(2, 6, 4).double().requires_grad_())
    others = torch.randn(20, 3).double(), torch.randn(2, 6, 3).double()
    loss = partial(similarity_kl, teacher=others, temperature=1.0, mask=torch.rand(20), block=block)
    assert torch.autograd.gradcheck(lambda a, b: loss((a, b)), (rows, columns))


def test_pooling_is_of_pixels_that_count() -> None:
    x, mask = torch.arange(12.0).reshape(1, 1, 3, 4), torch.ones(1, 3, 4, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 2, 2] = mask[0, 2, 3] = False
    small, counts = average_pool(x, 2, mask)
    torch.testing.assert_close(small.flatten(), torch.tensor([10 / 3, 4.5, 8.5, 0.0]))
    assert counts is not None
    assert counts.flatten().tolist() == [True, True, True, False]
    assert torch.equal(average_pool(x, 2)[0], F.avg_pool2d(x, 2, ceil_mode=True))


def test_large_maps_are_pooled_by_themselves() -> None:
    s, t = maps((1, 2, 130, 70), dtype=torch.float32)
    both = [cross_image_similarity(s, t, pool=pool) for pool in (None, 2)]
    assert both[0] == both[1]


def test_a_queue_is_compared_as_by_a_dense_softmax() -> None:
    torch.manual_seed(0)
    rows, others, queue = (torch.randn(n, 4).double() for n in (9, 9, 13))
    rows.requires_grad_()
    logs = [(x @ queue.T / 0.4).log_softmax(1) for x in (rows, others)]
    want = F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean") * 4
    same(queue_similarity(rows, others, queue=queue, temperature=0.2, kd_temperature=2.0), want, rows)


def test_no_rows_give_0_with_a_gradient() -> None:
    rows = torch.zeros(0, 4, requires_grad=True)
    value = queue_similarity(rows, torch.zeros(0, 4), queue=torch.randn(3, 4))
    assert value == 0
    assert gradient(value, rows).shape == (0, 4)


# ---- intra-class variation


def by_loop(s: Tensor, t: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Class after class, ignored pixels counted."""
    cosines = []
    for x in (s, t):
        centre = x.clone()
        for n, k in itertools.product(range(len(x)), range(classes)):
            of = labels[n] == k
            if of.any():
                mean = x[n][:, of].sum(1, keepdim=True) / (of.sum() + 1e-6)
                centre = centre.index_put((torch.tensor(n), *_columns(of, x.shape[1])), mean.expand(-1, int(of.sum())))
        cosines.append(F.cosine_similarity(x, centre, dim=1))
    return F.mse_loss(*cosines)


def _columns(of: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    y, x = of.nonzero(as_tuple=True)
    return torch.arange(channels)[:, None], y[None], x[None]


def test_variation_equals_a_loop_over_classes() -> None:
    s, t = maps(channels=5)
    labels = LABELS.clone()
    labels[0, :2] = 255
    labels[1] = labels[1].masked_fill(labels[1] == 2, 255)  # a class that an image does not have
    every = torch.ones_like(labels, dtype=torch.bool)
    same(intra_class_variation(s, t, labels=labels, classes=3, mask=every), by_loop(s, t, labels, 3), s)
    known = labels < 3
    left_out = intra_class_variation(s, t, labels=labels, classes=3)
    torch.testing.assert_close(left_out, by_loop(s, t, labels, 3) * known.numel() / known.sum())


def test_variation_of_one_class_and_of_none() -> None:
    s, t = maps()
    for label, zero in ((0, False), (255, True), (-1, True), (3, True)):
        value = intra_class_variation(s, t, labels=torch.full((2, 9, 7), label), classes=3)
        assert value.isfinite()
        assert (value == 0) == zero
        assert gradient(value, s).isfinite().all()
    means, count = class_means(s, torch.full((2, 9, 7), 1), 3)
    torch.testing.assert_close(means[:, 1], s.mean((2, 3)))
    assert means[:, [0, 2]].abs().max() == 0
    assert count.tolist() == [[0, 63, 0]] * 2


def test_labels_of_another_size_are_refused() -> None:
    s, t = maps()
    with pytest.raises(ShapeError, match="labels"):
        intra_class_variation(s, t, labels=LABELS[:, :4], classes=3)


# ---- contrast


def test_contrast_equals_a_loop() -> None:
    s, t = maps((1, 6, 4, 4))
    options: dict[str, Any] = {"groups": 3, "pool": 1, "patch": 2, "temperature": 0.5}
    terms = []
    for y, x in itertools.product((0, 2), repeat=2):
        cells = [(y + i, x + j) for i, j in itertools.product(range(2), repeat=2)]
        own = {(c, g): [m[0, 2 * g : 2 * g + 2, c[0], c[1]] for m in (s, t)] for c in cells for g in range(3)}
        for (cell, group), (of, _) in own.items():
            scores = [
                -(of - other).abs().sum() / 0.5
                for (c, g), (_, other) in own.items()
                if (c, g) == (cell, group) or g != group
            ]
            terms.append(torch.stack(scores).logsumexp(0) + (of - own[cell, group][1]).abs().sum() / 0.5)
    same(omni_contrastive(s, t, **options), torch.stack(terms).mean(), s)


def test_contrast_takes_maps_of_any_size_and_names_the_groups() -> None:
    for size in ((1, 1), (3, 17), (18, 23)):
        s, t = maps((1, 6, *size))
        value = omni_contrastive(s, t, groups=3)
        assert value.isfinite()
        assert gradient(value, s).isfinite().all()
    with pytest.raises(ShapeError, match=r"6 channels into 4 groups; expected a divisor of 6, as 3"):
        omni_contrastive(s, t, groups=4)


def test_the_middle_ninth_is_masked() -> None:
    kept = kept_border(torch.zeros(2, 5, 9, 9))
    assert kept.shape == (2, 1, 9, 9)
    assert (kept == 0).sum() == 2 * 9
    assert kept[:, :, 3:6, 3:6].sum() == 0


# ---- layers


def test_layers_of_several_sizes_are_compared_at_the_smallest() -> None:
    torch.manual_seed(0)
    sizes = ((3, 12, 16), (4, 6, 8), (5, 7, 5))
    own = [torch.randn(2, *size, requires_grad=True) for size in sizes]
    value = residual_attention(own, [torch.randn(2, 2 * c, h, w) for c, h, w in sizes])
    assert value > 0
    assert all(gradient(value, x).abs().sum() > 0 for x in own[:1])
    assert residual_attention(own, own) == 0
    with pytest.raises(ShapeError, match="at least two"):
        residual_attention(own[:1], own[:1])
