"""Face models by name: built from plain data, saved as a folder that says what it is, and loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from taskkd.backbones import read_weights
from taskkd.descriptions import WEIGHTS, load_weights
from taskkd.errors import DataError, RecipeError
from taskkd.face import iresnet, mobilefacenet
from taskkd.face.checkpoints import Checkpoint, read_centres, read_checkpoint
from taskkd.face.config import TIMM, FaceConfig
from taskkd.face.description import FACE, Description
from taskkd.face.model import FaceModel
from taskkd.face.timm_networks import timm_face

__all__ = [
    "FaceConfig",
    "build",
    "check_student",
    "describe",
    "existing",
    "load",
    "load_checkpoint",
    "save",
    "wrap",
]

EMBEDDING = 512
SIZE = 112


def build(config: FaceConfig | Mapping[str, Any], *, seed: int = 0) -> FaceModel:
    """A face model, in training mode.

    Args:
        config: see `FaceConfig`.
        seed: of what starts at random; the global random state is left as it was.

    Raises:
        RecipeError: unknown names, settings that do not go together, or weights of another architecture.
        DataError: a file is missing, changed or unreadable, or weights cannot be downloaded.
        CheckpointError: the tensors of a file are of no network that is known here, or do not fit the one they are of.
    """
    config = FaceConfig.of(config)
    if config.model is not None:
        return existing(config)
    found: Checkpoint | None = None
    pretrained: Mapping[str, Tensor] | str | None = config.weights
    if config.weights not in (None, "imagenet"):
        if config.family == "timm":
            pretrained = read_weights(config.weights, config.sha256)
        else:
            found = read_checkpoint(config.weights, config.sha256)
            config = found.complete(config)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        backbone, normal = _backbone(config, pretrained)
        model = FaceModel(
            backbone,
            size=config.size or SIZE,
            channels=config.channels or "rgb",
            mean=config.mean or normal[0],
            std=config.std or normal[1],
            **_sizes(config),
        )
    model.built = config
    if found is not None:
        found.load_into(backbone)
        model.centres = found.centres if config.projector is None else None
    if config.centres is not None:
        model.centres = read_centres(config.centres, model.embedding_size)
    return model


def _sizes(config: FaceConfig) -> dict[str, Any]:
    """The projector of a config, and the size of its embeddings."""
    width = config.embedding_size or EMBEDDING
    if config.projector is None:
        return {"embedding_size": width}
    return {"projector": nn.Linear(width, config.projector), "embedding_size": config.projector}


def _backbone(
    config: FaceConfig, pretrained: Mapping[str, Tensor] | str | None
) -> tuple[nn.Module, tuple[list[float], list[float]]]:
    """The backbone of a config, and mean and standard deviation of the images that are shown to it."""
    name, size, width = config.architecture or "", config.size or SIZE, config.embedding_size or EMBEDDING
    half = ([0.5] * 3, [0.5] * 3)
    if config.family == "timm":
        net, mean, std = timm_face(
            name.removeprefix(TIMM),
            width,
            pretrained,
            config.weights or "",
            size=size,
            dropout=config.dropout,
            native_stem=config.native_stem,
        )
        return net, (mean, std)
    if config.family == "mobilefacenet":
        layout: mobilefacenet.Layout = "gdc" if config.layout == "gdc" else "insightface"
        layers, channels = config.layers or mobilefacenet.LAYERS, config.width or mobilefacenet.WIDTHS[layout]
        return mobilefacenet.MobileFaceNet(layout, layers=layers, width=channels, embedding_size=width, size=size), half
    kind = iresnet.IR if config.layout == "ir" else iresnet.IResNet
    layers = config.layers or iresnet.LAYERS[name]
    return kind(layers, width=config.width or 64, embedding_size=width, size=size, dropout=config.dropout), half


def load_checkpoint(path: str | Path, architecture: str = "auto") -> FaceModel:
    """A face model of somebody else's file, in evaluation mode.

    The same as `build({"weights": path, "architecture": architecture}).eval()`.

    Args:
        path: of a file, see `taskkd.face.checkpoints`; or a folder with `model.safetensors`, of the hub or our own.
        architecture: "auto": by the tensors; or one of `FaceConfig`, checked against them.

    Raises:
        RecipeError: it is another architecture.
        DataError: the file is missing or unreadable.
        CheckpointError: its tensors are of no network that is known here, or do not fit the one they are of.
    """
    if architecture == "auto" and (Path(path) / FACE).is_file():
        return load(path)
    named = {} if architecture == "auto" else {"architecture": architecture}
    return build({"weights": str(path), **named}).eval()


def existing(config: FaceConfig) -> FaceModel:
    """The model in the folder that `config.model` names, in training mode.

    Raises:
        RecipeError: as `load`.
        DataError: as `load`.
        CheckpointError: as `load`.
    """
    folder = Path(config.model or "")
    if not folder.is_dir():
        raise DataError(f"face model {config.model!r}: no such folder.")
    if not (folder / FACE).is_file():
        inside = next((p for p in ("student", "model") if (folder / p / FACE).is_file()), None)
        hint = f"; did you mean {folder / inside}?" if inside else "; a file of weights is given as `weights`."
        raise DataError(f"{folder} holds no face model: expected {FACE} in it{hint}")
    return load(folder).train()


def wrap(model: nn.Module, **options: Any) -> FaceModel:
    """Any backbone as a `FaceModel`; one is returned as it is.

    Args:
        model: a face model, or a network (N, 3, size, size) -> (N, D).
        **options: of `FaceModel`.

    Raises:
        RecipeError: options of a face model, which has its own.
    """
    if not isinstance(model, FaceModel):
        return FaceModel(model, **options)
    if options:
        raise RecipeError(f"the face model has its own settings; leave out {', '.join(sorted(options))}.")
    return model


def check_student(model: nn.Module) -> None:
    """Refuse a student that would not learn.

    Raises:
        RecipeError: it has no parameter with a gradient.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError("the student has no parameter that is trained: all have `requires_grad=False`.")


# ---- saving


def describe(model: nn.Module) -> Description:
    """What is to be saved beside a face model's weights.

    Raises:
        RecipeError: it is no face model.
    """
    if not isinstance(model, FaceModel):
        raise RecipeError(f"a {type(model).__name__} is no face model: wrap it, `FaceModel(backbone)`.")
    return model.description


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a face model's own folder: `face.json`, `model.safetensors`, and `centres.safetensors` where it has any.

    Only its own weights are in it: no teacher, no margin head, no adapters.

    Raises:
        RecipeError: see `describe`.
    """
    describe(model).save_pretrained(folder)
    save_model(model, str(Path(folder) / WEIGHTS))


def load(folder: str | Path) -> FaceModel:
    """A face model from its folder, in evaluation mode, the same to the bit as the one that was saved.

    Raises:
        DataError: the folder is no face model's, or was saved from a network that was not built here.
        CheckpointError: the weights are missing, unreadable, or of another network.
    """
    described = Description.read(folder)
    config = described.config
    if config is None:
        raise DataError(
            f"{folder} holds the weights of a {described.kind} that was not built by taskkd.face.build: make the "
            f"network as you did, wrap it in a FaceModel, and load {WEIGHTS} with safetensors.torch.load_model."
        )
    with torch.random.fork_rng([]):
        model = FaceModel(_backbone(config, None)[0], **described.preprocessing, **_sizes(config))
    model.built, model.centres = config, described.centres
    load_weights(model, folder)
    return model.eval()
