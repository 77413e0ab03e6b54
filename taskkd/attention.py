"""Learned attention over layers and channels: which of the teacher's features the student follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import ShapeError, TapError, TaskkdError
from taskkd.losses.channels import channel_weighted
from taskkd.losses.layers import attention_based_features
from taskkd.losses.primitives import safe_divide
from taskkd.terms import Run, Term, Weight

__all__ = ["AttentionBasedFeatures", "ChannelAttention", "ChannelAttentive", "LayerAttention"]


class _Projection(nn.Module):
    """Linear, batch norm and, if wished, ReLU."""

    def __init__(self, size: int, features: int, *, relu: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(size, features)
        self.norm = nn.BatchNorm1d(features)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.training and len(y) == 1:  # no statistics of one sample
            norm = self.norm
            y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            y = self.norm(y)
        return y.relu() if self.relu else y


class LayerAttention(nn.Module):
    """How much each teacher layer attends to each student layer, from channel means of a sample and learned positions.

    Source: Ji, Heo, Park 2021, "Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching"
    (128 features).

    Args:
        student, teacher: the channels of each layer.
        features: the size of queries and keys.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], *, features: int = 128) -> None:
        super().__init__()
        self.keys = nn.ModuleList(_Projection(c, features, relu=True) for c in student)
        self.bilinear = _Projection(features, features * len(teacher))
        self.queries = nn.ModuleList(_Projection(c, features) for c in teacher)
        self.student_positions = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(student), features)))
        self.teacher_positions = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(teacher), features)))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Maps (batch, channels, H, W) of each layer -> (batch, teacher layers, student layers), sums of 1."""
        like = self.student_positions
        keys = torch.stack([k(x.mean((2, 3)).to(like.dtype)) for k, x in zip(self.keys, student, strict=True)], 1)
        queries = torch.stack([q(x.mean((2, 3)).to(like.dtype)) for q, x in zip(self.queries, teacher, strict=True)], 1)
        size = keys.shape[-1]
        keys = self.bilinear(keys.flatten(0, 1)).reshape(*keys.shape[:2], queries.shape[1], size)
        scores = torch.einsum("bstf,btf->bts", keys, queries) + self.teacher_positions @ self.student_positions.T
        return F.softmax(scores / size**0.5, 2)


class ChannelAttention(nn.Module):
    """How much each of the teacher's channels counts for a sample: a gate on their means, normalised to a sum of 1.

    Source: Wang K., Gao, Zhao, Li, Dou, Xu 2020, "Pay Attention to Features, Transfer Learn Faster CNNs", as
    Knowledge-Distillation-Zoo implements it.

    Args:
        channels: the teacher's.
        reduction: the hidden layer's share of them.
    """

    def __init__(self, channels: int, *, reduction: float = 0.5) -> None:
        super().__init__()
        hidden = max(int(channels * reduction), 1)
        self.gate = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, teacher: Tensor) -> Tensor:
        """Maps (batch, channels, H, W) -> (batch, channels)."""
        gate: Tensor = self.gate(teacher.mean((2, 3)).to(next(self.gate.parameters()).dtype))
        return safe_divide(gate, gate.sum(1, keepdim=True))


def _maps(run: Run, term: Term) -> tuple[list[Tensor], list[Tensor]]:
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for values, taps, maps in zip(
        (run.student, run.teacher), (term.student_taps, term.teacher_taps), found, strict=True
    ):
        for tap in taps:
            value = values.get(tap)
            if not isinstance(value, Tensor) or value.ndim != 4:
                raise TapError(f"term {term.name!r}: tap {tap!r} gives no map (batch, channels, height, width).")
            maps.append(value)
    return found


def _like(module: nn.Module, x: Tensor) -> nn.Module:
    return module.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)


class AttentionBasedFeatures(Term):
    """Attention-based feature distillation (AFD): `losses.attention_based_features` with a learned `LayerAttention`.

    Args:
        name: see `Term`.
        student, teacher: taps of maps, one or more of each; their numbers may differ.
        features: the size of queries and keys.
        weight: see `Term`; the authors' beta of 200 stands for a sum over the teacher's layers, so 200 times their
            number here.

    Raises:
        TaskkdError: no taps.
    """

    def __init__(
        self, name: str, student: Sequence[str], teacher: Sequence[str], *, features: int = 128, weight: Weight = 1.0
    ) -> None:
        super().__init__(name, weight)
        if isinstance(student, str) or isinstance(teacher, str) or not student or not teacher:
            raise TaskkdError(f"term {name!r} attends over layers and needs lists of student and of teacher taps.")
        self.student_taps, self.teacher_taps = tuple(student), tuple(teacher)
        self.features = features
        self.attention: LayerAttention | None = None

    @property
    def built(self) -> bool:
        return self.attention is not None

    def build(self, run: Run) -> None:
        if self.attention is None:
            students, teachers = _maps(run, self)
            attention = LayerAttention(
                [x.shape[1] for x in students], [x.shape[1] for x in teachers], features=self.features
            )
            _like(attention, students[0])
            self.attention = attention

    def forward(self, run: Run) -> Tensor:
        students, teachers = _maps(run, self)
        assert self.attention is not None
        return attention_based_features(students, teachers, attention=self.attention(students, teachers))


class ChannelAttentive(Term):
    """Attentive feature distillation (AFDS): `losses.channel_weighted`, normalised, with a learned `ChannelAttention`.

    Args:
        name: see `Term`.
        student, teacher: taps of maps of one shape but for their size; the same if `teacher` is left out.
        reduction: see `ChannelAttention`.
        weight: see `Term`.
    """

    def __init__(
        self, name: str, student: str, teacher: str | None = None, *, reduction: float = 0.5, weight: Weight = 1.0
    ) -> None:
        super().__init__(name, weight)
        self.student_taps, self.teacher_taps = (student,), (student if teacher is None else teacher,)
        self.reduction = reduction
        self.attention: ChannelAttention | None = None

    @property
    def built(self) -> bool:
        return self.attention is not None

    def build(self, run: Run) -> None:
        if self.attention is None:
            _, (teacher,) = _maps(run, self)
            attention = ChannelAttention(teacher.shape[1], reduction=self.reduction)
            _like(attention, teacher)
            self.attention = attention

    def forward(self, run: Run) -> Tensor:
        (student,), (teacher,) = _maps(run, self)
        assert self.attention is not None
        try:
            return channel_weighted(student, teacher, channels=self.attention(teacher), normalise=True)
        except ShapeError as error:
            raise ShapeError(f"term {self.name!r}: {error}") from None
