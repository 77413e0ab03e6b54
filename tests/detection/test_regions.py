"""Masks from boxes equal what loops over boxes give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from taskkd.detection.regions import assign_levels, box_sums, fgd_masks, fgfi_masks, inside_boxes

HEIGHT, WIDTH = 96, 160
STRIDES = [4, 8, 16, 32]
SHAPES = [(HEIGHT // s, WIDTH // s) for s in STRIDES]


def random_boxes(counts: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        centres = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
        sizes = torch.rand(count, 2, generator=generator) ** 2 * 120 + 0.5
        boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], 1)
        limit = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
        found.append(torch.minimum(boxes.clamp(min=0), limit))
    return found


def anchors_of(sizes: tuple[int, ...] = (8, 32, 64, 128)) -> list[Tensor]:
    generator = AnchorGenerator(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
    images = ImageList(torch.zeros(1, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)])
    anchors = generator(images, [torch.zeros(1, 1, *s) for s in SHAPES])[0]
    return list(anchors.split([h * w * 3 for h, w in SHAPES]))


def fgfi_by_loops(boxes: list[Tensor], anchors: list[Tensor], psi: float, assign: bool) -> list[Tensor]:
    masks = [torch.zeros(len(boxes), *s, dtype=torch.bool) for s in SHAPES]
    for n, own in enumerate(boxes):
        ious = [box_iou(a, own) for a in anchors]
        for j, level in enumerate(assign_levels(own, len(SHAPES)).tolist()):
            for i, iou in enumerate(ious):
                if assign and level != i:
                    continue
                best = iou[:, j].max() if assign else max(x[:, j].max() for x in ious)
                masks[i][n] |= (iou[:, j] > psi * best).view(*SHAPES[i], -1).any(-1)
    return masks


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("psi", [0.5, 0.2])
def test_fgfi_masks_are_those_of_all_overlaps(assign: bool, psi: float) -> None:
    for seed in range(4):
        boxes = random_boxes((6, 0, 13), seed)
        found = fgfi_masks(boxes, anchors_of(), SHAPES, psi=psi, assign=assign)
        for mask, expected in zip(found, fgfi_by_loops(boxes, anchors_of(), psi, assign), strict=True):
            assert torch.equal(mask, expected)


def test_fgfi_of_pixels_that_have_a_width() -> None:
    boxes, anchors = random_boxes((5,)), anchors_of()
    wider = [torch.cat([b[:, :2], b[:, 2:] + 1], 1) for b in (*boxes, *anchors)]
    found = fgfi_masks(boxes, anchors, SHAPES, plus_one=True, assign=False)
    for mask, expected in zip(found, fgfi_by_loops(wider[:1], wider[1:], 0.5, False), strict=True):
        assert torch.equal(mask, expected)


def fgd_by_loops(boxes: list[Tensor], shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    mask = torch.zeros(len(boxes), *shape)
    for n, own in enumerate(boxes):
        for x1, y1, x2, y2 in own.tolist():
            left, right = math.floor(x1 / size[1] * shape[1]), math.ceil(x2 / size[1] * shape[1])
            top, bottom = math.floor(y1 / size[0] * shape[0]), math.ceil(y2 / size[0] * shape[0])
            part = mask[n, top : bottom + 1, left : right + 1]
            part.clamp_(min=1.0 / ((bottom + 1 - top) * (right + 1 - left)))
    return mask


@pytest.mark.parametrize("counts", [(5, 0, 17), (150, 61)], ids=str)
def test_fgd_masks_are_those_of_loops(counts: tuple[int, ...]) -> None:
    boxes = random_boxes(counts)
    masks = fgd_masks(boxes, SHAPES, [(HEIGHT, WIDTH)] * len(boxes))
    for shape, (foreground, background) in zip(SHAPES, masks, strict=True):
        torch.testing.assert_close(foreground, fgd_by_loops(boxes, shape, (HEIGHT, WIDTH)))
        assert not ((foreground > 0) & (background > 0)).any()
        for own, other in zip(foreground, background, strict=True):
            assert other.sum().item() == pytest.approx(1.0 if (own == 0).any() else 0.0, abs=1e-5)


def test_fgd_masks_follow_the_size_that_is_given() -> None:
    box = [torch.tensor([[0.0, 0.0, 40.0, 40.0]])]
    ((padded, _),) = fgd_masks(box, [(8, 8)], [(64, 64)])
    ((authors, _),) = fgd_masks(box, [(8, 8)], [(40, 40)])
    assert (padded > 0).sum() == 6 * 6
    assert (authors > 0).all()  # the image without padding: the box is stretched over the padding


def test_a_box_covers_one_cell_at_least_and_only_its_own_level() -> None:
    boxes = [torch.tensor([[9.0, 17.0, 10.0, 18.0], [0.0, 0.0, 120.0, 96.0]]), torch.zeros(0, 4)]
    assert assign_levels(boxes[0], 4).tolist() == [0, 0]
    assert assign_levels(boxes[0], 4, finest=10.0).tolist() == [0, 3]
    masks = inside_boxes(boxes, SHAPES, [(s, s) for s in STRIDES], finest=10.0)
    assert [int(m.sum()) for m in masks] == [1, 0, 0, 3 * 3]
    assert masks[0][0, 4, 2]
    assert not any(m[1].any() for m in masks)


def test_sums_in_boxes_are_those_of_crops_and_carry_gradient() -> None:
    values = torch.rand(2, *SHAPES[0], dtype=torch.float64, requires_grad=True)
    boxes = random_boxes((3, 4))
    sums, cells = box_sums(values, boxes, (4, 4))
    crops = []
    for n, own in enumerate(boxes):
        for x1, y1, x2, y2 in (own / 4).trunc().long().tolist():
            crops.append(values[n, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)])
    torch.testing.assert_close(sums, torch.stack([c.sum() for c in crops]))
    assert cells.tolist() == [c.numel() for c in crops]
    sums.sum().backward()
    assert values.grad is not None
    expected = sum(inside_boxes([b[i : i + 1]], SHAPES[:1], [(4, 4)])[0].sum() for b in boxes for i in range(len(b)))
    assert values.grad.sum().item() == expected


def test_no_boxes_anywhere() -> None:
    boxes = [torch.zeros(0, 4), torch.zeros(0, 4)]
    strides = [(float(s), float(s)) for s in STRIDES]
    masks = [*fgfi_masks(boxes, anchors_of(), SHAPES), *inside_boxes(boxes, SHAPES, strides)]
    assert not any(m.any() for m in masks)
    ((foreground, background),) = fgd_masks(boxes, [(4, 5)], [(HEIGHT, WIDTH)] * 2)
    assert not foreground.any()
    torch.testing.assert_close(background, torch.full((2, 4, 5), 1 / 20))
