"""Where on a feature map the objects are: masks from ground truth boxes, without loops over boxes or images.

Boxes are lists of (n, 4), x1 y1 x2 y2 in pixels of the padded batch; n may be 0. A cell of a map (h, w) covers `stride`
pixels: height over h and width over w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = [
    "assign_levels",
    "box_sums",
    "fgd_masks",
    "fgfi_masks",
    "inside_boxes",
    "pad_boxes",
]

Shape = tuple[int, int]
#: of rows and of columns, in pixels
Stride = tuple[float, float]
#: boxes that are ranked at once, each a bit of a double
BITS = 52


def pad_boxes(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The boxes of all images in one tensor.

    Returns:
        (N, n, 4), n the most that an image has, zero where an image has fewer; and (N, n), which are boxes.
    """
    counts = torch.tensor([len(b) for b in boxes], device=boxes[0].device)
    padded = pad_sequence([b.detach() for b in boxes], batch_first=True)
    return padded, torch.arange(padded.shape[1], device=counts.device) < counts[:, None]


def assign_levels(boxes: Tensor, levels: int, *, finest: float = 56.0) -> Tensor:
    """The one level that each box belongs to, `floor(log2(sqrt(area) / finest))`, 0 to `levels - 1`.

    Source: Lin et al. 2017 (FPN) as in Guo et al. 2021 (DeFeat), whose widths and heights are a pixel larger.

    Args:
        boxes: (..., 4).
        levels: their number.
        finest: the size of a box, in pixels, from which on it leaves the finest level; twice that is the next step.

    Returns:
        (...,) int64.
    """
    width, height = boxes[..., 2] - boxes[..., 0] + 1, boxes[..., 3] - boxes[..., 1] + 1
    scale = (width * height).clamp(min=0).sqrt()
    return (scale / finest + 1e-6).log2().floor().clamp(0, levels - 1).long()


# ---- rectangles of cells


