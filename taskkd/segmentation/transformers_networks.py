"""Segmentation networks of `transformers`, with its own way of saving them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.checkpoints import part_of
from taskkd.errors import TaskkdError, nearest
from taskkd.segmentation.description import SEGMENTER, Description
from taskkd.segmentation.segmenter import IMAGENET, UNIVERSAL, Segmenter

__all__ = ["TransformersSegmenter", "is_transformers", "shape_needed"]

#: types whose position embeddings or reshapes allow one size of images only
ONE_SIZE = ("data2vec-vision", "dpt", "eomt", "eomt_dinov3", "videomt")
#: OneFormer is told what it is asked for, in words
TASK = "the task is semantic"
MANY = 100  # entries, in the smallest vocabulary that has words


def is_transformers(model: nn.Module) -> bool:
    """Whether a module is a model of `transformers` itself."""
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)


class TransformersSegmenter(Segmenter):
    """A `Segmenter` that is saved as `transformers` saves its models, with `segmenter.json` beside it.

    Args:
        model, classes, **options: as in `Segmenter`. Default of `classes`: those of the model's config.
        processor: its image processor, which is saved with it.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int | Sequence[str] | None = None,
        *,
        processor: Any = None,
        **options: Any,
    ) -> None:
        config: Any = model.config
        labels = [str(config.id2label[k]) for k in sorted(config.id2label)]
        if classes is None or classes == len(labels):
            classes = labels
        super().__init__(model, classes, **options)
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        classes: int | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """A segmenter from a folder or the hub, in `transformers`' own format. Nothing of it is executed.

        Args:
            name: of the folder or on the hub.
            classes: how many there are, or their names; where the number is another than the file's, the layers that
                classify start anew. Default: as in the file.
            dtype: of the weights; default: float32.
            output_loading_info: return what `transformers` says of missing and unexpected weights, too.
            **options: of `Segmenter`. Default: what was saved, or the image processor's mean and standard deviation
                (and, of networks of one size, that size; of plain vision transformers, padding to whole patches).

        Raises:
            TaskkdError: the architecture is not known.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(name)
        auto = _auto(config)
        saved = Description.read(name) if (Path(name) / SEGMENTER).is_file() else None
        if classes is not None:
            names = [f"LABEL_{i}" for i in range(classes)] if isinstance(classes, int) else list(classes)
            config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        elif saved is not None:
            classes = saved.names
        model, info = auto.from_pretrained(
            name,
            config=config,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=classes is not None,
        )
        processor = _processor(name)
        shown = saved.preprocessing if saved is not None else _preprocessing(config, processor)
        if "size" in options or "divisor" in options:  # one stands in place of the other
            shown = {k: v for k, v in shown.items() if k in ("mean", "std")}
        if (call := _call(config, name, processor)) is not None:
            shown["call"] = call
        segmenter = cls(model, classes, processor=processor, **(shown | options))
        return (segmenter, info) if output_loading_info else segmenter

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the network as `transformers` does, and `segmenter.json`."""
        self.config.id2label = dict(enumerate(self.classes))
        if isinstance(self._call, Asked):
            self.config.task_tokens = self._call.tokens[0].tolist()
        self.config.label2id = {name: label for label, name in enumerate(self.classes)}
        self.model.save_pretrained(folder, state_dict=part_of(state_dict, "model"))  # type: ignore[operator]
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        self.description.save_pretrained(folder)

    @property
    def config(self) -> Any:
        """The network's config."""
        return self.model.config

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.model, "_no_split_modules", None)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass; see `transformers`."""
        self.model.activation_checkpointing_enable(**options)  # type: ignore[operator]


def _auto(config: Any) -> Any:
    """The class that loads networks of this type.

    Raises:
        TaskkdError: the type is none that segments.
    """
    from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES as SEMANTIC

    kind = str(config.model_type)
    if kind in UNIVERSAL:
        return AutoModelForUniversalSegmentation
    if kind in SEMANTIC:
        return AutoModelForSemanticSegmentation
    known = (*SEMANTIC, *UNIVERSAL)
    raise TaskkdError(f"networks of type {kind!r} do not segment{nearest(kind, known)}; known are {', '.join(known)}.")


def _processor(name: str | Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):  # weights without settings
        return None


def _preprocessing(config: Any, processor: Any) -> dict[str, Any]:
    """How the images are shown that a network was trained on: arguments of `Segmenter`."""
    mean, std = (
        getattr(processor, "image_mean", None) or IMAGENET[0],
        getattr(processor, "image_std", None) or IMAGENET[1],
    )
    if processor is not None and getattr(processor, "do_normalize", True) in (False, None):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return {"mean": mean, "std": std, **shape_needed(config)}


def shape_needed(config: Any) -> dict[str, Any]:
    """The one size that images must have, or what their sides must be multiples of: arguments of `Segmenter`."""
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if config.model_type in ONE_SIZE and side is not None:
        return {"size": tuple(side) if isinstance(side, list | tuple) else (side, side)}
    return {"divisor": patch} if config.model_type == "beit" and isinstance(patch, int) else {}


# ---- networks that want more than images


class FlippedChannels:
    """Runs a network on BGR images, as MobileViT was trained."""

    #: made anew of what is saved
    of_library = True

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        return model(images.flip(1))


class Asked:
    """Runs OneFormer with the task that it is asked for, (1, L) token ids."""

    of_library = True

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        return model(images, task_inputs=self.tokens.to(images.device).expand(len(images), -1))


def _call(config: Any, name: str | Path, processor: Any) -> Any:
    if config.model_type == "oneformer":
        return Asked(_task_tokens(config, name))
    return FlippedChannels() if getattr(processor, "do_flip_channel_order", False) else None


def _task_tokens(config: Any, name: str | Path) -> Tensor:
    """The ids of the words, 0 where there are none, as OneFormer's processor gives them.

    Raises:
        TaskkdError: there is no tokenizer beside the weights.
    """
    from transformers import AutoTokenizer

    if (saved := getattr(config, "task_tokens", None)) is not None:
        return torch.tensor([saved])
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        tokenizer = ()
    if len(tokenizer) < MANY:  # transformers makes an empty one where there are no files
        raise TaskkdError("OneFormer is told its task in words, and there is no tokenizer beside its weights.")
    found = tokenizer(
        [TASK], padding="max_length", truncation=True, max_length=config.task_seq_len, return_tensors="pt"
    )
    tokens: Tensor = found["input_ids"] * found["attention_mask"]
    return tokens
