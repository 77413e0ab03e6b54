"""Families of detectors: where their tensors are tapped, how they are read, which parts of a teacher are run.

A `Family` is made for one model and holds none: tap names and small plain objects (box coders, matchers) only, so that
copies and checkpoints of what refers to it stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taskkd.detection.shared import Normalisation, SharedImages
from taskkd.detection.views import Dense, Rois, Rpn
from taskkd.errors import TaskkdError

__all__ = ["Family", "RunParts", "family_of"]

Values = Mapping[str, Any]
Reader = Callable[[Values, SharedImages], Any]


class RunParts(Protocol):
    """How a teacher's parts are run on images that are resized and normalised already."""

    def __call__(self, model: nn.Module, images: Any, parts: Collection[str], regions: list[Tensor] | None) -> None:
        """Run the backbone, and those of the heads of which `parts` names a tap; hooks take what they give.

        Args:
            model: the teacher, in eval mode.
            images: torchvision's `ImageList`.
            parts: the first words of the taps that are asked for (`{"backbone", "head"}`).
            regions: of each image (r, 4), what the second stage looks at.
        """


@dataclass(frozen=True)
class Family:
    """What is known of a detector.

    Args:
        name: in words.
        views: name -> the taps it is read from.
        readers: name -> `(values by tap, images) -> view`.
        run: how a teacher of this family is run.
        normalisation: what its `transform` does; None: unknown.
        images: the tap that gives (images, targets) as the model resized them.
    """

    name: str
    views: Mapping[str, tuple[str, ...]]
    readers: Mapping[str, Reader]
    run: RunParts
    normalisation: Normalisation | None = None
    images: str = "transform"
    notes: Mapping[str, Any] = field(default_factory=dict)

    def taps(self, view: str) -> tuple[str, ...]:
        """The taps of a view.

        Raises:
            TaskkdError: the family has it not.
        """
        if view not in self.views:
            raise TaskkdError(f"{self.name} has no {view!r}; it has {', '.join(self.views)}.")
        return self.views[view]

    def read(self, view: str, values: Values, images: SharedImages) -> Any:
        """A view from tapped values."""
        self.taps(view)
        return self.readers[view](values, images)


def family_of(model: nn.Module, who: str = "student") -> Family:
    """The family of a detector.

    Args:
        model: the detector.
        who: in errors.

    Raises:
        TaskkdError: it is of none; the message says which are known.
    """
    from torchvision.models import detection as tv

    from taskkd.detection.transformers_families import transformers_family
    from taskkd.detection.transformers_models import TransformersDetector

    makers: list[tuple[type, Callable[[Any], Family]]] = [
        (TransformersDetector, transformers_family),
        (tv.faster_rcnn.FasterRCNN, _two_stage),
        (tv.RetinaNet, _retinanet),
        (tv.FCOS, _fcos),
        (tv.ssd.SSD, _ssd),
    ]
    for kind, make in makers:
        if isinstance(model, kind):
            return make(model)
    raise TaskkdError(
        f"the {who} is a {type(model).__name__}, of which no tensors are known: expected torchvision's Faster or Mask "
        "R-CNN, RetinaNet, FCOS or SSD, or a transformers detector (`taskkd.detection.TransformersDetector`). Of any "
        "other module name the taps: `neck` and `teacher_neck` of the feature methods, or `kd.Match`."
    )


# ---- what families share


def maps(features: Any) -> list[Tensor]:
    """The maps that a torchvision backbone gives."""
    return list(features.values()) if isinstance(features, Mapping) else [features]


def neck(values: Values, images: SharedImages) -> list[Tensor]:
    """The reader of torchvision's backbones."""
    return maps(values["backbone"])


def shapes_of(features: list[Tensor]) -> list[tuple[int, int]]:
    """(height, width) of each map."""
    return [(int(f.shape[2]), int(f.shape[3])) for f in features]


def _matched(matcher: Any, boxes: Tensor, anchors: Tensor, level_sizes: list[int]) -> Tensor:
    """torchvision's assignment by overlap."""
    from torchvision.ops import box_iou

    found: Tensor = matcher(box_iou(boxes, anchors))
    return found


