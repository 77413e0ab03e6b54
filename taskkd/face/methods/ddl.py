"""DDL: distribution distillation from easy to hard samples (Huang et al. 2020)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from taskkd.errors import ShapeError, TaskkdError
from taskkd.face.histograms import dense_histogram, soft_histogram
from taskkd.losses.primitives import full_precision, l2_normalise, safe_divide
from taskkd.ranks import gather_ranks, join_ranks, whole_loss
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = ["DistributionDistillation", "ddl", "ddl_loss", "ddl_parts", "hardest_negatives", "pair_cosines"]

logger = logging.getLogger(__name__)

Compat: TypeAlias = Literal["default", "tface"]
Pair: TypeAlias = "tuple[Tensor, Tensor]"
FLOOR = 1e-9  # added to both distributions in the divergence


def pair_cosines(first: Tensor, second: Tensor) -> Tensor:
    """The cosines of given pairs: rows of `first` (n, D) with those of `second`, (n,)."""
    return (l2_normalise(first) * l2_normalise(second)).sum(1)


def hardest_negatives(
    features: Tensor, labels: Tensor | None = None, *, compat: Compat = "default"
) -> tuple[Tensor, Tensor]:
    """Of each sample the cosine to the most similar one of another identity, and whether there is such a one.

    Args:
        features: (n, D).
        labels: (n,) identities; those below 0 are unknown and nobody's negatives. None: all are different.
        compat: "tface": the released code, in which a sample sees only those after it and a cosine of 0, so that the
            last one's is 0 and none is negative; labels are not looked at.

    Returns:
        (n,) cosines, 0 where there is none, and (n,) bool.
    """
    count = len(features)
    unit = l2_normalise(features)
    cosine = unit @ unit.T
    every = torch.ones(count, dtype=torch.bool, device=features.device)
    if count == 0:
        return cosine.sum(1), every
    if compat == "tface":
        return cosine.triu(1).max(1).values, every
    other = ~torch.eye(count, dtype=torch.bool, device=features.device)
    if labels is not None:
        other &= (labels[:, None] != labels) & (labels >= 0) & (labels[:, None] >= 0)
    found = other.any(1)
    hardest = cosine.masked_fill(~other, -2.0).max(1).values
    return torch.where(found, hardest, torch.zeros_like(hardest)), found


def _rows(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Similarities of all branches as rows (branches, n), and their weights, 0 where a row has no more."""
    values = pad_sequence([v for v, _ in found], batch_first=True)
    return values, pad_sequence([w.to(values.dtype) for _, w in found], batch_first=True)


def _divergence(histogram: Tensor, there: Tensor, detach: bool) -> Tensor:
    """The sum of `KL(easy || hard)` over the hard branches; those without similarities add 0."""
    easy = (histogram[:1].detach() if detach else histogram[:1]) + FLOOR
    hard = histogram[1:] + FLOOR
    each = (easy * (easy.log() - hard.log())).sum(1)
    return torch.where(there[:1] & there[1:], each, torch.zeros_like(each)).sum()


