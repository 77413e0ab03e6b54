"""Embedding mimicking: the student's sentence embeddings are the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from annotated_types import Gt
from torch import Tensor, nn

from taskkd import adapters, losses
from taskkd.nlp.sentence import check_sentence_encoders
from taskkd.stages import Method, Stage
from taskkd.terms import Match

__all__ = ["embedding_mimic"]

LOSSES: dict[str, Callable[..., Tensor]] = {"cosine": losses.cosine, "mse": losses.mse, "l2": losses.euclidean}
EMBEDDING = "out.sentence_embedding"


def embedding_mimic(
    student: nn.Module,
    teacher: nn.Module,
    *,
    loss: Literal["cosine", "mse", "l2"] = "cosine",
    weight: Annotated[float, Gt(0)] = 1.0,
) -> Method:
    """`weight * d(student's embedding, teacher's embedding)` of every text; no labels.

    Source: Reimers, Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation"
    (mse), Kim et al. 2023, "EmbedDistill" (l2). For embeddings of unit length all three have the same minimum, and
    `mse` is `2 / features` times `cosine`.

    Scaling: `mse` is the mean over features too, as in sentence-transformers. Kim et al. compare documents' embeddings
    as well as queries'; here each text of a sample counts alike.

    Where the student's embedding has another size, a linear map to the teacher's is trained with it and left out of the
    saved student, whose embeddings are then a space of their own: only their similarities are the teacher's, and not
    by the objective. The term `{loss: similarity_preserving, normalise: samples}`, which compares similarities
    themselves, needs no map.

    Args:
        student, teacher: sentence encoders, whose output has `sentence_embedding`.
        loss: "cosine": `1 - cos`; "mse": mean squared difference; "l2": the difference's norm.
        weight: of the term.

    Raises:
        RecipeError: one of the two is no sentence encoder.
    """
    check_sentence_encoders("embedding_mimic", student, teacher)
    term = Match("embedding", LOSSES[loss], EMBEDDING, adapter=_where_sizes_differ, select=_texts, weight=weight)
    return Method("embedding_mimic", [Stage("distil", [term], task_weight=0.0)])


def _texts(embedding: Tensor) -> Tensor:
    """(texts, features), also where a sample is several texts."""
    return embedding.reshape(-1, embedding.shape[-1])


def _where_sizes_differ(student: Tensor, teacher: Tensor) -> nn.Module:
    same = student.shape[-1] == teacher.shape[-1]
    return nn.Identity() if same else adapters.Linear(student.shape[-1], teacher.shape[-1])
