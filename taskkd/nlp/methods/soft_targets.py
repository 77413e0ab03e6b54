"""Soft targets (Hinton et al. 2015)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt
from torch import nn

from taskkd.nlp.methods.logit_terms import logit_terms
from taskkd.stages import Method, Stage

__all__ = ["soft_targets"]


def soft_targets(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: Annotated[float, Gt(0)] = 4.0,
    weight: Annotated[float, Ge(0)] = 0.9,
    task_weight: Annotated[float, Ge(0)] = 0.1,
) -> Method:
    """`task_weight * task loss + weight * T^2 KL(teacher || student)` on the logits.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network". The defaults are those of the
    benchmark repositories (temperature 4, 0.9 and 0.1). For regression the term is the mean squared difference of the
    predictions (Ba & Caruana 2014), for which the temperature has no meaning.

    Args:
        student, teacher: models with the same head and labels; see `logit_terms` for what of their logits counts.
        temperature: `T`.
        weight: of the soft targets.
        task_weight: of the loss on the labels; 0: no labels are needed.

    Raises:
        RecipeError: heads or labels differ.
    """
    terms = logit_terms(student, teacher, temperature=temperature, weight=weight)
    needs = ("labels",) if task_weight > 0 else ()
    return Method("soft_targets", [Stage("distil", terms, task_weight)], needs)