def _decode(coder: Any, regression: Tensor, anchors: Tensor) -> Tensor:
    found: Tensor = coder.decode_single(regression, anchors)
    return found


def _decode_linear(coder: Any, regression: Tensor, anchors: Tensor) -> Tensor:
    found: Tensor = coder.decode(regression, anchors)
    return found


def _run_dense(model: Any, images: Any, parts: Collection[str], regions: list[Tensor] | None) -> None:
    features = maps(model.backbone(images.tensors))
    if any(part.split(".")[0] == "head" for part in parts):
        model.head(features)
    if "anchor_generator" in parts:
        model.anchor_generator(images, features)


# ---- one stage

DENSE = ("backbone", "head", "anchor_generator")


def _dense_family(model: Any, name: str, read: Reader) -> Family:
    views = {"neck": ("backbone",), "dense": DENSE, "regions": DENSE}
    readers: dict[str, Reader] = {"neck": neck, "dense": read, "regions": partial(_own_regions, read)}
    return Family(name, views, readers, _run_dense, Normalisation.of(model.transform))


def _own_regions(read: Reader, values: Values, images: SharedImages) -> list[Tensor]:
    from taskkd.detection.sampling import own_regions

    return own_regions(read(values, images), images)


def _read_dense(
    decode: Any, assign: Any, activation: Any, values: Values, images: SharedImages, *, per_cell: list[int] | None
) -> Dense:
    features = maps(values["backbone"])
    head, shapes = values["head"], shapes_of(features)
    logits, quality = head["cls_logits"], head.get("bbox_ctrness")
    cells = [h * w for h, w in shapes]
    each = per_cell or [logits.shape[1] // sum(cells)] * len(cells)
    return Dense(
        logits, head["bbox_regression"], values["anchor_generator"], shapes,
        [n * k for n, k in zip(cells, each, strict=True)], activation, decode, assign,
        quality=None if quality is None else quality.squeeze(-1),
    )  # fmt: skip


def _retinanet(model: Any) -> Family:
    coder = model.head.regression_head.box_coder
    read = partial(
        _read_dense, partial(_decode, coder), partial(_matched, model.proposal_matcher), "sigmoid", per_cell=None
    )
    return _dense_family(model, "RetinaNet", read)


def _ssd(model: Any) -> Family:
    per_cell = list(model.anchor_generator.num_anchors_per_location())
    decode, assign = partial(_decode, model.box_coder), partial(_matched, model.proposal_matcher)
    return _dense_family(model, "SSD", partial(_read_dense, decode, assign, "softmax", per_cell=per_cell))


def _fcos(model: Any) -> Family:
    decode = partial(_decode_linear, model.head.box_coder)
    assign = partial(assign_points, model.center_sampling_radius)
    return _dense_family(model, "FCOS", partial(_read_dense, decode, assign, "sigmoid", per_cell=None))


def assign_points(radius: float, boxes: Tensor, anchors: Tensor, level_sizes: list[int]) -> Tensor:
    """FCOS's assignment: points near a box's centre, inside it, of its scale; the smallest of several boxes.

    Source: Tian Z. et al. 2019, as in torchvision.

    Args:
        radius: in strides, how far from the centre a point may be.
        boxes: (n, 4), n > 0.
        anchors: (A, 4) squares of the stride around the points.
        level_sizes: points of each level.

    Returns:
        (A,) int64; -1: none.
    """
    centres, points = (boxes[:, :2] + boxes[:, 2:]) / 2, (anchors[:, :2] + anchors[:, 2:]) / 2
    size = anchors[:, 2] - anchors[:, 0]
    near = (points[:, None] - centres).abs().amax(2) < radius * size[:, None]
    sides = torch.cat([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], 2)
    reach = sides.amax(2)
    low, high = size * 4, size * 8
    low[: level_sizes[0]] = 0
    high[len(high) - level_sizes[-1] :] = float("inf")
    good = near & (sides.amin(2) > 0) & (reach > low[:, None]) & (reach < high[:, None])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    smallest, index = torch.where(good, area, float("inf")).min(1)
    return torch.where(smallest.isinf(), -1, index)


# ---- two stages

RPN = ("backbone", "rpn.head", "rpn.anchor_generator")
ROIS = ("roi_heads.box_roi_pool:in[1]", "roi_heads.box_roi_pool", "roi_heads.box_head", "roi_heads.box_predictor")


def _two_stage(model: Any) -> Family:
    rpn, heads = model.rpn, model.roi_heads
    views = {"neck": ("backbone",), "rpn": RPN, "rois": ROIS, "proposals": ("rpn",), "regions": ROIS[:1]}
    readers: dict[str, Reader] = {
        "neck": neck,
        "rpn": partial(_read_rpn, partial(_decode, rpn.box_coder), partial(_matched, rpn.proposal_matcher)),
        "rois": partial(_read_rois, heads.box_coder, heads.proposal_matcher),
        "proposals": lambda values, images: list(values["rpn"][0]),
        "regions": lambda values, images: list(values[ROIS[0]]),
    }
    name = "Mask R-CNN" if heads.has_mask() else "Faster R-CNN"
    return Family(name, views, readers, _run_two_stage, Normalisation.of(model.transform))


def _read_rpn(decode: Any, assign: Any, values: Values, images: SharedImages) -> Rpn:
    features = maps(values["backbone"])
    objectness, deltas = values["rpn.head"]
    flat = [o.permute(0, 2, 3, 1).flatten(1) for o in objectness]
    each = [d.reshape(len(d), -1, 4, *d.shape[2:]).permute(0, 3, 4, 1, 2).reshape(len(d), -1, 4) for d in deltas]
    return Rpn(
        torch.cat(flat, 1), torch.cat(each, 1), values["rpn.anchor_generator"], shapes_of(features),
        [f.shape[1] for f in flat], decode, assign,
    )  # fmt: skip


def _read_rois(coder: Any, matcher: Any, values: Values, images: SharedImages) -> Rois:
    proposals = list(values[ROIS[0]])
    logits, deltas = values[ROIS[3]]
    labels, targets = roi_targets(coder, matcher, proposals, images)
    return Rois(
        proposals, values[ROIS[1]], values[ROIS[2]], logits, deltas,
        lambda d, boxes: coder.decode_single(d, boxes).flatten(1), labels, targets,
    )  # fmt: skip


def roi_targets(coder: Any, matcher: Any, proposals: list[Tensor], images: SharedImages) -> tuple[Tensor, Tensor]:
    """Labels (R,) and encoded boxes (R, 4) that torchvision trains the sampled proposals to.

    They are a function of each proposal, so they are worked out anew instead of being taken from a method of the model.

    Args:
        coder, matcher: the model's box coder and proposal matcher.
        proposals: of each image (r, 4).
        images: with the ground truth.
    """
    labels, targets = [], []
    for boxes, own, classes in zip(proposals, images.boxes, images.labels, strict=True):
        if not len(own):
            labels.append(torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device))
            targets.append(torch.zeros_like(boxes))
            continue
        index = _matched(matcher, own.to(boxes.dtype), boxes, [])
        labels.append(torch.where(index >= 0, classes[index.clamp(min=0)], 0))
        targets.append(coder.encode_single(own[index.clamp(min=0)].to(boxes.dtype), boxes))
    return torch.cat(labels), torch.cat(targets)


def _run_two_stage(model: Any, images: Any, parts: Collection[str], regions: list[Tensor] | None) -> None:
    from collections import OrderedDict

    features = model.backbone(images.tensors)
    if isinstance(features, Tensor):
        features = OrderedDict([("0", features)])
    if "rpn" in parts:
        model.rpn(images, features)
    elif "rpn.head" in parts or "rpn.anchor_generator" in parts:
        model.rpn.head(maps(features))
        model.rpn.anchor_generator(images, maps(features))
    if regions is not None:
        heads = model.roi_heads
        pooled = heads.box_roi_pool(features, regions, images.image_sizes)
        heads.box_predictor(heads.box_head(pooled))
