"""Segmenters by name: built from plain data, saved as a folder that says what it is, and loaded from it.

Channel k of the logits is the class `names[k]`; 255 is no class. Every model is a `Segmenter` around a network of its
library's own class, with that network's own keys under "model.".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn

from taskkd.backbones import check_fit, downloaded, read_weights
from taskkd.descriptions import WEIGHTS, load_weights
from taskkd.errors import CheckpointError, DataError, RecipeError, TaskkdError, nearest
from taskkd.segmentation import smp_networks, torchvision_networks
from taskkd.segmentation.config import SMP, TORCHVISION, SegmenterConfig
from taskkd.segmentation.description import SEGMENTER, Description
from taskkd.segmentation.segmenter import Segmenter
from taskkd.segmentation.transformers_networks import TransformersSegmenter, is_transformers, shape_needed

__all__ = ["build", "check_student", "class_names", "describe", "existing", "load", "save", "wrap"]

# The last layers, whose size depends on the number of classes.
CLASSIFIERS = (
    "classifier.4.",
    "aux_classifier.4.",
    "classifier.low_classifier.",
    "classifier.high_classifier.",
    "segmentation_head.",
)
WHOLE = ("backbone.", "encoder.")  # keys of a whole network begin so


def build(
    config: SegmenterConfig | Mapping[str, Any], classes: int | Sequence[str], *, seed: int = 0, whole: bool = False
) -> Segmenter:
    """A segmenter, in training mode.

    Args:
        config: see `SegmenterConfig`.
        classes: names of the classes, in the order of their labels 0, 1, ...; or how many.
        seed: of what starts at random; the global random state is left as it was.
        whole: refuse a `model` of which a part would start at random, as of a backbone without its head.

    Raises:
        CheckpointError: it would, though it must be `whole`.
        RecipeError: unknown names, settings that do not go together, weights of another architecture, or a saved
            segmenter of other classes.
        DataError: a file is missing, changed or unreadable, or weights cannot be downloaded.
    """
    config = SegmenterConfig.of(config)
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    if not names:
        raise RecipeError("a segmenter needs at least one class.")
    if config.model is not None:
        return _existing(config, classes, seed, whole=whole)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network, shown = _assemble(config, len(names), _weights(config))
    segmenter = Segmenter(network, names, **shown, **_taps(config))
    segmenter.built = config
    return segmenter


def _taps(config: SegmenterConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in ("logits", "feature", "stages")}


def _weights(config: SegmenterConfig) -> Mapping[str, Tensor] | str | None:
    """The tensors that `weights` names; "imagenet" is left to the backbone's library."""
    if config.weights == "coco":
        what = f"COCO weights of {config.architecture} on {config.body}"
        return dict(downloaded(lambda: torchvision_networks.coco_weights(config), what))
    if config.weights in (None, "imagenet"):
        return config.weights
    state = read_weights(config.weights, config.sha256)
    if all(key.startswith("model.") for key in state):  # of a folder that `save` wrote
        state = {key.removeprefix("model."): value for key, value in state.items()}
    return state


