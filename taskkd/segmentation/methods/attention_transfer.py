"""Attention transfer on segmentation networks (Zagoruyko & Komodakis 2017)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt
from torch import nn

from taskkd import losses
from taskkd.segmentation.methods.beside import feature_of, soft_terms
from taskkd.segmentation.terms import Ignore, MapTerm
from taskkd.stages import Method, Stage
from taskkd.terms import Term

__all__ = ["attention_transfer"]


def attention_transfer(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] = 10000.0,
    kd: Annotated[float, Ge(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    power: Annotated[float, Ge(1)] = 2.0,
    ignore: Ignore = "padding",
) -> Method:
    """Where the features are large, `losses.attention_transfer` of the map before the classifier, and soft targets.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", as the code of CIRKD (Yang C. et al. 2022)
    has it for segmentation: a mean over pixels of squared differences of maps of length 1, which is why it weighs so
    much; their weights are the defaults.

    Args:
        student, teacher: models with `views.feature` and `views.logits`.
        weight: of the attention maps.
        kd, temperature: of the soft targets on logits.
        power: of the features.
        ignore: pixels that do not count, in the maps' lengths either; the authors count all ("none").
    """
    taps = feature_of(student, "student"), feature_of(teacher, "teacher")
    terms: list[Term] = [
        MapTerm("attention", losses.attention_transfer, *taps, weight=weight, ignore=ignore, power=power)
    ]
    terms += soft_terms(student, teacher, kd, temperature, ignore)
    return Method("attention_transfer", [Stage("distil", terms)], ("labels",))
