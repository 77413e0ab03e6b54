"""Batches by identity: datasets whose items are whole batches, each a function of (seed, epoch, index) alone.

An item is a list of samples, which the `collate` of faces flattens: a loader takes one item at a time. What it holds
does not depend on workers, prefetching or interruptions. Every image is flipped or not as by `RandomFlip`: drawn from
(seed, epoch, id), the id telling which, so that a cache of both views serves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from taskkd.augmentation import Augmented, generator_for
from taskkd.errors import DataError
from taskkd.face.datasets import TwoViews, maybe_flipped
from taskkd.face.difficulty import Members, members_of, split_easy_hard

__all__ = ["EasyHard", "GeneralPlusBalanced", "IdentityBalanced", "split_easy_hard"]


@functools.lru_cache(maxsize=16)
def _order(seed: int, stream: int, turn: int, count: int) -> NDArray[np.int64]:
    """The order in which things come in a turn through all of them."""
    order: NDArray[np.int64] = torch.randperm(count, generator=generator_for(seed, turn, -1 - stream)).numpy()
    return order


def _numbers(labels: ArrayLike, dataset: Any, name: str) -> NDArray[np.int64]:
    found = np.asarray(labels).astype(np.int64)
    if found.shape != (len(dataset),):
        raise DataError(
            f"{name} needs a label for each of the {len(dataset)} images of the dataset, got {found.shape}."
        )
    return found


def _enough(there: int, wanted: int, name: str, what: str, option: str) -> None:
    if there < wanted:
        advice = f"; {option}={there} would do" if there > 0 else ""
        raise DataError(f"{name}: a batch takes {wanted} {what}, but there are {there}{advice}.")


def _unchanged(sample: Any, _: torch.Generator) -> Any:
    return sample


class _Batches(Augmented):
    """A dataset of whole batches; subclasses say which images batch `number`, counted from the first epoch on, has."""

    whole_batches = True

    def __init__(self, dataset: Any, length: int, *, seed: int) -> None:
        super().__init__(dataset, _unchanged, seed=seed)
        self.length = length

    @property
    def views(self) -> TwoViews:
        """All samples that may come, which is what a cache is built over."""
        return TwoViews(self.dataset)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._batch(int(self._epoch) * len(self) + index)

    def _batch(self, number: int) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _sample(self, image: int, **more: int) -> dict[str, Any]:
        """An image's view of this epoch."""
        sample = {**self.dataset[int(image)], **more}
        return maybe_flipped(sample, generator_for(self.seed, int(self._epoch), int(sample["id"])))

    def _distinct(self, number: int, stream: int, size: int, count: int) -> NDArray[np.int64]:
        """`size` different ones of `count`; none comes again before all others, but for less than `size`, have come."""
        turn, place = divmod(number, count // size)
        return _order(self.seed, stream, turn, count)[place * size : (place + 1) * size]

    def _images(
        self, members: Members, chosen: Sequence[int] | NDArray[np.int64], each: int, number: int, stream: int
    ) -> list[int]:
        """`each` different images of each of the chosen identities."""
        generator = generator_for(self.seed, number, -100 - stream)
        return [
            int(members[i][k])
            for i in chosen
            for k in torch.randperm(len(members[i]), generator=generator)[:each].tolist()
        ]


class IdentityBalanced(_Batches):
    """Batches of `batch_size / per_identity` identities with `per_identity` different images of each.

    Identities come in a random order, each once before any comes again. Those with fewer images are left out.

    Args:
        dataset: samples are dicts with `images` and `id`, 2 * number, as those of `FaceDataset`.
        labels: of its images; below 0: of no identity.
        batch_size: how many samples an item has.
        per_identity: how many of them are of one identity.
        batches: how many items an epoch has. None: images over `batch_size`, at least one.
        seed: default 0.

    Raises:
        DataError: `per_identity` does not divide `batch_size`, or there are too few identities with so many images.
    """

    def __init__(
        self,
        dataset: Any,
        labels: ArrayLike,
        batch_size: int,
        per_identity: int,
        *,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        if per_identity < 1 or batch_size < 1 or batch_size % per_identity:
            raise DataError(
                f"IdentityBalanced: a batch of {batch_size} cannot be made of {per_identity} images of each identity; "
                "expected a divisor."
            )
        super().__init__(dataset, batches or max(1, len(dataset) // batch_size), seed=seed)
        numbers = _numbers(labels, dataset, "IdentityBalanced")
        self.members = members_of(numbers, np.ones(len(numbers), dtype=bool), per_identity)
        self.identities, self.per_identity = batch_size // per_identity, per_identity
        _enough(
            len(self.members) * per_identity,
            batch_size,
            "IdentityBalanced",
            f"images, {per_identity} of each of {self.identities} identities",
            "batch_size",
        )

    def _batch(self, number: int) -> list[dict[str, Any]]:
        chosen = self._distinct(number, 0, self.identities, len(self.members))
        return [self._sample(i) for i in self._images(self.members, chosen, self.per_identity, number, 0)]


class GeneralPlusBalanced(_Batches):
    """Batches of random images and, after them, of some identities with several images of each.

    Source: Huang Y. et al. 2022 (EKD): 32 random images and 8 identities of 4 images. Their margin softmax looks at the
    random half alone: that is `label_balanced=False`. Then the labels of the others are -1, and every sample has its
    identity as `identity`, too.

    Args:
        dataset, labels, seed: see `IdentityBalanced`.
        general: how many random images; each image comes once in an epoch among them, but for a last few.
        identities: how many identities.
        images: how many images of each of these.
        label_balanced: the task loss looks at all samples.
        batches: how many items an epoch has. None: images over `general`, at least one.

    Raises:
        DataError: there are too few images, or identities with so many images.
    """

    def __init__(
        self,
        dataset: Any,
        labels: ArrayLike,
        general: int = 32,
        identities: int = 8,
        images: int = 4,
        *,
        label_balanced: bool = True,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, batches or max(1, len(dataset) // max(general, 1)), seed=seed)
        self.numbers = _numbers(labels, dataset, "GeneralPlusBalanced")
        self.members = members_of(self.numbers, np.ones(len(self.numbers), dtype=bool), images)
        self.general, self.identities, self.images = general, identities, images
        self.label_balanced = label_balanced
        for value, option, least in ((general, "general", 1), (identities, "identities", 1), (images, "images", 2)):
            if value < least:
                raise DataError(f"GeneralPlusBalanced: `{option}` must be at least {least}, got {value}.")
        _enough(len(dataset), general, "GeneralPlusBalanced", "random images", "general")
        what = f"identities with {images} images or more"
        _enough(len(self.members), identities, "GeneralPlusBalanced", what, "identities")

    def _batch(self, number: int) -> list[dict[str, Any]]:
        general = self._distinct(number, 0, self.general, len(self.dataset)).tolist()
        chosen = self._distinct(number, 1, self.identities, len(self.members))
        balanced = self._images(self.members, chosen, self.images, number, 1)
        if self.label_balanced:
            return [self._sample(i) for i in [*general, *balanced]]
        own = [self._sample(i, identity=int(self.numbers[i])) for i in general]
        return own + [self._sample(i, identity=int(self.numbers[i]), labels=-1) for i in balanced]


class EasyHard(_Batches):
    """Batches of DDL: `identity` images of different identities and `pairs` pairs of one, of easy and of hard images.

    Every sample has its `branch`: 0 easy and 1 hard images of different identities, 2 easy and 3 hard pairs, the two of
    a pair next to each other. In all `2 identity + 4 pairs` samples, 192 as in Huang Y. et al. 2020. The labels of
    pairs are -1, so that the task's loss looks at the others alone, as theirs.

    Args:
        dataset, labels, seed: see `IdentityBalanced`.
        hard: of each image whether it is hard, see `split_easy_hard`.
        identity: how many identities of each kind.
        pairs: how many pairs of each kind. Identities are taken in turn, and again where there are fewer.
        easy_pairs, hard_pairs: (K, 2) numbers of images, the pairs to take. None: two images of an identity, both easy
            or both hard.
        mixed: hard pairs are of a hard and an easy image. For identities with a single hard image; otherwise it did
            worse in our trials.
        label_pairs: the task's loss looks at pairs, too.
        batches: how many items an epoch has. None: images over samples of an item, at least one.

    Raises:
        DataError: there are too few identities with easy or with hard images, or nothing to pair; or given pairs are
            not of the dataset.
    """

    def __init__(
        self,
        dataset: Any,
        labels: ArrayLike,
        hard: ArrayLike,
        identity: int = 32,
        pairs: int = 32,
        *,
        easy_pairs: ArrayLike | None = None,
        hard_pairs: ArrayLike | None = None,
        mixed: bool = False,
        label_pairs: bool = False,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        for value, option in ((identity, "identity"), (pairs, "pairs")):
            if value < 1:
                raise DataError(f"EasyHard: `{option}` must be at least 1, got {value}.")
        super().__init__(dataset, batches or max(1, len(dataset) // (2 * identity + 4 * pairs)), seed=seed)
        numbers, difficult = _numbers(labels, dataset, "EasyHard"), np.asarray(hard).astype(bool)
        if difficult.shape != numbers.shape:
            raise DataError(f"EasyHard: `hard` is {difficult.shape}, expected one for each of {len(dataset)} images.")
        self.identity, self.pairs, self.label_pairs = identity, pairs, label_pairs
        kinds = (~difficult, difficult)
        self.singles = [members_of(numbers, kind, 1) for kind in kinds]
        for there, name in zip(self.singles, ("easy", "hard"), strict=True):
            _enough(len(there), identity, "EasyHard", f"identities with {name} images, each once", "identity")
        self.given = [self._given(p, n) for p, n in ((easy_pairs, "easy_pairs"), (hard_pairs, "hard_pairs"))]
        self.couples = [self._couples(numbers, kinds, branch, mixed) for branch in (0, 1)]

    def _given(self, pairs: ArrayLike | None, name: str) -> NDArray[np.int64] | None:
        if pairs is None:
            return None
        found = np.asarray(pairs).astype(np.int64)
        if found.ndim != 2 or found.shape[1] != 2 or len(found) == 0:
            raise DataError(f"EasyHard: `{name}` must be (K, 2) numbers of images, got {found.shape}.")
        if found.min() < 0 or found.max() >= len(self.dataset):
            raise DataError(
                f"EasyHard: `{name}` names image {found.max() if found.min() >= 0 else found.min()}; the dataset has "
                f"{len(self.dataset)}."
            )
        return found

    def _couples(
        self, numbers: NDArray[np.int64], kinds: Sequence[NDArray[np.bool_]], branch: int, mixed: bool
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Of each identity the images that may be first and second of its pairs."""
        if self.given[branch] is not None:
            return []
        if branch == 1 and mixed:
            easy = {numbers[m[0]]: m for m in self.singles[0]}
            found = [(m, easy[numbers[m[0]]]) for m in self.singles[1] if numbers[m[0]] in easy]
        else:
            found = [(m, m) for m in members_of(numbers, kinds[branch], 2)]
        if not found:
            what = "two easy images" if branch == 0 else "a hard and an easy image" if mixed else "two hard images"
            advice = "; mixed=True pairs hard images with easy ones" if branch == 1 and not mixed else ""
            raise DataError(f"EasyHard: no identity has {what}, so there are no pairs of branch {branch + 2}{advice}.")
        return found

    def _pair(self, branch: int, number: int) -> tuple[int, int]:
        """The pair with this number, counted from the beginning of training."""
        given, couples = self.given[branch], self.couples[branch]
        count = len(couples) if given is None else len(given)
        turn, place = divmod(number, count)
        entry = int(_order(self.seed, 2 + branch, turn, count)[place])
        if given is not None:
            return int(given[entry, 0]), int(given[entry, 1])
        first, second = couples[entry]
        generator = generator_for(self.seed, number, -200 - branch)
        if first is second:
            a, b = torch.randperm(len(first), generator=generator)[:2].tolist()
        else:
            a, b = (int(torch.randint(len(m), (), generator=generator)) for m in (first, second))
        return int(first[a]), int(second[b])

    def _batch(self, number: int) -> list[dict[str, Any]]:
        samples = []
        for branch, members in enumerate(self.singles):
            chosen = self._distinct(number, branch, self.identity, len(members))
            images = self._images(members, chosen, 1, number, branch)
            samples += [self._sample(i, branch=branch) for i in images]
        more = {} if self.label_pairs else {"labels": -1}
        for branch in (0, 1):
            for k in range(number * self.pairs, (number + 1) * self.pairs):
                samples += [self._sample(i, branch=2 + branch, **more) for i in self._pair(branch, k)]
        return samples