def _assemble(
    config: SegmenterConfig, classes: int, weights: Mapping[str, Tensor] | str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a config, and how images are shown to it: arguments of `Segmenter`."""
    whole = isinstance(weights, Mapping) and any(key.startswith(WHOLE) for key in weights)
    part = None if whole else weights
    divisor = 1
    if config.architecture in TORCHVISION:
        network, normal = torchvision_networks.assemble(config, classes, part)
    else:
        network, normal, divisor = smp_networks.assemble(config, classes, part)
    if whole:
        assert isinstance(weights, Mapping)
        _load_whole(network, weights, config.weights or "")
    shown = {"mean": config.mean or normal[0], "std": config.std or normal[1], "size": config.size}
    return network, shown | {"divisor": 1 if config.size else config.divisor or divisor}


def _load_whole(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a network's weights; the last layers stay as they are where the number of classes is another.

    Those of an auxiliary head are left out where there is none, and it starts anew where they have none.

    Raises:
        RecipeError: they are of another network.
    """
    own = network.state_dict()
    new_aux = () if any(key.startswith("aux_classifier.") for key in state) else ("aux_classifier.",)
    check_fit(own, state, source, free=(*CLASSIFIERS, *new_aux))
    unknown = [k for k in state if k not in own and not k.startswith("aux_") and not k.endswith("num_batches_tracked")]
    if unknown:
        raise RecipeError(f"weights {source!r} have {unknown[0]!r}, which this {type(network).__name__} has not.")
    network.load_state_dict({k: v for k, v in state.items() if k in own and v.shape == own[k].shape}, strict=False)


# ---- what is there


def existing(config: SegmenterConfig) -> Segmenter:
    """The network that `config.model` names, with the classes that it has.

    Raises:
        RecipeError: as `build`.
        DataError: as `build`.
    """
    return _existing(config, None, 0, whole=True)


def _existing(
    config: SegmenterConfig, classes: int | Sequence[str] | None, seed: int, *, whole: bool = False
) -> Segmenter:
    """A folder of ours, or a network of `transformers`, for these classes; None: for its own."""
    source = config.model or ""
    folder = Path(source)
    if not (folder / SEGMENTER).is_file() or (folder / "config.json").is_file():
        return _of_transformers(config, classes, seed, whole=whole)
    if given := [k for k in ("mean", "std", "divisor", "size") if getattr(config, k) is not None]:
        raise RecipeError(f"the segmenter {source!r} has its own {given[0]!r}; leave out {', '.join(given)}.")
    segmenter = _load(source, _taps(config)).train()
    if classes is not None:
        _check_classes(source, class_names(segmenter), classes)
    return segmenter


def _of_transformers(
    config: SegmenterConfig, classes: int | Sequence[str] | None, seed: int, *, whole: bool = False
) -> Segmenter:
    """A network of `transformers`; what its file has not is initialised from `seed`, or refused if it must be `whole`.

    The classifier of another number of classes starts anew; of as many in another order, or of a folder that taskkd
    saved, it is refused.
    """
    source = config.model or ""
    _check_source(source)
    ours = (Path(source) / SEGMENTER).is_file()
    if ours and Description.read(source).call:
        raise DataError(
            f"segmenter {source!r} was run by a function, `call`, which is not saved: load it by TransformersSegmenter."
            "from_pretrained(folder, call=...)."
        )
    options = {k: v for k in ("mean", "std", "divisor", "size") if (v := getattr(config, k)) is not None}
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            if classes is not None:
                _check_names(source, classes)
            segmenter, found = TransformersSegmenter.from_pretrained(
                source, classes=classes, output_loading_info=True, **options, **_taps(config)
            )
    except TaskkdError as error:
        raise RecipeError(f"segmenter {source!r}: {error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{source}: {WEIGHTS} does not load: {error}") from None
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = nearest(source.partition("/")[0], (*TORCHVISION, *SMP))
        raise DataError(f"segmenter {source!r} cannot be loaded{hint}: {first}") from None
    lost = sorted([*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])])
    if lost and (whole or ours):
        raise CheckpointError(
            f"{source}: its weights have no {lost[0]!r} of this network ({len(lost)} are missing), which would start "
            "at random."
        )
    made: Segmenter = segmenter.train()
    return made


