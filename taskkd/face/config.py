"""What a face model is, in plain data: the section of a recipe, and what is saved beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from taskkd.errors import nearest
from taskkd.face import iresnet
from taskkd.schema import Model, model_of, own_part, own_settings

__all__ = ["ARCHITECTURES", "FaceConfig"]

ARCHITECTURES = (*iresnet.LAYERS, "mobilefacenet")
TIMM = "timm:"
LAYOUTS = {"iresnet": ("insightface", "ir"), "mobilefacenet": ("insightface", "gdc")}
Three = Annotated[list[float], Field(min_length=3, max_length=3)]
Positive = Annotated[float, Field(gt=0)]


class FaceConfig(Model):
    """A network of face embeddings to build (`architecture`), weights of one (`weights`), or a folder (`model`).

    Args:
        model: a folder that taskkd saved; it has its own settings.
        architecture: `iresnet18`, `iresnet34`, `iresnet50`, `iresnet100`, `iresnet200`, `mobilefacenet`, or any network
            of timm by `timm:<name>`. Default: that of the weights.
        weights: None: random; "imagenet": timm's; or a file (.pt, .pth, .ckpt, .safetensors, `package:name/file`) of
            arcface_torch, AdaFace, CVLface, TFace or AdaDistill, by whose tensors what is not named here is found out;
            see `taskkd.face.checkpoints`. Of timm's networks: by timm's names.
        sha256: expected digest of that file.
        centres: a file of the classifier that the model was trained with, where it is saved apart; or a list of shards
            in the order of their ranks (insightface's `softmax_fc_gpu_N.pt`). A classifier beside the backbone, as in
            AdaFace's checkpoints, is found by itself.
        layout: names of the tensors, and what goes with them. iresnet: "insightface", or "ir" (TFace, AdaFace,
            CVLface). mobilefacenet: "insightface" (its `mbf`), or "gdc" (TFace, AdaDistill). Default: that of the
            weights, else "insightface".
        layers: blocks of each stage, one to four stages of an iresnet, four of a mobilefacenet. Default: as published.
        width: channels of the first stage. Default: iresnet 64; mobilefacenet 128 in insightface's layout (its `mbf` of
            2.06 million parameters) and 64 in "gdc" (the paper's 1.20 million). `layers: [1, 1, 1, 1]` and a `width` of
            4 make toys of some ten thousand parameters.
        embedding_size: of the backbone. Default: 512.
        dropout: before the last linear layer of an iresnet or of timm's networks.
        projector: size that a linear layer, a part of the model, maps embeddings to: so that a small student's can be
            searched among a large teacher's.
        size: side of the images. Default: 112.
        channels: their order in the backbone. Default: "rgb"; "bgr" of AdaFace's own checkpoints. Nothing in a file of
            weights alone tells: if accuracy is a few points too low, try the other.
        mean, std: of the pixels in 0..1, in that order. Default: 0.5; ImageNet's, or those of the weights, of timm's.
        native_stem: of timm's networks: keep the stride of the first convolution, which is halved otherwise.
    """

    model: str | None = None
    architecture: str | None = None
    weights: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    centres: str | list[str] | None = None
    layout: Literal["insightface", "ir", "gdc"] | None = None
    layers: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1, max_length=4)
    width: int | None = Field(None, ge=1)
    embedding_size: int | None = Field(None, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    projector: int | None = Field(None, ge=1)
    size: int | None = Field(None, ge=8)
    channels: Literal["rgb", "bgr"] | None = None
    mean: Three | None = None
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] | None = None
    native_stem: bool = False

    @model_validator(mode="after")
    def _check(self) -> FaceConfig:
        given = own_settings(self, FaceConfig)
        if self.model is not None and (wrong := [k for k in given if k != "model"]):
            raise ValueError(f"`model` has its own settings; leave out {', '.join(wrong)}")
        if self.model is None and self.architecture is None and self.weights in (None, "imagenet"):
            raise ValueError("expected `architecture` (to build one), `weights` (a file) or `model` (a folder)")
        if self.sha256 is not None and self.weights in (None, "imagenet"):
            raise ValueError("`sha256` is of a file of weights; leave it out")
        if self.architecture is not None:
            self._check_architecture(self.architecture)
        return self

    def _check_architecture(self, name: str) -> None:
        if name.startswith(TIMM):
            if wrong := [k for k in ("layout", "layers", "width") if getattr(self, k) is not None]:
                raise ValueError(f"{name} has timm's shapes and names; leave out {', '.join(wrong)}")
            return
        if name not in ARCHITECTURES:
            raise ValueError(
                f"no architecture {name!r}{nearest(name, ARCHITECTURES)}; there are {', '.join(ARCHITECTURES)} and "
                "'timm:<name>'"
            )
        if self.weights == "imagenet":
            raise ValueError(f"there are no ImageNet weights of {name}; `weights` is a file, or left out")
        if self.native_stem:
            raise ValueError(f"`native_stem` is of timm's networks, {name} is none; leave it out")
        known = LAYOUTS[self.family]
        if self.layout is not None and self.layout not in known:
            raise ValueError(f"{name} has the layouts {' and '.join(map(repr, known))}, got {self.layout!r}")
        if self.family == "mobilefacenet" and self.layers is not None and len(self.layers) != 4:
            raise ValueError(f"mobilefacenet has four stages, got {len(self.layers)} in `layers`")
        if self.family == "mobilefacenet" and self.dropout:
            raise ValueError("mobilefacenet has no dropout; leave out `dropout`")

    @property
    def family(self) -> Literal["iresnet", "mobilefacenet", "timm"]:
        """Which of the three kinds of backbone it is."""
        name = self.architecture or ""
        return "timm" if name.startswith(TIMM) else "mobilefacenet" if name == "mobilefacenet" else "iresnet"

    @property
    def face(self) -> FaceConfig:
        """Only what is said of the network itself, without what a recipe says of a teacher beside it."""
        return own_part(self, FaceConfig)

    @classmethod
    def of(cls, given: FaceConfig | Mapping[str, Any]) -> FaceConfig:
        """A config from plain data.

        Raises:
            RecipeError: an unknown key, a wrong type, or settings that do not go together.
        """
        return model_of(cls, given, "face model")
