"""Face models outside of taskkd."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import RecipeError, TaskkdError
from taskkd.face import network
from taskkd.face.model import FaceModel
from taskkd.portable import Portable, Sample, Signature, network_of, own_network, write_network
from taskkd.sources import standalone

__all__ = ["portable"]

LOAD = """import sys

sys.path.insert(0, folder)
from network import load  # network.py of this folder

model = load(folder)"""
USE = """import torch
from torchvision.io import decode_image

crop = decode_image("image.png", mode="RGB")  # an aligned crop, (3, {size}, {size}) uint8
embedding = model.embed(crop[None])[0]  # of length 1, the sum of the crop's and its mirror image's"""


class Embeddings(nn.Module):
    """A face model as a graph: aligned crops (N, 3, size, size), RGB in 0..1 -> (N, D), as the network gives them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.model(images)["embeddings"],)


def portable(student: nn.Module) -> Portable:
    """A student of task face, as it leaves a run: without the centres of a classifier.

    Raises:
        RecipeError: it is no face model.
    """
    if not isinstance(student, FaceModel):
        raise RecipeError(f"a {type(student).__name__} is no face model: wrap it, `FaceModel(backbone)`.")
    student.centres, side = None, student.size

    def arrange(sample: Sample) -> tuple[Tensor]:
        images = sample["images"]
        images = images / 255 if images.dtype == torch.uint8 else images
        if images.shape[2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)
        return (images,)

    def synthetic() -> list[Sample]:
        generator = torch.Generator().manual_seed(0)
        return [{"images": torch.rand(1, 3, side, side, generator=generator)} for _ in range(3)]

    def save(folder: Path) -> None:
        if student.built is None:
            raise TaskkdError(
                f"format hf: this {student.kind} was not built by taskkd, which cannot say how to build it: export it "
                "as onnx, or as safetensors to load into the network that you have."
            )
        code = standalone(network.load, title="The network of this folder.", without={"FaceModel": ("description",)})
        left_out = {"model": None, "weights": None, "sha256": None, "centres": None}
        config = {
            "architectures": [student.kind],
            "network": student.built.model_dump() | {"family": student.built.family} | left_out,
            "embedding_size": student.embedding_size,
            "preprocessing": student.input_settings,
        }
        write_network(folder, code, student, config)

    arguments = ["backbone", *(["projector=projector"] if student.projector is not None else [])]
    arguments += [f"{key}={value!r}" for key, value in student.input_settings.items()]
    by_hand = own_network("FaceModel", "face", ", ".join(arguments), "backbone")
    axes = {"images": {0: "batch"}, "embeddings": {0: "batch"}}
    return Portable(
        student=student,
        title=f"{student.kind} for face recognition",
        pipeline="image-feature-extraction",
        library="pytorch",
        signature=Signature(Embeddings, ("images",), ("embeddings",), axes, arrange),
        synthetic=synthetic,
        preprocessing={
            "input": f"images (N, 3, {side}, {side}): aligned crops, RGB, float in 0..1",
            "output": f"embeddings (N, {student.embedding_size}), not normalised",
            "in_the_onnx_graph": "the order of the channels, normalisation",
            **student.input_settings,
            "compare_by": "cosine of the sums of the embeddings of a crop and of its mirror image",
        },
        load=LOAD,
        use=USE.format(size=side),
        own="from taskkd.face.models import load\n\nmodel = load(folder)" if student.built else by_hand,
        buildable=student.built is not None,
        save=save,
        reload=network_of,
    )
