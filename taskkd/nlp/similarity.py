"""The metric of sentence encoders: nearness to the teacher's embeddings, and the order of scored pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskkd.losses.primitives import l2_normalise
from taskkd.nlp.metrics import spearman

__all__ = ["Similarity", "pairwise_cosines"]

#: all pairs of as many texts are compared, the first by id: 499,500 pairs
COMPARED = 1000


class Similarity:
    """Embeddings against the teacher's for the same texts and, where pairs of texts have a score, against the scores.

    The teacher's are a column of the data, so that nothing but the student runs.

    Args:
        scored: whether pairs of texts have scores.
    """

    #: what it reads of a batch beside what the models do
    columns = ("teacher_embedding", "labels")

    def __init__(self, *, scored: bool = False) -> None:
        self.scored = scored
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Keep one batch.

        Args:
            output: with `sentence_embedding`, (batch, features) or (batch, texts, features).
            batch: `id` (batch,), `teacher_embedding` as the student's but for its features; for scored pairs (two
                texts) `labels` (batch,), NaN where there is no score.
        """
        own = output["sentence_embedding"].detach().float().cpu()
        teacher = batch["teacher_embedding"].detach().float().cpu()
        ids = batch["id"].cpu()
        scores = batch.get("labels")
        scores = torch.full(ids.shape, torch.nan) if scores is None else scores.detach().float().cpu()
        self.parts.append((own, teacher, ids, scores))

    def state(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Embeddings, the teacher's, ids and scores of each batch."""
        return self.parts

    def merge(self, states: Sequence[list[tuple[Tensor, Tensor, Tensor, Tensor]]]) -> None:
        """Take all processes' batches."""
        self.parts = [part for state in states for part in state]

    def compute(self) -> dict[str, float]:
        """`pairwise_spearman`: rank correlation of student's and teacher's cosines of all pairs of texts (of the first
        1,000); `teacher_cosine`: mean cosine to the teacher's embedding (left out where sizes differ); `spearman`: rank
        correlation of the cosine of scored pairs with their scores (left out without scores). 0 where undefined."""
        if not self.parts:
            names = ("pairwise_spearman", "teacher_cosine", *(["spearman"] if self.scored else []))
            return dict.fromkeys(names, 0.0)
        own, teacher, ids, scores = (torch.cat(column) for column in zip(*self.parts, strict=True))
        order = ids.argsort(stable=True)
        own, teacher, scores = (l2_normalise(own[order]), l2_normalise(teacher[order]), scores[order])
        found = {"pairwise_spearman": spearman(pairwise_cosines(own), pairwise_cosines(teacher))}
        if own.shape == teacher.shape:
            found["teacher_cosine"] = (own * teacher).sum(-1).mean().item()
        scored = ~scores.isnan()
        if bool(scored.any()):
            found["spearman"] = spearman((own[:, 0] * own[:, 1]).sum(-1)[scored], scores[scored])
        return found


def pairwise_cosines(embedding: Tensor) -> Tensor:
    """The cosines of all pairs of different texts, of the first 1,000, in a row.

    Args:
        embedding: (..., features).
    """
    unit = l2_normalise(embedding.reshape(-1, embedding.shape[-1])[:COMPARED])
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[first, second]
