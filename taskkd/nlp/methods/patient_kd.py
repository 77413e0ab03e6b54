"""Patient KD (Sun et al. 2019)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval
from torch import nn

from taskkd import layer_maps, losses
from taskkd.errors import RecipeError, TaskkdError
from taskkd.nlp.layers import hidden_taps
from taskkd.nlp.methods.logit_terms import classes, logit_terms
from taskkd.nlp.models import check_same_labels
from taskkd.stages import Method, Stage
from taskkd.terms import Match

__all__ = ["patient_kd", "patient_layers"]


def patient_layers(student: int, teacher: int, strategy: Literal["skip", "last"]) -> list[int]:
    """The teacher layers (0-based) that the student's layers 0 .. M-2 learn from.

    "skip" takes every k-th, k = teacher / student: 1, 3, 5, 7, 9 for 12 -> 6. "last" takes the last ones below the top:
    6 .. 10 for 12 -> 6, and 9, 10 for 12 -> 3. The top layers are matched by the logits.

    Raises:
        RecipeError: the student has under two layers, is deeper than the teacher, or k is no integer.
    """
    if student < 2:
        raise RecipeError(
            f"patient_kd needs a student of two layers or more, got {student}: its last layer is not matched."
        )
    try:
        pairs = layer_maps.last(student, teacher) if strategy == "last" else layer_maps.skip(student, teacher)
    except TaskkdError as error:
        raise RecipeError(f"patient_kd: {error} Or give teacher_layers.") from None
    return [j for _, j in pairs[:-1]]


def patient_kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layers: Literal["skip", "last"] = "skip",
    teacher_layers: list[int] | None = None,
    temperature: Annotated[float, Gt(0)] = 10.0,
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    beta: Annotated[float, Ge(0)] = 100.0,
    normalise: bool = True,
) -> Method:
    """`(1 - alpha) * CE + alpha * soft targets + beta * patience` over [CLS] states of intermediate layers.

    Source: Sun, Cheng, Gan, Liu 2019, "Patient Knowledge Distillation for BERT Model Compression". The authors search
    temperature in 5, 10, 20, alpha in 0.2, 0.5, 0.7 and beta in 10, 100, 500, 1000, and publish what they chose for
    each task; the defaults here are the middle of each.

    Scaling: the authors' soft-target loss is divided by `batch * labels`; so that their alpha works as published, the
    weight of our term (mean over the batch) is `alpha / labels`; it is `alpha` where the logits are not of labels
    (question answering, masked language modelling). Their beta belongs to the mean form, which is ours.

    Args:
        student, teacher: models with the same head, labels and hidden size.
        layers: "skip" or "last", see `patient_layers`.
        teacher_layers: 0-based, one for each student layer but the last; instead of `layers`.
        temperature, alpha, beta: as in the formula.
        normalise: L2-normalise each state first.

    Raises:
        RecipeError: layers, labels or hidden sizes do not fit.
    """
    check_same_labels(student, teacher)
    own, others = hidden_taps(student)[1:], hidden_taps(teacher)[1:]
    if teacher_layers is None:
        chosen = patient_layers(len(own), len(others), layers)
    else:
        chosen = teacher_layers
        if len(chosen) != len(own) - 1 or not all(0 <= i < len(others) for i in chosen):
            raise RecipeError(
                f"patient_kd: teacher_layers {chosen} must be {len(own) - 1} numbers (one for each student layer but "
                f"the last) from 0 to {len(others) - 1}."
            )
    sizes = [config.hidden_size for config in (student.config, teacher.config)]  # type: ignore[union-attr]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"patient_kd compares [CLS] states of one size; the student has {sizes[0]}, the teacher {sizes[1]}."
        )
    patience = Match(
        "patience",
        losses.patience,
        [f"{own[i]}[:, 0]" for i in range(len(own) - 1)],
        [f"{others[i]}[:, 0]" for i in chosen],
        weight=beta,
        normalise=normalise,
    )
    weight = alpha / classes(student)
    logits = logit_terms(student, teacher, temperature=temperature, weight=weight)
    return Method("patient_kd", [Stage("distil", [*logits, patience], 1 - alpha)], ("labels",) if alpha < 1 else ())
