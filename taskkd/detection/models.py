"""Detectors by name: built from plain data, saved as a folder that says what it is, and loaded from it.

Class 0 is the background; the label of the class `names[i]` is `i + 1`. Every model is of torchvision's own
class with its own keys, or `TransformersDetector`, and takes `model(images, targets)`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn

from taskkd.backbones import check_fit, downloaded, read_weights
from taskkd.descriptions import WEIGHTS, load_weights
from taskkd.detection.architectures import assemble, builder_of
from taskkd.detection.config import Architecture, DetectorConfig
from taskkd.detection.description import DETECTOR, Description
from taskkd.errors import DataError, RecipeError, nearest

__all__ = ["Description", "build", "class_count", "class_names", "describe", "existing", "load", "save"]

# The last layers, whose size depends on the number of classes.
CLASSIFIERS = (
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.",
    "head.classification_head.cls_logits.",
    "head.classification_head.module_list.",
)


def build(config: DetectorConfig | Mapping[str, Any], classes: int | Sequence[str], *, seed: int = 0) -> nn.Module:
    """A detector, in training mode.

    Args:
        config: see `DetectorConfig`.
        classes: names of the classes without the background, in the order of their labels 1, 2, ...; or how many.
        seed: of what starts at random; the global random state is left as it was.

    Raises:
        RecipeError: unknown names, settings that do not go together, weights of another architecture, or a saved
            detector of other classes.
        DataError: a file is missing, changed or unreadable, or weights cannot be downloaded.
    """
    config = DetectorConfig.of(config)
    names = tuple(map(str, range(1, classes + 1))) if isinstance(classes, int) else tuple(classes)
    if not names:
        raise RecipeError("a detector needs at least one class beside the background.")
    if config.model is not None:
        return _existing(config, classes, seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model, config = assemble(config, len(names), _weights(config), load=_load_whole)
    return _described(model, config, names)


def _described(model: nn.Module, config: DetectorConfig, names: tuple[str, ...]) -> nn.Module:
    # A plain attribute: it follows copies and pickles, and is in no state_dict.
    model.description = Description(config, names, _kind(model))  # type: ignore[assignment]
    return model


def _kind(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _weights(config: DetectorConfig) -> Mapping[str, Tensor] | str | None:
    """The tensors that `weights` names; "imagenet" is left to the backbone's library."""
    if config.weights == "coco":
        builder = builder_of(config)
        return dict(downloaded(builder.coco, f"COCO weights of {config.architecture} on {config.body}"))
    if config.weights in (None, "imagenet"):
        return config.weights
    return read_weights(config.weights, config.sha256)


