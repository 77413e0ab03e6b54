"""What is used where no method is named: chosen by the pair of detectors."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt
from torch import nn

from taskkd.detection.families import family_of
from taskkd.detection.methods.chen import chen
from taskkd.detection.methods.maps import MapsTerm, adapter_of
from taskkd.detection.methods.pearson_kd import pearson_loss
from taskkd.stages import Method, Stage
from taskkd.terms import Auto, Term

__all__ = ["auto"]


def auto(
    student: nn.Module,
    teacher: nn.Module,
    *,
    share: Annotated[float, Gt(0)] = 1.0,
    response: Literal["auto", "on", "off"] = "auto",
) -> Method:
    """PKD on the neck's maps, for every pair; for two two-stage detectors also Chen's answers of the second stage.

    Source: Cao et al. 2022, "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient" (`pearson_kd`), and Chen et al. 2017 (`chen`, without its hint). Which of them for which pair
    is our choice.

    Args:
        student, teacher: detectors of known families.
        share: the maps pull at the student with this share of its own loss's gradient, as measured on the first batch.
            The published weights, 6 and 10, suit 256 channels and images of 800 x 1333; in small detectors they drown
            the student's own loss.
        response: whether answers are compared: "auto" where both have two stages.

    Raises:
        TaskkdError: a detector is of no known family.
        RecipeError: `response="on"` and the two make no predictions of the same regions.
    """
    families = family_of(student, "student"), family_of(teacher, "teacher")
    maps = MapsTerm("pearson", student, teacher, pearson_loss, weight=Auto(share), adapter=adapter_of("auto"), count=4)
    terms: list[Term] = [maps]
    two_stage = all("rois" in family.views for family in families)
    if response == "on" or (response == "auto" and two_stage):
        answers = chen(student, teacher, gamma=0.0).stages[0].terms
        terms += [term for term in answers if term.name != "hint"]
    return Method("auto", [Stage("distil", terms)], ("labels",))
