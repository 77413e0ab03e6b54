"""Localization distillation (Zheng et al. 2022): the distributions that a detector predicts for the sides of a box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.detection.methods.dense_losses import distribution_kl
from taskkd.detection.methods.vlr import assign_atss, square_anchors, vlr_weights
from taskkd.detection.shared import SharedImages
from taskkd.detection.terms import NeckTerm
from taskkd.errors import RecipeError, ShapeError
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = ["Localization", "ld_terms", "localization"]

Normalize = Literal["sum_w", "authors"]
Part = Literal["ld", "ld_vlr", "kd"]


def ld_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_sides: Tensor,
    teacher_sides: Tensor,
    *,
    positive: Tensor,
    vlr: Tensor,
    temperature: float = 10.0,
    vlr_temperature: float = 10.0,
    class_temperature: float = 2.0,
    normalize: Normalize = "sum_w",
) -> dict[Part, Tensor]:
    """The three terms of LD, unweighted: the sides of positives, those in the valuable region, the classes of positives.

    `ld = mean_w(T^2 KL / bins)`, where `w` is the student's largest class probability at a positive anchor; `ld_vlr` a
    quarter of the same with the region's weights; `kd` the mean over positives with a softmax over classes. Source:
    Zheng et al. 2022, "Localization Distillation for Dense Object Detection".

    Scaling: the authors do not divide the first two by the sum of the weights, so that they grow with the positives of
    a batch (they warn of more than 3 images on a GPU): `normalize="authors"`.

    Args:
        student_logits, teacher_logits: (N, A, classes).
        student_sides, teacher_sides: (N, A, 4, bins) logits of the four distances.
        positive: (N, A) booleans.
        vlr: (N, A) weights of the region, as `vlr_weights` gives them.
        temperature, vlr_temperature, class_temperature: of the three.
        normalize: "sum_w" or "authors".

    Returns:
        `{"ld", "ld_vlr", "kd"}`: scalars; 0 where there is nothing.

    Raises:
        ShapeError: the shapes of student and teacher differ.
        ValueError: a temperature is not positive.
    """
    certain = student_logits.detach().sigmoid().amax(-1) * positive

    def sides(weights: Tensor, at: float, share: float) -> Tensor:
        divisor = None if normalize == "sum_w" else student_sides.shape[-2]
        value = distribution_kl(student_sides, teacher_sides, temperature=at, weights=weights, divisor=divisor)
        return share * value

    return {
        "ld": sides(certain, temperature, 1.0),
        "ld_vlr": sides(vlr, vlr_temperature, 0.25),
        "kd": distribution_kl(student_logits, teacher_logits, temperature=class_temperature, weights=positive),
    }