def _covered(low: Tensor, high: Tensor, weight: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """(N, h, w) of each level, the sums of the weights of the rectangles that cover a cell, in the weights' precision.

    A rectangle adds its weight at two corners and takes it away at two, then rows and columns are summed up: the price
    does not depend on its size.

    Args:
        low, high: (levels, N, n, 2), x y: the first cell and the one after the last.
        weight: (levels, N, n).
        shapes: (h, w) of the levels.
    """
    images = weight.shape[1]
    limit = torch.tensor([[w, h] for h, w in shapes], device=low.device)[:, None, None]
    low = torch.minimum(low.clamp(min=0), limit)
    high = torch.maximum(torch.minimum(high, limit), low)
    (x1, y1), (x2, y2) = low.unbind(-1), high.unbind(-1)
    sizes = [(h + 1) * (w + 1) for h, w in shapes]
    starts = [images * sum(sizes[:i]) + n * size for i, size in enumerate(sizes) for n in range(images)]
    start, row = torch.tensor(starts, device=low.device).view(-1, images, 1), limit[..., 0] + 1
    corners = torch.stack([start + y * row + x for x, y in ((x1, y1), (x2, y2), (x1, y2), (x2, y1))])
    signed = torch.stack([weight, weight, -weight, -weight])
    steps = weight.new_zeros(images * sum(sizes)).index_add_(0, corners.flatten(), signed.flatten())
    each = torch.split(steps, [images * size for size in sizes])
    return [x.view(images, h + 1, w + 1)[:, :h, :w].cumsum(1).cumsum(2) for x, (h, w) in zip(each, shapes, strict=True)]


def _cells(boxes: Tensor, strides: Sequence[Stride]) -> tuple[Tensor, Tensor]:
    """First cell and the one after the last, (levels, N, n, 2), x y, of boxes (N, n, 4): truncated, at least one."""
    by = boxes.new_tensor([[x, y, x, y] for y, x in strides])[:, None, None]
    cells = (boxes / by).long()
    return cells[..., :2], torch.maximum(cells[..., 2:], cells[..., :2] + 1)


@torch.no_grad()
def inside_boxes(
    boxes: Sequence[Tensor], shapes: Sequence[Shape], strides: Sequence[Stride], *, finest: float | None = None
) -> list[Tensor]:
    """(N, h, w) bool of each level: the cells in a box, `int(x1 / stride)` to before `int(x2 / stride)`, at least one.

    Args:
        boxes: of each image (n, 4).
        shapes, strides: of the levels, finest first.
        finest: each box counts on the one level that `assign_levels` gives it, as in Guo et al. 2021 (DeFeat), whose
            value is 56; None: on all.
    """
    padded, valid = pad_boxes(boxes)
    weights = valid.float().expand(len(shapes), -1, -1)
    if finest is not None:
        belongs = assign_levels(padded, len(shapes), finest=finest)
        weights = weights * (belongs == torch.arange(len(shapes), device=padded.device)[:, None, None])
    return [covered > 0 for covered in _covered(*_cells(padded, strides), weights, shapes)]


@torch.no_grad()
def box_sums(values: Tensor, boxes: Sequence[Tensor], stride: Stride) -> tuple[Tensor, Tensor]:
    """The sums of a map's values in boxes, of all images together, and the numbers of their cells.

    Args:
        values: (N, h, w); the sums carry gradient to it.
        boxes: of each image (r, 4), r may differ.
        stride: of rows and columns; a box covers the cells of `inside_boxes`, of those that are on the map.

    Returns:
        (R,) sums and (R,) numbers of cells.
    """
    padded, valid = pad_boxes(boxes)
    (low,), (high,) = _cells(padded, [stride])
    rows, columns = (_inside(low[..., i], high[..., i], values.shape[2 - i]).to(values.dtype) for i in (1, 0))
    with torch.enable_grad():
        sums = ((rows @ values) * columns).sum(-1)[valid]
    return sums, (rows.sum(-1) * columns.sum(-1))[valid]


def _inside(low: Tensor, high: Tensor, size: int) -> Tensor:
    """(..., size) bool, True from cell `low` to before cell `high`."""
    cells = torch.arange(size, device=low.device)
    return (cells >= low[..., None]) & (cells < high[..., None])


# ---- FGD: cells weighted by the area of the smallest box they are in


@torch.no_grad()
def fgd_masks(
    boxes: Sequence[Tensor], shapes: Sequence[Shape], sizes: Sequence[tuple[float, float]]
) -> list[tuple[Tensor, Tensor]]:
    """The foreground and background of each level, both (N, h, w), in the precision of the boxes.

    A box covers the cells from `floor` of its start to `ceil` of its end, both included, and gives them 1 over their
    number; a cell in several boxes has the largest. The background is spread evenly over the other cells, with sum 1
    in each image; 0 where there are none.

    Source: Yang Z. et al. 2022, "Focal and Global Knowledge Distillation for Detectors".

    Args:
        boxes: of each image (n, 4).
        shapes: (h, w) of the levels.
        sizes: (height, width) in pixels of what the maps cover, for each image; that is the padded batch. The
            authors' code has the image without padding there, which stretches the masks.
    """
    padded, valid = pad_boxes(boxes)
    relative = padded / padded.new_tensor(sizes)[:, None, [1, 0, 1, 0]]
    cells = relative * padded.new_tensor([[w, h, w, h] for h, w in shapes])[:, None, None]
    low, high = cells[..., :2].floor().long(), cells[..., 2:].ceil().long() + 1  # (levels, N, n, 2)
    values, order = torch.where(valid, 1 / (high - low).prod(-1).to(padded.dtype), 0).sort(2, descending=True)
    low, high = (x.gather(2, order[..., None].expand(-1, -1, -1, 2)) for x in (low, high))
    masks = []
    for foreground in _first(values, low, high, shapes):
        background = (foreground == 0).to(padded.dtype)
        masks.append((foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)))
    return masks


