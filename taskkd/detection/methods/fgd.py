"""FGD: focal and global distillation (Yang Z. et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.detection.methods.maps import Adapter, adapter_of, family_name, two_stage
from taskkd.detection.regions import fgd_masks
from taskkd.detection.terms import NeckTerm
from taskkd.errors import TaskkdError
from taskkd.losses.primitives import check_same_shape, full_precision
from taskkd.stages import Method, Stage
from taskkd.terms import Run

__all__ = [
    "FocalGlobal",
    "GlobalContext",
    "attention_maps",
    "fgd",
    "fgd_loss",
    "focal_loss",
    "global_loss",
    "inherit_parts",
]

logger = logging.getLogger(__name__)
#: temperature, alpha, beta, gamma, relation, as in the authors' configurations
PUBLISHED = {
    "two-stage": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7),
    "FCOS": (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6),
    "other": (0.5, 1e-3, 5e-4, 5e-4, 5e-6),
}


def attention_maps(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Where and in which channels a map (N, C, h, w) is large: (N, h, w) of mean 1 and (N, C) of mean 1."""
    size = x.abs()
    space = size.mean(1)
    n, h, w = space.shape
    where = (space.reshape(n, -1) / temperature).softmax(1).reshape(n, h, w) * (h * w)
    return where, (size.mean((2, 3)) / temperature).softmax(1) * x.shape[1]


@full_precision
def focal_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    foreground: Tensor,
    background: Tensor,
    temperature: float = 0.5,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 5e-4,
) -> Tensor:
    """Squares weighted by the teacher's attention and by masks, and the difference of attention.

    `alpha * sum F A (s - t)^2 + beta * sum B A (s - t)^2 + gamma * (sum |S_s - S_t| + sum |C_s - C_t|)`, mean over the
    batch, with `A = S_t C_t`.

    Source: Yang Z., Li, Jiang, Gong, Yuan, Zhao, Yuan 2022, "Focal and Global Knowledge Distillation for Detectors".

    Scaling: sums over channels and cells, as in the authors' code.

    Args:
        student, teacher: (N, C, h, w).
        foreground, background: `F` and `B`, (N, h, w), as of `regions.fgd_masks`.
        temperature: of the attention.
        alpha, beta, gamma: as in the formula.

    Raises:
        ShapeError: shapes differ.
    """
    check_same_shape(student, teacher, "focal_loss")
    where, which = attention_maps(teacher, temperature)
    own_where, own_which = attention_maps(student, temperature)
    each = where * torch.einsum("nchw,nc->nhw", (student - teacher).square(), which)
    masked = each * (alpha * foreground.to(each.dtype) + beta * background.to(each.dtype))
    attention = (own_where - where).abs().sum() + (own_which - which).abs().sum()
    return (masked.sum() + gamma * attention) / len(student)


