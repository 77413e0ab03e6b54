"""Structured knowledge distillation (Liu et al. 2019): pixels, pairs of regions, and whole maps before a judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd import losses
from taskkd.adversarial import Adversarial
from taskkd.errors import RecipeError, nearest
from taskkd.losses.primitives import full_precision
from taskkd.schedules import polynomial
from taskkd.segmentation.discriminators import Preprocessing, SelfAttentionDiscriminator, Small, probabilities
from taskkd.segmentation.terms import Ignore, MapTerm, resized
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term

__all__ = ["Holistic", "Preset", "pixel_sum", "structured"]

Preset: TypeAlias = Literal["corrected", "ce208e1", "d1ec858", "cvpr_19", "cirkd"]
Scores: TypeAlias = Literal["probabilities", "logits"]
#: images of a batch in the published script, over which its pixel-wise loss is a sum
PUBLISHED_BATCH = 8


@full_precision
def pixel_sum(student: Tensor, teacher: Tensor, *, over: Literal["classes", "memory"] = "classes") -> Tensor:
    """The pixel-wise loss as released: `-sum softmax(teacher) log softmax(student) / (H W)`, a sum over the batch.

    Source: Liu et al. 2019, their code. It doubles with the batch; `losses.kl_divergence(dim=1)` is the mean, without
    the teacher's entropy.

    Args:
        student, teacher: logits (batch, classes, H, W).
        over: "classes", or as the release before 3914ec7 "memory": of as many values as there are classes that lie
            side by side in memory, mostly pixels of one class in a row, which is a defect.

    Raises:
        ShapeError: the shapes differ.
    """
    batch, classes = student.shape[:2]
    if over == "memory":
        student, teacher = (x.contiguous().view(-1, classes) for x in (student, teacher))
    return batch * losses.soft_cross_entropy(student, teacher, dim=1)


class Holistic(Adversarial):
    """The game of structured distillation: a judge of whole maps of scores, given the image.

    Args:
        name: see `Term`.
        student, teacher: taps of logits (batch, classes, h, w); the student's are resized to the teacher's height and
            width where they differ.
        scores: what the judge sees: "probabilities" or "logits".
        condition: it also sees the images (`batch.images`, as they are there: 0 to 1), resized to the map.
        align_corners: of that resizing.
        **options: of `Adversarial`.

    Raises:
        TaskkdError: as `Adversarial`.
        ShapeError: when it runs, the two sides have different classes.
    """

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str,
        *,
        scores: Scores = "probabilities",
        condition: bool = True,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            name,
            student,
            teacher,
            select=probabilities if scores == "probabilities" else None,
            condition="batch.images" if condition else (),
            **options,
        )
        self.align_corners = align_corners

    def _sides(self, run: Run) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        own, other = self.student_pairs[0], self.teacher_pairs[0]
        student, teacher = run.student.get(own), run.teacher.get(other)
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            run = replace(run, student={**run.student, own: resized(student, teacher.shape[2:])})
        students, teachers, conditions = super()._sides(run)
        # Resized here and not in the judge, so that a penalty on them is one of what it sees.
        size = students[0].shape[2:]
        sized = (F.interpolate(c, size, mode="bilinear", align_corners=self.align_corners) for c in conditions)
        return students, teachers, tuple(sized)


@dataclass(frozen=True)
class _Variant:
    """What the released versions differ in; the defaults are ce208e1's."""

    pixel_loss: Callable[..., Tensor] = pixel_sum
    pixel_weight: float = 10.0
    pixel_factor: float = 1.0
    pair_weight: float = 0.5
    pair_options: Mapping[str, Any] = field(default_factory=lambda: {"scale": 0.5, "detach_norm": True})
    holistic_weight: float = 0.1
    scores: Scores = "logits"
    condition: bool = False
    preprocessing: Preprocessing | None = "batch_norm"
    game: Literal["wasserstein", "hinge"] = "wasserstein"
    adam: bool = False
    poly: bool = True
    ignore: Ignore = "none"
    official: bool = True


