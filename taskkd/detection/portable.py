"""Detectors outside of taskkd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.detection import network
from taskkd.detection.models import Description, class_names, describe
from taskkd.detection.transformers_models import TransformersDetector
from taskkd.errors import TaskkdError
from taskkd.portable import (
    Portable,
    Sample,
    Signature,
    differences,
    is_library_class,
    network_of,
    of_own_class,
    write_network,
)
from taskkd.sources import standalone

__all__ = ["portable"]

#: detections below are not compared: of equally bad ones a rounding decides which are kept
LEAST = 0.05
LOAD = """import sys

sys.path.insert(0, folder)
from network import load  # network.py of this folder

model = load(folder)"""
USE = """import torch
from torchvision.io import decode_image

image = decode_image("image.png", mode="RGB").float() / 255  # (3, H, W) in 0..1
with torch.no_grad():
    found = model([image])[0]  # boxes x0 y0 x1 y1 in pixels, scores, labels from 1"""


OWN = """from taskkd.detection import models

model = models.load(folder)"""
BY_HAND = """from safetensors.torch import load_model

# model: your own, made as it was for the run
load_model(model, f"{folder}/model.safetensors")
model.eval()"""


class Boxes(nn.Module):
    """A detector of torchvision as a graph: (3, H, W) RGB in 0..1 -> boxes (n, 4), scores (n,), labels (n,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (found,) = self.model([image])
        return found["boxes"], found["scores"], found["labels"]


class Queries(nn.Module):
    """A detector of transformers as a graph: pixels that are resized and normalised -> logits and boxes of queries."""

    def __init__(self, model: nn.Module, masked: bool) -> None:
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        names = ("pixel_values", "pixel_mask")[: 1 + self.masked]
        found = self.model(**dict(zip(names, tensors, strict=True)))
        return found.logits, found.pred_boxes


def portable(student: nn.Module, size: tuple[int, int] = (96, 128)) -> Portable:
    """A student of task detection, as it leaves a run.

    Args:
        student: in evaluation mode.
        size: of synthetic images.
    """

    def synthetic() -> list[Sample]:
        generator = torch.Generator().manual_seed(0)
        height, width = size
        sides = [(height, width), (width, height), (height, height)]
        return [{"images": [torch.rand(3, *side, generator=generator)]} for side in sides]

    kind = _of_transformers(student) if isinstance(student, TransformersDetector) else _of_torchvision(student)
    return Portable(
        student=student,
        pipeline="object-detection",
        synthetic=synthetic,
        own=OWN if kind["buildable"] else BY_HAND,
        classes=class_names(student),
        **kind,
    )


def _of_torchvision(student: nn.Module) -> dict[str, Any]:
    transform: Any = student.transform
    shown = {
        "mean": list(transform.image_mean),
        "std": list(transform.image_std),
        "min_size": transform.min_size,
        "max_size": transform.max_size,
        "fixed_size": transform.fixed_size,
    }

    def save(folder: Path) -> None:
        described: Description = describe(student)
        if described.config is None:
            raise TaskkdError(
                f"format hf: this {type(student).__name__} was not built by taskkd, which cannot say how to build it: "
                "export it as onnx, or as safetensors to load into the detector that you have."
            )
        built = described.config
        # Only whether there were weights, and whose, decides on the shape.
        weights = built.weights if built.weights in (None, "imagenet", "coco") else "file"
        settings = built.model_dump() | {"body": built.body, "two_stage": built.two_stage}
        settings |= {"weights": weights, "sha256": None, "model": None}
        names = list(described.names)
        config = {"architectures": [type(student).__name__], "network": settings, "classes": names}
        write_network(folder, standalone(network.load, title="The detector of this folder."), student, config)

    image = {"image": {1: "height", 2: "width"}}
    found: dict[str, dict[int, str]] = {name: {0: "detections"} for name in ("boxes", "scores", "labels")}
    return {
        "title": f"{type(student).__name__} for object detection",
        "library": "torchvision",
        # What suppression leaves has no size that is known beforehand, which the present exporter does not get over.
        "signature": Signature(
            Boxes, ("image",), ("boxes", "scores", "labels"), image | found, lambda sample: (sample["images"][0],),
            exporters=(False,), compare=_matched, telling={"scores": LEAST},
        ),
        "preprocessing": {
            "input": "image (3, height, width), RGB, float in 0..1",
            "output": "boxes (n, 4) x0 y0 x1 y1 in pixels of the image, scores (n,), labels (n,) from 1",
            "in_the_onnx_graph": "resizing, normalisation, suppression of overlapping boxes",
            **shown,
            "classes": class_names(student),
        },
        "load": LOAD, "use": USE, "save": save, "reload": network_of,
        "buildable": describe(student).config is not None,
    }  # fmt: skip


def _matched(live: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """Differences of boxes, scores and labels, each detection beside its nearest: equal scores have no order."""
    kept = [tuple(value[side[1] >= LEAST] for value in side) for side in (live, other)]
    (boxes, scores, labels), (others, other_scores, other_labels) = kept
    if len(boxes) != len(others) or not len(boxes):
        same = len(boxes) == len(others)
        return [0.0 if same else float("inf")] * 3
    far = (boxes[:, None] - others[None]).abs().amax(2) + 1e6 * (labels[:, None] != other_labels[None])
    order = far.argmin(1)
    if len(set(order.tolist())) < len(order):  # detections that are alike
        return differences((boxes, scores, labels), (others, other_scores, other_labels))
    return differences((boxes, scores, labels), (others[order], other_scores[order], other_labels[order]))


def _queries(live: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """Differences of logits and boxes, each query beside its nearest: those picked by equal scores have no order."""
    (logits, boxes), (other_logits, other_boxes) = live, other
    if logits.shape != other_logits.shape or boxes.shape != other_boxes.shape:
        return differences(live, other)
    nearest = torch.cdist(torch.cat(list(live), -1), torch.cat(list(other), -1)).argmin(-1)
    if any(len(set(order.tolist())) < len(order) for order in nearest):  # queries that are alike
        return differences(live, other)
    return differences(live, [value.take_along_dim(nearest[..., None], 1) for value in other])


def _of_transformers(student: TransformersDetector) -> dict[str, Any]:
    masked = student.kind.masked
    inputs = ("pixel_values", "pixel_mask")[: 1 + masked]
    free = {0: "batch"} if student.transform.fixed_size else {0: "batch", 2: "height", 3: "width"}
    axes: dict[str, dict[int, str]] = {"pixel_values": free, "logits": {0: "batch"}, "pred_boxes": {0: "batch"}}
    if masked:
        axes["pixel_mask"] = {0: "batch", 1: "height", 2: "width"}

    def arrange(sample: Sample) -> tuple[Tensor, ...]:
        shown, _ = student.transform(sample["images"], None)
        pixels = shown.tensors
        return (pixels, torch.ones_like(pixels[:, 0]).long())[: 1 + masked]

    def save(folder: Path) -> None:
        if not is_library_class(student.model):
            raise TaskkdError(of_own_class(student.model))
        student.model.save_pretrained(folder)  # type: ignore[operator]
        student.processor.save_pretrained(folder)

    def reload(folder: Path) -> nn.Module:
        model = type(student.model).from_pretrained(folder, dtype=torch.float32)  # type: ignore[attr-defined]
        return TransformersDetector(model, student.processor).eval()

    load = """from transformers import AutoImageProcessor, AutoModelForObjectDetection

processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForObjectDetection.from_pretrained(folder).eval()"""
    use = """import torch
from PIL import Image

image = Image.open("image.png").convert("RGB")
with torch.no_grad():
    output = model(**processor(images=image, return_tensors="pt"))
sizes = [(image.height, image.width)]
found = processor.post_process_object_detection(output, threshold=0.5, target_sizes=sizes)[0]  # labels from 0"""
    return {
        "title": f"{student.kind.title} for object detection",
        "library": "transformers",
        "signature": Signature(
            lambda model: Queries(model.get_submodule("model"), masked),
            inputs, ("logits", "pred_boxes"), axes, arrange, compare=_queries,
        ),
        "preprocessing": {
            "processor": "the files of AutoImageProcessor in the format hf",
            "input": "pixel_values (N, 3, height, width), resized and normalised; pixel_mask 1 where there is an image",
            "output": "logits (N, queries, classes); pred_boxes (N, queries, 4): centre x, centre y, width, height in "
            "0..1 of the image",
            **{key: value for key, value in student.processor.to_dict().items() if _plain(value)},
            "classes": class_names(student),
        },
        "load": load, "use": use, "save": save, "reload": reload,
        "buildable": is_library_class(student.model),
    }  # fmt: skip


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | dict)
