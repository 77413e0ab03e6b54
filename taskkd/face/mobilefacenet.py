"""MobileFaceNet (Chen et al. 2018) under the names of insightface and of the literature.

Two networks go by this name: insightface's `mbf` is twice as wide, 2.06 million parameters, where the paper, TFace and
AdaDistill have 1.20 million. Figures of the one say nothing of the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from taskkd.errors import RecipeError
from taskkd.face.iresnet import side, start_like_he

__all__ = ["LAYERS", "WIDTHS", "Layout", "MobileFaceNet"]

Layout = Literal["insightface", "gdc"]
#: blocks of each stage
LAYERS = (1, 4, 6, 2)
#: channels of the first stage, by layout
WIDTHS = {"insightface": 128, "gdc": 64}
GDC = ("conv1", "conv2_dw", "conv_23", "conv_3", "conv_34", "conv_4", "conv_45", "conv_5", "conv_6_sep", "output_layer")


def _named(layout: str, names: Sequence[str], modules: Sequence[nn.Module]) -> OrderedDict[str, nn.Module]:
    """Modules by name, or, in insightface's layout, numbered under `layers`."""
    if layout == "gdc":
        return OrderedDict(zip(names, modules, strict=True))
    return OrderedDict(layers=nn.Sequential(*modules))


def _conv(
    layout: str, inside: int, out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, linear: bool = False
) -> nn.Sequential:
    """Convolution and normalisation, and a PReLU unless it is linear; one that takes the whole map is not padded."""
    padding = 0 if linear else kernel // 2
    modules: list[nn.Module] = [nn.Conv2d(inside, out, kernel, stride, padding, groups=groups, bias=False)]
    modules += [nn.BatchNorm2d(out)] + ([] if linear else [nn.PReLU(out)])
    return nn.Sequential(_named(layout, ("conv", "bn", "prelu")[: len(modules)], modules))


class Bottleneck(nn.Sequential):
    """Inverted bottleneck: widened, convolved channel by channel, projected; the input is added where sizes allow."""

    def __init__(self, layout: str, inside: int, out: int, wide: int, stride: int) -> None:
        steps = [
            _conv(layout, inside, wide),
            _conv(layout, wide, wide, 3, stride, groups=wide),
            _conv(layout, wide, out, linear=True),
        ]
        super().__init__(_named(layout, ("conv", "conv_dw", "project"), steps))
        self.adds = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for step in self:
            out = step(out)
        return out + x if self.adds else out


def _stage(layout: str, channels: int, count: int, wide: int) -> nn.Sequential:
    blocks = nn.Sequential(*(Bottleneck(layout, channels, channels, wide, 1) for _ in range(count)))
    return nn.Sequential(OrderedDict({"model" if layout == "gdc" else "layers": blocks}))


class MobileFaceNet(nn.Sequential):
    """MobileFaceNet: (N, 3, size, size), normalised -> (N, embedding_size).

    The last map becomes a vector by a convolution of its own size in each channel ("GDC"), then a linear layer without
    bias and a batch normalisation.

    Args:
        layout: "insightface": the names of arcface_torch; "gdc": those of TFace and AdaDistill (`conv1.conv`,
            `output_layer.linear`), where the last normalisation has no parameters.
        layers: blocks of each stage. insightface's `mbf_large` has (2, 8, 12, 4), and a width of 256.
        width: channels of the first stage. insightface's `mbf` has 128 (its "scale" 2) and widens to 128, 256 and 512
            whatever the width; the paper, and its scale 1, 64. Below 64, for toys, all is narrower by the same factor.
        embedding_size: of the embedding.
        size: side of the images; the last convolution fits no other.

    Raises:
        RecipeError: `width` is above 64 and no multiple of it, or "gdc" is to have several blocks in its first stage.
    """

    def __init__(
        self,
        layout: Layout = "insightface",
        *,
        layers: Sequence[int] = LAYERS,
        width: int = 128,
        embedding_size: int = 512,
        size: int = 112,
    ) -> None:
        base = min(width, 64)
        if width % base:
            raise RecipeError(f"mobilefacenet: expected a `width` up to 64 or a multiple of 64, got {width}.")
        if layout == "gdc" and layers[0] != 1:
            raise RecipeError(f"mobilefacenet: the layout 'gdc' has 1 block in its first stage, got {layers[0]}.")
        first = (
            _conv(layout, width, width, 3, groups=base)
            if layers[0] == 1
            else _stage(layout, width, layers[0], 2 * base)
        )
        body: list[nn.Module] = [
            _conv(layout, 3, width, 3, 2),
            first,
            Bottleneck(layout, width, width, 2 * base, 2),
            _stage(layout, width, layers[1], 2 * base),
            Bottleneck(layout, width, 2 * width, 4 * base, 2),
            _stage(layout, 2 * width, layers[2], 4 * base),
            Bottleneck(layout, 2 * width, 2 * width, 8 * base, 2),
            _stage(layout, 2 * width, layers[3], 4 * base),
        ]
        last = 8 * base
        pooled: list[nn.Module] = [
            _conv(layout, last, last, side(size, 4), groups=last, linear=True),
            nn.Flatten(),
            nn.Linear(last, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, affine=layout != "gdc"),
        ]
        head = nn.Sequential(_named(layout, ("conv_6_dw", "conv_6_flatten", "linear", "bn"), pooled))
        tail: list[nn.Module] = [_conv(layout, 2 * width, last), head]
        if layout == "gdc":
            super().__init__(OrderedDict(zip(GDC, [*body, *tail], strict=True)))
            self.stages: tuple[str, ...] = ("conv2_dw", "conv_3", "conv_4", "conv_5")
        else:
            super().__init__(OrderedDict(layers=nn.Sequential(*body), conv_sep=tail[0], features=tail[1]))
            self.stages = ("layers.1", "layers.3", "layers.5", "layers.7")
        start_like_he(self)
