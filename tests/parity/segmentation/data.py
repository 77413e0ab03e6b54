"""Parity adapters of the segmentation losses: data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taskkd.segmentation.metrics import SegmentationMetric


def miou(inputs: dict[str, Tensor], params: dict[str, Any]) -> dict[str, Tensor]:
    """Predictions and labels as they are in the case; its ignored label is ours or becomes it."""
    labels = inputs["in_label"].long()
    labels[labels == params["ignore"]] = 255
    names = [str(k) for k in range(params["num_classes"])]
    ignoring, counting = SegmentationMetric(names), SegmentationMetric(names, absent="zero")
    for metric in (ignoring, counting):
        metric.update(inputs["in_pred"], {"labels": labels})
    result = ignoring.compute()
    return {
        "loss": torch.tensor(result["mIoU"], dtype=torch.float64),
        "miou_nanmean": torch.tensor(result["mIoU"], dtype=torch.float64),
        "miou_absent_zero": torch.tensor(counting.compute()["mIoU"], dtype=torch.float64),
        "iou": torch.tensor([result.get(f"IoU/{name}", 0.0) for name in names], dtype=torch.float64),
        "confusion": ignoring.matrix.double(),
    }


ADAPTERS: dict[str, Callable[..., Any]] = {"segmentation/miou": miou}
