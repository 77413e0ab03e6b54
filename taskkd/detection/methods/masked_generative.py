"""MGD: masked generative distillation (Yang Z. et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from taskkd.detection.methods.maps import Adapter, adapter_of, two_stage
from taskkd.detection.terms import NeckTerm
from taskkd.losses.generation import conv_generator, kept_cells, masked_generative_loss
from taskkd.stages import Method, Stage
from taskkd.terms import Run

__all__ = ["MaskedGenerative", "kept_cells", "masked_generative", "masked_generative_loss"]


class MaskedGenerative(NeckTerm):
    """`masked_generative_loss`, summed over levels, with a generator (3x3 convolution, ReLU, 3x3) for each.

    Args:
        name, student, teacher: see `NeckTerm`.
        masked: the share of cells that are masked.
        weight, neck, teacher_neck, adapter, count: see `NeckTerm`.
    """

    needs_images = False

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        masked: float = 0.65,
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
        self.masked, self.generators = masked, nn.ModuleList()

    def build(self, run: Run) -> None:
        """Pair the levels, make adapters and generators."""
        super().build(run)
        if len(self.generators):
            return
        for teacher in self.pairs(run)[1]:
            made = conv_generator(teacher.shape[1])
            self.generators.append(made.to(teacher.device, torch.promote_types(teacher.dtype, torch.float32)))

    @property
    def built(self) -> bool:
        return super().built and len(self.generators) > 0

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all levels."""
        levels = zip(students, teachers, self.generators, strict=True)
        losses = [masked_generative_loss(s, t, generator=g, kept=kept_cells(s, self.masked)) for s, t, g in levels]
        return torch.stack(losses).sum()


def masked_generative(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] | None = None,
    masked: Annotated[float, Interval(ge=0, lt=1)] | None = None,
    levels: Annotated[int, Gt(0)] | None = None,
    adapter: Adapter = "auto",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """The student's masked maps must generate the teacher's whole ones.

    Source: Yang Z. et al. 2022 (MGD). The sum over channels and cells is theirs, and so are the weights: they suit maps
    of 256 channels and images of 800 x 1333. PaddleDetection's MGD has no mask (`masked=0`). The masks are random: the
    loss of a student that equals its teacher is not 0.

    Args:
        student, teacher: detectors; any modules with `neck`.
        weight: the authors' alpha. None: 5e-7 for two-stage students, else 2e-5, as published.
        masked: the authors' lambda, the share of cells. None: 0.45 for two-stage students, else 0.65, as published.
        levels: how many, finest first; None: 4 of two-stage students, else all that both have.
        adapter: see `taskkd.detection.methods.maps.adapter_of`.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.
    """
    two = two_stage(student)
    term = MaskedGenerative(
        "generation",
        student,
        teacher,
        masked=(0.45 if two else 0.65) if masked is None else masked,
        weight=(5e-7 if two else 2e-5) if weight is None else weight,
        neck=neck,
        teacher_neck=teacher_neck,
        adapter=adapter,
        count=4 if levels is None and two else levels,
    )
    return Method("masked_generative", [Stage("distil", [term])], ("labels",))