def _load_whole(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a detector's weights; the last layers stay as they are where the number of classes is another.

    Raises:
        RecipeError: they are of another detector.
    """
    own = model.state_dict()
    check_fit(own, state, source, free=CLASSIFIERS)
    if extra := [k for k in state if k not in own and not k.endswith("num_batches_tracked")]:
        raise RecipeError(f"weights {source!r} have {extra[0]!r}, which this {type(model).__name__} has not.")
    model.load_state_dict({k: v for k, v in state.items() if k in own and v.shape == own[k].shape}, strict=False)


def existing(config: DetectorConfig) -> nn.Module:
    """The trained detector that `config` names, with the classes that it has: `model`, or torchvision's of COCO.

    Raises:
        RecipeError: as `build`.
        DataError: as `build`.
    """
    if config.model is None:
        return build(config, builder_of(config).classes())
    return _existing(config, None, 0)


def _existing(config: DetectorConfig, classes: int | Sequence[str] | None, seed: int) -> nn.Module:
    """A folder of ours, or a detector of `transformers`, for these classes; None: for its own."""
    source = config.model or ""
    if not (Path(source) / DETECTOR).is_file():
        return _of_transformers(config, classes, seed)
    if config.min_size is not None or config.max_size is not None:
        raise RecipeError(f"the detector {source!r} has its own size of images; leave out `min_size` and `max_size`.")
    model = load(source).train()
    found = class_names(model)
    if classes is not None and classes != (len(found) if isinstance(classes, int) else found):
        raise _other_classes(source, found, classes)
    return model


def _of_transformers(config: DetectorConfig, classes: int | Sequence[str] | None, seed: int) -> nn.Module:
    """A detector of `transformers`; what its file has not is initialised from `seed`."""
    from taskkd.detection.transformers_models import TransformersDetector

    several = isinstance(config.min_size, list)
    size: Any = {"scales": config.min_size} if several else {"size": config.min_size}
    _check_source(config.model or "")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            made: Any = TransformersDetector
            model: nn.Module = made.from_pretrained(config.model, classes=classes, longest=config.max_size, **size)
        except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
            first = str(error).strip().splitlines()[0]
            hint = nearest((config.model or "").partition("/")[0], get_args(Architecture))
            raise DataError(f"detector {config.model!r} cannot be loaded{hint}: {first}") from None
    if classes is not None and not isinstance(classes, int):
        _check_order(str(config.model), classes)
    return model.train()


def _check_source(source: str) -> None:
    """Refuse what is neither a folder of transformers nor a name on the hub.

    Raises:
        DataError: it is not.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = next((p for p in ("student", "model") if (folder / p / DETECTOR).is_file()), None)
        hint = f"; did you mean {folder / inside}?" if inside else "."
        raise DataError(f"{source} holds no detector: expected {DETECTOR} in it, or config.json of transformers{hint}")
    if not folder.exists() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise DataError(f"detector {source!r}: no such folder.")


def _check_order(source: str, classes: Sequence[str]) -> None:
    """Refuse a detector of `transformers` for the same classes in another order: its answers would be of others.

    Raises:
        RecipeError: the order is another.
    """
    from transformers import AutoConfig

    labels = AutoConfig.from_pretrained(source).id2label or {}
    found = [str(labels[i]) for i in sorted(labels)]
    if found != list(classes) and sorted(found) == sorted(classes):
        raise _other_classes(source, found, classes)


def _other_classes(source: str, found: Sequence[str], classes: int | Sequence[str]) -> RecipeError:
    given = str(classes) if isinstance(classes, int) else f"{len(classes)} ({', '.join(classes[:8])})"
    same = not isinstance(classes, int) and sorted(found) == sorted(classes)
    hint = "; a teacher of other classes takes a `label_map`"
    if same:
        hint = "; name them in the detector's order as `data: {classes: [...]}`"
    return RecipeError(
        f"the detector {source!r} is for {len(found)} classes ({', '.join(found[:8])}), the data has {given}: expected "
        f"the same, in the same order{hint}."
    )


# ---- saving


def describe(model: nn.Module, names: Sequence[str] | None = None) -> Description:
    """What is to be saved beside a detector's weights.

    Args:
        model: one that `build` or `load` gave, or any.
        names: of its classes; default: as it was built.

    Raises:
        RecipeError: it was not built here, and no names are given.
    """
    known = getattr(model, "description", None)
    if isinstance(known, Description):
        return known if names is None else Description(known.config, tuple(names), known.kind)
    if names is None:
        raise RecipeError(f"this {type(model).__name__} was not built by taskkd.detection: name its classes.")
    return Description(None, tuple(names), _kind(model))


def class_names(model: nn.Module) -> list[str]:
    """The names of a detector's classes, without the background; none are known of a module that was not built here,
    or of one of transformers that nobody gave names."""
    known = getattr(model, "description", None)
    if isinstance(known, Description):
        return list(known.names)
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}  # of transformers
    names = [str(labels[i]) for i in sorted(labels)]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def class_count(model: Any) -> int | None:
    """How many classes a detector tells apart, without the background; None: unknown."""
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
    from torchvision.models.detection.ssd import SSD

    if isinstance(model, FasterRCNN):
        scores = getattr(model.roi_heads.box_predictor, "cls_score", None)
        return None if scores is None else int(scores.out_features) - 1
    if isinstance(model, FCOS | RetinaNet):
        return int(model.head.classification_head.num_classes) - 1
    if isinstance(model, SSD):
        return int(model.head.classification_head.num_columns) - 1
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    return None if labels is None else int(labels)


def save(model: nn.Module, folder: str | Path, names: Sequence[str] | None = None) -> None:
    """Write a detector's own folder: `detector.json` and `model.safetensors`, or what its `save_pretrained` writes.

    Only its own weights are in it: no teacher, no adapters.

    Raises:
        RecipeError: see `describe`.
    """
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    describe(model, names).save_pretrained(folder)
    save_model(model, str(Path(folder) / WEIGHTS))


def load(folder: str | Path) -> nn.Module:
    """A detector from its folder, in evaluation mode, the same to the bit as the one that was saved.

    Raises:
        DataError: the folder is no detector's, or was saved from a model that was not built here.
        CheckpointError: the weights are missing, unreadable, or of another detector.
    """
    if not (Path(folder) / DETECTOR).is_file() and (Path(folder) / "config.json").is_file():
        return _of_transformers(DetectorConfig(model=str(folder)), None, 0).eval()
    described = Description.read(folder)
    if described.config is None:
        raise DataError(
            f"{folder} holds the weights of a {described.kind} that was not built by taskkd.detection.build: make the "
            f"model as you did, and load {WEIGHTS} with safetensors.torch.load_model."
        )
    with torch.random.fork_rng([]):
        model, config = assemble(described.config, len(described.names), None, load=_load_whole)
    load_weights(model, folder)
    return _described(model, config, described.names).eval()
