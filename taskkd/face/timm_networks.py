"""Networks of timm as backbones of face embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.backbones import downloaded, quiet, timm_normal, timm_options, timm_with
from taskkd.errors import RecipeError

__all__ = ["TimmFace", "timm_face"]


class TimmFace(nn.Module):
    """A network of timm without its classifier, and a head that gives embeddings: (N, 3, H, W) -> (N, D).

    The head is normalisation, dropout, a linear layer and normalisation with a weight that stays 1, as insightface's
    but on pooled features.

    Args:
        net: timm's network with `num_classes=0`.
        features: size of what it gives.
        embedding_size: of the embeddings.
        dropout: in the head.
        stages: names of modules in it that end a stage with a map (N, C, h, w).
    """

    def __init__(
        self, net: nn.Module, features: int, embedding_size: int, *, dropout: float = 0.0, stages: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.net = net
        self.bn = nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)
        self.stages = tuple(f"net.{name}" for name in stages)

    def forward(self, x: Tensor) -> Tensor:
        embeddings: Tensor = self.features(self.fc(self.dropout(self.bn(self.net(x)))))
        return embeddings


def timm_face(
    name: str,
    embedding_size: int,
    state: Mapping[str, Tensor] | str | None,
    source: str,
    *,
    size: int = 112,
    dropout: float = 0.0,
    native_stem: bool = False,
) -> tuple[TimmFace, list[float], list[float]]:
    """A backbone of timm for crops of `size`, and mean and standard deviation of the images of its weights.

    Networks of timm end at a stride of 32, for images of 224; faces have 112. Of a network that takes images of any
    size the first convolution's stride is halved (2 to 1, 4 to 2; its weights stay), so that the last map has 7 x 7
    cells, as of a photograph; it stays where the stem has several branches (FastViT). A network that is made for one
    size (vision transformers) keeps its stem, is made for `size`, and its positions are resized by timm.

    Args:
        name: without "timm:".
        embedding_size: of the embeddings.
        state: weights of the backbone by timm's names, "imagenet", or None.
        source: of the weights, for errors.
        size: side of the images.
        dropout: in the head.
        native_stem: keep the first convolution's stride.

    Raises:
        RecipeError: timm is not installed, has no such network, the weights are of another, or it does not run on
            images of this size.
        DataError: the weights cannot be downloaded.
    """
    timm = timm_with(name)
    options: dict[str, Any] = timm_options(name, state, source) | {"num_classes": 0}
    fixed = bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))
    if fixed:
        options["img_size"] = size
    try:
        with quiet("timm"):
            net = downloaded(lambda: timm.create_model(name, **options), f"ImageNet weights of timm:{name}")
        halved = not fixed and not native_stem and _halve_stem(net, size)
        features, stages = halved or _dry_run(net, size)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"timm:{name} does not run on images of {size} x {size}: {first}") from None
    mean, std = timm_normal(net, state, source)
    return TimmFace(net, features, embedding_size, dropout=dropout, stages=stages), mean, std


def _halve_stem(net: nn.Module, size: int) -> tuple[int, tuple[str, ...]] | None:
    """Halve the first convolution's stride and run the network; None: it stays as it was, since it cannot be."""
    stem = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    if stem is None or stem.stride not in ((2, 2), (4, 4)):
        return None
    native, half = stem.stride, int(stem.stride[0]) // 2
    stem.stride = (half, half)
    try:
        return _dry_run(net, size)
    except RuntimeError:  # a stem of several branches, whose maps would differ
        stem.stride = native
        return None


def _dry_run(net: Any, size: int) -> tuple[int, tuple[str, ...]]:
    """Size of the features, and the modules of timm's `feature_info` that give maps below the images' size."""
    listed = [dict(info) for info in getattr(net, "feature_info", None) or []]
    modules = dict(net.named_modules())
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str, _module: nn.Module, _args: Any, value: Any) -> None:
        shapes[name] = tuple(value.shape) if isinstance(value, Tensor) else ()

    names = [str(info.get("module", "")) for info in listed]
    handles = [modules[n].register_forward_hook(partial(see, n)) for n in names if n in modules]
    training = net.training
    like = next(net.parameters())
    try:
        with torch.no_grad():
            found = net.eval()(torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device))
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    if found.dim() != 2:
        raise ValueError(f"its features are {tuple(found.shape)}, expected one vector for each image")
    maps = [
        name
        for name, info in zip(names, listed, strict=True)
        if len(shapes.get(name, ())) == 4 and shapes[name][1] == info.get("num_chs") and shapes[name][2] < size
    ]
    return int(found.shape[1]), tuple(dict.fromkeys(maps))
