"""Which images are hard, and which are of one identity."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from taskkd.errors import DataError

__all__ = ["Members", "members_of", "split_easy_hard"]

Members: TypeAlias = "list[NDArray[np.int64]]"
By: TypeAlias = Literal["resolution", "norm", "centre"]


def members_of(labels: NDArray[np.int64], counted: NDArray[np.bool_], least: int) -> Members:
    """The images of each identity that has at least so many of those that count; labels below 0 are none's."""
    known = np.flatnonzero(counted & (labels >= 0))
    order = known[np.argsort(labels[known], kind="stable")]
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [p for p in parts if len(p) >= least]


def split_easy_hard(
    by: By,
    values: ArrayLike | Tensor,
    labels: ArrayLike | None = None,
    *,
    share: float | None = None,
    threshold: float | None = None,
    each_identity: bool = False,
) -> NDArray[np.bool_]:
    """Which images are hard, by a measure of their quality, of which hard ones have the least.

    Args:
        by: "resolution": the shorter side of the images as they were before alignment; "norm": the length of their
            embeddings by a trained network, which is small for what it does not recognise (Kim et al. 2022); "centre":
            the cosine of their embedding and the mean direction of their identity.
        values: for "resolution" (N,) or (N, 2) pixels; else raw embeddings (N, D).
        labels: (N,) identities, for "centre" and `each_identity`; an image of none (below 0) is easy in both.
        share: of the images that are hard, in (0, 1). Default: a half, if there is no `threshold`.
        threshold: images below it are hard: pixels, a length or a cosine. Not with `share`.
        each_identity: of each identity's images that share, rounded down, so that all have both kinds. Not with
            `threshold`.

    Returns:
        (N,) bool, as `EasyHard` takes it.

    Raises:
        DataError: the values or labels do not fit, or both or neither of `share` and `threshold` make sense.

    Example:
        >>> split_easy_hard("resolution", [112, 20, 16, 90], threshold=40)
        array([False,  True,  True, False])
    """
    if threshold is not None and (share is not None or each_identity):
        raise DataError("split_easy_hard: `threshold` goes neither with `share` nor with `each_identity`.")
    part = 0.5 if share is None else share
    if not 0 < part < 1:
        raise DataError(f"split_easy_hard: `share` must be between 0 and 1, got {part}.")
    numbers = None if labels is None else np.asarray(labels).astype(np.int64)
    if numbers is None and (by == "centre" or each_identity):
        raise DataError(f"split_easy_hard: {'each_identity' if each_identity else by!r} needs `labels`.")
    quality = _quality(by, values, numbers)
    if numbers is not None and numbers.shape != quality.shape:
        raise DataError(f"split_easy_hard: {numbers.shape} labels for {len(quality)} images.")
    if threshold is not None:
        return np.asarray(quality < threshold)
    groups = [np.arange(len(quality))]
    if each_identity and numbers is not None:
        groups = members_of(numbers, np.ones(len(numbers), dtype=bool), 1)
    hard = np.zeros(len(quality), dtype=bool)
    for group in groups:
        least = group[np.argsort(quality[group], kind="stable")]
        hard[least[: int(part * len(group))]] = True
    return hard


def _quality(by: By, values: ArrayLike | Tensor, labels: NDArray[np.int64] | None) -> NDArray[np.float64]:
    """One number for each image, small where it is hard."""
    numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values).astype(np.float64)
    if by == "resolution" and numbers.ndim in (1, 2):
        return numbers if numbers.ndim == 1 else numbers.min(1)
    if by not in ("norm", "centre") or numbers.ndim != 2:
        raise DataError(
            "split_easy_hard: `by` is 'resolution' with (N,) or (N, 2) pixels, 'norm' or 'centre' with embeddings "
            f"(N, D); got {by!r} with values of shape {numbers.shape}."
        )
    lengths = np.linalg.norm(numbers, axis=1)
    if by == "norm" or labels is None:
        return np.asarray(lengths)
    unit = numbers / np.maximum(lengths, 1e-12)[:, None]
    quality = np.ones(len(unit))
    for member in members_of(labels, np.ones(len(labels), dtype=bool), 1):
        mean = unit[member].mean(0)
        quality[member] = unit[member] @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
    return quality
