"""Detectors of `transformers` with torchvision's interface: DETR, Conditional and Deformable DETR, RT-DETR, D-FINE."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import box_convert

from taskkd.checkpoints import part_of
from taskkd.detection.shared import inside_images
from taskkd.errors import DataError, TaskkdError, nearest

__all__ = ["KINDS", "ImageTransform", "Kind", "TransformersDetector", "is_transformers", "labels_of"]


@dataclass(frozen=True)
class Kind:
    """What is known of an architecture.

    Args:
        title: in words.
        processor: the class of its image processor.
        masked: it is told where images are padded, and its boxes are relative to the image; else to the padded whole.
        activation: "softmax": over the classes and "no object", the last; "sigmoid": a probability for each class.
        top: detections of an image, the best pairs of query and class; None: as many as there are queries.
        weighted: its losses are weighted already.
    """

    title: str
    processor: str
    masked: bool
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    top: int | None = None
    weighted: bool = False


#: `config.model_type` -> what is known of it
KINDS: dict[str, Kind] = {
    "detr": Kind("DETR", "DetrImageProcessor", True, "softmax"),
    "conditional_detr": Kind("Conditional DETR", "ConditionalDetrImageProcessor", True, top=100),
    "deformable_detr": Kind("Deformable DETR", "DeformableDetrImageProcessor", True, top=100),
    "rt_detr": Kind("RT-DETR", "RTDetrImageProcessor", False, weighted=True),
    "rt_detr_v2": Kind("RT-DETRv2", "RTDetrImageProcessor", False, weighted=True),
    "d_fine": Kind("D-FINE", "RTDetrImageProcessor", False, weighted=True),
}


def _kind(config: Any) -> Kind:
    name = str(getattr(config, "model_type", type(config).__name__))
    if name not in KINDS:
        known = ", ".join(f"{k} ({kind.title})" for k, kind in KINDS.items())
        raise TaskkdError(f"detectors of type {name!r} are not known{nearest(name, KINDS)}; known are {known}.")
    return KINDS[name]


class ImageTransform(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision has no types
    """torchvision's transform with the sizes and the antialiasing of transformers' image processors.

    Args:
        sides: lengths of the shorter side; in training one is drawn for each image, else the last is taken.
        longest: the longer side is at most this.
        mean, std: of the channels of images in 0 to 1.
        fixed: (height, width) of every image instead, whatever its shape.
        divisible: height and width of the padded batch are multiples of this; in training of 32 at least, as teachers
            of other architectures want them.
    """

    def __init__(
        self,
        sides: Sequence[int],
        longest: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        fixed: tuple[int, int] | None = None,
        divisible: int = 1,
    ) -> None:
        width_first = None if fixed is None else (fixed[1], fixed[0])
        super().__init__(list(sides), longest, list(mean), list(std), divisible, width_first)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """An image (3, H, W) and its boxes at the size that the model wants."""
        from transformers.image_transforms import get_size_with_aspect_ratio

        old = (int(image.shape[-2]), int(image.shape[-1]))
        if self.fixed_size is not None:
            new = (self.fixed_size[1], self.fixed_size[0])
        else:
            side = self.torch_choice(list(self.min_size)) if self.training else self.min_size[-1]
            new = get_size_with_aspect_ratio(old, side, self.max_size)
        if new != old:
            image = F.interpolate(image[None], size=new, mode="bilinear", align_corners=False, antialias=True)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], old, new)
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """The images as one batch, padded with zeros."""
        batch: Tensor = super().batch_images(images, max(size_divisible, 32) if self.training else size_divisible)
        return batch


class Shown(nn.Module):
    """Hands on what it is given, for whoever taps it. It has no parameters and is no part of what is saved."""

    def forward(self, value: Any) -> Any:
        """The value itself."""
        return value


class TransformersDetector(nn.Module):
    """A detector of `transformers` that is used like one of torchvision's.

    Images and boxes go in as they are; in train mode a dict of weighted losses comes out, whose sum is the model's own
    loss, in eval mode the detections of each image. Images without boxes are fine. Denoising queries of RT-DETR and
    D-FINE are made in train mode by the model itself.

    DETR, Conditional and Deformable DETR are told where a batch is padded; their boxes are relative to the image
    without padding, as in the authors' code. (`transformers`' image processors divide by the padded size in training,
    but not when they undo it; batches of several shapes are trained wrongly by them.)

    Args:
        model: of `AutoModelForObjectDetection`; kept as `.model`.
        processor: its image processor: sizes, mean and standard deviation. Default: the architecture's own.
        size: the length of the shorter side, or (height, width) of every image. Default: the processor's.
        longest: with a shorter side: the longer side is at most this. Default: 1333/800 of it, as usual.
        scales: shorter sides, of which, `size` among them, training draws one for each image. `size` is by default the
            last of them.

    Raises:
        TaskkdError: the architecture or the processor's size is not known, or `scales` do not go with a fixed size.

    Example:
        >>> from transformers import AutoModelForObjectDetection, RTDetrConfig
        >>> model = TransformersDetector(AutoModelForObjectDetection.from_config(config))  # doctest: +SKIP
        >>> losses = model(images, targets)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        size: int | tuple[int, int] | None = None,
        longest: int | None = None,
        scales: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.kind = _kind(model.config)
        self.model = model
        #: taps: the model itself, whose heads and decoder may be run once more; the keyword arguments of its decoder.
        #: What a term keeps instead of tapping them would be another copy's after `deepcopy`.
        self.live, self.decoding = Shown(), Shown()
        self.processor = _processor(self.kind, processor, scales[-1] if scales and size is None else size, longest)
        self.transform = _transform(self.kind, self.processor, scales)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        classes: int | Sequence[str] | None = None,
        size: int | tuple[int, int] | None = None,
        longest: int | None = None,
        scales: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        output_loading_info: bool = False,
    ) -> Any:
        """A detector from a folder or the hub, in `transformers`' own format. Nothing of it is executed.

        Args:
            name: of the folder or on the hub.
            classes: how many there are, or their names, background not among them; where the number is another than
                the file's, the layer that classifies starts anew. Default: as in the file.
            size, longest, scales: see the class.
            dtype: of the weights; default: float32.
            output_loading_info: return what `transformers` says of missing and unexpected weights, too.

        Raises:
            TaskkdError: the architecture is not known.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

        config = AutoConfig.from_pretrained(name)
        _kind(config)
        if classes is not None:
            names = [f"LABEL_{i}" for i in range(classes)] if isinstance(classes, int) else list(classes)
            config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        model, info = AutoModelForObjectDetection.from_pretrained(
            name,
            config=config,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=classes is not None,
        )
        try:
            processor = AutoImageProcessor.from_pretrained(name)
        except OSError:  # weights without settings: the architecture's own
            processor = None
        detector = cls(model, processor, size=size, longest=longest, scales=scales)
        return (detector, info) if output_loading_info else detector

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write model and preprocessing as `transformers` does; its own `from_pretrained` reads both."""
        self.model.save_pretrained(folder, state_dict=part_of(state_dict, "model"))  # type: ignore[operator]
        self.processor.save_pretrained(folder)

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.model, "_no_split_modules", None)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass; see `transformers`."""
        self.model.activation_checkpointing_enable(**options)  # type: ignore[operator]

    # ---- forward

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses of a batch (train mode) or its detections (eval mode).

        Args:
            images: of each (3, H, W), in 0 to 1.
            targets: of each image `boxes` (n, 4), x1 y1 x2 y2 in its pixels, and `labels` (n,), 1 to the number of
                classes; n may be 0. Needed in train mode.

        Returns:
            Train mode: weighted losses, each a scalar. Eval mode: of each image `boxes` (n, 4), x1 y1 x2 y2 in its
            pixels, `scores` and `labels` (n,), sorted as `transformers`' post-processing does.

        Raises:
            DataError: a label is not a class, or there are no targets in train mode.
        """
        if self.training and targets is None:
            raise DataError("a detector in train mode needs `targets`, of each image its `boxes` and `labels`.")
        original = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        shown, found = self.transform(images, targets)
        if not self.training:
            return self._detections(self.run(shown), shown, original)
        output = self.run(shown, found)
        return self._losses(output, found)

    def run(self, images: ImageList, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """The model on images that are resized, normalised and padded already; its output as it is.

        Args:
            images: torchvision's `ImageList`.
            targets: as in `forward`, boxes in pixels of `images`; given, the output has losses.
        """
        self.live(self.model)
        mask = inside_images(images.tensors, images.image_sizes).long() if self.kind.masked else None
        labels = None if targets is None else labels_of(self, targets, images)
        with self._decoder_shown():
            return self.model(pixel_values=images.tensors, pixel_mask=mask, labels=labels)

    @contextmanager
    def _decoder_shown(self) -> Iterator[None]:
        """Where `decoding` is tapped, let it see what the decoder is called with."""
        if not self.decoding._forward_hooks:
            yield
            return

        def show(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            self.decoding(dict(kwargs))

        handle = self.model.get_submodule("model.decoder").register_forward_pre_hook(show, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def frames(self, images: ImageList) -> Tensor:
        """(batch, 4): what the model's boxes (centre x, centre y, width, height in 0 to 1) are multiplied by."""
        padded = (int(images.tensors.shape[2]), int(images.tensors.shape[3]))
        sizes = images.image_sizes if self.kind.masked else [padded] * len(images.image_sizes)
        frames: Tensor = images.tensors.new_tensor([(w, h, w, h) for h, w in sizes])
        return frames

    def _losses(self, output: Any, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses = weighted_losses(self.kind, self.config, output.loss_dict)
        embedding = getattr(self.model.model, "denoising_class_embed", None)
        if embedding is not None and not any(len(t["boxes"]) for t in targets):
            # a batch without boxes makes no denoising queries; data-parallel training waits for this gradient
            name = next(iter(losses))
            losses[name] = losses[name] + 0.0 * embedding.weight.sum()
        return losses

    def _detections(self, output: Any, images: ImageList, original: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        logits, boxes = output.logits.float(), box_convert(output.pred_boxes.float(), "cxcywh", "xyxy")
        scale = [
            (ow / w, oh / h, ow / w, oh / h) for (oh, ow), (h, w) in zip(original, images.image_sizes, strict=True)
        ]
        boxes = boxes * (self.frames(images) * boxes.new_tensor(scale))[:, None]
        if self.kind.activation == "softmax":
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        else:
            pairs = logits.sigmoid().flatten(1)
            scores, index = pairs.topk(min(self.kind.top or logits.shape[1], pairs.shape[1]), dim=1)
            labels = index % logits.shape[2]
            boxes = boxes.take_along_dim((index // logits.shape[2])[..., None], 1)
        return [{"boxes": b, "scores": s, "labels": c + 1} for b, s, c in zip(boxes, scores, labels, strict=True)]


def is_transformers(model: nn.Module) -> bool:
    """Whether a module is a model of `transformers` itself, as yet without torchvision's interface."""
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)


def labels_of(
    detector: TransformersDetector, targets: list[dict[str, Tensor]], images: ImageList
) -> list[dict[str, Tensor]]:
    """Targets as `transformers` wants them: classes from 0, boxes as centre and size relative to the image.

    Args:
        detector: for which they are.
        targets: boxes in pixels of `images`, labels from 1.
        images: as its transform made them.

    Raises:
        DataError: a label is not a class.
        TaskkdError: scipy is missing, by which `transformers` matches queries and boxes.
    """
    if importlib.util.find_spec("scipy") is None:
        raise TaskkdError(f"{detector.kind.title} matches queries to boxes by scipy: pip install scipy.")
    classes, found = int(detector.config.num_labels), []
    for i, (target, frame) in enumerate(zip(targets, detector.frames(images), strict=True)):
        labels, boxes = target["labels"], target["boxes"]
        if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= classes:
            raise DataError(
                f"image {i} of the batch has labels {int(labels.min())} to {int(labels.max())}; the detector has "
                f"{classes} classes, 1 to {classes} (0 is background)."
            )
        found.append({"class_labels": labels - 1, "boxes": box_convert(boxes, "xyxy", "cxcywh") / frame})
    return found


def weighted_losses(kind: Kind, config: Any, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The losses that the model trains on, times their weights; what it only reports is left out."""
    if kind.weighted:
        return dict(losses)
    weights = {
        "loss_ce": 1.0,
        "loss_bbox": float(config.bbox_loss_coefficient),
        "loss_giou": float(config.giou_loss_coefficient),
    }
    names = {name: name if name in weights else name.rpartition("_")[0] for name in losses}
    return {name: weights[known] * losses[name] for name, known in names.items() if known in weights}


# ---- preprocessing


def _processor(kind: Kind, processor: Any, size: int | tuple[int, int] | None, longest: int | None) -> Any:
    import transformers

    make = getattr(transformers, kind.processor)
    if processor is not None and size is None and longest is None:
        return processor
    settings: dict[str, Any] = (make() if processor is None else processor).to_dict()
    if size is None:
        size = settings["size"].get("shortest_edge") if longest else None
        if longest and size is None:
            raise TaskkdError(f"`longest` goes with a shorter side, but images are resized to {settings['size']}.")
    if isinstance(size, tuple):
        settings["size"] = {"height": size[0], "width": size[1]}
    elif size is not None:
        settings["size"] = {"shortest_edge": size, "longest_edge": longest or round(size * 1333 / 800)}
    return make(**settings)


def _transform(kind: Kind, processor: Any, scales: Sequence[int]) -> ImageTransform:
    size = dict(processor.size)
    fixed = (int(size["height"]), int(size["width"])) if size.get("height") else None
    if fixed and scales:
        raise TaskkdError(
            f"`scales` are lengths of the shorter side, but every image is resized to {fixed[0]}x{fixed[1]}; give "
            "`size` as one number."
        )
    side = int(size.get("shortest_edge") or 0)
    if not side and not fixed:
        raise TaskkdError(f"the image processor resizes to {size}; give `size` as a number or (height, width).")
    normal = processor.do_normalize
    return ImageTransform(
        list(dict.fromkeys([*(s for s in scales if s != side), side])),
        int(size.get("longest_edge") or 10**6),
        processor.image_mean if normal else [0.0] * 3,
        processor.image_std if normal else [1.0] * 3,
        fixed=fixed,
        divisible=1 if kind.masked else 32,
    )
