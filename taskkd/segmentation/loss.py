"""The task loss of segmentation networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import DataError, TaskkdError
from taskkd.segmentation.labels import IGNORE
from taskkd.segmentation.terms import resized

__all__ = ["PixelCrossEntropy"]


class PixelCrossEntropy:
    """Cross-entropy of every labelled pixel: a task loss, `(output, batch) -> scalar`.

    Logits are first resized (bilinearly) to the labels; the mean is over the pixels that are not ignored, by the weight
    of their classes where there are weights. A batch without labelled pixels gives 0, with a gradient of 0.

    Args:
        aux_weight: of the same loss of an auxiliary head, where the output has `aux`. Default 0.4 (Zhao et al. 2017).
        class_weights: one for each class, or None.

    Raises:
        TaskkdError: a weight is negative, or when it runs, there is not one for each class.
        DataError: when it runs, a label is no class.
    """

    def __init__(self, *, aux_weight: float = 0.4, class_weights: Sequence[float] | None = None) -> None:
        if aux_weight < 0 or any(w < 0 for w in class_weights or ()):
            raise TaskkdError(f"weights are not negative, got aux_weight {aux_weight}, class_weights {class_weights}.")
        self.aux_weight = aux_weight
        self.class_weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)

    def __call__(self, output: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch with `labels` (N, H, W), or a list of (H, W) and of logits, as in evaluation."""
        labels = batch["labels"]
        loss = self._of(output["logits"], labels)
        aux = output.get("aux")
        return loss if aux is None or self.aux_weight == 0 else loss + self.aux_weight * self._of(aux, labels)

    def _of(self, logits: Tensor | Sequence[Tensor], labels: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(logits, Tensor) and isinstance(labels, Tensor):
            total, counted = self._sums(logits, labels)
        else:  # images of several sizes
            found = [self._sums(x[None], y[None]) for x, y in zip(logits, labels, strict=True)]
            total, counted = (torch.stack(values).sum() for values in zip(*found, strict=True))
        return total / counted.clamp(min=1e-12)

    def _sums(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over the labelled pixels, and their weight."""
        classes = logits.shape[1]
        if not torch.compiler.is_compiling() and not logits.is_cuda:  # there the kernel itself refuses it
            wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORE)]
            if wrong.numel():
                raise DataError(f"label {int(wrong[0])}: expected 0 to {classes - 1}, or {IGNORE} for ignored pixels.")
        weights = self.class_weights
        if weights is not None:
            if len(weights) != classes:
                raise TaskkdError(f"{len(weights)} class_weights for {classes} classes.")
            weights = weights.to(logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            full = logits if logits.dtype == torch.float64 else logits.float()
            shown = resized(full, labels.shape[1:])
            own = None if weights is None else weights.to(shown.dtype)
            total = F.cross_entropy(shown, labels, weight=own, ignore_index=IGNORE, reduction="sum")
            known = labels != IGNORE  # and no selection by it: that has no fixed shape and waits for the device
            counted = known.sum() if own is None else (own[labels.where(known, 0)] * known).sum()
            return total, counted.to(total)
