"""Distillation for search: the student scores the candidates of a query as the teacher does.

A sample is a query and its candidates, several texts: `data.text: [query, positive, negative]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from annotated_types import Gt
from torch import Tensor, nn

from taskkd import losses
from taskkd.errors import ShapeError
from taskkd.losses.embeddings import candidate_scores
from taskkd.nlp.methods.embedding_mimic import EMBEDDING
from taskkd.nlp.sentence import check_sentence_encoders
from taskkd.stages import Method, Stage
from taskkd.terms import Match

__all__ = ["candidate_kl", "margin_mse"]

Similarity = Literal["dot", "cosine"]


def _scores(similarity: Similarity) -> Callable[[Tensor], Tensor]:
    """Of embeddings (batch, 1 + candidates, features) the scores (batch, candidates) of each query, the first text."""

    def scores(embedding: Tensor) -> Tensor:
        if embedding.ndim != 3 or embedding.shape[1] < 3:
            raise ShapeError(
                "scores of candidates need embeddings (batch, 1 + candidates, features) of two candidates or more, got "
                f"{tuple(embedding.shape)}; name the columns, as data.text=[query, positive, negative]."
            )
        return candidate_scores(embedding[:, 0], embedding[:, 1:], normalise=similarity == "cosine")

    return scores


def margin_mse(
    student: nn.Module,
    teacher: nn.Module,
    *,
    similarity: Similarity = "dot",
    weight: Annotated[float, Gt(0)] = 1.0,
) -> Method:
    """`weight * ((s(q, p) - s(q, n)) - (t(q, p) - t(q, n)))^2`, mean over the batch and the negatives `n`.

    Source: Hofstätter, Althammer, Schröder, Sertkan, Hanbury 2020, "Improving Efficient Neural Ranking Models with
    Cross-Architecture Knowledge Distillation". Their teacher is a cross-encoder whose margins are computed once; here
    it is a sentence encoder. Embeddings of other sizes need no map: scores are compared.

    Args:
        student, teacher: sentence encoders, whose output has `sentence_embedding`, (batch, 2 + negatives, features):
            query, positive, negatives.
        similarity: of query and candidate.
        weight: of the term.

    Raises:
        RecipeError: one of the two is no sentence encoder.
    """
    check_sentence_encoders("margin_mse", student, teacher)
    term = Match("margins", losses.margin_mse, EMBEDDING, select=_scores(similarity), weight=weight)
    return Method("margin_mse", [Stage("distil", [term], task_weight=0.0)])


def candidate_kl(
    student: nn.Module,
    teacher: nn.Module,
    *,
    similarity: Similarity = "dot",
    temperature: Annotated[float, Gt(0)] = 1.0,
    weight: Annotated[float, Gt(0)] = 1.0,
) -> Method:
    """`weight * T^2 KL(softmax(t(q, .) / T) || softmax(s(q, .) / T))` over the candidates of each query.

    Source: Lin, Yang, Lin 2021 (TCT-ColBERT) and Ren et al. 2021 (RocketQAv2), whose teachers score the pairs of texts
    themselves; here the teacher is a sentence encoder. Embeddings of other sizes need no map: scores are compared.

    Args:
        student, teacher: sentence encoders, whose output has `sentence_embedding`, (batch, 1 + candidates, features):
            query, candidates in any order.
        similarity: of query and candidate.
        temperature: `T`. Cosines differ by less than 2: for embeddings of unit length 0.05 gives a distribution that
            is not nearly uniform.
        weight: of the term.

    Raises:
        RecipeError: one of the two is no sentence encoder.
    """
    check_sentence_encoders("candidate_kl", student, teacher)
    term = Match(
        "candidates",
        losses.kl_divergence,
        EMBEDDING,
        select=_scores(similarity),
        temperature=temperature,
        weight=weight,
    )
    return Method("candidate_kl", [Stage("distil", [term], task_weight=0.0)])
