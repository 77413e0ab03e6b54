"""DIST for segmentation (Huang et al. 2022): correlations of predictions in place of exact ones."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from torch import nn

from taskkd import losses
from taskkd.segmentation.methods.soft_targets import logit_taps
from taskkd.segmentation.terms import Align, Ignore, MapTerm
from taskkd.stages import Method, Stage

__all__ = ["dist"]


def dist(
    student: nn.Module,
    teacher: nn.Module,
    *,
    inter: Annotated[float, Ge(0)] = 1.0,
    intra: Annotated[float, Ge(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    weight: Annotated[float, Ge(0)] = 1.0,
    aux_weight: Annotated[float, Ge(0)] = 0.4,
    over: Literal["all", "batch"] = "all",
    align: Align = "teacher",
    ignore: Ignore = "padding",
    gather: bool = False,
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Pearson's correlations of both networks' predictions: over the classes of each pixel, over all pixels of a class.

    Source: Huang, You, Wang, Qian, Xu 2022, "Knowledge Distillation from A Stronger Teacher", their code for
    segmentation: weight 1, temperature 1, the auxiliary logits with the 0.4 of their labels. The authors recommend a
    larger temperature for two classes.

    Scaling: equal. mmrazor's version correlates each pixel's classes over the images of the batch (`over="batch"`),
    which is not the paper's relation.

    Args:
        student, teacher: segmentation networks with `views`.
        inter, intra: of the correlations over classes, and over pixels.
        temperature: of the softmax.
        weight: of the term on the logits.
        aux_weight: of the term on auxiliary logits, where both networks have them (`views.aux`) at the same time.
        over: see `losses.dist`.
        align, ignore: see `MapTerm`. The authors' code has no mask: `ignore="none"`.
        gather: on several ranks correlate over the pixels of all of them, whose maps must be of one size; False: of
            each rank its own.
        task_weight: of the labels.

    Raises:
        RecipeError: the networks have different classes.
    """

    def term(name: str, taps: tuple[str, str], term_weight: float) -> MapTerm:
        return MapTerm(
            name,
            losses.dist,
            *taps,
            weight=term_weight,
            align=align,
            ignore=ignore,
            gather=gather,
            inter=inter,
            intra=intra,
            temperature=temperature,
            over=over,
            dim=1,
        )

    terms = [term("logits", logit_taps(student, teacher, "dist"), weight)]
    aux = [m.views.aux for m in (student, teacher)]  # type: ignore[union-attr]
    if aux_weight > 0 and aux[0] is not None and aux[1] is not None:
        terms.append(term("aux", (str(aux[0]), str(aux[1])), aux_weight))
    return Method("dist", [Stage("distil", terms, task_weight)])
