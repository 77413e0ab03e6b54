"""Faces as models take them, their two views, flips that a cache knows, and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from taskkd.augmentation import Augmented
from taskkd.errors import DataError
from taskkd.face.records import Faces, image_of

__all__ = ["FaceDataset", "RandomFlip", "TwoViews", "collate", "flipped"]


class FaceDataset(Dataset[Any]):
    """Faces with their identities.

    A sample is `{"images": (3, H, W) uint8 RGB, "labels": int, "id": 2 * number, "file": str}`; the id plus 1 is that
    of the flipped image.

    Args:
        faces: as a reader gives them.
        labels: False: samples have no `labels`, as those of a verification set.
        held: keep every image that was asked for in memory (38 kB of 112x112 pixels): for few.

    Raises:
        DataError: a file is missing or damaged, when it is asked for.
    """

    def __init__(self, faces: Faces, *, labels: bool = True, held: bool = False) -> None:
        self.faces, self.labels = faces, labels
        self._held: dict[int, Tensor] | None = {} if held else None

    @property
    def identities(self) -> list[str]:
        """Names; label k is `identities[k]`."""
        return self.faces.identities

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> dict[str, Any]:
        face = self.faces[index]
        identity = {"labels": face.identity} if self.labels else {}
        return {"images": self._image(face.number), **identity, "id": 2 * face.number, "file": face.source.name}

    def _image(self, number: int) -> Tensor:
        if self._held is None:
            return image_of(self.faces, number)
        if number not in self._held:
            self._held[number] = image_of(self.faces, number)
        return self._held[number]


def flipped(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample of the image's other view, left and right exchanged, with that view's id."""
    return {**sample, "images": sample["images"].flip(-1), "id": int(sample["id"]) ^ 1}


class TwoViews(Dataset[Any]):
    """Every image as it is and flipped: sample i is image i // 2, flipped if i is odd; its id is i.

    This is what an embedding cache is built over, and what is embedded of a verification set.

    Args:
        dataset: a `FaceDataset`, or any map-style dataset of such samples whose ids are 2 * index.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._last: tuple[int, dict[str, Any]] | None = None

    def __len__(self) -> int:
        return 2 * len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample = self._of(index // 2)
        return flipped(sample) if index % 2 else sample

    def _of(self, number: int) -> dict[str, Any]:
        """An image's sample; the last one is at hand, so that going through all decodes each image once."""
        last = self._last
        if last is None or last[0] != number:
            last = self._last = (number, self.dataset[number])
        return dict(last[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


class RandomFlip(Augmented):
    """Each image flipped or not, by even chance: the only augmentation that most papers use.

    The flip is drawn from (seed, epoch, id) alone, and the sample's id says which view it is; so a cache of both
    (`views`) holds the teacher's embedding of either.

    Args:
        dataset: a `FaceDataset` or one like it.
        seed: default 0.
    """

    def __init__(self, dataset: Any, *, seed: int = 0) -> None:
        super().__init__(dataset, maybe_flipped, seed=seed)

    @property
    def views(self) -> TwoViews:
        """All samples that may come."""
        return TwoViews(self.dataset)


def maybe_flipped(sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """The sample or, by even chance, its other view."""
    return flipped(sample) if float(torch.rand((), generator=generator)) < 0.5 else dict(sample)


class _Collate:
    """A batch of samples, or of lists of samples, as keyword arguments of a model.

    Returns:
        `images` (N, 3, H, W), uint8 as the samples are, `id` (N,) int64 and, where the samples have them, `labels` and
        `branch`, `identity` (N,) int64.

    Raises:
        DataError: the images differ in size.
    """

    #: what is needed of a sample, whatever a model takes: the trainer leaves these in
    columns = ("images", "labels", "id", "branch", "identity", "file")

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        flat: list[dict[str, Any]] = [s for entry in samples for s in (entry if isinstance(entry, list) else [entry])]
        sizes = {tuple(s["images"].shape[-2:]): s.get("file", f"image {int(s['id']) // 2}") for s in flat}
        if len(sizes) > 1:
            shown = ", ".join(f"{w}x{h} ({name})" for (h, w), name in sorted(sizes.items())[:4])
            raise DataError(
                f"the images of a batch are of {shown}: give a size, to which all are made square, or align them."
            )
        batch = {"images": torch.stack([s["images"] for s in flat])}
        for column in ("labels", "id", "branch", "identity"):
            if column in flat[0]:
                batch[column] = torch.tensor([int(s[column]) for s in flat], dtype=torch.int64)
        return batch


collate = _Collate()
