"""How similar the places of a map are to each other, without the matrix of all pairs."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_mask, full_precision, safe_divide

__all__ = ["pairwise_similarity"]

Algorithm = Literal["auto", "gram", "blocked", "dense"]
EPS = 1e-8
#: nodes up to which all pairs are the cheapest
FEW = 128
#: pairs looked at together by "blocked"
PANEL = 2**20
#: compute capabilities of CUDA devices that have half the speed in float64, and not a 32nd or less
FAST_DOUBLE = frozenset(((6, 0), (7, 0), (8, 0), (9, 0), (10, 0)))


@full_precision
def pairwise_similarity(
    student: Tensor,
    teacher: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    grid: int | None = None,
    pool: Literal["max", "avg"] = "max",
    detach_norm: bool = False,
    algorithm: Algorithm = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """Pair-wise similarity: mean squared difference of the cosines of all pairs of nodes of a map, over images too.

    Nodes are pixels, or what they are pooled to by one of `scale`, `window` and `grid`. A node whose features are 0 is
    similar to none, and gets no gradient.

    Source: Liu, Chen, Liu, Qin, Luo, Wang 2019, "Structured Knowledge Distillation for Semantic Segmentation". Their
    code has `scale=0.5`: 2 x 2 or 3 x 3 nodes, pooled by the maximum (the paper says average), and `detach_norm=True`;
    CIRKD's version of it (Yang et al. 2022) is `window=2`.

    Scaling: equal to both. Channels of student and teacher may differ, nodes may not.

    Args:
        student, teacher: (batch, channels, H, W), or (batch, channels, nodes) that are not pooled.
        scale: a window covers `int(H * scale)` by `int(W * scale)` pixels, at least one; the last ones may be smaller.
        window: a window covers so many pixels by so many.
        grid: so many nodes by so many (adaptive pooling).
        pool: "max" or "avg".
        detach_norm: whether the norms in the cosines count as constants; the gradient is then not that of the value,
            and changes the norms too.
        algorithm: "dense" has all pairs in memory; "gram" takes the squared norms of matrices channels x channels;
            "blocked" looks at some rows of pairs at a time. "auto" takes the cheapest for the sizes. Where student and
            teacher nearly agree, float32 loses most digits of the difference: "gram" is computed in float64, "blocked"
            and a few dense nodes too where the device is fast in it, and only there "auto" takes "gram".
        mask: weights or booleans over pixels (batch, H, W) or samples; a node is pooled from the pixels that count, has
            the largest of their weights, and a pair the product of both.

    Raises:
        ShapeError: the batches or nodes differ, or a tensor is no map.
        ValueError: more than one of `scale`, `window` and `grid`, one out of range, or an unknown option.
    """
    _check(student, teacher, pool, algorithm, scale=scale, window=window, grid=grid)
    weight = None
    if mask is not None:
        shape = student.select(1, 0).shape
        check_mask(mask, shape)
        weight = mask.to(student.dtype).reshape(mask.shape + (1,) * (len(shape) - mask.ndim)).expand(shape)
    s, t = (_nodes(x, weight, pool, scale, window, grid) for x in (student, teacher))
    if s.shape[2:] != t.shape[2:]:
        raise ShapeError(
            f"`pairwise_similarity` compares maps of the same nodes, got {tuple(s.shape[2:])} of the student's "
            f"{tuple(student.shape)} and {tuple(t.shape[2:])} of the teacher's {tuple(teacher.shape)}: resize one."
        )
    s, t = s.flatten(2), t.flatten(2)
    if weight is None:
        return _squared_differences(s, t, None, detach_norm, algorithm).sum() / max(len(s) * s.shape[2] ** 2, 1)
    weight = _pooled(weight[:, None], "max", scale, window, grid).flatten(1)
    pairs = weight.sum(1).square().sum()
    return safe_divide(_squared_differences(s, t, weight, detach_norm, algorithm).sum(), pairs)


def _check(student: Tensor, teacher: Tensor, pool: str, algorithm: str, **sizes: float | None) -> None:
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"at most one of {', '.join(sizes)} says what the nodes are, got {', '.join(given)}.")
    for name, value in given.items():
        if not (0 < value <= 1 if name == "scale" else value >= 1):
            raise ValueError(f"`{name}` is {'in (0, 1]' if name == 'scale' else 'at least 1'}, got {value}.")
    if pool not in ("max", "avg"):
        raise ValueError(f"`pool` is one of max, avg, got {pool!r}.")
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"`algorithm` is one of {', '.join(get_args(Algorithm))}, got {algorithm!r}.")
    if student.ndim < (4 if given else 3) or student.ndim != teacher.ndim or len(student) != len(teacher):
        raise ShapeError(
            "`pairwise_similarity` needs as many maps (batch, channels, height, width) of the student as of the "
            f"teacher, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )


def _pooled(
    x: Tensor, pool: Literal["max", "avg"], scale: float | None, window: int | None, grid: int | None
) -> Tensor:
    """(batch, channels, H, W) pooled to the nodes."""
    if grid is not None:
        size = (min(grid, x.shape[2]), min(grid, x.shape[3]))
        return F.adaptive_max_pool2d(x, size) if pool == "max" else F.adaptive_avg_pool2d(x, size)
    if scale is not None:
        sides = (max(int(x.shape[2] * scale), 1), max(int(x.shape[3] * scale), 1))
    elif window is not None:
        sides = (window, window)
    else:
        return x
    if pool == "max":
        return F.max_pool2d(x, sides, sides, ceil_mode=True)
    return F.avg_pool2d(x, sides, sides, ceil_mode=True, count_include_pad=False)


def _nodes(x: Tensor, weight: Tensor | None, pool: Literal["max", "avg"], *sizes: Any) -> Tensor:
    """The map pooled to the nodes, from the pixels that count alone; a node without any is 0."""
    if weight is None:
        return _pooled(x, pool, *sizes)
    if x.shape[2:] != weight.shape[1:]:
        raise ShapeError(f"a mask over {tuple(weight.shape[1:])} does not fit a map of shape {tuple(x.shape)}.")
    counts = (weight > 0)[:, None]
    if pool == "avg":
        return safe_divide(_pooled(x.masked_fill(~counts, 0), pool, *sizes), _pooled(counts.to(x.dtype), pool, *sizes))
    some = _pooled(counts.to(x.dtype), "max", *sizes) > 0
    return _pooled(x.masked_fill(~counts, torch.finfo(x.dtype).min), pool, *sizes).masked_fill(~some, 0)


def _choose(student: Tensor, teacher: Tensor) -> Algorithm:
    """The cheapest algorithm for nodes (batch, channels, nodes)."""
    nodes, cs, ct = student.shape[2], student.shape[1], teacher.shape[1]
    if nodes <= FEW:
        return "dense"
    fast = student.dtype == torch.float64 or _fast_double(student.device)
    return "gram" if fast and cs * cs + ct * ct + cs * ct < nodes * (cs + ct) else "blocked"


def _fast_double(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in FAST_DOUBLE
    return device.type == "cpu"


def _squared_differences(
    student: Tensor, teacher: Tensor, weight: Tensor | None, detach: bool, algorithm: Algorithm
) -> Tensor:
    """(batch,): sums over all pairs of nodes of the squared difference of cosines, times both nodes' weights."""
    if algorithm == "auto":
        algorithm = _choose(student, teacher)
    root = None if weight is None else weight.sqrt()
    if algorithm == "dense" or torch.compiler.is_compiling():
        return _differentiable(student, teacher, root, detach, "dense" if algorithm == "blocked" else algorithm)
    sums: Tensor = _Pairs.apply(student, teacher, root, detach, algorithm, torch.is_grad_enabled())
    return sums


