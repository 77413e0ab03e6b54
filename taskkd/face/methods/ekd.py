"""EKD: evaluation-oriented knowledge distillation (Huang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from taskkd.errors import ShapeError, TaskkdError
from taskkd.losses.primitives import cosines, full_precision, masked_mean
from taskkd.ranks import gather_ranks, join_ranks, whole_loss
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = ["EvaluationDistillation", "ekd", "ekd_loss", "false_positive_thresholds", "pair_similarities", "soft_ranks"]

Start: TypeAlias = Literal["zero", "first_batch"]
ANCHORS = (10, 100, 1000, 10_000, 100_000, 1_000_000)
NONE = -2.0  # below every cosine


@full_precision
def pair_similarities(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines of all pairs of a batch, i < j: (2, pairs), the student's and the teacher's.

    Raises:
        ShapeError: they are not (N, features) of one N.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ShapeError(
            f"`pair_similarities` needs embeddings (N, features) of one N, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    place = _above_diagonal(len(student), student.device)
    return torch.stack([cosines(x).flatten().index_select(0, place) for x in (student, teacher)])


def _above_diagonal(count: int, device: torch.device) -> Tensor:
    """Where the pairs i < j are in a flattened matrix."""
    place: Tensor = torch.triu_indices(count, count, 1, device=device)
    return place[0] * count + place[1]


def soft_ranks(similarities: Tensor, thresholds: Tensor, temperature: float = 0.01) -> Tensor:
    """How many thresholds a similarity is above, softly: `sum_k sigmoid((s - thr_k) / temperature)`."""
    return torch.sigmoid((similarities[..., None] - thresholds) / temperature).sum(-1)


def false_positive_thresholds(similarities: Tensor, negative: Tensor, anchors: Sequence[int] = ANCHORS) -> Tensor:
    """The similarities above which one in `anchor` pairs of two identities lies, for each anchor.

    Of L such pairs in descending order that at `floor(L / anchor)`; so for an anchor above L the largest. No more of
    the order is found than is needed.

    Args:
        similarities: (pairs,).
        negative: (pairs,) bool, which are of two identities.
        anchors: one over the rates of false positives.

    Returns:
        (anchors,); 0 where no pair is negative.
    """
    if len(similarities) == 0:
        return similarities.new_zeros(len(anchors))
    reach = min(len(similarities) // min(anchors) + 1, len(similarities))
    top = similarities.masked_fill(~negative, NONE).topk(reach).values
    total = negative.sum()
    place = torch.stack([torch.minimum(total // a, total - 1) for a in anchors]).clamp(min=0)
    return torch.where(total > 0, top[place], 0.0)


def _kinds(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs are of one identity and which of two, (pairs,) bool; neither where one is unknown."""
    place = _above_diagonal(len(labels), labels.device)
    same, known = labels[:, None] == labels, (labels >= 0) & (labels >= 0)[:, None]
    return (same & known).flatten()[place], (~same & known).flatten()[place]


@full_precision
def ekd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    student_thresholds: Tensor,
    teacher_thresholds: Tensor,
    topk: int = 2000,
    temperature: float = 0.01,
    positive: float = 0.02,
    negative: float = 0.01,
) -> Tensor:
    """Soft ranks of pairs among thresholds, of positive and the hardest negative ones: the student's as the teacher's.

    `positive mean_+ (r_s - r_t)^2 + negative mean_- (r_s - r_t)^2`, `r` the `soft_ranks` of a pair's cosine among the
    thresholds of its network; the first mean is over all pairs of one identity, the second over the `topk` of two
    identities that are the most similar to the student. Source: Huang Y. et al. 2022, "Evaluation-oriented Knowledge
    Distillation for Deep Face Recognition"; numbers are the authors', and so is the scaling.

    Args:
        student, teacher: embeddings (N, features) of one N; widths may differ.
        labels: (N,) identities; pairs with one below 0 do not count.
        student_thresholds, teacher_thresholds: (K,), see `false_positive_thresholds`.
        topk: how many negative pairs, at most.
        temperature: of the ranks.
        positive, negative: weights.

    Returns:
        A scalar; a mean over no pairs is exactly 0.

    Raises:
        ShapeError: embeddings or labels do not fit.
        ValueError: a number is out of range.
    """
    if labels.shape != student.shape[:1]:
        raise ShapeError(f"`ekd_loss` needs labels ({len(student)},), got {tuple(labels.shape)}.")
    if topk < 1 or not temperature > 0:
        raise ValueError(f"`topk` and `temperature` must be positive, got {topk} and {temperature}.")
    thresholds = student_thresholds, teacher_thresholds
    parts = _rank_distances(pair_similarities(student, teacher), _kinds(labels), thresholds, topk, temperature)
    return positive * parts[0] + negative * parts[1]


