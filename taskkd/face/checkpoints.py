"""Weights of face backbones as their authors save them: tensors alone, and what network they are of.

Nothing of a file is executed. The network is found by the names and shapes of the tensors:

- insightface, arcface_torch (`model.pt`, `backbone.pth`, `checkpoint_gpu_N.pt`): IResNet and MobileFaceNet;
- TFace, CVLface (`model.pt`; the hub's `model.safetensors`, "model.net."), AdaFace (Lightning's `.ckpt`, "model."):
  IR-18 to IR-101, the layout "ir";
- AdaDistill, TFace: MobileFaceNet, the layout "gdc"; AdaDistill's iresnets are insightface's.

Names and shapes are those of the authors' code; the files, which are for non-commercial use, were not at hand where
this was written.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskkd.backbones import read_saved
from taskkd.errors import CheckpointError, DataError, RecipeError
from taskkd.face import iresnet, mobilefacenet
from taskkd.face.config import FaceConfig
from taskkd.packages import PACKAGE

__all__ = ["Checkpoint", "read_centres", "read_checkpoint"]

#: a tensor that only one kind of network has -> its family and layout
MARKS = {
    "layer1.0.bn1.weight": ("iresnet", "insightface"),
    "body.0.res_layer.0.weight": ("iresnet", "ir"),
    "conv_sep.layers.0.weight": ("mobilefacenet", "insightface"),
    "conv_6_sep.conv.weight": ("mobilefacenet", "gdc"),
}
#: where training scripts put the backbone's tensors and those of the classifier
NESTS = ("state_dict_backbone", "state_dict", "model_state_dict", "model", "net", "backbone")
HEADS = ("state_dict_softmax_fc",)
#: names of a classifier's weights, (identities, D), or (D, identities) where it is a "kernel"
CENTRES = ("kernel", "head.weight", "softmax_fc.weight", "partial_fc.weight", "classifier.weight")
#: modules whose objects lie in training checkpoints beside the tensors; they are read as empty shells
HARMLESS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "argparse.", "omegaconf.", "easydict.", "pathlib.")


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Args:
        source: the file.
        state: the backbone's tensors, by the names of its layout.
        config: the network that they are of: architecture, layout, layers, width, embedding_size, size.
        channels: "bgr" where the file tells that it is AdaFace's own; else None, which says nothing.
        centres: (identities, D), the weights of the classifier beside the backbone, if there is one.
    """

    source: str
    state: dict[str, Tensor]
    config: FaceConfig
    channels: Literal["bgr"] | None = None
    centres: Tensor | None = field(default=None, repr=False)

    def complete(self, asked: FaceConfig) -> FaceConfig:
        """What was asked for, with what the tensors say where nothing was asked.

        Raises:
            RecipeError: another network was asked for.
        """
        own = self.config
        is_of = f"weights {self.source!r} are of {_in_words(own)}"
        other = asked.architecture is not None and asked.family != own.family
        if other or layers_of(asked) not in ((), layers_of(own)):
            raise RecipeError(f"{is_of}, not of {_in_words(asked)}.")
        found = {key: getattr(own, key) for key in ("layout", "width", "embedding_size", "size", "layers")}
        for key, value in found.items():
            given = getattr(asked, key)
            if key != "layers" and given not in (None, value):
                raise RecipeError(f"{is_of}: its `{key}` is {value}, got {given}.")
        found["architecture"] = asked.architecture or own.architecture
        found["channels"] = asked.channels or self.channels
        named = {k: getattr(asked, k) for k in asked.model_fields_set & set(FaceConfig.model_fields)}
        return FaceConfig.of(named | {k: v for k, v in found.items() if v is not None and named.get(k) is None})

    def load_into(self, backbone: nn.Module) -> None:
        """Load the tensors into a network of `config`.

        Raises:
            CheckpointError: one is missing, unexpected, or of another shape; every one is named, up to some.
        """
        own = backbone.state_dict()
        state = {k: v for k, v in self.state.items() if k in own}
        missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
        unexpected = [k for k in self.state if k not in own]
        shapes = [
            f"{k} ({_shape(v)} there, {_shape(own[k])} here)" for k, v in state.items() if v.shape != own[k].shape
        ]
        lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        wrong = " ".join(f"{what.capitalize()}: {_listed(keys)}." for what, keys in lists.items() if keys)
        if wrong:
            raise CheckpointError(
                f"weights {self.source!r} look like {_in_words(self.config)}, but do not fit it. {wrong}"
            )
        backbone.load_state_dict(state, strict=False)


