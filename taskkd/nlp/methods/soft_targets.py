"""Soft targets (Hinton et al. 2015)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt
from torch import nn

from taskkd import losses
from taskkd.nlp.models import check_same_labels, is_regression
from taskkd.stages import Method, Stage
from taskkd.terms import Match, Term

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
        student, teacher: sequence classifiers with the same labels.
        temperature: `T`.
        weight: of the soft targets.
        task_weight: of the loss on the labels; 0: no labels are needed.

    Raises:
        RecipeError: the two have other numbers of labels.
    """
    check_same_labels(student, teacher)
    term: Term
    if is_regression(student):
        term = Match("logits", losses.logit_mse, "out.logits", weight=weight)
    else:
        term = Match("logits", losses.kl_divergence, "out.logits", temperature=temperature, weight=weight)
    needs = ("labels",) if task_weight > 0 else ()
    return Method("soft_targets", [Stage("distil", [term], task_weight)], needs)