def ddl_parts(
    identities: Sequence[Tensor],
    pairs: Sequence[Pair],
    *,
    labels: Sequence[Tensor] | None = None,
    bins: int = 1000,
    sigma: float = 0.1,
    low: float = 0.0,
    high: float = 1.0,
    detach_easy: bool | None = None,
    compat: Compat = "default",
) -> dict[str, Tensor]:
    """The three parts of `ddl_loss`, unweighted, in the precision of the features.

    Returns:
        `kl_pos`, `kl_neg` and `order`, scalars; with those on which they stand: `pos` and `neg` (branches, n) cosines,
        `pos_weight` and `neg_weight` (0: not counted), `pos_hist` and `neg_hist` (branches, bins).

    Raises:
        ShapeError: there are not as many branches of both kinds, at least two, or features do not fit.
        ValueError: a number is out of range, or there is no such `compat`.
    """
    _check(identities, pairs, bins, sigma, low, high, compat)
    pos = [pair_cosines(*pair) for pair in pairs]
    kept = [v > 0 if compat == "tface" else torch.ones_like(v, dtype=torch.bool) for v in pos]
    own = [None] * len(identities) if labels is None else list(labels)
    neg = [hardest_negatives(x, y, compat=compat) for x, y in zip(identities, own, strict=True)]
    detach = compat != "tface" if detach_easy is None else detach_easy
    values, weight = _rows([*zip(pos, kept, strict=True), *neg])  # all at once
    if compat == "tface":  # nodes in single precision
        nodes = torch.arange(low, high, (high - low) / bins, dtype=torch.float32, device=values.device)
        histogram = dense_histogram(values, nodes.to(values.dtype), sigma=sigma, weight=weight)
    else:
        histogram = soft_histogram(values, bins=bins, low=low, high=high, sigma=sigma, weight=weight)
    count = weight.sum(1)
    means, there = safe_divide((values * weight).sum(1), count), count > 0
    parts: dict[str, Tensor] = {}
    for name, rows in (("pos", slice(len(pos))), ("neg", slice(len(pos), None))):
        parts[f"kl_{name}"] = _divergence(histogram[rows], there[rows], detach)
        parts |= {name: values[rows], f"{name}_weight": weight[rows], f"{name}_hist": histogram[rows]}
    apart = means[len(pos) :, None] - means[: len(pos)]
    some = there[len(pos) :, None] & there[: len(pos)]
    parts["order"] = torch.where(some, apart, torch.zeros_like(apart)).sum()
    return parts


def _check(
    identities: Sequence[Tensor], pairs: Sequence[Pair], bins: int, sigma: float, low: float, high: float, compat: str
) -> None:
    if len(identities) != len(pairs) or len(pairs) < 2:
        raise ShapeError(
            "`ddl_loss` needs as many branches of identities as of pairs, the easy one and at least one hard one; got "
            f"{len(identities)} and {len(pairs)}."
        )
    for number, (first, second) in enumerate(pairs):
        if first.shape != second.shape or first.ndim != 2 or identities[number].ndim != 2:
            raise ShapeError(
                f"`ddl_loss`, branch {number}: features must be (n, features) and pairs as many on both sides, got "
                f"{tuple(identities[number].shape)}, {tuple(first.shape)} and {tuple(second.shape)}."
            )
    if bins < 2 or not sigma > 0 or not low < high:
        raise ValueError(
            f"`bins` must be at least 2, `sigma` positive, `low` below `high`; got {bins}, {sigma}, {low} and {high}."
        )
    if compat not in ("default", "tface"):
        raise ValueError(f"`compat` is 'default' or 'tface', got {compat!r}.")


@full_precision
def ddl_loss(
    identities: Sequence[Tensor],
    pairs: Sequence[Pair],
    *,
    positive: float = 0.1,
    negative: float = 0.02,
    order: float = 0.5,
    labels: Sequence[Tensor] | None = None,
    bins: int = 1000,
    sigma: float = 0.1,
    low: float = 0.0,
    high: float = 1.0,
    detach_easy: bool | None = None,
    compat: Compat = "default",
) -> Tensor:
    """Distributions of similarities of hard samples as those of easy ones, and negatives below positives.

    `positive sum_k KL(P+_0 || P+_k) + negative sum_k KL(P-_0 || P-_k) + order sum_ij (mean s-_i - mean s+_j)`: `P` the
    `soft_histogram` of a branch's similarities, of given pairs (+) or of each sample and its hardest negative (-).
    Branch 0 is easy, all others are hard; the last sum is over all pairs of branches. Source: Huang Y. et al. 2020,
    "Improving Face Recognition from Hard Samples via Distribution Distillation Loss"; weights are the authors'.

    Scaling: sums over branches, as the authors'. Departures, all undone by `compat="tface"`: the easy branch's
    distributions are constants in the divergences (`detach_easy`), which did at least as well in our trials; positives
    of a cosine of 0 or less count (theirs are dropped); a sample's hardest negative is looked for among all others of
    another identity (theirs: see `hardest_negatives`). A branch without positives or negatives adds exactly 0, also
    with `compat="tface"`, where their code is NaN.

    Args:
        identities: of each branch features (n, D) of different identities.
        pairs: of each branch two tensors (n, D) whose rows are of one identity.
        positive, negative, order: weights.
        labels: identities of `identities`, as `hardest_negatives` takes them; None: each is another.
        bins, low, high, sigma: of the histograms.
        detach_easy: no gradient flows into the easy branch by the divergences. None: so, except in "tface".
        compat: "tface": the released code.

    Raises:
        ShapeError: there are not as many branches of both kinds, at least two, or features do not fit.
        ValueError: a number is out of range, or there is no such `compat`.
    """
    parts = ddl_parts(
        identities,
        pairs,
        labels=labels,
        bins=bins,
        sigma=sigma,
        low=low,
        high=high,
        detach_easy=detach_easy,
        compat=compat,
    )
    return positive * parts["kl_pos"] + negative * parts["kl_neg"] + order * parts["order"]


