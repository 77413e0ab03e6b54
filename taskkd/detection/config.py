"""What a detector is, in plain data: the section of a recipe, and what is saved beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from taskkd.schema import Model, model_of, own_part, own_settings

__all__ = ["Architecture", "DetectorConfig"]

Architecture = Literal["faster_rcnn", "mask_rcnn", "retinanet", "fcos", "ssd", "ssdlite"]
TWO_STAGE = ("faster_rcnn", "mask_rcnn")
SSD = ("ssd", "ssdlite")
BACKBONES = {"ssd": "vgg16", "ssdlite": "mobilenet_v3_large"}  # the others: resnet50
# What fixes the shape of a detector, so that another value does not go with its builder's weights.
SHAPE = ("stages", "width", "extra_levels", "anchor_sizes", "anchor_ratios", "head_convs", "representation_size")


class DetectorConfig(Model):
    """A detector to build (`architecture`), or one that is there (`model`).

    Args:
        model: a folder that taskkd saved, or a detector of `transformers` by hub name or folder; nothing else is given,
            but `min_size` and `max_size` for those of `transformers`.
        architecture: of torchvision.
        backbone: a classifier of torchvision (`resnet18`, `mobilenet_v3_large`), or `timm:<name>`. Default: resnet50;
            vgg16 for ssd, mobilenet_v3_large for ssdlite.
        weights: None: random; "imagenet": the library's of the backbone; "coco": those of torchvision's detector with
            this backbone, the last layers new where the number of classes differs; or a file (.safetensors, .pth,
            `package:name/file`) of the whole detector (its keys begin with `backbone.`) or of the backbone.
        sha256: expected digest of that file.
        stages: of the backbone that make levels: 1 to 4, of stride 4, 8, 16, 32 (the last layer of each). Default: all
            for two stages, [2, 3, 4] for RetinaNet and FCOS, [3, 4] for SSD.
        extra_levels: coarser levels above: one for the RPN alone, two for RetinaNet and FCOS; SSD always has four.
        width: channels of the FPN.
        norm: of the backbone: "batch", "frozen" (its statistics and affine parameters are constants), "group".
            Default as torchvision's: "frozen" with weights, "batch" without; SSD "batch".
        trainable_layers: how many of the backbone's five parts, from the last, are trained. Default as torchvision's:
            3 with weights, else all.
        min_size, max_size: the shorter side is resized to `min_size` (one of them at random, in training), the longer
            one to at most `max_size`; SSD resizes to a square of `min_size`. Default: 800 and 1333; 300, 320.
        mean, std: of the images, in 0..1. Default: those that the weights were trained with.
        anchor_sizes: in pixels, a list for each level. Default: 8 x stride (RPN), 4, 5.04 and 6.35 x stride
            (RetinaNet), stride (FCOS); not of SSD.
        anchor_ratios: height over width. Default: 0.5, 1, 2; FCOS has points.
        head_convs: RetinaNet (at most 4) and FCOS: 3 x 3 convolutions of a head, 4; two stages: of the box head, 0.
        representation_size: of the box head's hidden layers.
        proposals: kept by the RPN for an image in training and half of it in evaluation.
        rois_per_image: sampled for the box head in training.
        score_threshold: of detections. Default as torchvision's: 0.05; FCOS 0.2, SSD 0.01, SSDLite 0.001.
        detections: at most so many for an image. Default as torchvision's: 100, RetinaNet and SSDLite 300, SSD 200.
    """

    model: str | None = None
    architecture: Architecture | None = None
    backbone: str | None = None
    weights: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    stages: list[Annotated[int, Field(ge=1, le=4)]] | None = Field(None, min_length=1)
    extra_levels: bool = True
    width: int = Field(256, ge=8)
    norm: Literal["batch", "frozen", "group"] | None = None
    trainable_layers: int | None = Field(None, ge=0, le=5)
    min_size: Annotated[int, Field(ge=32)] | list[Annotated[int, Field(ge=32)]] | None = None
    max_size: int | None = Field(None, ge=32)
    mean: list[float] | None = Field(None, min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=3, max_length=3)
    anchor_sizes: list[list[Annotated[float, Field(gt=0)]]] | None = None
    anchor_ratios: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=1)
    head_convs: int | None = Field(None, ge=0)
    representation_size: int = Field(1024, ge=8)
    proposals: int = Field(2000, ge=2)
    rois_per_image: int = Field(512, ge=2)
    score_threshold: float | None = Field(None, ge=0, lt=1)
    detections: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> DetectorConfig:
        given = own_settings(self, DetectorConfig)
        if (self.model is None) == (self.architecture is None):
            raise ValueError("expected either `architecture` (to build one) or `model` (a folder or a hub name)")
        if self.model is not None and (wrong := [k for k in given if k not in ("model", "min_size", "max_size")]):
            raise ValueError(f"`model` has its own settings; leave out {', '.join(wrong)}")
        if self.weights == "coco" and (wrong := [k for k in SHAPE if k in given]):
            raise ValueError(f"`weights: coco` go with torchvision's own shapes; leave out {', '.join(wrong)}")
        self._check_shapes()
        return self

    def _check_shapes(self) -> None:
        if self.stages is not None and self.stages != sorted(set(self.stages)):
            raise ValueError(f"`stages` are in rising order, each once, got {self.stages}")
        if self.architecture in SSD and (self.anchor_sizes or self.anchor_ratios or self.head_convs is not None):
            raise ValueError(f"{self.architecture} has its own anchors and heads; leave out anchors and `head_convs`")
        if self.architecture in SSD and isinstance(self.min_size, list):
            raise ValueError(f"{self.architecture} has one size of images, got {self.min_size}")
        if self.architecture == "fcos" and self.anchor_ratios is not None:
            raise ValueError("fcos has points; leave out `anchor_ratios`")
        if self.architecture == "retinanet" and (self.head_convs or 0) > 4:
            raise ValueError(f"RetinaNet's heads have at most 4 convolutions, got head_convs {self.head_convs}")

    @property
    def two_stage(self) -> bool:
        """Whether there are proposals and RoI heads."""
        return self.architecture in TWO_STAGE

    @property
    def detector(self) -> DetectorConfig:
        """Only what is said of the detector itself, without what a recipe says of a teacher beside it."""
        return own_part(self, DetectorConfig)

    @property
    def body(self) -> str:
        """The backbone, by name."""
        return self.backbone or BACKBONES.get(self.architecture or "", "resnet50")

    @classmethod
    def of(cls, given: DetectorConfig | Mapping[str, Any]) -> DetectorConfig:
        """A config from plain data.

        Raises:
            RecipeError: an unknown key, a wrong type, or settings that do not go together.
        """
        return model_of(cls, given, "detector")
