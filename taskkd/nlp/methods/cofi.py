"""The layer distillation of CoFi (Xia et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn

from taskkd import losses
from taskkd.adapters import build_adapter
from taskkd.errors import RecipeError
from taskkd.nlp.layers import hidden_taps
from taskkd.nlp.methods.intermediate import MASK
from taskkd.nlp.methods.logit_terms import logit_terms
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = ["DynamicLayers", "cofi"]


class DynamicLayers(Term):
    """`losses.dynamic_layers` of any numbers of layers, the student's through one linear map.

    Args:
        name, weight: see `Term`.
        student, teacher: taps of hidden states, in order.
        ordered: see the loss.
        mask: a tap of (batch, tokens); None: all tokens.
    """

    def __init__(
        self,
        name: str,
        student: Sequence[str],
        teacher: Sequence[str],
        *,
        ordered: bool = True,
        mask: str | None = MASK,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, weight)
        self.layers, self.teacher_taps = tuple(student), tuple(teacher)
        self.ordered, self.mask = ordered, mask
        self.student_taps = (*self.layers, *([mask] if mask else []))
        self.adapters = nn.ModuleList()

    @property
    def built(self) -> bool:
        return len(self.adapters) > 0

    def build(self, run: Run) -> None:
        if not self.built:
            own = run.student[self.layers[0]]
            adapter = build_adapter("linear", own, run.teacher[self.teacher_taps[0]]).to(own.device)
            self.adapters.append(adapter.double() if own.dtype == torch.float64 else adapter)

    def forward(self, run: Run) -> Tensor:
        own = [self.adapters[0](run.student[tap]) for tap in self.layers]
        others = [run.teacher[tap] for tap in self.teacher_taps]
        mask = None if self.mask is None else run.student[self.mask]
        return losses.dynamic_layers(own, others, ordered=self.ordered, mask=mask)


def cofi(
    student: nn.Module,
    teacher: nn.Module,
    *,
    teacher_layers: list[int] | None = None,
    ordered: bool = True,
    temperature: Annotated[float, Gt(0)] = 2.0,
    layer_weight: Annotated[float, Interval(ge=0, le=1)] = 0.9,
) -> Method:
    """`(1 - layer_weight)` times soft targets, `layer_weight` times each teacher layer with the nearest student layer.

    Source: Xia, Zhong, Chen 2022, "Structured Pruning Learns Compact and Accurate Models": the layer distillation
    objective of CoFi, without its pruning. Which student layer learns from which is found anew in every step; weights
    of 0.9, 0.7 and 0.5 are searched. No labels are used.

    Scaling: the authors sum over the teacher's layers; the weight is multiplied by their number, as published. Means
    are over tokens that are no padding, theirs over all.

    Args:
        student, teacher: models with the same head and labels.
        teacher_layers: 0-based; None: four, evenly (2, 5, 8, 11 of 12), or all where there are fewer.
        ordered: keep the order of layers (their version 4), or take the nearest of all (3).
        temperature: of the soft targets.
        layer_weight: see the formula.

    Raises:
        RecipeError: a layer is not there, or labels differ.
    """
    own, others = hidden_taps(student)[1:], hidden_taps(teacher)[1:]
    if teacher_layers is None:
        few = min(4, len(others))
        teacher_layers = [(i + 1) * len(others) // few - 1 for i in range(few)]
    if not teacher_layers or not all(0 <= i < len(others) for i in teacher_layers):
        raise RecipeError(f"cofi: teacher_layers {teacher_layers} must be numbers from 0 to {len(others) - 1}.")
    chosen = [others[i] for i in teacher_layers]
    layers = DynamicLayers("layers", own, chosen, ordered=ordered, weight=layer_weight * len(chosen))
    logits = logit_terms(student, teacher, temperature=temperature, weight=1 - layer_weight)
    return Method("cofi", [Stage("distil", [*logits, layers], 0.0)])
