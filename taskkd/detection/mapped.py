"""A teacher of other classes: what its heads say of its classes, merged into the classes of the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection import models
from taskkd.detection.description import Description
from taskkd.errors import RecipeError, nearest

__all__ = ["mapped"]

Activation = Literal["sigmoid", "softmax"]


class _Groups(nn.Module):
    """Logits of groups of channels: a group is what any of its channels is.

    The log of the summed exponentials of channels that exclude each other ("softmax"); of independent decisions
    ("sigmoid") the logit of `1 - prod (1 - p)`.
    """

    order: Tensor

    def __init__(self, groups: Sequence[Sequence[int]], activation: Activation) -> None:
        super().__init__()
        self.sizes, self.activation = [len(group) for group in groups], activation
        self.register_buffer("order", torch.tensor([c for group in groups for c in group]), persistent=False)

    def forward(self, logits: Tensor, dim: int = -1) -> Tensor:
        picked = logits.index_select(dim, self.order)
        if max(self.sizes) == 1:
            return picked
        full = picked if picked.dtype == torch.float64 else picked.float()
        return torch.stack([self._merged(group, dim) for group in torch.split(full, self.sizes, dim)], dim)

    def _merged(self, group: Tensor, dim: int) -> Tensor:
        if group.shape[dim] == 1:
            return group.squeeze(dim)
        if self.activation == "softmax":
            return group.logsumexp(dim)
        none = F.softplus(group).sum(dim).clamp(min=torch.finfo(group.dtype).tiny)  # - log prod (1 - p)
        return none + (-torch.expm1(-none)).log()


class _Last(nn.Module):
    """A layer whose last dimension are the classes, merged."""

    def __init__(self, layer: nn.Module, groups: _Groups) -> None:
        super().__init__()
        self.layer, self.groups = layer, groups

    def forward(self, x: Tensor) -> Any:
        return self.groups(self.layer(x))


class _Map(_Last):
    """A layer that gives (N, anchors * channels, h, w), the channels merged."""

    def __init__(self, layer: nn.Module, groups: _Groups, channels: int) -> None:
        super().__init__(layer, groups)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        each = self.layer(x).unflatten(1, (-1, self.channels))
        merged: Tensor = self.groups(each, 2).flatten(1, 2)
        return merged


class _Boxes(_Last):
    """A second stage's class logits, merged, and the box of a merged class: that of the surest class in it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = self.layer(x)
        each, rows = deltas.unflatten(1, (-1, 4)), torch.arange(len(logits), device=logits.device)
        groups = torch.split(self.groups.order, self.groups.sizes)
        # of what is background now the own regression of background, which comes first
        surest = [groups[0][:1].expand(len(rows)), *(group[logits[:, group].argmax(1)] for group in groups[1:])]
        return self.groups(logits), torch.stack([each[rows, own] for own in surest], 1).flatten(1)


