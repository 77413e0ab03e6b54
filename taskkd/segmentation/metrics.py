"""Mean intersection over union and pixel accuracy, from one confusion matrix that is counted as batches come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from taskkd.errors import DataError, TaskkdError
from taskkd.segmentation.labels import IGNORE

__all__ = ["SegmentationMetric", "confusion", "predicted"]

#: logits that are resized at once: few enough for a processor's cache; on other devices few launches count
CHUNK, CHUNK_ELSEWHERE = 1 << 19, 1 << 26


class SegmentationMetric:
    """The confusion matrix of all pixels of a data set and what follows from it; a `Metric` of the trainer.

    Counts are whole numbers (int64), so shards in any order give exactly what the whole gives.

    Args:
        classes: names; label k is `classes[k]`.
        absent: a class that is in no label and no prediction is left out of the mean IoU ("ignore", as mmsegmentation
            has it), or counts as 0 ("zero", as the code of SKD and CIRKD). With few images the two differ by a lot.
        per_class: also give the IoU of each class that occurs, `IoU/<class>`.

    Raises:
        TaskkdError: another `absent`, or no class.
    """

    #: what is read of a batch
    columns = ("labels",)

    def __init__(
        self, classes: Sequence[str], *, absent: Literal["ignore", "zero"] = "ignore", per_class: bool = True
    ) -> None:
        if absent not in ("ignore", "zero"):
            raise TaskkdError(f"absent={absent!r}: expected 'ignore' or 'zero'.")
        if not classes:
            raise TaskkdError("a metric of segmentation needs the names of the classes.")
        self.classes, self.absent, self.per_class = list(classes), absent, per_class
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        #: (K, K) int64, on the device of the batches: pixels by label (row) and prediction (column)
        self.matrix = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)

    @torch.no_grad()
    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Count one batch.

        Args:
            output: logits (N, K, h, w), which are resized to the labels bilinearly, or labels (N, H, W) of whole
                numbers; or a mapping or an object with `logits`; or, where sizes differ, a list with an entry
                ((K, h, w) or (H, W)) for each image.
            batch: with `labels` (N, H, W), or a list of (H, W): 0..K-1; 255 and -1 are ignored.

        Raises:
            DataError: a label is out of range, or the batch has none.
            TaskkdError: the logits are not of K classes, or predictions not of the labels' size.
        """
        if "labels" not in batch:
            raise DataError("the batch has no `labels` to measure by.")
        found = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
        for one, label in zip(found, batch["labels"], strict=True):
            self.matrix = self.matrix.to(label.device) + confusion(self._prediction(one, label), label, self.classes)

    def _prediction(self, found: Tensor, label: Tensor) -> Tensor:
        """(H, W) of logits (K, h, w), or of what is a prediction already."""
        if found.ndim == 3 and found.shape[0] == len(self.classes):
            return predicted(found[None], (int(label.shape[-2]), int(label.shape[-1])))[0]
        if found.shape == label.shape and not found.is_floating_point():
            return found
        raise TaskkdError(
            f"the metric of {len(self.classes)} classes ({', '.join(self.classes[:5])}, ...) got {tuple(found.shape)} "
            f"for an image with labels {tuple(label.shape)}: expected logits ({len(self.classes)}, h, w) or whole "
            "numbers of the labels' size."
        )

    def state(self) -> Tensor:
        """The counts of this process."""
        return self.matrix.cpu()

    def merge(self, states: Sequence[Tensor]) -> None:
        """Take the counts of all processes."""
        self.matrix = torch.stack(list(states)).sum(0)

    def compute(self) -> dict[str, float]:
        """Fractions: `mIoU`; `pixel_accuracy`, the share of right pixels; `mean_accuracy`, its mean over the classes in
        the labels; and `IoU/<class>`. All are 0.0 where no pixel was seen.
        """  # fmt: skip
        counts = self.matrix.double().cpu()
        right, labelled, union = counts.diagonal(), counts.sum(1), counts.sum(0) + counts.sum(1) - counts.diagonal()
        iou, there = right / union.clamp(min=1), union > 0
        mean = iou.sum() / (there.sum().clamp(min=1) if self.absent == "ignore" else len(self.classes))
        results = {
            "mIoU": float(mean),
            "pixel_accuracy": float(right.sum() / counts.sum().clamp(min=1)),
            "mean_accuracy": float((right / labelled.clamp(min=1)).sum() / (labelled > 0).sum().clamp(min=1)),
        }
        if self.per_class:
            named = zip(self.classes, iou.tolist(), there.tolist(), strict=True)
            results |= {f"IoU/{name}": value for name, value, occurs in named if occurs}
        return results

    def by_class(self) -> dict[str, dict[str, float]]:
        """`IoU`, and the share of right pixels `accuracy`, of each class that occurs in labels or predictions."""
        counts = self.matrix.double().cpu()
        right, labelled, union = counts.diagonal(), counts.sum(1), counts.sum(0) + counts.sum(1) - counts.diagonal()
        iou, accuracy = (right / union.clamp(min=1)).tolist(), (right / labelled.clamp(min=1)).tolist()
        return {name: {"IoU": iou[k], "accuracy": accuracy[k]} for k, name in enumerate(self.classes) if union[k] > 0}