def _check_source(source: str) -> None:
    """Refuse what is neither a folder of transformers nor a name on the hub.

    Raises:
        DataError: it is not.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = next((p for p in ("student", "model") if (folder / p / SEGMENTER).is_file()), None)
        hint = f"; did you mean {folder / inside}?" if inside else "."
        raise DataError(
            f"{source} holds no segmenter: expected {SEGMENTER} in it, or config.json of transformers{hint}"
        )
    if not folder.exists() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise DataError(f"segmenter {source!r}: no such folder.")


def _check_names(source: str, classes: int | Sequence[str]) -> None:
    """Refuse a network whose answers would be of other classes than is thought.

    Raises:
        RecipeError: they are the same in another order, or it was saved by taskkd for others.
    """
    from transformers import AutoConfig

    if (Path(source) / SEGMENTER).is_file():
        _check_classes(source, Description.read(source).names, classes)
        return
    labels = AutoConfig.from_pretrained(source).id2label or {}
    found = [str(labels[i]) for i in sorted(labels)]
    if not isinstance(classes, int) and sorted(found) == sorted(classes):
        _check_classes(source, found, classes)


def _check_classes(source: str, found: Sequence[str], classes: int | Sequence[str]) -> None:
    """Raises:
    RecipeError: the segmenter is of other classes.
    """
    if classes == len(found) if isinstance(classes, int) else list(classes) == list(found):
        return
    given = str(classes) if isinstance(classes, int) else f"{len(classes)} ({', '.join(classes[:8])})"
    same = not isinstance(classes, int) and sorted(found) == sorted(classes)
    hint = "; name them in the segmenter's order as `data: {classes: [...]}`" if same else ""
    raise RecipeError(
        f"the segmenter {source!r} is for {len(found)} classes ({', '.join(found[:8])}), the data has {given}: "
        f"expected the same, in the same order{hint}."
    )


def wrap(model: nn.Module, classes: int | Sequence[str] | None = None, **options: Any) -> Segmenter:
    """Any network as a `Segmenter`; one is returned as it is.

    Args:
        model: a segmenter, or a network.
        classes: its classes. Default: of a network of `transformers`, those of its config.
        **options: of `Segmenter`. Default of `divisor` and `size`: what networks of transformers and
            segmentation-models-pytorch say that they need.

    Raises:
        RecipeError: it is a segmenter of another number of classes, or of the same in another order; or none are named.
    """
    if isinstance(model, Segmenter):
        count = len(model.classes) if classes is None else classes if isinstance(classes, int) else len(classes)
        if count != len(model.classes):
            raise RecipeError(f"the segmenter has {len(model.classes)} classes, the data has {count}.")
        if isinstance(classes, Sequence) and sorted(classes) == sorted(model.classes):
            _check_classes(model.kind, model.classes, classes)
        return model
    own = is_transformers(model)
    if "divisor" not in options and "size" not in options:
        options |= shape_needed(model.config) if own else {"divisor": smp_networks.divisor_of(model)}
    if own:
        return TransformersSegmenter(model, classes, **options)
    if classes is None:
        raise RecipeError(f"how many classes does this {type(model).__name__} tell apart? Name them.")
    return Segmenter(model, classes, **options)


def check_student(model: nn.Module) -> None:
    """Refuse a student that would not learn by a loss on its map.

    Raises:
        RecipeError: it predicts by queries.
    """
    if isinstance(model, Segmenter) and model.universal:
        raise RecipeError(
            f"{model.kind} predicts by queries, which are learnt by matching them with masks; a loss on its map of "
            "classes does not do that. Take it as the teacher, and as student a network that gives one map: SegFormer, "
            "UperNet, DeepLabV3, ..."
        )


# ---- saving


def describe(model: nn.Module, names: Sequence[str] | None = None) -> Description:
    """What is to be saved beside a segmenter's weights.

    Args:
        model: a segmenter.
        names: of its classes; default: as it was made.

    Raises:
        RecipeError: it is no segmenter, or there are more or fewer names than classes.
    """
    if not isinstance(model, Segmenter):
        raise RecipeError(f"a {type(model).__name__} is no segmenter: wrap it, `Segmenter(model, classes)`.")
    if names is not None:
        if len(names) != len(model.classes):
            raise RecipeError(f"{len(names)} names for a segmenter of {len(model.classes)} classes.")
        model.classes = tuple(names)
    return model.description


def class_names(model: nn.Module) -> list[str]:
    """The names of a segmenter's classes ("0", "1", ... where only their number is known); none of other modules."""
    return list(model.classes) if isinstance(model, Segmenter) else []


def save(model: nn.Module, folder: str | Path, names: Sequence[str] | None = None) -> None:
    """Write a segmenter's own folder: `segmenter.json` and `model.safetensors`, or what transformers writes with it.

    Only its own weights are in it: no teacher, no adapters.

    Raises:
        RecipeError: see `describe`.
    """
    description = describe(model, names)
    if isinstance(model, TransformersSegmenter):
        model.save_pretrained(folder)
        return
    description.save_pretrained(folder)
    save_model(model, str(Path(folder) / WEIGHTS))


def load(folder: str | Path) -> Segmenter:
    """A segmenter from its folder, in evaluation mode, the same to the bit as the one that was saved.

    Raises:
        DataError: the folder is no segmenter's, or was saved from a network that was not built here.
        CheckpointError: the weights are missing, unreadable, or of another network.
    """
    return _load(folder, {}).eval()


def _load(folder: str | Path, taps: Mapping[str, Any]) -> Segmenter:
    if (Path(folder) / "config.json").is_file():
        return _of_transformers(SegmenterConfig(model=str(folder)), None, 0, whole=True)
    described = Description.read(folder)
    config = described.config
    if config is None:
        raise DataError(
            f"{folder} holds the weights of a {described.kind} that was not built by taskkd.segmentation.build: make "
            f"the network as you did, wrap it in a Segmenter, and load {WEIGHTS} with safetensors.torch.load_model."
        )
    with torch.random.fork_rng([]):
        network, _ = _assemble(config, len(described.names), None)
    given = {key: value for key, value in taps.items() if value is not None}
    segmenter = Segmenter(network, described.names, **described.preprocessing, **(_taps(config) | given))
    segmenter.built = config
    load_weights(segmenter, folder)
    return segmenter