_CONDITIONAL: dict[str, Any] = {"scores": "probabilities", "condition": True, "preprocessing": None}
_MEAN = partial(losses.kl_divergence, dim=1)
_VARIANTS: dict[str, _Variant] = {
    "corrected": _Variant(
        pixel_loss=_MEAN,
        pixel_factor=PUBLISHED_BATCH,
        pair_options={"scale": 0.5},
        adam=True,
        ignore="padding",
        official=False,
        **_CONDITIONAL,
    ),
    "ce208e1": _Variant(),
    "d1ec858": _Variant(pixel_loss=partial(pixel_sum, over="memory")),
    "cvpr_19": _Variant(**_CONDITIONAL),
    "cirkd": _Variant(
        pixel_loss=_MEAN,
        pixel_weight=1.0,
        pair_weight=10.0,
        pair_options={"window": 2},
        holistic_weight=1e-3,
        game="hinge",
        adam=True,
        poly=False,
    ),
}


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=4e-4, betas=(0.9, 0.99))


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=4e-4, momentum=0.9, weight_decay=5e-4)


def _holistic(taps: tuple[str, str], variant: _Variant, *, width: int, learning_rate: float, small: Small) -> Holistic:
    def judge(maps: Tensor, *conditions: Tensor) -> nn.Module:
        return SelfAttentionDiscriminator(
            maps.shape[1] + sum(c.shape[1] for c in conditions),
            width=width,
            preprocessing=variant.preprocessing,
            small=small,
            overwrite=variant.official,
        )

    return Holistic(
        "holistic",
        *taps,
        scores=variant.scores,
        condition=variant.condition,
        align_corners=variant.official,
        discriminator=judge,
        game=variant.game,
        penalty=10.0 if variant.game == "wasserstein" else 0.0,
        penalise_conditions=variant.official and variant.condition,
        discriminator_weight=0.1,
        optimizer=_adam if variant.adam else _sgd,
        learning_rate=polynomial(learning_rate) if variant.poly else learning_rate,
        weight=variant.holistic_weight,
    )


def _taps(student: nn.Module, teacher: nn.Module) -> tuple[str, str]:
    """The taps of the logits."""
    counts = [len(m.classes) for m in (student, teacher)]  # type: ignore[arg-type]
    if counts[0] != counts[1]:
        raise RecipeError(f"structured: the student has {counts[0]} classes, the teacher {counts[1]}.")
    own, other = (str(m.views.logits) for m in (student, teacher))  # type: ignore[union-attr]
    return own, other


def _feature(model: nn.Module, who: str) -> str:
    tap = model.views.feature  # type: ignore[union-attr]
    if tap is None:
        raise RecipeError(
            f"structured: the {who} does not name its features, on which pairs are compared: `feature=` of its "
            "`Segmenter` is the tap of the map before the classifier; `pair_weight=0` leaves the pairs out."
        )
    return str(tap)


