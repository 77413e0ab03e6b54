"""Verification and identification from embeddings: the protocols of LFW and IJB, as functions of numpy arrays."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taskkd.errors import DataError, TaskkdError

__all__ = [
    "Verification",
    "auc",
    "few_negatives",
    "identify",
    "ijb_templates",
    "ijb_verify",
    "roc",
    "squared_distances",
    "tar_at_far",
    "unit",
    "verify",
]

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]
#: of squared distances of unit vectors, 0 to 4
THRESHOLDS: Array = np.arange(0, 4, 0.01)
#: below so many expected false accepts a TAR@FAR rests on a handful of pairs
FEW = 10
#: scores of a search that are held at once
CHUNK = 1 << 24


def unit(embeddings: ArrayLike) -> Array:
    """Rows of length 1 (a row of zeros stays), in double precision unless they are of single precision."""
    rows = np.asarray(embeddings)
    rows = rows if rows.dtype == np.float32 else rows.astype(np.float64)
    length = np.sqrt((rows * rows).sum(-1, keepdims=True))
    found: Array = rows / np.where(length > 0, length, 1)
    return found


def squared_distances(left: ArrayLike, right: ArrayLike) -> Array:
    """(N,) squared Euclidean distances of the rows of two (N, D) arrays of unit vectors.

    For asymmetric search `left` are a student's embeddings (the queries), `right` a teacher's (the gallery).

    Raises:
        TaskkdError: the arrays differ in shape.
    """
    one, other = np.asarray(left), np.asarray(right)
    if one.shape != other.shape or one.ndim != 2:
        raise TaskkdError(f"embeddings {one.shape} and {other.shape}: expected (N, D) twice, the same N and D.")
    found: Array = np.sum(np.square(np.subtract(one, other)), 1)
    return found


@dataclass(frozen=True)
class Verification:
    """What `verify` finds.

    Args:
        accuracies, thresholds: (folds,) of each fold, at the threshold that is best on the others.
        tpr, fpr: (400,) rates at `THRESHOLDS`, means over the folds.
    """

    accuracies: Array
    thresholds: Array
    tpr: Array
    fpr: Array

    @property
    def accuracy(self) -> float:
        """The mean over folds."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """The standard deviation over folds (of the population, as the papers report it)."""
        return float(np.std(self.accuracies))


def verify(distances: ArrayLike, same: ArrayLike, folds: int = 10) -> Verification:
    """Verification by the protocol of LFW (Huang et al. 2007), equal to the last bit to InsightFace's code.

    A pair is of the same person where its distance is below a threshold (not at it). For each fold the threshold is the
    first of 0, 0.01, ..., 3.99 with the highest accuracy on the other folds. Folds are contiguous: keep the order of a
    benchmark's file. Each distance is looked up once, the rest are cumulative counts.

    Args:
        distances: (N,) squared Euclidean, of unit vectors.
        same: (N,) bool.
        folds: the first N % folds of them are one pair larger.

    Raises:
        DataError: fewer pairs than folds, another number of labels, or a distance is not finite.
    """
    given, truth = _pairs(distances, same, "distances")
    if not 2 <= folds <= len(given):
        raise DataError(f"{len(given)} pairs in {folds} folds: expected 2 folds or more, and a pair for each.")
    # a pair is accepted from this threshold on
    place = np.searchsorted(THRESHOLDS, given, side="right")
    sizes = np.full(folds, len(given) // folds)
    sizes[: len(given) % folds] += 1
    fold = np.repeat(np.arange(folds), sizes)
    bins = len(THRESHOLDS) + 1
    counts = np.bincount((fold * 2 + truth) * bins + place, minlength=folds * 2 * bins).reshape(folds, 2, bins)
    accepted = counts[..., :-1].cumsum(-1)
    total = counts.sum(-1)
    right = accepted[:, 1] + total[:, :1] - accepted[:, 0]
    others, rest = right.sum(0) - right, len(given) - sizes
    best = (others / rest[:, None]).argmax(1)
    rates = [np.where(total[:, k, None], accepted[:, k] / np.maximum(total[:, k, None], 1), 0.0) for k in (1, 0)]
    return Verification(
        right[np.arange(folds), best] / sizes, THRESHOLDS[best], np.mean(rates[0], 0), np.mean(rates[1], 0)
    )


def roc(scores: ArrayLike, same: ArrayLike, *, thin: bool = False) -> tuple[Array, Array, Array]:
    """The points of the ROC curve.

    Args:
        scores: (N,), higher: more alike (of squared distances give the negative).
        same: (N,) bool, of both kinds.
        thin: leave out points on a straight line between others, as scikit-learn does.

    Returns:
        (false positive rates, true positive rates, thresholds), each from (0, 0, inf) on: pairs are accepted whose
        score is the threshold or above.

    Raises:
        DataError: there are no pairs of one kind, another number of labels, or a score is not finite.
    """
    given, truth = _pairs(scores, same, "scores")
    order = np.argsort(-given, kind="stable")
    given, truth = given[order], truth[order]
    ends = np.append(np.flatnonzero(np.diff(given)), len(given) - 1)
    positives = np.cumsum(truth)[ends]
    negatives = 1 + ends - positives
    if positives[-1] == 0 or negatives[-1] == 0:
        raise DataError(
            f"{positives[-1]} pairs of the same person and {negatives[-1]} of different ones: both are needed."
        )
    thresholds = given[ends]
    if thin and len(ends) > 2:
        corner = (np.diff(negatives, 2) != 0) | (np.diff(positives, 2) != 0)
        kept = np.flatnonzero(np.concatenate([[True], corner, [True]]))
        positives, negatives, thresholds = positives[kept], negatives[kept], thresholds[kept]
    return (
        np.concatenate([[0], negatives]) / negatives[-1],
        np.concatenate([[0], positives]) / positives[-1],
        np.concatenate([[np.inf], thresholds]),
    )


def auc(scores: ArrayLike, same: ArrayLike) -> float:
    """The area under the ROC curve: the chance that a pair of one person scores above one of two; ties count half.

    Raises:
        DataError: as `roc`.
    """
    fpr, tpr, _ = roc(scores, same)
    return float(np.trapezoid(tpr, fpr))


def tar_at_far(
    scores: ArrayLike, same: ArrayLike, far: Sequence[float], *, strict: bool = True, warn: bool = True
) -> Array:
    """True accept rates at false accept rates.

    Args:
        scores: (N,), higher: more alike.
        same: (N,) bool, of both kinds.
        far: rates.
        strict: the highest TAR whose FAR is not above the target. False: the TAR at the point of the ROC curve (thin,
            as scikit-learn gives it) whose FAR is nearest, the higher of two, as InsightFace's tables for IJB have it:
            its FAR may be several times the target.
        warn: log a warning where fewer than 10 false accepts are expected.

    Returns:
        (len(far),) float64.

    Raises:
        DataError: as `roc`.
    """
    if warn and (sentence := few_negatives(int((~np.asarray(same, dtype=bool)).sum()), far)):
        logger.warning(sentence)
    fpr, tpr, _ = roc(scores, same, thin=not strict)
    if strict:
        return np.asarray([tpr[fpr <= target].max() for target in far])
    return np.asarray([tpr[::-1][np.abs(fpr[::-1] - target).argmin()] for target in far])


def few_negatives(negatives: int, far: Sequence[float]) -> str:
    """A sentence where false accept rates are too low for a number of pairs of different people, else empty."""
    few = [target for target in far if negatives * target < FEW]
    if not few:
        return ""
    return (
        f"{negatives} pairs of different people are few for FAR {', '.join(f'{target:g}' for target in few)}: fewer "
        f"than {FEW} false accepts are expected, so that TAR there rests on chance."
    )


def ijb_templates(
    features: ArrayLike,
    templates: ArrayLike,
    medias: ArrayLike,
    scores: ArrayLike | None = None,
    *,
    norm_score: bool = True,
) -> tuple[Array, Array]:
    """Templates of IJB-B and IJB-C (Whitelam et al. 2017, Maze et al. 2018) as InsightFace makes them.

    The features of images, times the detector's scores, are averaged in each media (a video, or a picture), summed over
    the medias of a template, and normalised.

    Args:
        features: (N, D), of both views summed, not normalised.
        templates, medias: (N,) whole numbers.
        scores: (N,) of the face detector; None: 1.
        norm_score: the length of a feature counts ("norm score"); False: features are normalised first.

    Returns:
        (T,) numbers of the templates, ascending, and (T, D) unit vectors.

    Raises:
        DataError: the arrays are not of one length.
    """
    rows = np.asarray(features, dtype=np.float64)
    template, media = np.asarray(templates), np.asarray(medias)
    weights = np.ones(len(rows)) if scores is None else np.asarray(scores, dtype=np.float64)
    if rows.ndim != 2 or not len(rows) == len(template) == len(media) == len(weights):
        raise DataError(
            f"{rows.shape} features, {len(template)} templates, {len(media)} medias, {len(weights)} scores: expected "
            "(N, D) features and N of each."
        )
    rows = (rows if norm_score else unit(rows)) * weights[:, None]
    groups, inverse, counts = np.unique(np.stack([template, media], 1), axis=0, return_inverse=True, return_counts=True)
    means = _summed(rows, inverse.reshape(-1), len(groups)) / counts[:, None]
    numbers, place = np.unique(groups[:, 0], return_inverse=True)
    return numbers, unit(_summed(means, place, len(numbers)))


def ijb_verify(numbers: ArrayLike, features: ArrayLike, left: ArrayLike, right: ArrayLike) -> Array:
    """(P,) scores of pairs of templates: the cosines of their features.

    Args:
        numbers, features: as `ijb_templates` gives them.
        left, right: (P,) numbers of templates.

    Raises:
        DataError: a pair names a template that is not there.
    """
    known, rows = np.asarray(numbers), np.asarray(features)
    sides = []
    for side in (np.asarray(left), np.asarray(right)):
        place = np.searchsorted(known, side).clip(max=len(known) - 1)
        if (known[place] != side).any():
            raise DataError(f"a pair names template {side[known[place] != side][0]}, of which there is no image.")
        sides.append(place)
    scores = np.empty(len(sides[0]))
    for first in range(0, len(scores), 1 << 16):
        part = slice(first, first + (1 << 16))
        scores[part] = np.einsum("nd,nd->n", rows[sides[0][part]], rows[sides[1][part]])
    return scores


def identify(
    probes: ArrayLike,
    gallery: ArrayLike,
    mates: ArrayLike,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    fpir: Sequence[float] = (),
    legacy: bool = False,
) -> dict[str, float]:
    """Search of probes in a gallery, closed-set and open-set.

    Args:
        probes: (P, D) unit vectors; for asymmetric search those of another model than the gallery's.
        gallery: (G, D) unit vectors, one for each person.
        mates: (P,) the row of the gallery that is the probe's; -1: there is none.
        ranks: `rank@k`, the share of probes with a mate for which fewer than k others score as high as the mate (ties
            count against it).
        fpir: `tpir@f`, the share of probes with a mate whose mate is first and scores above the threshold at which a
            share f of the probes without a mate finds somebody (strictly: not more); `threshold@f` with it.
        legacy: as InsightFace's ijb_1n.py: no probe is without a mate; the threshold is the ceil(f * P)-th highest of
            all scores of a probe and another's entry, and a mate above it counts whatever its rank. This is no FPIR.

    Raises:
        DataError: shapes differ, a number is not finite, a mate is no row, or the probes that a rate needs are missing.
    """
    one, other, mate = np.asarray(probes), np.asarray(gallery), np.asarray(mates)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or mate.shape != one.shape[:1]:
        raise DataError(
            f"probes {one.shape}, gallery {other.shape}, mates {mate.shape}: expected (P, D), (G, D) and (P,)."
        )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise DataError("an embedding of the probes or the gallery is not finite.")
    if len(mate) and not -1 <= mate.min() <= mate.max() < len(other):
        raise DataError(f"mates are from {mate.min()} to {mate.max()}: expected rows of the gallery, or -1.")
    known = mate >= 0
    if not known.any() or (legacy and not known.all()):
        raise DataError("there is no probe with a mate." if not known.any() else "legacy: every probe needs a mate.")
    places = [max(1, math.ceil(len(one) * rate)) if legacy else 0 for rate in fpir]
    own, before, highest, rivals = _searched(one, other, mate, max(places, default=0))
    found = {f"rank@{k}": float(np.mean(before[known] < k)) for k in ranks}
    for rate, place in zip(fpir, places, strict=True):
        threshold = _nth(rivals, place, rate) if legacy else _open_threshold(highest[~known], rate)
        hits = own[known] > threshold if legacy else (own[known] > threshold) & (before[known] == 0)
        found |= {f"tpir@{rate:.0e}": float(np.mean(hits)), f"threshold@{rate:.0e}": threshold}
    return found


def _searched(probes: Array, gallery: Array, mates: Array, keep: int) -> tuple[Array, Array, Array, Array]:
    """For each probe its mate's score, how many others are as high, the highest of these; and the `keep` highest of all
    scores but the mates'. Probes are searched some at a time.
    """  # fmt: skip
    own, before, highest = np.full(len(probes), -np.inf), np.zeros(len(probes), np.int64), np.empty(len(probes))
    rivals = np.empty(0)
    step = max(1, CHUNK // len(gallery))
    for first in range(0, len(probes), step):
        part = slice(first, first + step)
        scores = probes[part] @ gallery.T
        rows = np.flatnonzero(mates[part] >= 0)
        own[part][rows] = scores[rows, mates[part][rows]]
        scores[rows, mates[part][rows]] = -np.inf
        before[part] = (scores >= own[part][:, None]).sum(1)
        highest[part] = scores.max(1)
        if keep:
            rivals = np.concatenate([rivals, scores[np.isfinite(scores)]])
            rivals = np.sort(np.partition(rivals, -keep)[-keep:]) if len(rivals) > keep else np.sort(rivals)
    return own, before, highest, rivals


def _nth(rivals: Array, place: int, rate: float) -> float:
    """The `place`-th highest of ascending scores."""
    if place > len(rivals):
        raise DataError(f"FPIR {rate:g} needs {place} scores of different people, there are {len(rivals)}.")
    return float(rivals[-place])


def _open_threshold(highest: Array, rate: float) -> float:
    """The lowest score above which not more than a share of the probes without a mate find somebody."""
    if not len(highest):
        raise DataError("FPIR needs probes without a mate (-1), and there is none.")
    ordered = np.sort(highest)[::-1]
    allowed = math.floor(rate * len(ordered) + 1e-9)
    return float(ordered[allowed]) if allowed < len(ordered) else -np.inf


def _summed(rows: Array, groups: Array, count: int) -> Array:
    """(count, D) sums of the rows of each group; every group has one."""
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(count))
    found: Array = np.add.reduceat(rows[order], starts, axis=0)
    return found


def _pairs(values: ArrayLike, same: ArrayLike, what: str) -> tuple[Array, Array]:
    given, truth = np.asarray(values), np.asarray(same).astype(np.int64)
    if given.ndim != 1 or given.shape != truth.shape or not len(given):
        raise DataError(f"{what} {given.shape} and labels {truth.shape}: expected (N,) twice, at least one pair.")
    if not np.isfinite(given).all():
        raise DataError(f"pair {int(np.flatnonzero(~np.isfinite(given))[0])}: the {what} are not finite.")
    return given, truth