def _working(x: Tensor, algorithm: Algorithm) -> torch.dtype:
    """Float64 where it costs little: the difference of nearly equal cosines loses up to all digits of float32."""
    if algorithm == "blocked":
        accurate = _fast_double(x.device)
    else:
        accurate = (algorithm == "gram" or x.shape[-1] <= FEW) and x.device.type != "mps"
    return torch.float64 if accurate else x.dtype


def _inverse(x: Tensor, detach: bool) -> Tensor:
    """(..., 1, nodes): one over the norms of nodes (..., channels, nodes), 0 where they are 0."""
    norm = (x.detach() if detach else x).square().sum(-2, keepdim=True).sqrt()  # faster than the norm across memory
    some = norm > EPS
    return torch.where(some, 1 / torch.where(some, norm + EPS if detach else norm, 1.0), 0.0)


def _unit(x: Tensor, root: Tensor | None, detach: bool, algorithm: Algorithm) -> Tensor:
    """Nodes (batch, channels, nodes) over their norms, times the roots of their weights."""
    x = x.to(_working(x, algorithm))
    zero = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) <= EPS
    inverse = _inverse(x.masked_fill(zero, 1), detach).masked_fill(zero, 0)  # no norm of 0: its gradient is NaN
    return x * (inverse if root is None else inverse * root[:, None])


