"""Segmentation networks outside of taskkd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import RecipeError, TaskkdError
from taskkd.portable import (
    Portable,
    Sample,
    Signature,
    is_library_class,
    network_of,
    of_own_class,
    own_network,
    write_network,
)
from taskkd.segmentation import network
from taskkd.segmentation.segmenter import Segmenter
from taskkd.segmentation.transformers_networks import FlippedChannels, TransformersSegmenter
from taskkd.sources import standalone

__all__ = ["portable"]

USE = """import torch
from torchvision.io import decode_image

image = decode_image("image.png", mode="RGB").float() / 255  # (3, H, W) in 0..1
with torch.no_grad():
    logits = {call}
logits = torch.nn.functional.interpolate(logits, size=image.shape[1:], mode="bilinear", align_corners=False)
mask = logits[0].argmax(0)  # (H, W), numbers of classes"""
NETWORK = """import sys

sys.path.insert(0, folder)
from network import load  # network.py of this folder

model = load(folder)"""


class PixelLogits(nn.Module):
    """A segmenter as a graph: (N, 3, H, W) RGB in 0..1 -> (N, K, H, W) logits at the size of the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        logits = self.model(images)["logits"]
        return (F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False),)


def portable(student: nn.Module, size: tuple[int, int] = (96, 128)) -> Portable:
    """A student of task segmentation, as it leaves a run.

    Args:
        student: a segmenter in evaluation mode.
        size: of synthetic images.

    Raises:
        RecipeError: it is no segmenter.
    """
    if not isinstance(student, Segmenter):
        raise RecipeError(f"a {type(student).__name__} is no segmenter: wrap it, `taskkd.segmentation.wrap(network)`.")
    own = student.size
    free = {0: "batch"} if own else {0: "batch", 2: "height", 3: "width"}

    def arrange(sample: Sample) -> tuple[Tensor]:
        images = sample["images"]
        if own is not None and tuple(images.shape[2:]) != own:
            images = F.interpolate(images, own, mode="bilinear", align_corners=False, antialias=True)
        return (images,)

    def synthetic() -> list[Sample]:
        generator = torch.Generator().manual_seed(0)
        height, width = size
        sides = [own] * 3 if own else [(height, width), (width, height), (height, height)]
        return [{"images": torch.rand(1, 3, *side, generator=generator)} for side in sides]

    hub = _of_transformers(student) if isinstance(student, TransformersSegmenter) else _network(student)
    settings = [f"{key}={value!r}" for key, value in student.input_settings.items()]
    call = ["call=call"] if student.description.call else []
    arguments = ", ".join(["network", repr(list(student.classes)), *settings, *call])
    by_hand = own_network("Segmenter", "segmentation", arguments, "network")
    return Portable(
        student=student,
        title=f"{student.kind} for semantic segmentation",
        pipeline="image-segmentation",
        signature=Signature(PixelLogits, ("images",), ("logits",), {"images": free, "logits": free}, arrange),
        synthetic=synthetic,
        preprocessing={
            "input": "images (N, 3, height, width), RGB, float in 0..1",
            "output": "logits (N, classes, height, width), at the size of the images",
            "in_the_onnx_graph": "normalisation, padding, resizing of the logits",
            **student.input_settings,
            "resize_before": None if own is None else f"bilinear, antialiased, to {own[0]} x {own[1]}",
            "classes": list(student.classes),
        },
        own="from taskkd.segmentation import load\n\nmodel = load(folder)" if hub["buildable"] else by_hand,
        classes=student.classes,
        **hub,
    )


def _network(student: Segmenter) -> dict[str, Any]:
    def save(folder: Path) -> None:
        if student.built is None:
            raise TaskkdError(
                f"format hf: this {student.kind} was not built by taskkd, which cannot say how to build it: export it "
                "as onnx, or as safetensors to load into the network that you have."
            )
        code = standalone(
            network.load, title="The network of this folder.", without={"Segmenter": ("views", "description")}
        )
        built = student.built
        settings = built.model_dump() | {"body": built.body, "weights": None, "sha256": None, "model": None}
        config = {
            "architectures": [student.kind],
            "network": settings,
            "classes": list(student.classes),
            "preprocessing": student.description.preprocessing,
        }
        write_network(folder, code, student, config)

    use = USE.format(call='model(image[None])["logits"]')
    loading = {"load": NETWORK, "save": save, "reload": network_of, "buildable": student.built is not None}
    return {**loading, "use": use, "library": "pytorch"}


def _of_transformers(student: TransformersSegmenter) -> dict[str, Any]:
    description = student.description
    auto = "AutoModelForUniversalSegmentation" if student.universal else "AutoModelForSemanticSegmentation"

    def save(folder: Path) -> None:
        if not is_library_class(student.model):
            raise TaskkdError(of_own_class(student.model))
        student.config.id2label = dict(enumerate(student.classes))
        student.config.label2id = {name: label for label, name in enumerate(student.classes)}
        student.model.save_pretrained(folder)  # type: ignore[operator]
        if student.processor is not None:
            student.processor.save_pretrained(folder)

    def reload(folder: Path) -> nn.Module:
        model = type(student.model).from_pretrained(folder, dtype=torch.float32)  # type: ignore[attr-defined]
        return TransformersSegmenter(model, student.classes, call=student._call, **description.preprocessing).eval()

    load = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(folder).eval()"
    mean, std = description.mean, description.std
    shown = f"""mean, std = torch.tensor({list(mean)}), torch.tensor({list(std)})
shown = ((image - mean[:, None, None]) / std[:, None, None])[None]
"""
    if isinstance(student._call, FlippedChannels):
        shown += "shown = shown.flip(1)  # BGR\n"
    if student.size is not None:
        shown += f'shown = torch.nn.functional.interpolate(shown, {student.size}, mode="bilinear", antialias=True)\n'
    elif student.divisor > 1:
        shown += (
            f"shown = torch.nn.functional.pad(shown, (0, -image.shape[2] % {student.divisor}, 0, "
            f"-image.shape[1] % {student.divisor}))  # and cut what is below and right of the image off the mask\n"
        )
    use = USE.format(call="model(shown).logits").replace("with torch", shown + "with torch")
    loading = {"load": load, "save": save, "reload": reload, "buildable": is_library_class(student.model)}
    return {**loading, "use": use, "library": "transformers"}