class _Masks(_Last):
    """A mask head's maps (R, classes, h, w): of a merged class the highest of its classes."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.layer(x)
        groups = torch.split(self.groups.order, self.groups.sizes)
        return torch.stack([maps[:, group].amax(1) for group in groups], 1)


def mapped(teacher: nn.Module, label_map: Mapping[Any, str], classes: Sequence[str]) -> nn.Module:
    """A copy of a detector of other classes, as one of the student's classes.

    The logits of its last layers are merged, and so all that is made of them: its detections, and what methods compare.
    A class that several of the teacher's are mapped to is any of these: their probabilities are summed where the
    teacher's classes exclude each other (Faster and Mask R-CNN, SSD, DETR), else it is `1 - prod (1 - p)` (RetinaNet,
    FCOS, the other detectors of transformers). The teacher's classes that are not mapped count as background, or "no
    object", in the former, and are left out in the latter. A second stage's box is that of the surest of the classes.

    RT-DETR and D-FINE then pick their queries by the student's classes.

    Args:
        teacher: a detector of torchvision or `TransformersDetector`. It is left as it is.
        label_map: the teacher's class -> the student's. Of a detector whose classes have no names: its labels 1, 2, ...
        classes: the student's, in the order of their labels.

    Raises:
        RecipeError: a name is not among the classes of its side, a class of the student has none of the teacher, or the
            detector is of no known kind.
    """
    pairs = {str(name): own for name, own in label_map.items()}
    names = models.class_names(teacher) or [str(i + 1) for i in range(models.class_count(teacher) or 0)]
    if not names:
        raise RecipeError(
            f"label_map: the classes of the teacher, a {type(teacher).__name__}, are not known: expected a detector of "
            "torchvision, taskkd or transformers."
        )
    _check(pairs, names, classes)
    places = [[k for k, name in enumerate(names) if pairs.get(name) == own] for own in classes]
    found = copy.deepcopy(teacher)
    _merge(found, places, len(names))
    if hasattr(found, "save_pretrained"):
        config: Any = found.config
        config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
    else:
        kind = f"{type(teacher).__module__}.{type(teacher).__qualname__}"
        found.description = Description(None, tuple(classes), kind)  # type: ignore[assignment]
    return found


def _check(label_map: Mapping[str, str], names: Sequence[str], classes: Sequence[str]) -> None:
    for name, to in label_map.items():
        for which, known, who in ((name, names, "teacher"), (to, classes, "student")):
            if which not in known:
                raise RecipeError(
                    f"label_map: the {who} has no class {which!r}{nearest(which, known)}; it has "
                    f"{', '.join(map(str, known[:20]))}."
                )
    if missing := [c for c in classes if c not in label_map.values()]:
        raise RecipeError(f"label_map: no class of the teacher is mapped to the student's {missing[0]!r}.")


def _merge(model: Any, places: Sequence[Sequence[int]], count: int) -> None:
    """Put the merging behind the layers that predict classes; `places` are of the teacher's `count` classes, from 0."""
    from torchvision.models import detection as tv

    from taskkd.detection.transformers_models import TransformersDetector

    used = {k for own in places for k in own}
    rest = [k for k in range(count) if k not in used]
    later = [[k + 1 for k in own] for own in places]  # torchvision's channel 0 is background, or not used
    exclusive = _Groups([[0, *(k + 1 for k in rest)], *later], "softmax")
    if isinstance(model, TransformersDetector):
        softmax = model.kind.activation == "softmax"
        _merge_queries(model, _Groups([*places, [*rest, count]] if softmax else places, model.kind.activation))
    elif isinstance(model, tv.FasterRCNN):
        heads = model.roi_heads
        heads.box_predictor = _Boxes(heads.box_predictor, exclusive)
        if heads.has_mask():
            heads.mask_predictor = _Masks(heads.mask_predictor, _Groups([[0], *later], "softmax"))
    elif isinstance(model, tv.RetinaNet | tv.FCOS):
        head: Any = model.head.classification_head
        head.cls_logits = _Map(head.cls_logits, _Groups([[0], *later], "sigmoid"), count + 1)
        head.num_classes = len(places) + 1
    elif isinstance(model, tv.ssd.SSD):
        head = model.head.classification_head
        head.module_list = nn.ModuleList(_Map(layer, exclusive, count + 1) for layer in head.module_list)
        head.num_columns = len(places) + 1
    else:
        raise RecipeError(
            f"label_map: where a {type(model).__name__} predicts classes is not known: expected a detector of "
            "torchvision or transformers. Methods on feature maps need no classes of the teacher."
        )


def _merge_queries(detector: Any, groups: _Groups) -> None:
    """Every layer of a detector of `transformers` that predicts classes; one that is used twice stays one."""
    model, made = detector.model, dict[int, nn.Module]()

    def merged(layer: nn.Module) -> nn.Module:
        return made.setdefault(id(layer), _Last(layer, groups))

    for module in list(model.modules()):
        for name in ("class_labels_classifier", "enc_score_head"):
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, merged(getattr(module, name)))
        layers = getattr(module, "class_embed", None)
        if isinstance(layers, nn.ModuleList) and not isinstance(layers[0], _Last):
            # Deformable DETR's last one tells an object from none in its encoder, by channel 0
            own = (
                layers[: detector.config.decoder_layers] if detector.config.model_type == "deformable_detr" else layers
            )
            for i, layer in enumerate(own):
                layers[i] = merged(layer)
