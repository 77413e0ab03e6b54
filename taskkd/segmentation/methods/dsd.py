"""DSD: double similarity distillation (Feng et al. 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import RecipeError, ShapeError
from taskkd.losses.primitives import check_mask, check_same_shape, full_precision, l2_normalise, masked_mean
from taskkd.segmentation.methods.beside import check_classes, soft_terms
from taskkd.segmentation.similarity import average_pool
from taskkd.segmentation.terms import Ignore, MapTerm, valid_at
from taskkd.stages import Method, Stage
from taskkd.terms import Match, Run, Term

__all__ = ["Residuals", "category_similarity", "dsd", "residual_attention"]


def _residuals(maps: Sequence[Tensor], size: tuple[int, int], mask: Tensor | None) -> list[Tensor]:
    """Of all pairs of maps the difference of their attention, (N, h, w), of length 1."""
    attention = []
    for x in maps:
        q = F.adaptive_avg_pool2d(x.square().mean(1, keepdim=True), size)[:, 0]
        if mask is not None:
            q = torch.where(mask > 0, q, torch.zeros_like(q))
        attention.append(l2_normalise(q.flatten(1)))
    return [l2_normalise(b - a).reshape(-1, *size) for a, b in itertools.combinations(attention, 2)]


@full_precision
def residual_attention(student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """How attention changes between layers: `(R_s - R_t)^2`, mean over pairs of layers, batch and pixels (PSD).

    `R` is the difference of the attention maps `mean_c x^2` of two layers, each map and `R` of length 1. Maps are
    averaged to the smallest size there is.

    Source: Feng, Sun, Diao, Li, Gao 2021, "Double Similarity Distillation for Semantic Image Segmentation"; formula and
    scaling of the code of CIRKD.

    Args:
        student, teacher: as many maps (N, C, h, w) of each, at least two; channels and sizes may differ.
        mask: booleans (N, h, w) at the smallest size; pixels left out do not count in the lengths either.

    Raises:
        ShapeError: fewer than two maps, or not as many of each.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ShapeError(
            "`residual_attention` compares layers: it needs as many maps of the student as of the teacher, at least "
            f"two, got {len(student)} and {len(teacher)}."
        )
    size = smallest((*student, *teacher))
    if mask is not None:
        check_mask(mask, torch.Size((len(student[0]), *size)))
    pairs = zip(_residuals(student, size, mask), _residuals(teacher, size, mask), strict=True)
    return torch.stack([masked_mean((s - t).square(), mask) for s, t in pairs]).mean()


def smallest(maps: Sequence[Tensor]) -> tuple[int, int]:
    """The least height and the least width of several maps."""
    return min(x.shape[2] for x in maps), min(x.shape[3] for x in maps)


@full_precision
def category_similarity(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, pool: int = 2, mask: Tensor | None = None
) -> Tensor:
    """Mean squared difference of the products of all pairs of classes' softmax over space (CSD).

    Source: Feng et al. 2021, as `residual_attention`; no factor `T^2`.

    Args:
        student, teacher: (N, K, h, w) of one shape, logits.
        temperature: of the softmax, positive.
        pool: averages of so many pixels each way first.
        mask: booleans (N, h, w); pixels left out have no share in the softmax.

    Raises:
        ShapeError: shapes differ, or the mask does not fit.
    """
    check_same_shape(student, teacher, "category_similarity")
    if mask is not None:
        check_mask(mask, student[:, 0].shape)
    products = []
    for x in (student, teacher):
        small, valid = average_pool(x, pool, mask)
        small = small / temperature
        if valid is not None:
            small = small.masked_fill(~valid[:, None], torch.finfo(x.dtype).min)
        share = small.flatten(2).softmax(2)
        products.append(share @ share.mT)
    some = None if mask is None else mask.flatten(1).any(1)  # a sample of padding alone
    return masked_mean((products[0] - products[1]).square(), some)


class Residuals(Match):
    """`residual_attention` of the maps of several taps, at the smallest size of them.

    Args:
        name, student, teacher: see `Match`.
        ignore: pixels that do not count, see `valid_at`.
        **options: of `Match`.
    """

    columns = ("labels", "valid", "unlabelled")

    def __init__(
        self, name: str, student: Sequence[str], teacher: Sequence[str], *, ignore: Ignore = "padding", **options: Any
    ) -> None:
        super().__init__(name, residual_attention, student, teacher, **options)
        self.ignore: Ignore = ignore
        self.plain = False  # the mask differs from batch to batch

    def _options(self, run: Run, like: Tensor) -> dict[str, Any]:
        size = smallest([run.student[n] for n in self.student_pairs] + [run.teacher[n] for n in self.teacher_pairs])
        return {**super()._options(run, like), "mask": valid_at(run.batch, size, self.ignore)}


def _layers(views: Any) -> tuple[str | None, ...]:
    return views.stages[-1] if views.stages else None, views.feature, views.logits


def layers_of(student: nn.Module, teacher: nn.Module) -> tuple[list[str], list[str]]:
    """The taps of the backbone's last map, the map before the classifier and the logits, as far as both name them.

    Raises:
        RecipeError: only the logits are left.
    """
    own, other = (_layers(m.views) for m in (student, teacher))
    found = [(s, t) for s, t in dict.fromkeys(zip(own, other, strict=True)) if s is not None and t is not None]
    if len(found) < 2:
        raise RecipeError(
            "dsd compares layers, but student and teacher have nothing but logits in common: name the taps of the "
            "features (`feature=` of `Segmenter`). pixel=0 leaves this out."
        )
    return [s for s, _ in found], [t for _, t in found]


def dsd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    pixel: Annotated[float, Ge(0)] = 1000.0,
    category: Annotated[float, Ge(0)] = 10.0,
    category_temperature: Annotated[float, Gt(0)] = 4.0,
    kd: Annotated[float, Ge(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    ignore: Ignore = "padding",
) -> Method:
    """How attention changes from layer to layer, how alike the maps of two classes are, and soft targets.

    Source: Feng, Sun, Diao, Li, Gao 2021, "Double Similarity Distillation for Semantic Image Segmentation", with
    formula, layers and weights of the code of CIRKD (Yang C. et al. 2022), the defaults: the layers are the backbone's
    last map, the map before the classifier, and the logits.

    Args:
        student, teacher: models with `views.logits` and `views.stages` or `views.feature`, and the same classes; a
            layer that one of them does not name is left out.
        pixel: of `residual_attention`.
        category, category_temperature: of `category_similarity`.
        kd, temperature: of the soft targets on logits.
        ignore: pixels that do not count; the authors count all ("none").

    Raises:
        RecipeError: the logits are the only layer of both, or the classes differ.
    """
    if category > 0:
        check_classes(student, teacher, "category=0 and kd=0 leave this out.")
    terms: list[Term] = []
    if pixel > 0:
        terms.append(Residuals("attention", *layers_of(student, teacher), weight=pixel, ignore=ignore))
    if category > 0:
        taps = (str(m.views.logits) for m in (student, teacher))  # type: ignore[union-attr]
        options: dict[str, Any] = {"weight": category, "temperature": category_temperature}
        terms.append(MapTerm("categories", category_similarity, *taps, ignore=ignore, **options))
    terms += soft_terms(student, teacher, kd, temperature, ignore)
    return Method("dsd", [Stage("distil", terms)], ("labels",))
