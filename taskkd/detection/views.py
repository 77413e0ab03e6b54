"""What detectors compute, in one form for all families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from taskkd.detection.shared import SharedImages

__all__ = ["Decoder", "Dense", "Rois", "Rpn", "Views", "shapes"]

#: raw regression (n, 4) and anchors (n, 4) -> boxes (n, 4), x1 y1 x2 y2
Decode = Callable[[Tensor, Tensor], Tensor]
#: ground truth (n, 4), anchors (A, 4), anchors of each level -> (A,) index of the box of each anchor, negative for none
Assign = Callable[[Tensor, Tensor, list[int]], Tensor]


def _decoded(decode: Decode, regression: Tensor, anchors: list[Tensor]) -> Tensor:
    """Boxes (N, A, 4) of raw regression (N, A, 4); not in half precision, in which a box of 800 pixels is off by 4."""
    regression = regression if regression.dtype == torch.float64 else regression.float()
    return decode(regression.flatten(0, 1), torch.cat(anchors)).reshape(regression.shape)


@dataclass(frozen=True)
class Dense:
    """Predictions at every anchor or point of a one-stage detector.

    Args:
        logits: (N, A, C); of all anchors, levels one after the other, finest first.
        regression: (N, A, 4) as the head gives it.
        anchors: (A, 4) of each image, x1 y1 x2 y2.
        shapes: (height, width) of each level.
        level_sizes: the number of anchors of each level; their sum is A.
        activation: "sigmoid": a probability for each class; "softmax": over the classes and background, which is 0.
        decoder, assigner: the detector's own.
        first: the channel of class 1; before it are background or channels that the detector does not use.
        quality: (N, A) logits of centre-ness, or None.
    """

    logits: Tensor
    regression: Tensor
    anchors: list[Tensor]
    shapes: list[tuple[int, int]]
    level_sizes: list[int]
    activation: Literal["sigmoid", "softmax"]
    decoder: Decode
    assigner: Assign | None = None
    first: int = 1
    quality: Tensor | None = None

    def decode(self, regression: Tensor | None = None) -> Tensor:
        """Boxes (N, A, 4), x1 y1 x2 y2 in pixels; of `regression` (N, A, 4), by default the own."""
        return _decoded(self.decoder, self.regression if regression is None else regression, self.anchors)

    def probabilities(self) -> Tensor:
        """(N, A, classes), of the real classes alone."""
        found = self.logits.sigmoid() if self.activation == "sigmoid" else self.logits.softmax(-1)
        return found[..., self.first :]

    def match(self, boxes: list[Tensor]) -> Tensor:
        """(N, A) int64: which of an image's boxes (n, 4) the detector's own assigner gives to an anchor; < 0: none."""
        assert self.assigner is not None, "only the families that assign have this view"
        found = []
        for own, anchors in zip(boxes, self.anchors, strict=True):
            none = torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
            found.append(self.assigner(own.to(anchors.dtype), anchors, self.level_sizes) if len(own) else none)
        return torch.stack(found)


@dataclass(frozen=True)
class Rois:
    """The second stage of a two-stage detector on sampled proposals, R in all images together.

    Args:
        proposals: of each image (r, 4), x1 y1 x2 y2 in pixels.
        features: (R, C, h, w), pooled.
        embeddings: (R, D), what the box head makes of them.
        logits: (R, classes + 1); 0 is background.
        deltas: (R, 4 (classes + 1)).
        decoder: `(deltas (R, 4 k), proposals (R, 4)) -> (R, 4 k)` boxes.
        labels: (R,) int64, of the student: what its own loss trains it to.
        targets: (R, 4) likewise, encoded.
    """

    proposals: list[Tensor]
    features: Tensor
    embeddings: Tensor
    logits: Tensor
    deltas: Tensor
    decoder: Decode
    labels: Tensor | None = None
    targets: Tensor | None = None


@dataclass(frozen=True)
class Rpn:
    """The first stage of a two-stage detector, at every anchor.

    Args:
        objectness: (N, A) logits.
        deltas: (N, A, 4).
        anchors, shapes, level_sizes: as in `Dense`.
        decoder, assigner: the detector's own.
    """

    objectness: Tensor
    deltas: Tensor
    anchors: list[Tensor]
    shapes: list[tuple[int, int]]
    level_sizes: list[int]
    decoder: Decode
    assigner: Assign | None = None

    def decode(self) -> Tensor:
        """Boxes (N, A, 4), x1 y1 x2 y2 in pixels."""
        return _decoded(self.decoder, self.deltas, self.anchors)

    match = Dense.match


@dataclass(frozen=True)
class Decoder:
    """Predictions of the queries of a DETR-like detector, without denoising queries.

    Args:
        logits: (N, L, Q, C) of all L decoder layers, the last one the output.
        boxes: (N, L, Q, 4) centre x, centre y, width, height in 0 to 1.
        activation: "softmax": the last channel is "no object"; "sigmoid": a probability for each class.
        hidden: (N, L, Q, d), or None.
        corners: (N, L, Q, 4, bins) logits of the distribution of each side (D-FINE), or None.
        edges: (N, L, Q, 4, bins) where each bin puts its side, x1 y1 x2 y2 in 0 to 1, or None.
    """

    logits: Tensor
    boxes: Tensor
    activation: Literal["sigmoid", "softmax"]
    hidden: Tensor | None = None
    corners: Tensor | None = None
    edges: Tensor | None = None


@dataclass
class Views:
    """One side of a run, read at first use.

    Args:
        family: of the model.
        values: by tap.
        images: that both sides see.
    """

    family: Any
    values: dict[str, Any]
    images: SharedImages
    read: dict[str, Any] = field(default_factory=dict)

    def get(self, view: str) -> Any:
        """A view by name; the names are those of the properties."""
        if view not in self.read:
            self.read[view] = self.family.read(view, self.values, self.images)
        return self.read[view]

    @property
    def neck(self) -> list[Tensor]:
        """The maps (N, C, h, w) that the heads get, finest first."""
        maps: list[Tensor] = self.get("neck")
        return maps

    @property
    def dense(self) -> Dense:
        """Predictions at every anchor."""
        found: Dense = self.get("dense")
        return found

    @property
    def rois(self) -> Rois:
        """The second stage on the sampled proposals."""
        found: Rois = self.get("rois")
        return found

    @property
    def rpn(self) -> Rpn:
        """The first stage."""
        found: Rpn = self.get("rpn")
        return found

    @property
    def proposals(self) -> list[Tensor]:
        """What the first stage proposes, of each image (n, 4), the best first."""
        found: list[Tensor] = self.get("proposals")
        return found

    @property
    def regions(self) -> list[Tensor]:
        """Of each image (r, 4): the boxes that both sides' second stages look at.

        The sampled proposals of a two-stage student; of a one-stage student its own predictions and the ground truth.
        """
        found: list[Tensor] = self.get("regions")
        return found

    @property
    def decoder(self) -> Decoder:
        """Predictions of the queries."""
        found: Decoder = self.get("decoder")
        return found


def shapes(view: Any) -> str:
    """The shapes of the tensors of a view, in words."""
    if isinstance(view, Tensor):
        return str(tuple(view.shape))
    if isinstance(view, list):
        return ", ".join(shapes(x) for x in view)
    parts = ((f.name, getattr(view, f.name)) for f in fields(view))
    return ", ".join(f"{name} {shapes(value)}" for name, value in parts if isinstance(value, Tensor))