def layers_of(config: FaceConfig) -> tuple[int, ...]:
    """Blocks of each stage."""
    default = (
        mobilefacenet.LAYERS if config.family == "mobilefacenet" else iresnet.LAYERS.get(config.architecture or "")
    )
    return tuple(config.layers or default or ())


def _in_words(config: FaceConfig) -> str:
    layout = f" in the layout {config.layout!r}" if config.layout is not None else ""
    said = {"width": config.width, "embedding_size": config.embedding_size, "size": config.size}
    parts = [f"layers {list(config.layers)}"] if config.layers is not None else []
    parts += [f"{key} {value}" for key, value in said.items() if value is not None]
    details = f" ({', '.join(parts)})" if parts else ""
    return f"{config.architecture or 'a network'}{layout}{details}"


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "a number"


def _listed(keys: Sequence[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


# ---- reading


def read_checkpoint(source: str | Path, sha256: str | None = None) -> Checkpoint:
    """Weights of a backbone, and what network they are of.

    Args:
        source: a file (.safetensors, or what torch saved), `package:name/file`, or a folder with `model.safetensors`.
        sha256: expected digest of the file.

    Raises:
        DataError: no such file, another digest, unreadable, or with objects in it that would have to be executed.
        CheckpointError: its tensors are of no network that is known here.
    """
    source = str(source)
    path = Path(source)
    if not source.startswith(PACKAGE) and path.is_dir():
        source = str(path / "model.safetensors")
    if source.endswith(".onnx"):
        raise DataError(f"weights {source!r}: an ONNX graph; expected the .pt or .pth file of the same network.")
    with _shells(source):
        raw = read_saved(source, sha256)
    tensors, head = _sorted_out(raw, source)
    prefix, mark = _find(tensors, source)
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    others = {k: v for k, v in tensors.items() if not k.startswith(prefix)} | head
    if not prefix:  # the classifier lies among the backbone's
        others |= {k: state.pop(k) for k in list(state) if k.split(".")[0] in ("head", "classifier", "partial_fc")}
    config = _config(state, *MARKS[mark], source)
    adaface = config.layout == "ir" and "head.kernel" in others
    centres = _centres(others, config.embedding_size or 0)
    return Checkpoint(source, state, config, "bgr" if adaface else None, centres)


@contextmanager
def _shells(source: str) -> Iterator[None]:
    """Let objects that Lightning and argparse leave in a file be read as empty shells; torch refuses all others."""
    path = Path(source)
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path) if path.is_file() else []
    except Exception:  # not torch's format; the reader says what is wrong
        wanted = []
    shells: list[Any] = [(_Shell, name) for name in wanted if name.startswith(HARMLESS)]
    with torch.serialization.safe_globals(shells):
        yield


class _Shell:
    """Stands for a class of which no object is made: an empty dict that torch fills instead."""

    def __new__(cls, *_args: Any) -> Any:
        return OrderedDict()


def _sorted_out(raw: Any, source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors by name, and those of a classifier that is saved beside them."""
    head: dict[str, Tensor] = {}
    while isinstance(raw, Mapping):
        for name in HEADS:
            head |= {f"softmax_fc.{k}": v for k, v in dict(raw.get(name) or {}).items() if isinstance(v, Tensor)}
        inner = next((raw[key] for key in NESTS if isinstance(raw.get(key), Mapping)), None)
        if inner is None:
            break
        raw = inner
    tensors = {k: v for k, v in raw.items() if isinstance(v, Tensor)} if isinstance(raw, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"weights {source!r}: expected tensors by name, got {type(raw).__name__} without any.")
    return {str(k): v for k, v in tensors.items()}, head


def _find(tensors: Mapping[str, Tensor], source: str) -> tuple[str, str]:
    """What stands before the names of the backbone, and the mark by which it is known."""
    found = {(k[: -len(mark)], mark) for k in tensors for mark in MARKS if k == mark or k.endswith(f".{mark}")}
    if len(found) == 1:
        return found.pop()
    if found:
        names = ", ".join(sorted(repr(prefix) for prefix, _ in found))
        raise CheckpointError(f"weights {source!r} hold {len(found)} backbones, under {names}: save the one alone.")
    hint = "; a vision transformer is none" if any("blocks.0." in k for k in tensors) else ""
    raise CheckpointError(
        f"weights {source!r}: the {len(tensors)} tensors ({_listed(list(tensors), 3)}) are of no backbone that is "
        "known here: expected an IResNet or MobileFaceNet under the names of insightface, TFace, AdaFace, CVLface or "
        f"AdaDistill{hint}."
    )


# ---- which network


def _config(state: Mapping[str, Tensor], family: str, layout: str, source: str) -> FaceConfig:
    """The network that has tensors of these names and shapes."""
    if any("se_block." in k for k in state) or "body.0.res_layer.7.weight" in state:
        raise CheckpointError(
            f"weights {source!r} are of an IResNet with squeeze-and-excitation or bottlenecks (IR-SE, IR-152, IR-200), "
            "which is not there: expected plain blocks."
        )
    read = {
        ("iresnet", "insightface"): _insightface,
        ("iresnet", "ir"): _ir,
        ("mobilefacenet", "insightface"): _mbf,
        ("mobilefacenet", "gdc"): _gdc,
    }[family, layout]
    try:
        layers, width, embedding, size = read(state)
        known = iresnet.LAYERS if family == "iresnet" else {"mobilefacenet": mobilefacenet.LAYERS}
        name = next((n for n, usual in known.items() if usual == layers), None)
        shapes: dict[str, Any] = {"width": width, "embedding_size": embedding, "size": size}
        if name is None:
            name, shapes["layers"] = next(iter(known)), list(layers)
        return FaceConfig.of({"architecture": name, "layout": layout, **shapes})
    except KeyError as error:
        raise CheckpointError(
            f"weights {source!r} look like {family} in the layout {layout!r}, but have no {error}."
        ) from None


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow a prefix."""
    return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})