def structured(
    student: nn.Module,
    teacher: nn.Module,
    *,
    preset: Preset = "corrected",
    pixel_weight: Annotated[float, Ge(0)] | None = None,
    pair_weight: Annotated[float, Ge(0)] | None = None,
    holistic_weight: Annotated[float, Ge(0)] | None = None,
    scale: Annotated[float, Interval(gt=0, le=1)] | None = None,
    condition: bool | None = None,
    game: Literal["wasserstein", "hinge"] | None = None,
    ignore: Ignore | None = None,
    width: Annotated[int, Gt(0)] = 64,
    learning_rate: Annotated[float, Gt(0)] = 4e-4,
    small: Small = "resize",
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Soft targets at every pixel + similarities of all pairs of regions + a judge of whole maps.

    Source: Liu, Chen, Liu, Qin, Luo, Wang 2019, "Structured Knowledge Distillation for Semantic Segmentation" (SKD),
    and their releases, which differ. No term looks at labels: unlabelled images may be in the batches.

    ============  ======================  =======================  ====================================================
    preset        pixels                  pairs                    judge
    ============  ======================  =======================  ====================================================
    "corrected"   mean KL, 10 x 8         0.5, two or three nodes  0.1, WGAN-GP on probabilities given the image, Adam
                                          a side
    "ce208e1"     cross-entropy, summed   0.5, norms as constants  0.1, WGAN-GP on raw logits after batch norm, without
                  over the batch, 10                               image, SGD; users report NaN
    "d1ec858"     as ce208e1, but of      as ce208e1               as ce208e1
                  values side by side in
                  memory, not classes
    "cvpr_19"     as ce208e1              as ce208e1               as the paper: probabilities and image, the penalty on
                                                                   both; SGD. That branch has no training script
    "cirkd"       mean KL, 1              10, nodes of 2 x 2       1e-3, hinge on raw logits after batch norm, Adam at a
                                          pixels                   constant rate
    ============  ======================  =======================  ====================================================

    Scaling: the released pixel-wise loss is a sum over the batch; in the published script, one GPU with 8 images, its
    weight 10 is 80 on the mean. "corrected" applies that 8, whatever the batch, so `pixel_weight` is the published
    number. The other releases are as their code, and their pixel-wise loss grows with the batch of a process. The
    script sets the pairs' weight to 0.5 (the code's default is 1, the paper is quoted with 10). The released judges
    overwrite the vectors of spectral normalisation between a forward and its backward; "corrected" does not.

    Args:
        student, teacher: segmentation networks with `views`.
        preset: see the table; the options that are None are as there.
        pixel_weight, pair_weight, holistic_weight: of the three terms; 0: left out.
        scale: height and width of a pooled region as a share of the map's, for the pairs.
        condition: whether the judge sees the image.
        game: "wasserstein" (with a gradient penalty of 10) or "hinge".
        ignore: pixels that the first two terms leave out, see `MapTerm`. None: "padding" of "corrected", "none" of the
            releases. The judge sees whole maps.
        width: of the judge's first convolution.
        learning_rate: of the judge, falling with power 0.9 but for "cirkd" (so a loop by hand calls
            `distiller.set_total`). The factor of its loss is 0.1.
        small: what is done to maps of less than 64 pixels before the judge, see `SelfAttentionDiscriminator`.
        task_weight: of the labels.

    Raises:
        RecipeError: there is no such preset, the networks have different classes, one names no features, or pixels
            shall be ignored by a released loss that cannot.
    """
    if preset not in _VARIANTS:
        raise RecipeError(f"structured: no preset {preset!r}{nearest(preset, _VARIANTS)}; {', '.join(_VARIANTS)}.")
    variant = _VARIANTS[preset]
    given: dict[str, Any] = {
        "pixel_weight": pixel_weight,
        "pair_weight": pair_weight,
        "holistic_weight": holistic_weight,
    }
    given |= {"condition": condition, "game": game, "ignore": ignore}
    if scale is not None:
        pair_options = {k: v for k, v in variant.pair_options.items() if k != "window"}
        variant = replace(variant, pair_options={**pair_options, "scale": scale})
    variant = replace(variant, **{option: value for option, value in given.items() if value is not None})
    terms: list[Term] = []
    taps = _taps(student, teacher)
    if variant.pixel_weight > 0:
        if variant.ignore != "none" and "mask" not in inspect.signature(variant.pixel_loss).parameters:
            raise RecipeError(
                f"structured: the pixel-wise loss of preset {preset!r}, as it was released, looks at all pixels; leave "
                "out `ignore`, or take preset 'corrected'."
            )
        weight = variant.pixel_weight * variant.pixel_factor
        terms.append(MapTerm("pixels", variant.pixel_loss, *taps, ignore=variant.ignore, weight=weight))
    if variant.pair_weight > 0:
        features = _feature(student, "student"), _feature(teacher, "teacher")
        options = {"ignore": variant.ignore, "weight": variant.pair_weight, **variant.pair_options}
        terms.append(MapTerm("pairs", losses.pairwise_similarity, *features, **options))
    if variant.holistic_weight > 0:
        terms.append(_holistic(taps, variant, width=width, learning_rate=learning_rate, small=small))
    return Method("structured", [Stage("distil", terms, task_weight)])
