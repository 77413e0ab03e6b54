"""Angular distillation, the last term of ShrinkTeaNet (Duong et al. 2019): embeddings of one direction."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt
from torch import nn

from taskkd import losses
from taskkd.face.methods.beside import EMBEDDINGS, adapter_of
from taskkd.stages import Method, Stage
from taskkd.terms import Match

__all__ = ["angular_distillation"]


def angular_distillation(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Gt(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """`1 - cos` of the embeddings beside ArcFace on the labels.

    Source: Duong, Luu, Quach, Le 2019, "ShrinkTeaNet: Million-scale Lightweight Face Recognition via Shrinking
    Teacher-Student Networks", in the form of Svitov & Alyamkin 2020 ("MarginDistillation"), who compare with it:
    ArcFace (s 64, m 0.5) and weight 1. `embedding_mimic` is the same with a weight that works better.

    Departures: in their MXNet code the weight has no effect on the gradient; here it has.

    Args:
        student, teacher: face models; see `embedding_mimic` where their embeddings differ in size.
        weight: of the term.
        task_weight: of the margin softmax.
    """
    term = Match("angle", losses.cosine, EMBEDDINGS, adapter=adapter_of(student, teacher), weight=weight)
    return Method("angular_distillation", [Stage("distil", [term], task_weight)], ("labels",))