class DistributionDistillation(Term):
    """`ddl_loss` of the samples of all ranks, by the batch's `branch`; no teacher.

    `branch` (N,) is b of the identities of branch b, `branches + b` of its pairs, whose two samples lie next to each
    other, -1 of what does not take part. `labels`, where the batch has them, say which are of one identity.

    Not with `torch.compile(fullgraph=True)`: how many are of a branch is looked up in every step.

    Args:
        name, weight: see `Term`.
        student: the tap of the embeddings (N, D).
        branches: how many, easy and hard.
        gather: over all ranks; False: each its own.
        **options: of `ddl_loss`.

    Raises:
        TaskkdError: when it runs, the batch has no `branch`, or one that does not fit.
    """

    columns = ("branch", "labels")

    def __init__(
        self,
        name: str = "distributions",
        student: str = "out.embeddings",
        *,
        branches: int = 2,
        gather: bool = True,
        positive: float = 0.1,
        negative: float = 0.02,
        order: float = 0.5,
        bins: int = 1000,
        sigma: float = 0.1,
        low: float = 0.0,
        high: float = 1.0,
        detach_easy: bool | None = None,
        compat: Compat = "default",
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, weight)
        if branches < 2:
            raise TaskkdError(f"term {name!r}: `branches` are an easy one and at least one hard one, got {branches}.")
        self.student_taps = (student,)
        self.branches, self.gather = branches, gather
        self.low, self.high, self.compat = low, high, compat
        self.options: dict[str, Any] = {"positive": positive, "negative": negative, "order": order, "bins": bins}
        self.options |= {"sigma": sigma, "low": low, "high": high, "detach_easy": detach_easy, "compat": compat}
        self.warned = False

    def _sorted(self, run: Run, x: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """Features by branch, and the labels of those of identities."""
        branch, labels = run.batch.get("branch"), run.batch.get("labels")
        if not isinstance(branch, Tensor) or branch.shape != x.shape[:1]:
            raise TaskkdError(
                f"term {self.name!r} needs `branch` ({len(x)},) in the batch: 0 to {self.branches - 1} of identities, "
                f"from {self.branches} of pairs, as `taskkd.face.batches.EasyHard` gives it; the batch has "
                f"{'another' if isinstance(branch, Tensor) else ', '.join(run.batch) or 'nothing'}."
            )
        if self.gather:
            branch = gather_ranks(branch)
            labels = gather_ranks(labels) if isinstance(labels, Tensor) else None
            x = join_ranks(x)
        counts = torch.bincount(branch.long() + 1, minlength=2 * self.branches + 1).tolist()
        if len(counts) > 2 * self.branches + 1 or any(n % 2 for n in counts[self.branches + 1 :]):
            raise TaskkdError(
                f"term {self.name!r}: by `branch` there are {counts[1:]} samples of branches 0, 1, ...; expected "
                f"{self.branches} branches of identities, then as many of pairs, of an even number of samples each."
            )
        order = branch.argsort(stable=True)
        parts = list(torch.split(x[order], counts))[1:]
        if not isinstance(labels, Tensor):
            return parts, None
        own = list(torch.split(labels[order], counts))[1 : self.branches + 1]
        return parts, own

    def forward(self, run: Run) -> Tensor:
        parts, labels = self._sorted(run, run.student[self.student_taps[0]])
        pairs = [(x[0::2], x[1::2]) for x in parts[self.branches :]]
        if not self.warned:
            self._warn(pairs)
        try:
            value = ddl_loss(parts[: self.branches], pairs, labels=labels, **self.options)
        except ValueError as error:
            raise TaskkdError(f"term {self.name!r}: {error}") from error
        return whole_loss(value) if self.gather else value

    def _warn(self, pairs: Sequence[Pair]) -> None:
        """Say once that a branch has nothing in the histogram's range."""
        with torch.no_grad():
            inside = [((v := pair_cosines(a.float(), b.float())) > self.low) & (v <= self.high) for a, b in pairs]
        for number, found in enumerate(inside):
            if len(found) and not bool(found.any()):
                self.warned = True
                logger.warning(
                    "term %r: none of the %d positive pairs of branch %d has a cosine between %g and %g, the range of "
                    "the histogram; %s. Is the student trained already, and are the pairs of one identity?",
                    self.name,
                    len(found),
                    number,
                    self.low,
                    self.high,
                    "they are left out" if self.compat == "tface" else "their tails are compared",
                )
                return


def ddl(
    student: nn.Module,  # noqa: ARG001  (as of all methods)
    teacher: nn.Module | None = None,  # noqa: ARG001
    *,
    positive: Annotated[float, Ge(0)] = 0.1,
    negative: Annotated[float, Ge(0)] = 0.02,
    order: Annotated[float, Ge(0)] = 0.5,
    scale: Annotated[float, Gt(0)] = 1.0,
    branches: Annotated[int, Ge(2)] = 2,
    bins: Annotated[int, Ge(2)] = 1000,
    sigma: Annotated[float, Gt(0)] = 0.1,
    low: Annotated[float, Ge(-1)] = 0.0,
    high: float = 1.0,
    detach_easy: bool | None = None,
    gather: bool = True,
    compat: Compat = "default",
) -> Method:
    """Similarities of hard samples distributed as those of easy ones: fine-tunes one network, there is no teacher.

    Source: Huang Y. et al. 2020, "Improving Face Recognition from Hard Samples via Distribution Distillation Loss", and
    their code (TFace): a fine-tuning of two epochs at a learning rate of 1e-3. Beside it the margin softmax of the
    samples of identities; theirs has a head for each branch, which have classes of their own, here it is the task's.
    Batches as `taskkd.face.batches.EasyHard` makes them.

    Departures: see `ddl_loss`; `compat="tface"` is the released code.

    Args:
        student: a model whose output has `embeddings`.
        teacher: not used.
        positive, negative, order: weights of both divergences and of the order of the means.
        scale: of all three. The authors' weights belong to a margin softmax of s = 64 at that learning rate; on a small
            problem trained from scratch ten times as much was far better, so try 1, 3 and 10.
        branches: how many, the easy one and hard ones.
        bins, low, high, sigma: of the histograms.
        detach_easy: no gradient flows into the easy branch by the divergences. None: so, except in "tface".
        gather: over all ranks; False: each its own.
        compat: "tface": the released code with its defects.
    """
    term = DistributionDistillation(
        "distributions",
        branches=branches,
        gather=gather,
        positive=positive,
        negative=negative,
        order=order,
        bins=bins,
        sigma=sigma,
        low=low,
        high=high,
        detach_easy=detach_easy,
        compat=compat,
        weight=scale,
    )
    return Method("ddl", [Stage("distil", [term])], ("labels",))
