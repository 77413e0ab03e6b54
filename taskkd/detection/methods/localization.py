"""Localization distillation (Zheng et al. 2022): the distributions that a detector predicts for the sides of a box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.detection.methods.dense_losses import distribution_kl
from taskkd.detection.methods.localization_features import Region, RegionImitation, anchors_of
from taskkd.detection.methods.localization_queries import is_d_fine, query_terms
from taskkd.detection.methods.towers import called
from taskkd.detection.methods.vlr import assign_atss, vlr_weights
from taskkd.detection.shared import SharedImages
from taskkd.detection.terms import NeckTerm
from taskkd.errors import RecipeError, ShapeError
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = ["Localization", "ld_terms", "localization"]

Normalise = Literal["sum_w", "authors"]
Part = Literal["ld", "ld_vlr", "kd"]
PARTS: tuple[Part, ...] = ("ld", "ld_vlr", "kd")
NAMES: dict[Part, str] = {"ld": "localization", "ld_vlr": "localization-vlr", "kd": "classification"}


def ld_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_sides: Tensor,
    teacher_sides: Tensor,
    *,
    positive: Tensor,
    vlr: Tensor,
    temperature: float = 10.0,
    vlr_temperature: float = 10.0,
    class_temperature: float = 2.0,
    normalise: Normalise = "sum_w",
    parts: Sequence[Part] = PARTS,
) -> dict[Part, Tensor]:
    """The terms of LD, unweighted: the sides of positives, those in the valuable region, the classes of positives.

    `ld` is the mean of `T^2 KL / bins` over the four sides of positive anchors, weighted by the student's largest class
    probability; `ld_vlr` a quarter of the same with the region's weights; `kd` the mean over positives of
    `T^2 KL / classes` with a softmax over classes. Source: Zheng et al. 2022, "Localization Distillation for Dense
    Object Detection".

    Scaling: the authors do not divide the first two by the sum of the weights, so that they grow with the positives of
    a batch (they warn of more than 3 images on a GPU): `normalise="authors"`, of one level; they add up the levels.

    Args:
        student_logits, teacher_logits: (N, A, classes).
        student_sides, teacher_sides: (N, A, 4, bins), logits of the four distances.
        positive: (N, A) booleans.
        vlr: (N, A) weights of the region, as `vlr_weights` gives them.
        temperature, vlr_temperature, class_temperature: of the three.
        normalise: "sum_w" or "authors".
        parts: which to compute.

    Returns:
        `{"ld", "ld_vlr", "kd"}`: scalars; 0 where there is nothing.

    Raises:
        ShapeError: the shapes of student and teacher differ.
        ValueError: a temperature is not positive.
    """
    divisor = None if normalise == "sum_w" else student_sides.shape[-2]
    found: dict[Part, Tensor] = {}
    if "ld" in parts:
        certain = probabilities(student_logits).amax(-1) * positive
        found["ld"] = distribution_kl(
            student_sides, teacher_sides, temperature=temperature, weights=certain, divisor=divisor
        )
    if "ld_vlr" in parts:
        found["ld_vlr"] = 0.25 * distribution_kl(
            student_sides, teacher_sides, temperature=vlr_temperature, weights=vlr, divisor=divisor
        )
    if "kd" in parts:
        found["kd"] = distribution_kl(student_logits, teacher_logits, temperature=class_temperature, weights=positive)
    return found


def probabilities(logits: Tensor) -> Tensor:
    """Sigmoids without gradient, in fp32 at least."""
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


class Localization(NeckTerm):
    """One part of LD at every anchor of a head that predicts distributions, as GFL's.

    Anchors are one square for each cell, positives those of ATSS, as in GFL.

    Args:
        name, weight: see `Term`.
        student, teacher: any modules; images and boxes are those of the student's `transform`, or `batch.images` and
            `batch.targets` of a module of no known family.
        part: "ld", "ld_vlr" or "kd".
        sides, teacher_sides: taps of the maps (N, 4 bins, h, w) of all levels, finest first.
        classes, teacher_classes: taps of the maps (N, classes, h, w), likewise.
        temperature: of this part.
        strides: of the levels; None: the power of two nearest to image height / map height.
        anchor_scale: side of an anchor in strides.
        legacy_iof: see `vlr_weights`.
        normalise: see `ld_terms`.

    Raises:
        TaskkdError: the numbers of taps differ.
        ShapeError: maps of student and teacher differ in shape, or are no distributions of four sides.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        part: Part,
        sides: Sequence[str],
        classes: Sequence[str],
        teacher_sides: Sequence[str] | None = None,
        teacher_classes: Sequence[str] | None = None,
        temperature: float,
        strides: Sequence[float] | None = None,
        anchor_scale: float = 8.0,
        legacy_iof: bool = False,
        normalise: Normalise = "sum_w",
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, student, teacher, neck=sides, teacher_neck=teacher_sides, adapter=None, weight=weight)
        self.class_taps = tuple(classes)
        self.teacher_class_taps = self.class_taps if teacher_classes is None else tuple(teacher_classes)
        counts = [len(sides), len(self.class_taps), len(self.teacher_class_taps)]
        if len(set(counts)) > 1:
            raise RecipeError(f"localization: taps of {counts[0]} levels for the sides, {counts[1:]} for the classes.")
        self.student_taps = (*self.student_taps, *self.class_taps)
        self.teacher_taps = (*self.teacher_taps, *self.teacher_class_taps)
        self.part, self.temperature, self.strides, self.anchor_scale = part, temperature, strides, anchor_scale
        self.legacy_iof, self.normalise = legacy_iof, normalise

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The part's value over all levels."""
        positive, vlr = self._regions([(m.shape[2], m.shape[3]) for m in students], self.images(run))
        levels = [m.shape[2] * m.shape[3] for m in students]
        logits = (
            _rows([run.student[t] for t in self.class_taps]),
            _rows([run.teacher[t] for t in self.teacher_class_taps]),
        )
        sides = _sides(students, self.name), _sides(teachers, self.name)
        split = [levels] if self.normalise == "sum_w" else [[n] for n in levels]
        value, start = students[0].new_zeros(()), 0
        for own in split:
            at = slice(start, start := start + sum(own))
            value = value + ld_terms(
                *(x[:, at] for x in (*logits, *sides)), positive=positive[:, at], vlr=vlr[:, at], parts=[self.part],
                temperature=self.temperature, vlr_temperature=self.temperature, class_temperature=self.temperature,
                normalise=self.normalise,
            )[self.part]  # fmt: skip
        return value

    def _regions(self, shapes: list[tuple[int, int]], images: SharedImages) -> tuple[Tensor, Tensor]:
        """(N, A) positives and weights of the valuable region."""
        anchors = anchors_of(shapes, images, strides=self.strides, scale=self.anchor_scale)
        sizes = [h * w for h, w in shapes]
        boxes = [b.to(anchors.dtype) for b in images.boxes]
        positive = torch.stack([assign_atss(anchors, b, sizes) >= 0 for b in boxes])
        if self.part != "ld_vlr":
            return positive, torch.zeros_like(positive, dtype=anchors.dtype)
        return positive, torch.stack([vlr_weights(anchors, b, sizes, legacy_iof=self.legacy_iof) for b in boxes])


