"""What a segmenter is, in plain data: the section of a recipe, and what is saved beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from taskkd.errors import RecipeError, nearest
from taskkd.schema import Model, model_of, own_part, own_settings

__all__ = ["Architecture", "SegmenterConfig"]

TorchvisionArchitecture = Literal["deeplabv3", "fcn", "lraspp"]
SmpArchitecture = Literal[
    "unet", "unetplusplus", "manet", "linknet", "fpn", "pan", "pspnet", "deeplabv3plus", "segformer", "upernet"
]
Architecture = Literal[TorchvisionArchitecture, SmpArchitecture]  # one list, so that an error names all of them
TORCHVISION = get_args(TorchvisionArchitecture)
SMP = get_args(SmpArchitecture)
BACKBONES = {"deeplabv3": "resnet50", "fcn": "resnet50", "lraspp": "mobilenet_v3_large"}  # the others: resnet34
# What goes with a network that is there, too.
OF_ANY = ("model", "mean", "std", "divisor", "size", "logits", "feature", "stages")


class SegmenterConfig(Model):
    """A segmentation network to build (`architecture`), or one that is there (`model`).

    `deeplabv3`, `fcn` and `lraspp` are torchvision's heads, on torchvision's backbones or timm's; the others are of
    segmentation-models-pytorch (`pip install 'taskkd[smp]'`), on its encoders or timm's.

    Args:
        model: a folder that taskkd saved, or a network of `transformers` by hub name or folder; beside it only how
            images are shown to it (`mean`, `std`, `divisor`, `size`) and the taps are given.
        architecture: see above. The stride of the native logits: that of the backbone for deeplabv3 and fcn; 8 for
            lraspp and pspnet; 4 for fpn, pan, deeplabv3plus, segformer and upernet; 1 for the other four.
        backbone: torchvision's `resnet18` to `resnet152`, `mobilenet_v3_large`, `mobilenet_v3_small` or any whose
            layers follow one another, for its heads; an encoder of segmentation-models-pytorch (`resnet34`, `mit_b0`)
            for the others; or `timm:<name>` for all. Default: resnet50; mobilenet_v3_large for lraspp; resnet34 for
            those of segmentation-models-pytorch.
        weights: None: random; "imagenet": the library's of the backbone; "coco": torchvision's whole network on this
            backbone, trained on COCO with VOC's 21 labels, the last layers new where the number of classes differs; or
            a file (.safetensors, .pth, `package:name/file`) of the whole network (its keys begin with `backbone.` or
            `encoder.`) or of the backbone.
        sha256: expected digest of that file.
        output_stride: of the backbone, by dilation. torchvision's heads on a ResNet: 8, 16 or 32, default 8; on
            MobileNetV3 16 or 32, default 16; on timm's networks 8, 16 or 32 where they can, default 16; on others 32.
            deeplabv3plus: 8 or 16, default 16; pan: 16 or 32, default 16.
        depth: of segmentation-models-pytorch's encoder: how often it halves the image, 3 to 5; what it has beyond is
            left out. Default: 5. fpn has 5 and pspnet 3, or their logits were not of the image's size.
        width: channels of the head or decoder. Default as the library's: deeplabv3 256, fcn a quarter of the
            backbone's, lraspp 128, fpn 128 (a multiple of 32; its pyramid has twice as many), pspnet 512,
            deeplabv3plus, segformer and upernet 256, pan 32; unet, unetplusplus and manet 16, at the finest of their
            levels, each coarser one having twice as many; linknet has its own.
        aux: deeplabv3 and fcn: an auxiliary head, as torchvision's on a ResNet's `layer3` or MobileNetV3's first map of
            stride 8; of other backbones on the last stage but one.
        mean, std: of the images, in 0..1. Default: those that the weights were trained with, else ImageNet's.
        divisor: images are padded to multiples of it. Default: what the network needs.
        size: [height, width] that every image is resized to instead, for networks of one size.
        logits, feature, stages: taps, as in `Segmenter`. Default: found by a dry run.
    """

    model: str | None = None
    architecture: Architecture | None = None
    backbone: str | None = None
    weights: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    output_stride: Literal[8, 16, 32] | None = None
    depth: int | None = Field(None, ge=3, le=5)
    width: int | None = Field(None, ge=1)
    aux: bool = False
    mean: list[float] | None = Field(None, min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=3, max_length=3)
    divisor: int | None = Field(None, ge=1)
    size: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=2, max_length=2)
    logits: str | None = None
    feature: str | None = None
    stages: list[str] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> SegmenterConfig:
        given = own_settings(self, SegmenterConfig)
        if (self.model is None) == (self.architecture is None):
            raise ValueError("expected either `architecture` (to build one) or `model` (a folder or a hub name)")
        if self.model is not None and (wrong := [k for k in given if k not in OF_ANY]):
            raise ValueError(f"`model` has its own settings; leave out {', '.join(wrong)}")
        if self.weights == "coco" and (wrong := [k for k in ("width", "output_stride") if k in given]):
            raise ValueError(f"`weights: coco` go with torchvision's own shapes; leave out {', '.join(wrong)}")
        if self.size is not None and (self.divisor or 1) > 1:
            raise ValueError("`size` resizes every image, so that none is padded; leave out `divisor`")
        self._check_shapes()
        return self

    def _check_shapes(self) -> None:
        name = self.architecture
        if self.aux and name not in ("deeplabv3", "fcn"):
            raise ValueError(f"{name} has no auxiliary head; leave out `aux`")
        if self.depth is not None and name in TORCHVISION:
            raise ValueError(f"{name} has torchvision's backbone as a whole; leave out `depth`")
        if self.depth is not None and name in ("fpn", "pspnet"):
            raise ValueError(f"{name} has a `depth` of {5 if name == 'fpn' else 3}; leave it out")
        if self.output_stride is not None and name in SMP and name not in ("deeplabv3plus", "pan"):
            raise ValueError(f"{name} has no dilated encoder; leave out `output_stride`")
        if self.width is not None and name == "linknet":
            raise ValueError("linknet's decoder has the widths of its encoder; leave out `width`")
        if self.width is not None and name == "fpn" and self.width % 32:
            raise ValueError(
                f"fpn normalises in 32 groups: expected a `width` that is a multiple of 32, got {self.width}"
            )

    @property
    def segmenter(self) -> SegmenterConfig:
        """Only what is said of the network itself, without what a recipe says of a teacher beside it."""
        return own_part(self, SegmenterConfig)

    @property
    def body(self) -> str:
        """The backbone, by name; timm's as "timm:<name>"."""
        name = self.backbone or BACKBONES.get(self.architecture or "", "resnet34")
        return f"timm:{name[3:]}" if name.startswith("tu-") else name

    @classmethod
    def of(cls, given: SegmenterConfig | Mapping[str, Any]) -> SegmenterConfig:
        """A config from plain data.

        Raises:
            RecipeError: an unknown key, a wrong type, or settings that do not go together.
        """
        known = (*TORCHVISION, *SMP)
        name = None if isinstance(given, SegmenterConfig) else given.get("architecture")
        if name is not None and name not in known:
            raise RecipeError(
                f"segmenter: no architecture {str(name)!r}{nearest(str(name), known)}; there are {known}."
            )
        return model_of(cls, given, "segmenter")