def confusion(prediction: Tensor, labels: Tensor, classes: Sequence[str] | int) -> Tensor:
    """The confusion matrix of some pixels.

    Args:
        prediction: whole numbers 0..K-1.
        labels: of the same shape; 255 and -1 are ignored.
        classes: K, or K names.

    Returns:
        (K, K) int64: pixels by label (row) and prediction (column).

    Raises:
        DataError: a label or prediction is out of range.
    """
    count = classes if isinstance(classes, int) else len(classes)
    labels, prediction = labels.reshape(-1).long(), prediction.reshape(-1).to(labels.device).long()
    ignored = (labels == IGNORE) | (labels == -1)
    if bool((((labels < 0) | (labels >= count)) & ~ignored).any()):
        wrong = labels[((labels < 0) | (labels >= count)) & ~ignored][0]
        raise DataError(f"the label {int(wrong)} is none of 0 to {count - 1}, 255 or -1 (both are ignored).")
    if bool(((prediction < 0) | (prediction >= count)).any()):
        raise DataError(
            f"predictions are from {int(prediction.min())} to {int(prediction.max())}, not 0 to {count - 1}."
        )
    codes = torch.where(ignored, count * count, labels * count + prediction)
    return torch.bincount(codes, minlength=count * count + 1)[:-1].reshape(count, count)


def predicted(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of each pixel after bilinear resizing (align_corners=False), some rows at a time.

    The same as `F.interpolate(logits, size, mode="bilinear").argmax(1)` but for ties within rounding, without the
    (N, K, H, W) map.

    Args:
        logits: (N, K, h, w).
        size: (H, W).

    Returns:
        (N, H, W) int64.
    """
    number, classes, height, _ = logits.shape
    if tuple(logits.shape[-2:]) == tuple(size):
        return _winner(logits)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    held = CHUNK if logits.device.type == "cpu" else CHUNK_ELSEWHERE
    rows = max(1, held // max(1, number * classes * size[1]))
    places = ((torch.arange(size[0], device=logits.device, dtype=logits.dtype) + 0.5) * (height / size[0]) - 0.5).clamp(
        0
    )
    found = logits.new_empty((number, *size), dtype=torch.int64)
    for first in range(0, size[0], rows):
        chunk = places[first : first + rows]
        upper = chunk.long().clamp(max=height - 1)
        lower = (upper + 1).clamp(max=height - 1)
        between = torch.lerp(logits[:, :, upper], logits[:, :, lower], (chunk - upper)[:, None])
        wide = F.interpolate(between, (len(chunk), size[1]), mode="bilinear", align_corners=False)
        found[:, first : first + rows] = _winner(wide)
    return found


def _winner(maps: Tensor) -> Tensor:
    """`maps.argmax(1)`; on a CPU class by class, as argmax over a dimension that is not the last is 3 times slower."""
    if maps.device.type != "cpu":
        return maps.argmax(1)
    best = maps[:, 0].clone()
    winner = torch.zeros(best.shape, dtype=torch.uint8 if maps.shape[1] <= 256 else torch.int16)
    for label in range(1, maps.shape[1]):
        winner.masked_fill_(maps[:, label] > best, label)
        torch.maximum(maps[:, label], best, out=best)
    return winner.long()