def _rank_distances(
    similarities: Tensor,
    kinds: tuple[Tensor, Tensor],
    thresholds: tuple[Tensor, Tensor],
    topk: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Mean squared differences of ranks over positive pairs and over the student's hardest negative ones."""
    same, other = kinds
    count = min(topk, len(other))
    hardest = similarities[0].detach().masked_fill(~other, NONE).topk(count, sorted=False).indices
    if (
        similarities.device.type == "cpu" and not torch.compiler.is_compiling()
    ):  # few; elsewhere it would stop the device
        positive = same.nonzero()[:, 0]
        chosen, same = similarities.index_select(1, positive), same[positive]
    else:
        chosen = similarities
    found = []
    for pairs, counted in ((chosen, same), (similarities.index_select(1, hardest), other[hardest])):
        both = zip(pairs, thresholds, strict=True)
        ranks = [soft_ranks(x, level.to(x.dtype), temperature) for x, level in both]
        found.append(masked_mean((ranks[0] - ranks[1].detach()).square(), counted))
    return found[0], found[1]


class EvaluationDistillation(Term):
    """`ekd_loss` of the samples of all ranks, and the running thresholds of both networks.

    Before the loss the thresholds move by `momentum` towards those of the batch: `thr = momentum batch + (1 - momentum)
    thr`, from 0. In the first hundred steps they are therefore far too low and all ranks near the number of anchors;
    `init="first_batch"` begins with those of the first batch. They are part of checkpoints and alike on all ranks.

    Identities are the batch's `identity` where it has that, else its `labels`.

    Args:
        name, weight: see `Term`.
        student, teacher: taps of the embeddings.
        anchors, topk, temperature, positive, negative: see `false_positive_thresholds` and `ekd_loss`.
        momentum: of the thresholds.
        init: of the thresholds.
        gather: over all ranks; False: each its own.

    Raises:
        TaskkdError: a number is out of range; when it runs, the batch has no labels.
    """

    columns = ("identity", "labels")
    student_thresholds: Tensor
    teacher_thresholds: Tensor
    started: Tensor

    def __init__(
        self,
        name: str = "ranks",
        student: str = "out.embeddings",
        teacher: str = "out.embeddings",
        *,
        anchors: Sequence[int] = ANCHORS,
        topk: int = 2000,
        temperature: float = 0.01,
        momentum: float = 0.01,
        init: Start = "zero",
        positive: float = 0.02,
        negative: float = 0.01,
        gather: bool = True,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, weight)
        if not anchors or min(anchors) < 1 or not 0 < momentum <= 1:
            raise TaskkdError(
                f"term {name!r}: `anchors` are whole numbers from 1 and `momentum` in (0, 1], got {list(anchors)} and "
                f"{momentum}."
            )
        if init not in ("zero", "first_batch"):
            raise TaskkdError(f"term {name!r}: `init` is 'zero' or 'first_batch', got {init!r}.")
        self.student_taps, self.teacher_taps = (student,), (teacher,)
        self.anchors, self.momentum, self.init, self.gather = tuple(anchors), momentum, init, gather
        if topk < 1 or not temperature > 0:
            raise TaskkdError(
                f"term {name!r}: `topk` and `temperature` must be positive, got {topk} and {temperature}."
            )
        self.topk, self.temperature, self.weights = topk, temperature, (positive, negative)
        for side in ("student", "teacher"):
            self.register_buffer(f"{side}_thresholds", torch.zeros(len(self.anchors)))
        self.register_buffer("started", torch.tensor(False))

    def _labels(self, run: Run, count: int) -> Tensor:
        labels = run.batch.get("identity", run.batch.get("labels"))
        if not isinstance(labels, Tensor) or labels.shape != (count,):
            shown = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else "missing"
            raise TaskkdError(
                f"term {self.name!r} needs the identities of a batch, `labels` ({count},), to tell pairs of one from "
                f"others; they are {shown}."
            )
        return labels

    @torch.no_grad()
    def _move(self, similarities: Tensor, negative: Tensor) -> None:
        """Move both thresholds towards those of this batch, if it has negative pairs."""
        some = negative.any()
        for old, values in zip((self.student_thresholds, self.teacher_thresholds), similarities, strict=True):
            new = false_positive_thresholds(values, negative, self.anchors).to(old.dtype)
            moved = self.momentum * new + (1 - self.momentum) * old
            if self.init == "first_batch":
                moved = torch.where(self.started, moved, new)
            old.copy_(torch.where(some, moved, old))
        self.started |= some

    def forward(self, run: Run) -> Tensor:
        student, teacher = run.student[self.student_taps[0]], run.teacher[self.teacher_taps[0]]
        labels = self._labels(run, len(student))
        if self.gather:
            student, teacher, labels = join_ranks(student), gather_ranks(teacher), gather_ranks(labels)
        similarities, kinds = pair_similarities(student, teacher), _kinds(labels)
        self._move(similarities.detach(), kinds[1])
        thresholds = self.student_thresholds.clone(), self.teacher_thresholds.clone()
        parts = _rank_distances(similarities, kinds, thresholds, self.topk, self.temperature)
        value = self.weights[0] * parts[0] + self.weights[1] * parts[1]
        return whole_loss(value) if self.gather else value


def ekd(
    student: nn.Module,  # noqa: ARG001  (as of all methods)
    teacher: nn.Module,  # noqa: ARG001
    *,
    positive: Annotated[float, Ge(0)] = 0.02,
    negative: Annotated[float, Ge(0)] = 0.01,
    anchors: list[int] | None = None,
    topk: Annotated[int, Gt(0)] = 2000,
    temperature: Annotated[float, Gt(0)] = 0.01,
    momentum: Annotated[float, Interval(gt=0, le=1)] = 0.01,
    init: Start = "zero",
    gather: bool = True,
) -> Method:
    """Where pairs stand among thresholds of given false positive rates: the student's pairs as the teacher's.

    Source: Huang Y. et al. 2022, "Evaluation-oriented Knowledge Distillation for Deep Face Recognition", and their code
    (TFace): beside ArcFace (m = 0.4) on batches of 32 random images and 8 identities of 4 images, as
    `taskkd.face.batches.GeneralPlusBalanced` makes them.

    Args:
        student, teacher: models whose output has `embeddings`, of any widths.
        positive, negative: weights of the pairs of one identity and of the hardest of two.
        anchors: one over the false positive rates of the thresholds. None: 10, 100, ..., a million.
        topk: how many negative pairs, those most similar to the student.
        temperature: of the soft ranks.
        momentum: of the thresholds.
        init: "zero", as the authors, whose thresholds need some hundred steps; or those of the "first_batch".
        gather: over all ranks; False: each its own.
    """
    term = EvaluationDistillation(
        anchors=ANCHORS if anchors is None else anchors,
        topk=topk,
        temperature=temperature,
        momentum=momentum,
        init=init,
        positive=positive,
        negative=negative,
        gather=gather,
    )
    return Method("ekd", [Stage("distil", [term])], ("labels",))
