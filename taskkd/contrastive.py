"""Contrastive terms: the student's embedding of a sample told from those of other samples, with a memory of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from taskkd.adapters import Embedding
from taskkd.banks import MemoryBank, sample_ids
from taskkd.errors import ShapeError, TapError, TaskkdError
from taskkd.losses.contrastive import noise_contrast, relation_similarities, similarities
from taskkd.losses.primitives import masked_mean
from taskkd.ranks import gather_ranks
from taskkd.terms import Run, Term, Weight

__all__ = ["ContrastiveRelation", "ContrastiveRepresentation"]

#: ids (batch,) -> ids of their negatives (batch, K)
Draw: TypeAlias = Callable[[Tensor], Tensor]


class ContrastiveRepresentation(Term):
    """Contrastive representation distillation (CRD): both directions of `losses.noise_contrastive`, with memories.

    The student's embedding is contrasted with the memory of the teacher's, the teacher's with that of the student's;
    then both memories take in the batch. Source: Tian, Krishnan, Isola 2020 and 2022, "Contrastive Representation
    Distillation". The embedding of the teacher's features is trained too.

    Batches need `id`: the sample's number in 0 to `samples - 1`. The two memories take `8 * samples * features` bytes
    on each device and in each checkpoint. Negatives come from torch's generator, so a resumed run draws the same.
    Each rank draws for its own samples; memories and constant are the same on all.

    The trap of the authors' code, kept because their weight belongs to it: the constant `Z` is what the very first
    training batch gives (not that of `prepare`), and stays. Where that batch is not typical, features near 0 say, the
    loss is of little use for the whole training; the buffer `log_z` shows it.

    Args:
        name: see `Term`.
        student, teacher: taps of the features before the classifier; the same if `teacher` is left out.
        samples: the size of the training set.
        negatives: K. They are drawn uniformly and with replacement.
        labels: the class of every sample, (samples,): negatives are then of other classes (the authors' default).
            None: any sample, the positive too.
        draw: other negatives, `ids (batch,) -> ids (batch, K)`.
        temperature, momentum, features: of the scores, the memories, the embeddings.
        weight: see `Term`; 0.8 in the paper.

    Raises:
        TaskkdError: a number is out of range, or labels that do not leave a negative for every sample.
    """

    log_z: Tensor

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str | None = None,
        *,
        samples: int,
        negatives: int = 16384,
        labels: Tensor | None = None,
        draw: Draw | None = None,
        temperature: float = 0.07,
        momentum: float = 0.5,
        features: int = 128,
        weight: Weight = 0.8,
    ) -> None:
        super().__init__(name, weight)
        if samples < 2 or negatives < 1 or not temperature > 0:
            raise TaskkdError(
                f"term {name!r}: `samples` must be at least 2, `negatives` and `temperature` positive, got {samples}, "
                f"{negatives} and {temperature}."
            )
        self.student_taps, self.teacher_taps = (student,), (student if teacher is None else teacher,)
        self.samples, self.negatives, self.temperature = samples, negatives, temperature
        self.momentum, self.features, self.draw = momentum, features, draw
        self.embeddings = nn.ModuleList()
        self.banks = nn.ModuleList()
        self.register_buffer("log_z", torch.full((2,), -torch.inf))  # Z = 0: not known yet
        self._sort(labels)

    def _sort(self, labels: Tensor | None) -> None:
        """The ids by class, and where each sample's class begins and how many it has."""
        self.by_class: tuple[Tensor, Tensor, Tensor] | None = None
        if labels is None:
            return
        if labels.shape != (self.samples,):
            raise TaskkdError(f"term {self.name!r}: labels of shape {tuple(labels.shape)} for {self.samples} samples.")
        _, inverse, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise TaskkdError(f"term {self.name!r}: all samples are of one class, none has a negative of another.")
        begins = counts.cumsum(0) - counts
        self.by_class = (inverse.argsort(stable=True), begins[inverse], counts[inverse])

    @property
    def built(self) -> bool:
        return len(self.banks) == 2

    def build(self, run: Run) -> None:
        if self.built:
            return
        for value in self._features(run):
            embedding = Embedding(value[0].numel(), self.features)
            bank = MemoryBank(self.samples, self.features, momentum=self.momentum)
            dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
            self.embeddings.append(embedding.to(value.device, dtype))
            self.banks.append(bank.to(value.device, dtype))
        self.log_z = self.log_z.to(value.device, dtype)

    def _features(self, run: Run) -> tuple[Tensor, Tensor]:
        values = (run.student.get(self.student_taps[0]), run.teacher.get(self.teacher_taps[0]))
        for tap, value in zip((*self.student_taps, *self.teacher_taps), values, strict=True):
            if not isinstance(value, Tensor) or value.ndim < 2:
                raise TapError(f"term {self.name!r}: tap {tap!r} gives no tensor (batch, ...).")
        return values  # type: ignore[return-value]

    def _draw(self, ids: Tensor) -> Tensor:
        """The ids of the negatives, (batch, K)."""
        if self.draw is not None:
            return self.draw(ids)
        shape = (len(ids), self.negatives)
        if self.by_class is None:
            return torch.randint(self.samples, shape, device=ids.device)
        self.by_class = order, begin, count = tuple(x.to(ids.device) for x in self.by_class)  # type: ignore[assignment]
        begins, counts = begin[ids, None], count[ids, None]
        place = (torch.rand(shape, dtype=torch.float64, device=ids.device) * (self.samples - counts)).long()
        return order[place + counts * (place >= begins)]

    def scores(self, embedding: Tensor, bank: MemoryBank, candidates: Tensor) -> Tensor:
        """Similarities to the candidates over the temperature, the positive first along the last dimension."""
        return similarities(embedding, (bank.rows, candidates), temperature=self.temperature)

    def forward(self, run: Run) -> Tensor:
        ids = sample_ids(run.batch, self.samples, f"term {self.name!r}")
        values = self._features(run)
        if len(ids) != len(values[0]):
            raise ShapeError(f"term {self.name!r}: {len(ids)} ids for {len(values[0])} samples.")
        ids = ids.to(values[0].device)
        embeddings = [embedding(value) for embedding, value in zip(self.embeddings, values, strict=True)]
        candidates = torch.cat([ids[:, None], self._draw(ids)], 1)
        banks: list[MemoryBank] = list(self.banks)  # type: ignore[arg-type]
        scores = [self.scores(e, b, candidates) for e, b in zip(embeddings, reversed(banks), strict=True)]
        self._fix_z(scores)
        parts = [masked_mean(noise_contrast(s, z, self.samples)) for s, z in zip(scores, self.log_z, strict=True)]
        for bank, embedding in zip(banks, embeddings, strict=True):
            bank.update(ids, embedding.detach())
        return parts[0] + parts[1]

    @torch.no_grad()
    def _fix_z(self, scores: list[Tensor]) -> None:
        """`log (mean exp(score) * samples)` over the first batch of all ranks, without asking the device whether."""
        means = torch.stack([s.flatten().logsumexp(0) - math.log(max(s.numel(), 1)) for s in scores])
        every = gather_ranks(means[None])
        log_z = every.logsumexp(0) + math.log(self.samples / len(every))
        self.log_z.copy_(torch.where(self.log_z.isinf(), log_z.to(self.log_z.dtype), self.log_z))


class ContrastiveRelation(ContrastiveRepresentation):
    """Complementary relation contrastive distillation (CRCD): both directions of `losses.relation_contrastive`.

    As `ContrastiveRepresentation`, but for each sample and each anchor the relation between them is contrasted; the
    anchors are the batch's samples as the memory has them. Source: Zhu, Tang, Chen, Yu, Liu, Rong, Yang, Wang 2021,
    "Complementary Relation Contrastive Distillation" (without its linear or deep relation module; weight 1).

    Memory grows with `batch^2 * K * features`: about 1 GiB in fp32 for each direction, and as much again for the
    backward, at a batch of 64, K 500 and 128 features.

    Args, raises: as `ContrastiveRepresentation`; K is 500 and the temperature 0.05.
    """

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str | None = None,
        *,
        samples: int,
        negatives: int = 500,
        labels: Tensor | None = None,
        draw: Draw | None = None,
        temperature: float = 0.05,
        momentum: float = 0.5,
        features: int = 128,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(
            name, student, teacher, samples=samples, negatives=negatives, labels=labels, draw=draw,
            temperature=temperature, momentum=momentum, features=features, weight=weight,
        )  # fmt: skip

    def scores(self, embedding: Tensor, bank: MemoryBank, candidates: Tensor) -> Tensor:
        """(batch, anchors, 1 + K): the anchors are the batch's positives."""
        anchors = bank.rows[candidates[:, 0]]
        return relation_similarities(embedding, (bank.rows, candidates), anchors=anchors, temperature=self.temperature)