class GlobalContext(nn.Module):
    """A GC block: `x` plus a function of its own mean, weighted by a softmax over space.

    Source: Cao Y. et al. 2019 (GCNet), initialised as in FGD's code: it gives `x` itself at first.

    Args:
        channels: of `x`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        mid = max(channels // 2, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, mid, 1), nn.LayerNorm([mid, 1, 1]), nn.ReLU(), nn.Conv2d(mid, channels, 1)
        )
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        for parameter in (self.mask.bias, *self.add[3].parameters()):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        attention = self.mask(x).flatten(2).softmax(2)  # (N, 1, hw)
        context = (x.flatten(2) @ attention.mT)[..., None]  # (N, C, 1, 1)
        out: Tensor = x + self.add(context)
        return out


@full_precision
def global_loss(student: Tensor, teacher: Tensor, *, student_context: nn.Module, teacher_context: nn.Module) -> Tensor:
    """Squared difference of the maps after a `GlobalContext` each, summed, mean over the batch.

    Source: Yang Z. et al. 2022 (FGD); both blocks are trained.

    Args:
        student, teacher: (N, C, h, w).
        student_context, teacher_context: the blocks.

    Raises:
        ShapeError: shapes differ.
    """
    check_same_shape(student, teacher, "global_loss")
    total: Tensor = (student_context(student) - teacher_context(teacher)).square().sum()
    return total / len(student)


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    foreground: Tensor,
    background: Tensor,
    student_context: nn.Module,
    teacher_context: nn.Module,
    temperature: float = 0.5,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 5e-4,
    relation: float = 5e-6,
) -> Tensor:
    """`focal_loss + relation * global_loss`; see both.

    Raises:
        ShapeError: shapes differ.
    """
    focal = focal_loss(
        student,
        teacher,
        foreground=foreground,
        background=background,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
    )
    if relation == 0:
        return focal
    contexts = {"student_context": student_context, "teacher_context": teacher_context}
    return focal + relation * global_loss(student, teacher, **contexts)


class FocalGlobal(NeckTerm):
    """`fgd_loss`, summed over levels, with a pair of blocks for each.

    Args:
        name, student, teacher: see `NeckTerm`.
        coords: what the boxes are measured against, see `fgd`.
        temperature, alpha, beta, gamma, relation: see `fgd_loss`.
        weight, neck, teacher_neck, adapter, count: see `NeckTerm`.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        coords: Literal["padded", "authors"] = "padded",
        temperature: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        relation: float = 5e-6,
        weight: float = 1.0,
        neck: Sequence[str] | None = None,
        teacher_neck: Sequence[str] | None = None,
        adapter: Adapter = "auto",
        count: int | None = None,
    ) -> None:
        super().__init__(
            name,
            student,
            teacher,
            weight=weight,
            neck=neck,
            teacher_neck=teacher_neck,
            adapter=adapter_of(adapter),
            count=count,
        )
        self.coords = coords
        self.options = {"temperature": temperature, "alpha": alpha, "beta": beta, "gamma": gamma, "relation": relation}
        self.student_contexts, self.teacher_contexts = nn.ModuleList(), nn.ModuleList()

    def build(self, run: Run) -> None:
        """Pair the levels, make adapters and blocks."""
        super().build(run)
        if self.options["relation"] == 0 or len(self.student_contexts):
            return
        for _, teacher in zip(*self.pairs(run), strict=True):
            for blocks in (self.student_contexts, self.teacher_contexts):
                block = GlobalContext(teacher.shape[1]).to(teacher.device)
                blocks.append(block.double() if teacher.dtype == torch.float64 else block)

    @property
    def built(self) -> bool:
        return super().built and (self.options["relation"] == 0 or len(self.student_contexts) > 0)

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all levels."""
        images = self.images(run)
        padded = [(float(images.tensors.shape[2]), float(images.tensors.shape[3]))] * len(images.boxes)
        sizes = padded if self.coords == "padded" else [(float(h), float(w)) for h, w in images.sizes]
        masks = fgd_masks(images.boxes, [(m.shape[2], m.shape[3]) for m in students], sizes)
        losses = [
            fgd_loss(
                s,
                t,
                foreground=foreground,
                background=background,
                student_context=self.student_contexts[i] if len(self.student_contexts) else nn.Identity(),
                teacher_context=self.teacher_contexts[i] if len(self.teacher_contexts) else nn.Identity(),
                **self.options,
            )
            for i, (s, t, (foreground, background)) in enumerate(zip(students, teachers, masks, strict=True))
        ]
        return torch.stack(losses).sum()


@torch.no_grad()
def inherit_parts(student: nn.Module, teacher: nn.Module) -> tuple[list[str], list[str]]:
    """Give the student the teacher's neck and head, where names and shapes agree.

    Everything but the backbone's body counts as neck and head. Source: Yang Z. et al. 2022 (FGD's inheriting strategy),
    after Kang et al. 2021.

    Args:
        student, teacher: detectors; the student is changed.

    Returns:
        The names of parameters and buffers that were copied, and of those that were left.

    Raises:
        TaskkdError: none agrees.
    """
    own, other = student.state_dict(), teacher.state_dict()
    parts = [n for n in own if "backbone" not in n.split(".") or "fpn" in n.split(".")]
    copied = [n for n in parts if n in other and other[n].shape == own[n].shape]
    if not copied:
        raise TaskkdError(
            f"inherit: nothing of the teacher's neck and head fits the student's ({len(parts)} tensors): names and "
            "shapes must agree."
        )
    for name in copied:
        own[name].copy_(other[name])
    chosen = set(copied)
    left = [n for n in parts if n not in chosen]
    told = f"; left as they were: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}" if left else ""
    logger.info("inherit: %d of the %d tensors of neck and head are the teacher's%s", len(copied), len(parts), told)
    return copied, left


def fgd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] | None = None,
    alpha: Annotated[float, Ge(0)] | None = None,
    beta: Annotated[float, Ge(0)] | None = None,
    gamma: Annotated[float, Ge(0)] | None = None,
    relation: Annotated[float, Ge(0)] | None = None,
    coords: Literal["padded", "authors"] = "padded",
    inherit: bool = False,
    levels: Annotated[int, Gt(0)] | None = None,
    adapter: Adapter = "auto",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """Objects and background apart under the teacher's attention, attention itself, and relations by GC blocks.

    Source: Yang Z. et al. 2022 (FGD). The sums over channels and cells are theirs, and so are the weights, one set for
    each kind of detector: they suit maps of 256 channels and images of 800 x 1333. On others keep their ratio and set
    `weight` so that the term is 0.1 to 2 times the task loss (the authors' advice). They clip gradients to 35
    (`training.max_grad_norm`).

    Args:
        student, teacher: detectors; any modules with `neck`.
        weight: of all parts together.
        temperature, alpha, beta, gamma, relation: see `fgd_loss`; `relation` is the authors' lambda. None: as published
            for two-stage detectors (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7), FCOS (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6) or others
            (0.5, 1e-3, 5e-4, 5e-4, 5e-6). `relation=0`: without GC blocks.
        coords: boxes are measured against the "padded" batch that maps cover, or against each image without padding, as
            in the authors' code, which stretches them in batches of several sizes.
        inherit: start from the teacher's neck and head where shapes agree, as the authors do with one-stage
            detectors; done when the method is made, see `inherit_parts`. The student is changed.
        levels: how many, finest first; None: 4 of two-stage students, else all that both have.
        adapter: see `taskkd.detection.methods.maps.adapter_of`.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.

    Raises:
        TaskkdError: nothing can be inherited.
    """
    kind = "two-stage" if two_stage(student) else "FCOS" if family_name(student) == "FCOS" else "other"
    published = PUBLISHED[kind]
    given = (temperature, alpha, beta, gamma, relation)
    values = [p if g is None else g for g, p in zip(given, published, strict=True)]
    options = dict(zip(("temperature", "alpha", "beta", "gamma", "relation"), values, strict=True))
    term = FocalGlobal(
        "focal_global",
        student,
        teacher,
        coords=coords,
        weight=weight,
        neck=neck,
        teacher_neck=teacher_neck,
        adapter=adapter,
        count=4 if levels is None and kind == "two-stage" else levels,
        **options,
    )
    if inherit:
        inherit_parts(student, teacher)
    return Method("fgd", [Stage("distil", [term])], ("labels",))