def _first(values: Tensor, low: Tensor, high: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """(N, h, w) of each level, the value of the first of the rectangles that cover a cell; 0 where there is none.

    Values (levels, N, n) fall; those that are 0 do not count. Each rectangle is a bit, and the highest that is set is
    the first.
    """
    found = [values.new_zeros(values.shape[1], *shape) for shape in shapes]
    for start in range(0, values.shape[2], BITS):
        part = slice(start, start + BITS)
        some = values[:, :, part].flip(2)  # the last one is bit 0
        bit = torch.arange(some.shape[2] - 1, -1, -1, device=values.device, dtype=torch.float64).exp2()
        covered = _covered(low[:, :, part], high[:, :, part], bit * (values[:, :, part] > 0), shapes)
        known = torch.cat([some.new_zeros(*some.shape[:2], 1), some], 2)
        for i, bits in enumerate(covered):
            # a double's exponent without a logarithm: 0 for none, 1 for bit 0
            highest = bits.view(torch.int64).bitwise_right_shift_(52).sub_(1022).clamp_(min=0)
            own = known[i].gather(1, highest.flatten(1)).view_as(found[i])
            found[i] = torch.maximum(found[i], own) if start else own
    return found


# ---- FGFI: cells with an anchor that overlaps a box nearly as much as the best one does


@torch.no_grad()
def fgfi_masks(
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    shapes: Sequence[Shape],
    *,
    psi: float = 0.5,
    plus_one: bool = False,
    assign: bool = True,
    finest: float = 56.0,
) -> list[Tensor]:
    """The cells near objects of each level, (N, h, w) bool.

    A cell counts if one of its anchors has an IoU with a box of more than `psi` times the largest IoU that any anchor
    has with that box. Source: Wang T. et al. 2019, "Distilling Object Detectors with Fine-grained Feature Imitation",
    who have one level; several as in Guo et al. 2021 (DeFeat).

    The cells of a row of anchors that overlap a box by more than some area are neighbours, so where they begin and end
    is looked up instead of working out the IoU of all anchors with all boxes.

    Args:
        boxes: of each image (n, 4).
        anchors: of each level (h * w * a, 4), cell by cell. Every cell has the same `a` shapes around its own centre,
            the anchors of a column of cells share their x, those of a row their y, as all generators make them.
        shapes: (h, w) of the levels, finest first.
        psi: in [0, 1].
        plus_one: a pixel has width 1, so that boxes are one wider and higher, as in the authors' code.
        assign: each box counts on the one level that it belongs to; False: on all, and the largest IoU is that of all
            levels' anchors.
        finest: see `assign_levels`.
    """
    padded, valid = pad_boxes(boxes)
    valid = valid & (padded[..., 2:] > padded[..., :2]).any(-1)  # a point is no box, even where pixels have a width
    belongs = assign_levels(padded, len(shapes), finest=finest)
    grids = [_Grid(a, shape, plus_one) for a, shape in zip(anchors, shapes, strict=True)]
    target = padded.to(anchors[0].dtype).flatten(0, 1)
    if plus_one:
        target = target + target.new_tensor([0, 0, 1, 1])
    best = torch.stack([grid.best(target) for grid in grids])
    joint = best.amax(0)
    masks = []
    for i, grid in enumerate(grids):
        counted = valid & (belongs == i) if assign else valid
        masks.append(grid.above(target, psi * (best[i] if assign else joint), counted))
    return masks


class _Grid:
    """The anchors of a level by columns and rows: x1 and x2 (a, w), y1 and y2 (a, h)."""

    def __init__(self, anchors: Tensor, shape: Shape, plus_one: bool) -> None:
        grid = anchors.reshape(*shape, -1, 4) + anchors.new_tensor([0, 0, 1, 1]) * plus_one
        (self.x1, self.x2), (self.y1, self.y2) = (
            (line[..., i].T.contiguous(), line[..., i + 2].T.contiguous())
            for i, line in ((0, grid[0]), (1, grid[:, 0]))
        )
        self.width, self.height = (self.x2 - self.x1)[:, :1], (self.y2 - self.y1)[:, :1]

    def best(self, boxes: Tensor) -> Tensor:
        """(M,): the largest IoU of an anchor with each box (M, 4)."""
        wide = (torch.minimum(self.x2[..., None], boxes[:, 2]) - torch.maximum(self.x1[..., None], boxes[:, 0])).amax(1)
        high = self._rows(boxes).amax(1)
        inside = wide.clamp(min=0) * high
        return (inside / (self._areas(boxes) - inside)).amax(0)

    def above(self, boxes: Tensor, threshold: Tensor, counted: Tensor) -> Tensor:
        """(N, h, w) bool: cells with an anchor whose IoU with a box (M, 4), of those `counted` (N, M / N), is above.

        An IoU above `t` is an intersection above `t / (1 + t)` times the sum of both areas: in a row of cells, a width
        above that over the row's height.
        """
        images, each = counted.shape
        columns, rows = self.x1.shape[1], self.y1.shape[1]
        width = (threshold / (1 + threshold) * self._areas(boxes))[:, None] / self._rows(boxes)  # (a, h, M)
        first = torch.searchsorted(self.x2, (boxes[:, 0] + width).flatten(1), right=True).view(width.shape)
        last = torch.searchsorted(self.x1, (boxes[:, 2] - width).flatten(1)).view(width.shape)
        wide = torch.minimum(self.width, boxes[:, 2] - boxes[:, 0])[:, None]
        hit = (wide > width) & (first < last) & counted.flatten()
        row = torch.arange(rows, device=boxes.device)[:, None] + rows * torch.arange(images, device=boxes.device)
        begin = row.repeat_interleave(each, 1) * (columns + 1)  # (h, M): where the row of cells begins
        steps = torch.zeros(images * rows * (columns + 1), device=boxes.device)
        steps.index_add_(0, (begin + first).flatten(), hit.float().flatten())
        steps.index_add_(0, (begin + last).flatten(), -hit.float().flatten())
        return steps.view(images, rows, columns + 1).cumsum(2)[..., :columns] > 0

    def _rows(self, boxes: Tensor) -> Tensor:
        """(a, h, M): the heights of the intersections."""
        high = torch.minimum(self.y2[..., None], boxes[:, 3]) - torch.maximum(self.y1[..., None], boxes[:, 1])
        return high.clamp(min=0)

    def _areas(self, boxes: Tensor) -> Tensor:
        """(a, M): the sums of the areas of anchors and boxes."""
        return self.width * self.height + (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