def _rows(maps: Sequence[Tensor]) -> Tensor:
    """Maps (N, k, h, w) of all levels as (N, A, k)."""
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)


def _sides(maps: Sequence[Tensor], name: str) -> Tensor:
    """Maps (N, 4 bins, h, w) of all levels as (N, A, 4, bins)."""
    if maps[0].shape[1] % 4 or maps[0].shape[1] < 8:
        raise ShapeError(
            f"term {name!r}: maps of {maps[0].shape[1]} channels are no distributions of four sides: expected 4 times "
            "the number of bins."
        )
    rows = _rows(maps)
    return rows.reshape(*rows.shape[:2], 4, -1)


def localization(
    student: nn.Module,
    teacher: nn.Module,
    *,
    sides: list[str] | None = None,
    classes: list[str] | None = None,
    teacher_sides: list[str] | None = None,
    teacher_classes: list[str] | None = None,
    weight: Annotated[float, Ge(0)] = 0.25,
    temperature: Annotated[float, Gt(0)] = 10.0,
    vlr_weight: Annotated[float, Ge(0)] = 0.25,
    vlr_temperature: Annotated[float, Gt(0)] = 10.0,
    class_weight: Annotated[float, Ge(0)] = 10.0,
    class_temperature: Annotated[float, Gt(0)] = 2.0,
    imitation_weight: Annotated[float, Ge(0)] = 0.0,
    imitation_region: Region = "fine_grained",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
    legacy_iof: bool = False,
    normalise: Normalise = "sum_w",
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Task loss + the distributions of a box's sides at positives and around them + the classes at positives.

    Source: Zheng et al. 2022, "Localization Distillation for Dense Object Detection" (LD). It needs heads that predict
    a distribution over distances for each side of a box: of GFL's name the taps of its maps; D-FINE's is known (see
    `QueryLocalization`, which is ours; it has no region around positives, `vlr_weight` does nothing there).

    Scaling: see `ld_terms`; the paper's RetinaNet has weight 5 and class_temperature 8. The paper's point is that
    feature imitation is not needed, so it is off; configurations of the released code have it beside the rest, with
    `imitation_weight=2` and the region "fine_grained".

    Args:
        student, teacher: any modules that tap names reach, or two D-FINE.
        sides, teacher_sides: taps of the distributions (N, 4 bins, h, w) of all levels, finest first.
        classes, teacher_classes: taps of the class logits (N, classes, h, w), likewise.
        weight, temperature: of the sides at positives.
        vlr_weight, vlr_temperature: of the sides in the valuable localization region.
        class_weight, class_temperature: of the classes at positives.
        imitation_weight: of the mean squared difference of the neck's maps in a region around the boxes; 0: left out.
        imitation_region: "fine_grained", "inside" or "vlr", see `RegionImitation`.
        neck, teacher_neck: taps of its maps (N, C, h, w) of all levels, finest first; None: those of the family.
        legacy_iof: the region as the released code computes it, whose "DIoU" divides by the anchor's area.
        normalise: "sum_w" divides by the sum of the weights, "authors" does not.
        task_weight: of the detector's own loss.

    Raises:
        RecipeError: no taps are named and the detectors predict no distributions.
        TaskkdError: features are to be imitated of a module of no known family, without `neck`.
    """
    maps: list[Term] = []
    if imitation_weight > 0:
        options: dict[str, Any] = {"neck": neck, "teacher_neck": teacher_neck, "region": imitation_region}
        options |= {"legacy_iof": legacy_iof, "normalise": normalise, "weight": imitation_weight}
        maps.append(RegionImitation("imitation", student, teacher, **options))
    if sides is None or classes is None:
        if not (is_d_fine(student) and is_d_fine(teacher)):
            raise RecipeError(no_distributions(student, teacher))
        heat = {"temperature": temperature, "class_temperature": class_temperature}
        parts = query_terms(student, teacher, weight=weight, class_weight=class_weight, **heat)
        return Method("localization", [Stage("distil", [*parts, *maps], task_weight)], ("labels",))
    temperatures: dict[Part, tuple[float, float]] = {
        "ld": (weight, temperature), "ld_vlr": (vlr_weight, vlr_temperature), "kd": (class_weight, class_temperature),
    }  # fmt: skip
    terms = [
        Localization(
            NAMES[part], student, teacher, part=part, sides=sides, classes=classes, teacher_sides=teacher_sides,
            teacher_classes=teacher_classes, temperature=at, legacy_iof=legacy_iof, normalise=normalise, weight=w,
        )
        for part, (w, at) in temperatures.items()
        if w > 0
    ]  # fmt: skip
    return Method("localization", [Stage("distil", [*terms, *maps], task_weight)], ("labels",))


def no_distributions(student: nn.Module, teacher: nn.Module) -> str:
    """Why LD does not go with a pair of detectors."""
    return (
        "localization compares distributions over the distance of each side of a box; the student "
        f"({called(student)}) or the teacher ({called(teacher)}) regresses one number for each side. "
        "D-FINE has distributions; of another head with them (GFL's) name the taps: sides=[...] and classes=[...], one "
        "for each level. For RetinaNet and FCOS: crosskd, bckd."
    )
