"""How a recipe of task `detection` becomes data, models and metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from taskkd.detection import models
from taskkd.detection.architectures import COCO
from taskkd.detection.config import Architecture, DetectorConfig
from taskkd.detection.data import DetectionData, load
from taskkd.detection.datasets import DetectionDataset, collate
from taskkd.detection.families import family_of
from taskkd.detection.mapped import mapped
from taskkd.detection.methods import METHODS
from taskkd.detection.metrics import CocoMetric, VocMetric
from taskkd.detection.portable import portable
from taskkd.detection.readers import read
from taskkd.detection.schema import Data, DetectionRecipe
from taskkd.detection.teacher import DetectorTeacher
from taskkd.images import decode, named_file
from taskkd.portable import Portable
from taskkd.tasks import Task, groups_of
from taskkd.teachers import Teacher

if TYPE_CHECKING:
    from taskkd.detection.given import GivenDetection

__all__ = ["TASK", "DetectionTask"]

logger = logging.getLogger(__name__)


class DetectionTask(Task):
    """The glue between recipes and this package."""

    name = "detection"
    recipe = DetectionRecipe
    methods = METHODS
    default_method = "auto"

    # ---- data

    def load(self, recipe: DetectionRecipe, folder: Path | None = None) -> DetectionData:
        """Read and divide the data.

        Raises:
            DataError: a file, class, box or split is wrong.
        """
        return load(recipe.data)

    def shorthand(self, teacher: Any, student: Any, data: Any) -> dict[str, Any]:
        """The sections of a recipe that a name or a path stands for.

        Args:
            teacher, student: a saved folder, a detector of `transformers`, or an architecture and its backbone
                (`faster_rcnn/resnet50`), which begins with the weights that there are; such a teacher is fine-tuned.
            data: a COCO json file, a folder in the layout of Pascal VOC, or `trees`, the embedded sample.
        """
        return {
            "data": _source(str(data)),
            "teacher": _named(str(teacher), {"finetune": {}}),
            "student": _named(str(student), {}),
            "method": {"name": self.default_method},
        }

    def read(self, recipe: DetectionRecipe, path: str, student: Any, processing: Any) -> Any:
        """Other images with boxes, with the classes of a trained student."""
        classes = models.class_names(student) or None
        return DetectionDataset(read(path, classes=classes, bad=recipe.data.bad), ignored=True)

    def latency_batches(self, data: DetectionData, count: int, size: int = 1) -> list[dict[str, Any]]:
        """Real test images in batches of `size`, as the models' keyword arguments."""
        images = [data.test[i]["images"] for i in range(min(count, 16, len(data.test)))]
        return [{"images": group} for group in groups_of(images, size)]

    # ---- models

    def teacher(self, recipe: DetectionRecipe, data: DetectionData, source: str | None = None) -> nn.Module:
        """The teacher (from `source`, a folder of this run, once it is fine-tuned)."""
        if source is not None:
            return models.load(source)
        own = recipe.teacher
        if own.label_map is not None:
            return mapped(models.existing(own.detector), own.label_map, data.classes)
        return models.build(own.detector, data.classes)

    def student(self, recipe: DetectionRecipe, data: DetectionData, teacher: nn.Module, seed: int) -> nn.Module:
        """The student at its start; the same for a seed, whatever it is then trained with."""
        return models.build(recipe.student.detector, data.classes, seed=seed)

    def given(self, *args: Any, **options: Any) -> GivenDetection:
        """This task with models and data that the caller holds; see `GivenDetection`."""
        from taskkd.detection.given import GivenDetection

        return GivenDetection(*args, **options)

    def trained(self, folder: Path) -> tuple[nn.Module, Any]:
        """A trained student, from the folder it was saved in."""
        return models.load(folder).eval(), None

    def supplier(self, recipe: DetectionRecipe, student: nn.Module, teacher: nn.Module) -> Teacher:
        """The teacher, run in parts on the student's images."""
        own = recipe.teacher
        supplier: Teacher = DetectorTeacher(teacher, student, size=own.size, dtype=own.dtype)
        return supplier

    def portable(self, recipe: DetectionRecipe | None, student: nn.Module, processing: Any) -> Portable:
        """A trained student as it leaves a run."""
        return portable(student)

    def named(self, name: str) -> tuple[nn.Module, Any]:
        """A model by what a recipe calls it, for a look at it: what is built has random weights."""
        own = {key: value for key, value in _named(name, {}).items() if key != "weights"}
        config = DetectorConfig.of(own)
        return (models.existing(config) if config.model else models.build(config, 2)).eval(), None

    def pair(self, data: DetectionData, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        """What is to be known of a pair of detectors before they are distilled."""
        lines = []
        for who, model in (("teacher", teacher), ("student", student)):
            family, size = family_of(model, who), getattr(model, "transform", None)
            resizes = f", images of {_sizes(size)}" if size is not None else ""
            lines.append((f"{who}'s family", f"{family.name}{resizes}; it has {', '.join(family.views)}"))
        return lines

    # ---- training and evaluation

    def loss(self, recipe: DetectionRecipe, student: nn.Module | None = None, seed: int = 0) -> Any:
        """The task loss: the sum of the detector's own."""

    def metric(self, data: DetectionData, table: Any) -> Any:
        """A fresh metric for a table of the data."""
        return _metric(data.config, data.classes)

    def metric_of(self, recipe: DetectionRecipe, student: nn.Module, table: Any) -> Any:
        """A fresh metric for a trained student on a table."""
        return _metric(recipe.data, table.classes)

    def collator(self, recipe: DetectionRecipe, processing: Any) -> Any:
        """Makes a batch."""
        return collate

    def chance(self, data: DetectionData) -> float:
        """Average precision without looking at the image."""
        return 0.0

    def predict(
        self, recipe: DetectionRecipe, student: Any, processing: Any, inputs: Sequence[str]
    ) -> Iterator[tuple[str, float | None, str]]:
        """(class, score, "file x0 y0 x1 y1") of each box with a score of 0.5 or more, in each image file."""
        names = models.class_names(student)
        for path in inputs:
            image = decode(named_file(path, "detectors predict on image files"), 0).float() / 255
            with torch.no_grad():
                (found,) = student([image])
            if not (found["scores"] >= 0.5).any():
                best = f"; the highest is {float(found['scores'].max()):.2f}" if len(found["scores"]) else ""
                logger.warning("%s: no box with a score of 0.5 or more%s", path, best)
            for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
                if score >= 0.5:
                    corners = " ".join(f"{v:.1f}" for v in box.tolist())
                    yield names[int(label) - 1], float(score), f"{path} {corners}"

    def draw(self, data: DetectionData, detectors: Mapping[str, nn.Module], path: Path) -> None:
        """Draw test images with the boxes of the ground truth and of every model, side by side."""
        from taskkd.detection.pictures import draw

        draw(data.test, detectors, data.classes, path)


def _sizes(transform: Any) -> str:
    if getattr(transform, "fixed_size", None):
        return "x".join(str(s) for s in transform.fixed_size)
    shorter = transform.min_size
    shown = "/".join(map(str, shorter)) if isinstance(shorter, list | tuple) else str(shorter)
    return f"{shown} to {transform.max_size}"


def _metric(config: Data, classes: Sequence[str]) -> Any:
    if config.metric.startswith("VOC"):
        return VocMetric(classes, use_07_metric=config.metric == "VOC07_AP50")
    return CocoMetric(classes, backend=config.backend)


# ---- names and paths


def _source(data: str) -> dict[str, Any]:
    if data == "trees":
        return {"sample": {"name": "trees"}}
    if (Path(data) / "ImageSets").is_dir():
        return {"voc": {"folder": data, "test": "test" if _listed(data, "test") else None}}
    return {"coco": {"train": data}}


def _listed(folder: str, part: str) -> bool:
    return (Path(folder) / "ImageSets" / "Main" / f"{part}.txt").is_file()


def _named(name: str, built: dict[str, Any]) -> dict[str, Any]:
    architecture, _, backbone = name.partition("/")
    if Path(name).exists() or architecture not in get_args(Architecture):
        return {"model": name}
    body = {"backbone": backbone} if backbone else {}
    known = (architecture, backbone or DetectorConfig(architecture=architecture).body) in COCO
    return {"architecture": architecture, **body, "weights": "coco" if known else "imagenet", **built}


TASK = DetectionTask()
