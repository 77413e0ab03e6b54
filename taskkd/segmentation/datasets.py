"""Images and labels as models take them, the stream of unlabelled images beside them, and batches of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from taskkd.augmentation import Augmented, generator_for
from taskkd.errors import DataError
from taskkd.segmentation.records import Annotations, Record, decoded, window_of

__all__ = ["SegmentationDataset", "WithUnlabelled", "collate", "collate_pairs"]


class SegmentationDataset(Dataset[Any]):
    """Images and labels.

    A sample is `{"images": (3, H, W) float32 RGB in 0..1, "labels": (H, W) int64, 255 is ignored, "unlabelled": bool,
    "id": int, "file": str}`. The labels of one without a mask are all 255.

    Args:
        annotations: as a reader gives them.
        training: also give `valid` (H, W) bool, which is False where augmentation pads; images and labels are uint8
            until they are in a batch (augmentation is faster so), and all of a batch must be of one size.
        held: keep every file's pixels in memory (four bytes for each pixel): for few images, or tiles of them.

    Raises:
        DataError: a file is missing or damaged, an image and its mask differ in size, or a mask has an unknown value,
            when it is asked for; with the file.
    """

    def __init__(self, annotations: Annotations, *, training: bool = False, held: bool = False) -> None:
        self.annotations, self.training = annotations, training
        self._held: dict[str, tuple[Tensor, Tensor]] | None = None
        if held:
            self._held = {name: decoded(r) for name, r in {r.source.name: r for r in self.records}.items()}

    @property
    def records(self) -> list[Record]:
        """One for each sample."""
        return self.annotations.records

    @property
    def classes(self) -> list[str]:
        """Names; label k is `classes[k]`."""
        return self.annotations.classes

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image, labels = decoded(record) if self._held is None else self._held[record.source.name]
        image, labels = window_of(record, image), window_of(record, labels)
        about = {"unlabelled": record.mask is None, "id": record.image_id, "file": record.source.name}
        if self.training:
            return {"images": image, "labels": labels, "valid": torch.ones_like(labels, dtype=torch.bool), **about}
        return {"images": image.float() / 255, "labels": labels.long(), **about}


class WithUnlabelled(Augmented):
    """Labelled samples, each with some unlabelled ones: a sample is a list, the labelled one first.

    So the shares of both are the same in every batch. Unlabelled images are taken in a random order that depends on the
    seed, each once before any comes again, from epoch to epoch: what a labelled sample brings is a function of (seed,
    epoch, index) alone. Every one that is taken is augmented anew.

    Args:
        labelled, unlabelled: map-style datasets; samples are dicts with `id`.
        transform: as in `Augmented`, of labelled samples; None: they stay as they are.
        other: the same of unlabelled ones.
        count: how many unlabelled samples come with each labelled one.
        seed: default 0.
    """

    def __init__(
        self,
        labelled: Any,
        unlabelled: Any,
        transform: Callable[[Any, torch.Generator], Any] | None = None,
        other: Callable[[Any, torch.Generator], Any] | None = None,
        *,
        count: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(labelled, transform or _unchanged, seed=seed)
        self.unlabelled, self.other, self.count = unlabelled, other or _unchanged, count

    def __getitem__(self, index: int) -> list[Any]:
        samples = [super().__getitem__(index)]
        first = (int(self._epoch) * len(self) + index) * self.count
        for number in range(first, first + self.count):
            turn, place = divmod(number, len(self.unlabelled))
            sample = self.unlabelled[_order(self.seed, turn, len(self.unlabelled))[place]]
            samples.append(self.other(sample, generator_for(self.seed, -1 - number, int(sample["id"]))))
        return samples


@functools.lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> list[int]:
    """The order in which unlabelled samples come in a turn through all of them."""
    order: list[int] = torch.randperm(count, generator=generator_for(seed, turn, -1)).tolist()
    return order


def _unchanged(sample: Any, _: torch.Generator) -> Any:
    return sample


class _Collate:
    """A batch of samples, or of lists of samples, as keyword arguments of a model.

    Args:
        pairs: a training batch of one sample, as the last of an epoch may be, has it twice. Heads that pool the image
            to one pixel (DeepLabV3, PAN, UPerNet) cannot normalise a batch of one; losses, being means, stay the same.

    Returns:
        `images` (N, 3, H, W) float32, `labels` (N, H, W) int64, `unlabelled` (N,) bool, `id` (N,) int64, and in
        training `valid` (N, H, W) bool. In evaluation, where sizes differ, `images` and `labels` are lists.

    Raises:
        DataError: images of a training batch differ in size.
    """

    #: what is needed of a sample, whatever a model takes: the trainer leaves these in
    columns = ("images", "labels", "valid", "unlabelled", "id", "file")

    def __init__(self, *, pairs: bool = False) -> None:
        self.pairs = pairs

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        flat: list[dict[str, Any]] = [s for entry in samples for s in (entry if isinstance(entry, list) else [entry])]
        if self.pairs and len(flat) == 1 and "valid" in flat[0]:
            flat *= 2
        sizes = {tuple(s["labels"].shape): s.get("file", f"image id {s['id']}") for s in flat}
        batch: dict[str, Any] = {key: [s[key] for s in flat] for key in ("images", "labels", "valid") if key in flat[0]}
        if len(sizes) > 1 and "valid" in batch:
            shown = ", ".join(f"{w}x{h} ({name})" for (h, w), name in sorted(sizes.items())[:4])
            raise DataError(
                f"the images of a training batch are of {shown}: end data.augment with a transform to one size, as "
                "{name: RandomCrop, size: [512, 512], pad_if_needed: true}, RandomResizedCrop or Resize."
            )
        if len(sizes) == 1:
            batch = {key: torch.stack(values) for key, values in batch.items()}
            batch["images"] = batch["images"] if batch["images"].is_floating_point() else batch["images"].float() / 255
            batch["labels"] = batch["labels"].long()
        batch["unlabelled"] = torch.tensor([s["unlabelled"] for s in flat], dtype=torch.bool)
        batch["id"] = torch.tensor([s["id"] for s in flat], dtype=torch.int64)
        return batch


collate = _Collate()
collate_pairs = _Collate(pairs=True)
