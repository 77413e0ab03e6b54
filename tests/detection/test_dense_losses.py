"""Losses on dense predictions, and the regions of localization distillation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.detection.methods.crosskd import standardise_like
from taskkd.detection.methods.dense_losses import box_overlap, distribution_kl, quality_focal
from taskkd.detection.methods.localization import ld_terms
from taskkd.detection.methods.localization_features import Normalise, region_imitation
from taskkd.detection.methods.vlr import assign_atss, fine_grained_region, inside_region, square_anchors, vlr_weights
from taskkd.errors import ShapeError

LOSSES: list[tuple[Callable[..., Tensor], int]] = [(quality_focal, 3), (distribution_kl, 5), (box_overlap, 4)]
IDS = [loss.__name__ for loss, _ in LOSSES]


def random(loss: Callable[..., Tensor], width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, 6, width) logits, or boxes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 6, width, generator=generator, dtype=torch.float64)
    if loss is box_overlap:
        x = torch.cat([x[..., :2], x[..., :2] + 1 + x[..., 2:].abs()], -1)
    return x.to(dtype)


@pytest.mark.parametrize(("loss", "width"), LOSSES, ids=IDS)
def test_gradients_are_right(loss: Callable[..., Tensor], width: int) -> None:
    s, t = random(loss, width).requires_grad_(), random(loss, width, 1)
    weights = torch.rand(2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, t, weights=weights), s)
    assert torch.autograd.gradcheck(lambda x: loss(x, t, divisor=7.0), s)


@pytest.mark.parametrize(("loss", "width"), LOSSES, ids=IDS)
def test_the_reduction_is_a_mean_over_what_counts(loss: Callable[..., Tensor], width: int) -> None:
    s, t = random(loss, width), random(loss, width, 1)
    weights = torch.rand(2, 6, dtype=torch.float64)
    once, twice = loss(s, t, weights=weights), loss(s.repeat(2, 1, 1), t.repeat(2, 1, 1), weights=weights.repeat(2, 1))
    assert math.isclose(once, twice, rel_tol=1e-9)
    assert math.isclose(once, loss(s, t, weights=weights, divisor=weights.sum()), rel_tol=1e-9)
    assert math.isclose(loss(s, t), loss(s, t, divisor=12), rel_tol=1e-9)
    padded = [torch.cat([x, torch.full_like(x, number)], 1) for x, number in ((s, 1e30), (t, -1e30))]
    value = loss(padded[0].requires_grad_(), padded[1], weights=torch.cat([weights, torch.zeros_like(weights)], 1))
    assert math.isclose(value.item(), once, rel_tol=1e-12)  # but for the order of the sum
    value.backward()
    assert padded[0].grad is not None and bool((padded[0].grad[:, 6:] == 0).all())


@pytest.mark.parametrize(("loss", "width"), LOSSES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(loss: Callable[..., Tensor], width: int, dtype: torch.dtype) -> None:
    s, t = random(loss, width, dtype=dtype), random(loss, width, 1, dtype=dtype)
    value = loss(s, t)
    assert value.dtype == torch.float32
    assert math.isclose(value, loss(s.double(), t.double()), rel_tol=1e-4)


@pytest.mark.parametrize(("loss", "width"), LOSSES, ids=IDS)
def test_nothing_gives_nothing(loss: Callable[..., Tensor], width: int) -> None:
    s = random(loss, width).requires_grad_()
    for value in (loss(s, s.detach() + 1, weights=torch.zeros(2, 6)), loss(s[:0], s[:0].detach())):
        assert value == 0
        value.backward()
    assert s.grad is not None and bool((s.grad == 0).all())
    with pytest.raises(ShapeError, match=r"of one shape"):
        loss(s, s[:1])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_factor(beta: float) -> None:
    s, t = random(quality_focal, 3).requires_grad_(), random(quality_focal, 3, 1)
    want = torch.zeros((), dtype=torch.float64)
    for own, other in zip(s.flatten(), t.flatten(), strict=True):
        p, q = own.sigmoid(), other.sigmoid()
        want = want + (p - q).abs() ** beta * -(q * p.log() + (1 - q) * (1 - p).log())
    assert math.isclose(quality_focal(s, t, beta=beta, divisor=1).item(), want.item(), rel_tol=1e-9)
    equal = quality_focal(s, s.detach(), beta=beta)
    equal.backward()
    assert s.grad is not None and bool(s.grad.isfinite().all())
    assert (equal == 0) == (beta > 0)


def test_options_out_of_range_say_so() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"`beta` must not be negative, got -1"):
        quality_focal(x, x, beta=-1)
    with pytest.raises(ValueError, match=r"`temperature` must be positive, got 0"):
        distribution_kl(x, x, temperature=0)
    with pytest.raises(ValueError, match=r"`bins` must be 'mean' or 'sum', got 'max'"):
        distribution_kl(x, x, bins="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`kind` must be 'giou' or 'iou', got 'diou'"):
        box_overlap(x, x, kind="diou")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"needs boxes \(..., 4\), got \(2, 3\)"):
        box_overlap(x[:, :3], x[:, :3])


def test_overlap_of_boxes_that_do_not_touch_or_have_no_area() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [2, 2, 2, 2]], requires_grad=True)
    for kind in ("giou", "iou"):
        value = box_overlap(boxes, boxes.detach().flip(0), kind=kind)  # type: ignore[arg-type]
        value.backward()
        assert value > 1
    assert boxes.grad is not None and bool(boxes.grad.isfinite().all())
    same = boxes[:2].detach()
    assert box_overlap(same, same) < 1e-6
    assert box_overlap(same, same, kind="iou") == 0


# ---- CrossKD's alignment


def test_the_student_takes_on_the_teachers_moments() -> None:
    s, t = torch.randn(2, 3, 4, 5) * 7 + 2, torch.randn(2, 3, 4, 5)
    aligned = standardise_like(s, t)
    for channel in range(3):
        assert torch.allclose(aligned[:, channel].mean(), t[:, channel].mean(), atol=1e-5)
        assert torch.allclose(aligned[:, channel].std(), t[:, channel].std(), atol=1e-5)


def test_the_gradient_of_the_alignment_is_right() -> None:
    s, t = (torch.randn(2, 4, 5, 6, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: standardise_like(x, t), s.requires_grad_(), fast_mode=True)


def test_a_single_cell_and_a_constant_map_are_finite() -> None:
    for shape in ((1, 2, 1, 1), (2, 2, 3, 3)):
        s = torch.ones(shape, requires_grad=True)
        aligned = standardise_like(s, torch.full(shape, 3.0))
        aligned.sum().backward()
        assert torch.equal(aligned, torch.full(shape, 3.0))
        assert s.grad is not None and bool(s.grad.isfinite().all())


# ---- regions


def anchors() -> tuple[Tensor, list[int]]:
    shapes = [(8, 8), (4, 4), (2, 2)]
    return square_anchors(shapes, [8, 16, 32]), [h * w for h, w in shapes]


def test_anchors_are_squares_at_the_cells() -> None:
    found = square_anchors([(1, 2)], [8], scale=4.0)
    assert found.tolist() == [[-16, -16, 16, 16], [-8, -16, 24, 16]]


def test_no_boxes_are_nowhere() -> None:
    found, sizes = anchors()
    none = torch.zeros(0, 4)
    assert bool((assign_atss(found, none, sizes) == -1).all())
    for region in (vlr_weights(found, none, sizes), fine_grained_region(found, none), inside_region(found, none)):
        assert region.shape == (84,) and not region.any()


def test_regions_by_loops() -> None:
    found, sizes = anchors()
    boxes = torch.tensor([[4.0, 6, 60, 50], [20, 20, 45, 60]])
    expected, weights = torch.full((84,), -1), torch.zeros(84)
    best = torch.zeros(84)
    for index, box in enumerate(boxes.tolist()):
        ious = [iou(a, box) for a in found.tolist()]
        near: list[int] = []
        for start, size in zip((0, 64, 80), sizes, strict=True):
            order = sorted(range(start, start + size), key=lambda i: math.dist(centre(found[i].tolist()), centre(box)))
            near += order[:9]
        own = torch.tensor([ious[i] for i in near])
        threshold = (own.mean() + own.std()).item()
        for i, anchor in enumerate(found.tolist()):
            x, y = centre(anchor)
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if i in near and ious[i] >= threshold and inside and ious[i] > best[i]:
                expected[i], best[i] = index, ious[i]
            wide, high = (max(anchor[k + 2], box[k + 2]) - min(anchor[k], box[k]) for k in (0, 1))
            diou = ious[i] - math.dist((x, y), centre(box)) ** 2 / (wide**2 + high**2)
            if 0.25 * threshold <= diou < threshold:
                weights[i] = max(weights[i].item(), ious[i])
    assert torch.equal(assign_atss(found, boxes, sizes), expected)
    assert (expected >= 0).sum() > 2
    assert torch.allclose(vlr_weights(found, boxes, sizes), weights, atol=1e-6)
    assert not torch.allclose(vlr_weights(found, boxes, sizes, legacy_iof=True), weights, atol=1e-3)


def centre(box: list[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def iou(a: list[float], b: list[float]) -> float:
    wide, high = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return wide * high / (areas[0] + areas[1] - wide * high)


def test_levels_that_are_not_the_anchors_say_so() -> None:
    with pytest.raises(ShapeError, match=r"levels of \[64, 16\] anchors are not the 84"):
        assign_atss(anchors()[0], torch.tensor([[0.0, 0, 9, 9]]), [64, 16])


# ---- LD


def inputs(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2, 6, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    sides = [torch.randn(2, 6, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [*logits, *sides]


def test_ld_is_a_mean_and_the_authors_a_sum() -> None:
    values = inputs()
    positive, vlr = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.float64)
    positive[0, :2], vlr[1, 3:] = True, torch.tensor([0.25, 0.0, 0.5])
    ours, theirs = (
        [ld_terms(*(v.repeat(n, *[1] * (v.ndim - 1)) for v in values), positive=positive.repeat(n, 1),
                  vlr=vlr.repeat(n, 1), normalise=normalise) for n in (1, 2)]
        for normalise in ("sum_w", "authors")
    )  # fmt: skip
    for part in ("ld", "ld_vlr", "kd"):
        assert math.isclose(ours[0][part], ours[1][part], rel_tol=1e-9)
        factor = 1 if part == "kd" else 2
        assert math.isclose(theirs[1][part], factor * theirs[0][part], rel_tol=1e-9)
    certain = values[0].sigmoid().amax(-1)[positive].sum()
    assert math.isclose(theirs[0]["ld"], certain * ours[0]["ld"], rel_tol=1e-9)
    assert math.isclose(theirs[0]["ld_vlr"], 0.75 * ours[0]["ld_vlr"], rel_tol=1e-9)


def test_ld_of_nothing_is_exactly_zero_with_a_gradient_path() -> None:
    values = [v.requires_grad_() for v in inputs()]
    found = ld_terms(*values, positive=torch.zeros(2, 6, dtype=torch.bool), vlr=torch.zeros(2, 6))
    total = sum(found.values(), torch.zeros(()))
    total.backward()
    assert total == 0
    assert F.mse_loss(values[0].grad, torch.zeros(2, 6, 3)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("normalise", ["sum_w", "authors"])
def test_imitation_in_a_region(normalise: Normalise) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [
        [torch.randn(2, 4, *size, generator=generator, dtype=torch.float64) for size in ((5, 6), (2, 3))] for _ in "st"
    ]
    regions = [torch.rand(2, *size, generator=generator) > 0.5 for size in ((5, 6), (2, 3))]

    def loss(*students: Tensor) -> Tensor:
        return region_imitation(list(students), maps[1], regions=regions, normalise=normalise)

    students = [s.requires_grad_() for s in maps[0]]
    assert torch.autograd.gradcheck(loss, students)
    none = region_imitation(students, maps[1], regions=[torch.zeros_like(r) for r in regions], normalise=normalise)
    none.backward()
    assert none.item() == 0
    assert all(bool((s.grad == 0).all()) for s in students)  # type: ignore[union-attr]
    far = [s.detach().masked_fill(~r[:, None], 1e30) for s, r in zip(students, regions, strict=True)]
    torch.testing.assert_close(loss(*far), loss(*students).detach())
    with pytest.raises(ShapeError):
        region_imitation(students[0], maps[1][1], regions=regions[0])
