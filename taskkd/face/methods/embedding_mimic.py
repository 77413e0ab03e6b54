"""Embedding mimicking: the student's embedding as the teacher's, by cosine, unit vectors or raw numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd import losses
from taskkd.face.methods.beside import EMBEDDINGS, adapter_of
from taskkd.losses.primitives import check_same_shape, full_precision, l2_normalise, masked_mean
from taskkd.stages import Method, Stage
from taskkd.terms import Match

__all__ = ["embedding_mimic", "unit_distance"]


@full_precision
def unit_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`|s/|s| - t/|t||^2 = 2 - 2 cos(s, t)`, mean over the batch.

    Source: FaceNet's distance, by which face embeddings are compared; as a loss of distillation in insightface's and
    Keras_insightface's users' code.

    Args:
        student, teacher: embeddings (batch, features).
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "unit_distance")
    return masked_mean((l2_normalise(student) - l2_normalise(teacher)).square().sum(-1), mask)


KINDS = {"cosine": losses.cosine, "l2": unit_distance, "mse": losses.mse}


def embedding_mimic(
    student: nn.Module,
    teacher: nn.Module,
    *,
    kind: Literal["cosine", "l2", "mse"] = "cosine",
    weight: Annotated[float, Gt(0)] = 64.0,
    task_weight: Annotated[float, Ge(0)] | None = None,
) -> Method:
    """The student's embedding as the teacher's, beside the margin softmax on the labels; or on faces without labels.

    Source: Romero et al. 2015 (FitNets, "mse"); the cosine with a large weight is Keras_insightface's, from cached
    embeddings (weight 128 or 64; 7 gained half as much). SynthDistill (Otroshi Shahreza et al. 2023) is
    `kind="mse", task_weight=0` on generated faces.

    Scaling: "cosine" and "l2" are means over samples, "mse" over features, too.

    Args:
        student, teacher: face models. Where their embeddings differ in size the student's are mapped by a linear layer,
            which is trained and left out of the student.
        kind: "cosine": `1 - cos`; "l2": the squared distance of unit vectors, twice that; "mse": of raw embeddings,
            which did harm in EKD's table.
        weight: of the term.
        task_weight: of the margin softmax; 0: labels are not needed. None: 1, or 0 where the training data has no
            identities (`student.identities` is 0).
    """
    if task_weight is None:
        task_weight = 0.0 if student.identities == 0 else 1.0
    term = Match("embedding", KINDS[kind], EMBEDDINGS, adapter=adapter_of(student, teacher), weight=weight)
    return Method("embedding_mimic", [Stage("distil", [term], task_weight)], ("labels",) if task_weight > 0 else ())