def _differentiable(
    student: Tensor, teacher: Tensor, root: Tensor | None, detach: bool, algorithm: Algorithm
) -> Tensor:
    """`_squared_differences` by operations that autograd and compilers know."""
    s, t = (_unit(x, root, detach, algorithm) for x in (student, teacher))
    if algorithm == "gram":
        own, other, cross = ((a @ b.mT).square().sum((1, 2)) for a, b in ((s, s), (t, t), (s, t)))
        return (own + other - 2 * cross).clamp(min=0).to(student.dtype)
    return (s.mT @ s - t.mT @ t).square().sum((1, 2)).to(student.dtype)


class _Pairs(torch.autograd.Function):
    """`_squared_differences`, image by image; what waits for the backward is the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        root: Tensor | None,
        detach: bool,
        algorithm: Algorithm,
        training: bool,
    ) -> Tensor:
        wanted = [training and needed for needed in ctx.needs_input_grad[:2]]
        grads = [torch.empty_like(x) if w else None for x, w in zip((student, teacher), wanted, strict=True)]
        sums, work = student.new_zeros(len(student)), _gram if algorithm == "gram" else _blocked
        for image in range(len(student)):
            nodes = [x[image].to(_working(x, algorithm), copy=True) for x in (student, teacher)]
            inverses = [_inverse(x, detach) for x in nodes]
            factors = inverses if root is None else [i * root[image] for i in inverses]
            for x, factor in zip(nodes, factors, strict=True):
                x.mul_(factor)
            sums[image], *slopes = work(nodes[0], nodes[1], wanted)
            for grad, slope, x, factor, inverse in zip(grads, slopes, nodes, factors, inverses, strict=True):
                if grad is not None and slope is not None:
                    if not detach:  # less what is along the node
                        unit = x * safe_divide(inverse, factor)
                        slope.sub_(unit * (unit * slope).sum(0))
                    grad[image] = slope.mul_(factor)
        ctx.save_for_backward(student, teacher, root, *grads)
        ctx.detach, ctx.algorithm = detach, algorithm
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, root, *grads = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *(None if g is None else g * grad[:, None, None] for g in grads), None, None, None, None
        pair = student.view_as(student), teacher.view_as(teacher)  # to be differentiated again
        sums = _differentiable(*pair, root, ctx.detach, "gram" if ctx.algorithm == "gram" else "dense")
        wanted = ctx.needs_input_grad[:2]
        sides = [x for x, w in zip(pair, wanted, strict=True) if w]
        found = iter(torch.autograd.grad(sums, sides, grad, create_graph=True))
        return *(next(found) if w else None for w in wanted), None, None, None, None


def _gram(s: Tensor, t: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`|S'S - T'T|^2 = |SS'|^2 + |TT'|^2 - 2 |ST'|^2` of (channels, nodes), and its gradients."""
    own, cross = s @ s.T, s @ t.T
    value = own.square().sum() + _squared_gram(t) - 2 * cross.square().sum()
    of_s = torch.addmm(cross @ t, own, s, beta=-1).mul_(4) if wanted[0] else None
    of_t = torch.addmm(cross.T @ s, t @ t.T, t, beta=-1).mul_(4) if wanted[1] else None
    return value.clamp(min=0), of_s, of_t


def _squared_gram(x: Tensor, rows: int = 128) -> Tensor:
    """`|xx'|^2`, of which what is above the diagonal stands for what is below."""
    value = x.new_zeros(())
    for start in range(0, len(x), rows):
        panel = (x[start : start + rows] @ x[start:].T).square_()
        value += 2 * panel.sum() - panel[:, : len(panel)].sum()
    return value


def _blocked(s: Tensor, t: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same by rows of the matrix of pairs, of which those above the diagonal stand for those below."""
    count, value = s.shape[1], s.new_zeros(())
    grads = [torch.zeros_like(x) if w else None for x, w in zip((s, t), wanted, strict=True)]
    rows = max(min(PANEL // max(count, 1), count // 8), 64)
    for start in range(0, count, rows):
        end = min(start + rows, count)
        right_s, right_t = s[:, start:], t[:, start:]
        difference = torch.addmm(t[:, start:end].T @ right_t, s[:, start:end].T, right_s, beta=-1)
        beyond = difference[:, end - start :]
        value += difference[:, : end - start].square().sum() + 2 * beyond.square().sum()
        for grad, x, right, sign in ((grads[0], s, right_s, 4), (grads[1], t, right_t, -4)):
            if grad is not None:
                grad[:, start:end].addmm_(right, difference.T, alpha=sign)
                grad[:, end:].addmm_(x[:, start:end], beyond, alpha=sign)
    return value, grads[0], grads[1]
