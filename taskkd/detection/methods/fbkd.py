"""FBKD: attention-guided and non-local distillation (Zhang L. & Ma 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.methods.fgd import attention_maps
from taskkd.detection.terms import NeckTerm
from taskkd.errors import ShapeError
from taskkd.losses.primitives import full_precision
from taskkd.stages import Method, Stage
from taskkd.terms import Run

__all__ = ["Fbkd", "NonLocal", "StudentMaps", "fbkd", "fbkd_loss"]

Over = Literal["image", "batch"]
Mode = Literal["dot_product", "embedded_gaussian"]


class NonLocal(nn.Module):
    """A non-local block: `x` plus a function of all its cells, weighted by how they relate to each.

    Source: Wang X. et al. 2018, "Non-local Neural Networks".

    Args:
        channels: of `x`.
        reduction: the inner channels are `channels / reduction`.
        pool: the cells that are looked at are pooled by this (largest value) first; at most the size of the map.
        mode: relations as products over the number of cells, or their softmax.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 2,
        pool: int = 1,
        mode: Mode = "dot_product",
    ) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out, self.norm = nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)  # it gives `x` itself at first
        self.pool, self.mode = pool, mode

    def forward(self, x: Tensor) -> Tensor:
        def looked_at(y: Tensor) -> Tensor:
            size = min(self.pool, y.shape[2]), min(self.pool, y.shape[3])
            return (F.max_pool2d(y, size) if max(size) > 1 else y).flatten(2)

        theta, phi, g = self.theta(x).flatten(2), looked_at(self.phi(x)), looked_at(self.g(x))
        related = theta.mT @ phi
        if self.mode == "dot_product":
            related = related / phi.shape[2]
        else:
            related = (related / theta.shape[1] ** 0.5).softmax(2)
        y = self.out((related @ g.mT).mT.reshape(len(x), -1, *x.shape[2:]))
        if self.training and y.numel() == y.shape[1]:  # one value of each channel has no deviation
            y = y * 0 + self.norm.bias[:, None, None]
        else:
            y = self.norm(y)
        out: Tensor = x + y
        return out