def _insightface(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int, int, int]:
    stages = sorted({k.split(".")[0] for k in state if k.startswith("layer")})
    layers = tuple(_count(state, f"{stage}.") for stage in stages)
    width, last = state["conv1.weight"].shape[0], state["bn2.weight"].shape[0]
    embedding, flat = state["fc.weight"].shape
    return layers, width, embedding, math.isqrt(flat // last) * 2 ** len(layers)


def _ir(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int, int, int]:
    count = _count(state, "body.")
    widths = [state[f"body.{n}.res_layer.4.weight"].shape[0] for n in range(count)]
    layers = tuple(len(list(group)) for _, group in groupby(widths))
    embedding, flat = state["output_layer.3.weight"].shape
    return layers, widths[0], embedding, math.isqrt(flat // widths[-1]) * 2 ** len(layers)


def _mbf(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int, int, int]:
    stages = (1, 3, 5, 7)
    plain = "layers.1.layers.0.weight" in state
    layers = tuple(1 if plain and n == 1 else _count(state, f"layers.{n}.layers.") for n in stages)
    side = state["features.layers.0.layers.0.weight"].shape[-1]
    return layers, state["layers.0.layers.0.weight"].shape[0], state["features.layers.2.weight"].shape[0], side * 16


def _gdc(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int, int, int]:
    layers = (1, *(_count(state, f"conv_{n}.model.") for n in (3, 4, 5)))
    side = state["output_layer.conv_6_dw.conv.weight"].shape[-1]
    return layers, state["conv1.conv.weight"].shape[0], state["output_layer.linear.weight"].shape[0], side * 16


def _centres(others: Mapping[str, Tensor], size: int) -> Tensor | None:
    """The weights of a classifier, (identities, size), among the tensors that are not the backbone's."""
    for key, value in others.items():
        if value.dim() != 2 or not any(key == name or key.endswith(f".{name}") for name in CENTRES):
            continue
        centres = value.T if key.endswith("kernel") else value
        if centres.shape[1] == size:
            return centres.detach().float().contiguous()
    return None


def read_centres(sources: str | Sequence[str], size: int) -> Tensor:
    """The weights of a classifier that is saved in files of its own.

    Args:
        sources: a file, or one of each rank, in their order: insightface's Partial FC saves its shards apart.
        size: of the embeddings.

    Returns:
        (identities, size).

    Raises:
        DataError: a file is missing or unreadable.
        CheckpointError: it holds no such matrix.
    """
    found = []
    for source in [sources] if isinstance(sources, str) else sources:
        with _shells(source):
            raw = read_saved(source)
        tensors, head = _sorted_out({"weight": raw} if isinstance(raw, Tensor) else raw, source)
        bare = {f"classifier.{k}": v for k, v in tensors.items() if k.rpartition(".")[2] in ("weight", "kernel")}
        part = _centres(head | tensors | bare, size)
        if part is None:
            raise CheckpointError(
                f"classifier {source!r}: expected a `weight` (identities, {size}) or a `kernel` ({size}, identities), "
                f"got {_listed([f'{k} ({_shape(v)})' for k, v in (head or tensors).items()])}."
            )
        found.append(part)
    return torch.cat(found)
