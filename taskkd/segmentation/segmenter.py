"""Any segmentation network behind one interface: images in 0..1 in, logits out, and its maps known by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import TaskkdError
from taskkd.segmentation.config import SegmenterConfig
from taskkd.segmentation.description import Description
from taskkd.segmentation.probe import Views, probe

__all__ = ["Segmenter", "Views", "semantic_map"]

#: runs the network on images that are normalised and padded
Call = Callable[[nn.Module, Tensor], Any]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNIVERSAL = ("eomt", "eomt_dinov3", "mask2former", "maskformer", "oneformer", "videomt")


def semantic_map(classes: Tensor, masks: Tensor) -> Tensor:
    """Logits of what networks of queries (MaskFormer, 2021; Mask2Former, 2022) say of every pixel.

    The sum over the queries of class probability times mask probability is no distribution over the classes (its sum
    is anything from 0 to the number of queries); the logarithm of its share of that sum is.

    Args:
        classes: (N, Q, K + 1) logits; the last is "no object".
        masks: (N, Q, h, w) logits.

    Returns:
        (N, K, h, w), whose exponentials sum to 1; not in half precision.
    """
    with torch.autocast(classes.device.type, enabled=False):
        classes, masks = (x if x.dtype == torch.float64 else x.float() for x in (classes, masks))
        found = torch.einsum("nqk,nqhw->nkhw", classes.softmax(-1)[..., :-1], masks.sigmoid())
        found = found.clamp_min(torch.finfo(found.dtype).tiny)
        return found.log() - found.sum(1, keepdim=True).log()


class Segmenter(nn.Module):
    """A segmentation network of torchvision, transformers or segmentation-models-pytorch, or any that gives logits.

    Images are normalised, padded (right and below, with the mean colour) to multiples of `divisor` where it is above
    1, and handed to the network; its logits are cut back. (What taps see is not: train on multiples of it.) `views`
    says where its maps are. The network's own module is `.model`; its `state_dict` is under "model.", with nothing
    beside it.

    Networks of queries (Mask2Former, MaskFormer, OneFormer, EoMT of `transformers`; `.universal`) give the logarithm of
    their normalised semantic map: good for teachers, but a student would never learn its queries by it.

    Args:
        model: the network. What it gives is a tensor (N, K, h, w), a mapping or an object with `out` or `logits` (and,
            of an auxiliary head, `aux`), a tuple whose first is one of these, or queries.
        classes: how many, or their names; channel k is of class k.
        mean, std: of the images that it was trained with, in 0..1.
        logits, feature: taps in the network ("head.conv", "head.conv:in"), where the probe does not find them.
        stages: likewise of the backbone's maps, finest first.
        divisor: what height and width are padded to multiples of.
        size: (height, width) that every image is resized to instead, for networks of one size.
        call: "auto", or `call(model, images) -> output`, where the network wants more than images (OneFormer's task).

    Raises:
        TaskkdError: no classes, or `divisor` is not positive.

    Example:
        >>> net = Segmenter(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)), ["sky", "sea"])
        >>> net(torch.zeros(1, 3, 32, 32))["logits"].shape
        torch.Size([1, 2, 16, 16])
        >>> net.views.logits, net.views.feature
        ('model.2', 'model.2:in')
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        classes: int | Sequence[str],
        *,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        logits: str | None = None,
        feature: str | None = None,
        stages: Sequence[str] | None = None,
        divisor: int = 1,
        size: Sequence[int] | None = None,
        call: Call | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        if not names:
            raise TaskkdError("a segmentation network needs at least one class.")
        if divisor < 1:
            raise TaskkdError(f"`divisor` must be positive, got {divisor}.")
        if size is not None and divisor > 1:
            raise TaskkdError("`size` resizes every image, so that none is padded; leave out `divisor`.")
        self.model, self.classes, self.divisor, self._call = model, names, int(divisor), call
        self.size = None if size is None else (int(size[0]), int(size[1]))
        #: what it was built of, where `taskkd.segmentation.models` did
        self.built: SegmenterConfig | None = None
        self._normal = (tuple(map(float, mean)), tuple(map(float, std)))
        # Not in the state: they are said by the description, and a network's own file has none.
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        for name, value in zip(("mean", "std"), self._normal, strict=True):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1).to(like), persistent=False)
        self._given = (logits, feature, None if stages is None else tuple(stages))
        self._views: Views | None = None
        self._aux: Tensor | None = None
        # `transformers` runs auxiliary heads, but returns nothing of them.
        head = getattr(model, "auxiliary_head", None)
        if isinstance(head, nn.Module):
            head.register_forward_hook(self._keep)

    @property
    def input_settings(self) -> dict[str, Any]:
        """How images are shown to the network: no weight tells it, and a cache of its outputs depends on it."""
        return {"mean": self._normal[0], "std": self._normal[1], "divisor": self.divisor, "size": self.size}

    def _keep(self, _module: nn.Module, _args: Any, value: Any) -> None:
        if self.training:
            self._aux = value

    @property
    def kind(self) -> str:
        """The name of the network's class."""
        return type(self.model).__name__

    @property
    def description(self) -> Description:
        """What is saved beside the weights."""
        kind = f"{type(self.model).__module__}.{type(self.model).__qualname__}"
        call = not (self._call == "auto" or getattr(self._call, "of_library", False))
        return Description(self.built, self.classes, kind, *self._normal, self.divisor, self.size, call)

    @property
    def universal(self) -> bool:
        """Whether the network predicts by queries, each with a class and a mask."""
        return getattr(getattr(self.model, "config", None), "model_type", None) in UNIVERSAL

    @property
    def views(self) -> Views:
        """Where the maps are, as taps on this module; found at first use by a dry run (see `probe`), then kept.

        Raises:
            TapError: it cannot be found out.
        """
        if self._views is None:
            logits, feature, stages = self._given
            self._views = probe(self, logits=logits, feature=feature, stages=stages)
        return self._views

    def forward(self, images: Tensor | Sequence[Tensor]) -> dict[str, Any]:
        """Logits of images.

        Args:
            images: (N, 3, H, W) RGB in 0..1; or a list of (3, H, W) of any sizes, which are run one by one.

        Returns:
            `logits` (N, K, h, w) at the size that the network gives them; in training also `aux` (N, K, h', w') where
            it has an auxiliary head. Of a list: lists of (K, h, w).

        Raises:
            TaskkdError: the network's output has no logits.
        """
        if not isinstance(images, Tensor):
            found = [self._run(image[None]) for image in images]
            return {key: [one[key][0] for one in found] for key in (found[0] if found else ("logits",))}
        return self._run(images)

    def _run(self, images: Tensor) -> dict[str, Tensor]:
        height, width = int(images.shape[2]), int(images.shape[3])
        shown = (images.to(self.mean.dtype) - self.mean) / self.std
        if self.size is not None and self.size != (height, width):
            shown = F.interpolate(shown, self.size, mode="bilinear", align_corners=False, antialias=True)
        right, below = (0, 0) if self.size else (-width % self.divisor, -height % self.divisor)
        if right or below:
            shown = F.pad(shown, (0, right, 0, below))
        self._aux = None
        output = self.model(shown) if self._call == "auto" else self._call(self.model, shown)
        maps = self._maps(output)
        self._aux = None
        if right or below:
            padded = (height + below, width + right)
            maps = {name: _cropped(value, (height, width), padded) for name, value in maps.items()}
        return maps

    def _maps(self, output: Any) -> dict[str, Tensor]:
        """Logits and, in training, those of the auxiliary head, of whatever the network gave."""
        if isinstance(output, tuple | list) and output:  # logits first; what follows is of other tasks
            output = output[0]
        if isinstance(output, Tensor):
            found: dict[str, Any] = {"logits": output}
        else:
            found = dict(output if isinstance(output, Mapping) else getattr(output, "__dict__", {}))
        if found.get("class_queries_logits") is not None:
            found = {"logits": semantic_map(found["class_queries_logits"], found["masks_queries_logits"])}
        logits = found.get("out", found.get("logits"))
        if not isinstance(logits, Tensor) or logits.dim() != 4:
            shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
            raise TaskkdError(
                f"the output of this {self.kind} has no logits (N, K, h, w): expected a tensor, or one named 'out' or "
                f"'logits', got {type(output).__name__}{shape}; `call=` can make them of it."
            )
        aux = found.get("aux", self._aux)
        return {"logits": logits, "aux": aux} if self.training and aux is not None else {"logits": logits}


def _cropped(value: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """A map of a padded image, without what the padding gave.

    Where the border falls between two cells, the map is first resized to the padded image, so that what is left covers
    the image exactly.
    """
    (height, width), (h, w) = padded, (int(value.shape[2]), int(value.shape[3]))
    if size[0] * h % height or size[1] * w % width:
        value, h, w = F.interpolate(value, padded, mode="bilinear", align_corners=False), height, width
    return value[:, :, : size[0] * h // height, : size[1] * w // width]