class StudentMaps(nn.Module):
    """What of a student's map is compared with the teacher's: the map, its means, its relations, each adapted.

    Args:
        student, teacher: numbers of channels.
        reduction, pool, mode: see `NonLocal`.
    """

    def __init__(
        self, student: int, teacher: int, *, reduction: int = 2, pool: int = 1, mode: Mode = "dot_product"
    ) -> None:
        super().__init__()
        self.map, self.channels = nn.Conv2d(student, teacher, 1), nn.Linear(student, teacher)
        self.space = nn.Conv2d(1, 1, 3, padding=1)
        self.relations = nn.Sequential(
            NonLocal(student, reduction=reduction, pool=pool, mode=mode), nn.Conv2d(student, teacher, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The map (N, C, h, w), means of channels (N, C) and of cells (N, 1, h, w), and relations (N, C, h, w)."""
        return self.map(x), self.channels(x.mean((2, 3))), self.space(x.mean(1, keepdim=True)), self.relations(x)


def _distance(a: Tensor, b: Tensor, over: Over) -> Tensor:
    difference = (a - b).flatten(1)
    norms: Tensor = torch.linalg.vector_norm(difference, dim=1 if over == "image" else None)
    return norms.mean()


@full_precision
def fbkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    student_maps: nn.Module,
    teacher_relations: nn.Module,
    temperature: float = 0.5,
    feature: float = 7e-5,
    channel: float = 4e-3,
    space: float = 4e-3,
    relation: float = 7e-5,
    over: Over = "image",
) -> Tensor:
    """Norms of differences: maps under both sides' attention, means over space, means over channels, relations.

    Source: Zhang L., Ma 2021, "Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and
    Efficient Detectors", as in mmrazor.

    Scaling: norms, not squared, of each image, mean over the batch. Their norms are of the whole batch (`over="batch"`)
    and grow with the root of its size.

    Args:
        student: (N, C_s, h, w).
        teacher: (N, C_t, h, w).
        student_maps: as `StudentMaps`.
        teacher_relations: as `NonLocal`; trained too.
        temperature: of the attention over space, whose mean of both sides has no gradient.
        feature, channel, space, relation: weights.
        over: whose norm.

    Raises:
        ShapeError: batches or sizes differ.
    """
    if len(student) != len(teacher) or student.shape[2:] != teacher.shape[2:]:
        raise ShapeError(
            f"`fbkd_loss` needs maps of one batch and size, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    maps, channels, spaces, relations = student_maps(student)
    with torch.no_grad():
        attention = [attention_maps(x, temperature)[0] for x in (student, teacher)]
        root = ((attention[0] + attention[1]) / 2).sqrt()[:, None]
    return (
        feature * _distance(maps * root, teacher * root, over)
        + channel * _distance(channels, teacher.mean((2, 3)), over)
        + space * _distance(spaces, teacher.mean(1, keepdim=True), over)
        + relation * _distance(relations, teacher_relations(teacher), over)
    )


class Fbkd(NeckTerm):
    """`fbkd_loss`, summed over levels, with its own modules for each.

    Args:
        name, student, teacher: see `NeckTerm`.
        reduction, pool: of the non-local blocks, level by level; the last one for those that follow.
        temperature, feature, channel, space, relation, over: see `fbkd_loss`.
        weight, neck, teacher_neck, count: see `NeckTerm`.
    """

    needs_images = False

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        reduction: Sequence[int] = (4, 4, 2, 2),
        pool: Sequence[int] = (8, 4, 2, 2),
        temperature: float = 0.5,
        feature: float = 7e-5,
        channel: float = 4e-3,
        space: float = 4e-3,
        relation: float = 7e-5,
        over: Over = "image",
        weight: float = 1.0,
        neck: Sequence[str] | None = None,
        teacher_neck: Sequence[str] | None = None,
        count: int | None = 4,
    ) -> None:
        super().__init__(
            name, student, teacher, weight=weight, neck=neck, teacher_neck=teacher_neck, adapter=None, count=count
        )
        self.blocks, self.over = list(zip(reduction, pool, strict=True)), over
        self.weights = {"feature": feature, "channel": channel, "space": space, "relation": relation}
        self.temperature = temperature
        self.student_maps, self.teacher_relations = nn.ModuleList(), nn.ModuleList()

    def build(self, run: Run) -> None:
        """Pair the levels, make the modules."""
        super().build(run)
        if len(self.student_maps):
            return
        for i, (s, t) in enumerate(zip(*self.pairs(run), strict=True)):
            reduction, pool = self.blocks[min(i, len(self.blocks) - 1)]
            own = StudentMaps(s.shape[1], t.shape[1], reduction=reduction, pool=pool)
            other = NonLocal(t.shape[1], reduction=reduction, pool=pool)
            for modules, made in ((self.student_maps, own), (self.teacher_relations, other)):
                modules.append(made.to(s.device, torch.promote_types(s.dtype, torch.float32)))

    @property
    def built(self) -> bool:
        return super().built and len(self.student_maps) > 0

    def forward(self, run: Run) -> Tensor:
        """The loss of all levels, whose channels may differ."""
        losses = [
            fbkd_loss(
                s,
                t,
                student_maps=self.student_maps[i],
                teacher_relations=self.teacher_relations[i],
                temperature=self.temperature,
                over=self.over,
                **self.weights,
            )
            for i, (s, t) in enumerate(zip(*self.pairs(run), strict=True))
        ]
        return torch.stack(losses).sum()


def fbkd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] = 1.4142135623730951,
    feature: Annotated[float, Ge(0)] = 7e-5,
    channel: Annotated[float, Ge(0)] = 4e-3,
    space: Annotated[float, Ge(0)] = 4e-3,
    relation: Annotated[float, Ge(0)] = 7e-5,
    temperature: Annotated[float, Gt(0)] = 0.5,
    pool: list[int] | None = None,
    over: Over = "image",
    levels: Annotated[int, Gt(0)] | None = 4,
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """Maps under attention, their means, and relations of all cells, each by a norm.

    Source: Zhang L. & Ma 2021 (FBKD), weights as in mmrazor. The relations' teacher side is trained, too.

    Args:
        student, teacher: detectors; any modules with `neck`.
        weight: of all parts; sqrt(2), since their norms are of the two images that each of their GPUs has.
        feature, channel, space, relation, temperature: see `fbkd_loss`.
        pool: of the non-local blocks, level by level; None: 8, 4, 2, 2. mmrazor's blocks pool twice: 16, 8, 4, 4.
        over: whose norm; "batch" (and `weight=1`) is their code.
        levels: how many, finest first; None: all that both have.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.
    """
    pool = [8, 4, 2, 2] if pool is None else pool
    reduction = [*(4, 4, 2, 2), *[2] * len(pool)][: len(pool)]
    term = Fbkd(
        "feature_based",
        student,
        teacher,
        reduction=reduction,
        pool=pool,
        temperature=temperature,
        feature=feature,
        channel=channel,
        space=space,
        relation=relation,
        over=over,
        weight=weight,
        neck=neck,
        teacher_neck=teacher_neck,
        count=levels,
    )
    return Method("fbkd", [Stage("distil", [term])], ("labels",))
