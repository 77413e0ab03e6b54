"""Images and boxes as detectors take them, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from taskkd.detection.records import Annotations, Array, Record, cropped, pixels
from taskkd.images import decode

__all__ = ["DetectionDataset", "collate"]


class DetectionDataset(Dataset[Any]):
    """Images and boxes as detectors of torchvision take them.

    A sample is `{"images": (3, H, W) float32 in 0..1, "targets": {...}, "id": int}`; its targets are `boxes` (n, 4)
    xyxy float32 in pixels, `labels` (n,) int64 1..C, `area` (n,) float32, `iscrowd` (n,) int64 (all 0), `image_id`
    () int64 and `size` (2,) int64, height and width. Crowds and difficult objects are in none of these.

    Args:
        annotations: as a reader gives them.
        ignored: also give what is to be ignored in evaluation, under names that no detector reads: `ignored_boxes`,
            `ignored_labels`, `ignored_area`.
        held: keep every image file's pixels in memory (one byte for each of 3 H W): for few images, or tiles of them.

    Raises:
        DataError: an image cannot be read or is of another size than the annotations say, when it is asked for.
    """

    def __init__(self, annotations: Annotations, *, ignored: bool = False, held: bool = False) -> None:
        self.annotations, self.ignored = annotations, ignored
        self._held: dict[str, Tensor] | None = None
        if held:
            sources = {r.source.name: r for r in annotations.records}
            self._held = {name: decode(r.source, r.image_id) for name, r in sources.items()}

    @property
    def records(self) -> list[Record]:
        """One for each sample."""
        return self.annotations.records

    @property
    def classes(self) -> list[str]:
        """Names; label k is `classes[k - 1]`."""
        return self.annotations.classes

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = pixels(record) if self._held is None else cropped(self._held[record.source.name], record)
        return {"images": image.float() / 255, "targets": self._targets(record), "id": record.image_id}

    def _targets(self, record: Record) -> dict[str, Tensor]:
        boxes = _tensors(record, ~record.iscrowd)
        targets = {**boxes, "iscrowd": torch.zeros_like(boxes["labels"])}
        targets["image_id"] = torch.tensor(record.image_id)
        targets["size"] = torch.tensor(record.size)
        if self.ignored:
            targets |= {f"ignored_{name}": value for name, value in _tensors(record, record.iscrowd).items()}
        return targets


def _tensors(record: Record, chosen: Array) -> dict[str, Tensor]:
    return {
        "boxes": torch.from_numpy(record.boxes[chosen].astype(np.float32)),
        "labels": torch.from_numpy(record.labels[chosen]),
        "area": torch.from_numpy(record.area[chosen].astype(np.float32)),
    }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch `{"images": list, "targets": list, "id": (n,) int64}`: images keep their sizes."""
    return {
        "images": [s["images"] for s in samples],
        "targets": [s["targets"] for s in samples],
        "id": torch.tensor([s["id"] for s in samples], dtype=torch.int64),
    }
