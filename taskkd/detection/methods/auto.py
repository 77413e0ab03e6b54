"""What is used where no method is named: chosen by the pair of detectors."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from torch import nn

from taskkd.detection.families import family_of
from taskkd.detection.methods.chen import chen
from taskkd.detection.methods.pearson_kd import pearson_kd
from taskkd.stages import Method, Stage

__all__ = ["auto"]


def auto(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] | None = None,
    response: Literal["auto", "on", "off"] = "auto",
) -> Method:
    """PKD on the neck's maps, for every pair; for two two-stage detectors also Chen's answers of the second stage.

    Source: Cao et al. 2022, "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient" (`pearson_kd`), and Chen et al. 2017 (`chen`, without its hint). Which of them for which pair
    is our choice.

    Args:
        student, teacher: detectors of known families.
        weight: of the maps; None: as published, 6 for two-stage students, 10 for others.
        response: whether answers are compared: "auto" where both have two stages.

    Raises:
        TaskkdError: a detector is of no known family.
        RecipeError: `response="on"` and the two make no predictions of the same regions.
    """
    families = family_of(student, "student"), family_of(teacher, "teacher")
    terms = list(pearson_kd(student, teacher, weight=weight).stages[0].terms)
    two_stage = all("rois" in family.views for family in families)
    if response == "on" or (response == "auto" and two_stage):
        answers = chen(student, teacher, gamma=0.0).stages[0].terms
        terms += [term for term in answers if term.name != "hint"]
    return Method("auto", [Stage("distil", terms)], ("labels",))
