"""Localization distillation for D-FINE, whose queries predict a distribution for each side of a box."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.methods.dense_losses import distribution_kl
from taskkd.detection.methods.detr_distill import matched_queries
from taskkd.detection.shared import SharedImages
from taskkd.detection.terms import DetectionTerm
from taskkd.detection.views import Decoder
from taskkd.errors import RecipeError, ShapeError
from taskkd.terms import Run, Term, Weight

__all__ = ["QueryLocalization", "is_d_fine", "on_other_bins", "query_terms"]

PAIRS = "detection.localization_pairs"


def is_d_fine(model: nn.Module) -> bool:
    """Whether a module is a wrapped D-FINE."""
    from taskkd.detection.transformers_models import TransformersDetector

    return isinstance(model, TransformersDetector) and model.config.model_type == "d_fine"


def on_other_bins(probabilities: Tensor, positions: Tensor, bins: Tensor) -> Tensor:
    """A discrete distribution put on other bins: each atom is shared by its two neighbours, so that the mean stays.

    What lies outside goes to the outermost bin. Source: the projection of Bellemare et al. 2017 (C51).

    Args:
        probabilities, positions: (..., n) of the atoms.
        bins: (..., m), increasing.

    Returns:
        (..., m) probabilities.

    Example:
        >>> on_other_bins(torch.tensor([1.0]), torch.tensor([0.25]), torch.tensor([0.0, 1.0, 2.0])).tolist()
        [0.75, 0.25, 0.0]
    """
    at = positions.clamp(bins[..., :1], bins[..., -1:]).contiguous()
    upper = torch.searchsorted(bins.contiguous(), at).clamp(1, bins.shape[-1] - 1)
    low, high = bins.gather(-1, upper - 1), bins.gather(-1, upper)
    share = (at - low) / (high - low).clamp(min=1e-12)
    found = torch.zeros_like(bins, dtype=probabilities.dtype)
    found = found.scatter_add(-1, upper - 1, probabilities * (1 - share))
    return found.scatter_add(-1, upper, probabilities * share)


class QueryLocalization(DetectionTerm):
    """One part of LD at the queries that both sides' own predictions match to the same box of the ground truth.

    The last layer of the decoders counts. The two queries refine different boxes, so that the same bin means another
    place: the teacher's softened distribution is put on the student's bins (`on_other_bins`). This is our reading of
    LD for a detector with queries; there is no code of its authors for it.

    Args:
        name, weight: see `Term`.
        student, teacher: two D-FINE.
        part: "ld", the sides, weighted by the student's largest class probability; or "kd", a softmax over classes.
        temperature: of this part.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        part: Literal["ld", "kd"],
        temperature: float,
        weight: Weight = 1.0,
    ) -> None:
        if not (is_d_fine(student) and is_d_fine(teacher)):
            raise RecipeError(f"term {name!r}: queries with distributions are D-FINE's; both sides must be one.")
        super().__init__(name, student, teacher, student_views=("decoder",), teacher_views=("decoder",), weight=weight)
        self.part, self.temperature = part, temperature

    def forward(self, run: Run) -> Tensor:
        own, other = self.student_views(run).decoder, self.teacher_views(run).decoder
        if own.logits.shape[-1] != other.logits.shape[-1]:
            raise ShapeError(
                f"term {self.name!r}: the student has {own.logits.shape[-1]} classes, the teacher "
                f"{other.logits.shape[-1]}."
            )
        if PAIRS not in run.notes:
            run.notes[PAIRS] = same_objects(own, other, self.student_views(run).images)
        image, mine, theirs = run.notes[PAIRS]
        logits, target = own.logits[image, -1, mine], other.logits[image, -1, theirs]
        if self.part == "kd":
            return distribution_kl(logits, target, temperature=self.temperature)
        certain = logits.detach().float().sigmoid().amax(-1)
        sides, aim = self._sides(own, image, mine), self._sides(other, image, theirs)
        soft = on_other_bins((aim[0] / self.temperature).softmax(-1), aim[1], sides[1])
        # as logits that the temperature gives back
        again = soft.clamp(min=1e-12).log() * self.temperature
        return distribution_kl(sides[0], again, temperature=self.temperature, weights=certain)

    def _sides(self, decoder: Decoder, image: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """(M, 4, bins): logits, and how far outwards the bins lie."""
        assert decoder.corners is not None and decoder.edges is not None, "D-FINE has both"
        outwards = decoder.edges.new_tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
        return decoder.corners[image, -1, query].float(), decoder.edges[image, -1, query].float() * outwards


@torch.no_grad()
def same_objects(own: Decoder, other: Decoder, images: SharedImages) -> tuple[Tensor, Tensor, Tensor]:
    """Of each box of the ground truth: its image, and the queries of both sides that are matched to it."""
    found: list[list[Tensor]] = [[], [], []]
    for i, (boxes, labels, (height, width)) in enumerate(zip(images.boxes, images.labels, images.sizes, strict=True)):
        size = boxes.new_tensor([width, height, width, height])
        centred = torch.cat([boxes[:, :2] + boxes[:, 2:], 2 * (boxes[:, 2:] - boxes[:, :2])], 1) / 2 / size
        truth = F.one_hot(labels - 1, own.logits.shape[-1]).to(own.logits.dtype)[None], centred[None]
        sides = []
        for decoder in (own, other):
            predicted = decoder.logits[i : i + 1, -1], decoder.boxes[i : i + 1, -1]
            queries, truths = (x[0] for x in matched_queries(predicted, truth))
            sides.append(dict(zip(truths.tolist(), queries.tolist(), strict=True)))
        both = sorted(sides[0].keys() & sides[1].keys())  # of more boxes than queries some have none
        for k, values in enumerate(([i] * len(both), *([side[j] for j in both] for side in sides))):
            found[k].append(torch.tensor(values, dtype=torch.int64, device=own.logits.device))
    image, mine, theirs = (torch.cat(x) for x in found)
    return image, mine, theirs


def query_terms(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: float,
    class_weight: float,
    temperature: float,
    class_temperature: float,
) -> list[Term]:
    """The terms of `localization` for two D-FINE."""
    terms: list[Term] = []
    if weight > 0:
        terms.append(
            QueryLocalization("localization", student, teacher, part="ld", temperature=temperature, weight=weight)
        )
    if class_weight > 0:
        terms.append(
            QueryLocalization(
                "classification", student, teacher, part="kd", temperature=class_temperature, weight=class_weight
            )
        )
    return terms
