"""Margin softmax: functions from cosines to logits, one per paper, in the variants that are in use.

All take `cosines` (N, C) of embeddings to class centres and `labels` (N,), -1 where a sample's class is not among
these columns (none, or on another rank), and return logits (N, C) for a softmax cross-entropy. They compute in fp32
(fp64 stays fp64); gradients are finite at cosines of 1 and -1, which rounding reaches and passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from taskkd.errors import TaskkdError, nearest
from taskkd.losses.primitives import full_precision

__all__ = [
    "VARIANTS",
    "Kind",
    "Variant",
    "adaface",
    "arcface",
    "cosface",
    "curricularface",
    "image_quality",
    "of_own_class",
]

Kind: TypeAlias = Literal["arcface", "cosface", "adaface", "curricularface"]
Variant: TypeAlias = Literal["exact", "insightface", "adaface_repo", "cvlface"]

#: which variants there are of each margin; "exact" is the paper's
VARIANTS: dict[str, tuple[str, ...]] = {
    "arcface": ("exact", "insightface", "adaface_repo"),
    "cosface": ("exact", "insightface", "adaface_repo"),
    "adaface": ("exact", "cvlface"),
    "curricularface": ("exact",),
}
#: how far the AdaFace repository keeps cosines and angles from their ends: in its ArcFace and CosFace, in its AdaFace
REPO_EPS, ADAFACE_EPS = 1e-4, 1e-3


def check_variant(kind: str, variant: str) -> None:
    """Refuse a margin or a variant of it that there is not.

    Raises:
        TaskkdError: the sentence names what there is.
    """
    for option, given, known in (("kind", kind, tuple(VARIANTS)), ("variant", variant, VARIANTS.get(kind, ()))):
        if given not in known:
            of = f" of {kind!r}" if option == "variant" else ""
            names = ", ".join(repr(k) for k in known)
            raise TaskkdError(f"`{option}`{of} must be one of {names}, got {given!r}{nearest(str(given), known)}.")


@full_precision
def arcface(
    cosines: Tensor,
    labels: Tensor,
    *,
    m: float | Tensor = 0.5,
    s: float = 64.0,
    variant: Variant = "exact",
    easy_margin: bool = False,
    monotone: bool = True,
    filter_above: float | None = None,
) -> Tensor:
    """ArcFace: the angle to the own class is widened by `m` radians.

    Source: Deng et al. 2019. Three codes by that name differ, in value and in gradient:

    - "exact" (the paper, TFace): `cos(theta + m)` with its true gradient; beyond `theta = pi - m`, where that would
      rise again, `cos(theta) - m sin(m)`.
    - "insightface" (arcface_torch): `cos(theta + m)` everywhere; its gradient with respect to the cosine is 1.
    - "adaface_repo": the widened angle ends at `pi - 1e-4`, without gradient there; all cosines at 1 - 1e-4.

    Args:
        cosines, labels: see the module.
        m: the margin in radians, or (N,) one for each sample. Default 0.5.
        s: scale of the logits. Default 64.
        variant: see above.
        easy_margin: of "exact": a margin only where `theta < pi / 2`, nothing beyond.
        monotone: of "exact": False is `cos(theta + m)` everywhere (AdaDistill, MarginDistillation).
        filter_above: cosines to other classes above it become 0, without gradient: probably the same person under
            another label (insightface's `interclass_filtering_threshold`). Default None: none.

    Raises:
        TaskkdError: an unknown variant.
    """
    check_variant("arcface", variant)
    cosines = _filtered(cosines, labels, filter_above)
    if variant == "adaface_repo":
        cosines = cosines.clamp(REPO_EPS - 1, 1 - REPO_EPS)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "exact": lambda c: _eased(c, m) if easy_margin else _monotone(c, m) if monotone else _widened(c, m),
        "insightface": lambda c: _straight_through((_angle(c) + m).cos(), c),
        "adaface_repo": lambda c: (c.acos() + m).clamp(REPO_EPS, math.pi - REPO_EPS).cos(),
    }
    return _with_target(cosines, labels, changes[variant]) * s


@full_precision
def cosface(
    cosines: Tensor,
    labels: Tensor,
    *,
    m: float = 0.4,
    s: float = 64.0,
    variant: Variant = "exact",
    filter_above: float | None = None,
) -> Tensor:
    """CosFace: the cosine to the own class less `m`.

    Source: Wang et al. 2018 (m 0.35); TFace and insightface take m = 0.4, as here.

    Args:
        cosines, labels, s, filter_above: see `arcface`.
        m: the margin.
        variant: "insightface" is "exact"; "adaface_repo" clamps all cosines at 1 - 1e-4.

    Raises:
        TaskkdError: an unknown variant.
    """
    check_variant("cosface", variant)
    cosines = _filtered(cosines, labels, filter_above)
    if variant == "adaface_repo":
        cosines = cosines.clamp(REPO_EPS - 1, 1 - REPO_EPS)
    return _with_target(cosines, labels, lambda c: c - m) * s


def image_quality(norms: Tensor, mean: Tensor | float, std: Tensor | float, *, h: float = 0.333) -> Tensor:
    """AdaFace's measure of an image's quality: `clamp(h (norm - mean) / (std + 1e-3), -1, 1)`, without gradient.

    Args:
        norms: (N,) of the raw embeddings; they count as 0.001 to 100.
        mean, std: of norms, a running mean.
        h: concentration: with 0.333 most samples lie between -1 and 1. Default 0.333.
    """
    return ((norms.detach().clamp(1e-3, 100.0) - mean) / (std + ADAFACE_EPS) * h).clamp(-1.0, 1.0)


@full_precision
def adaface(
    cosines: Tensor,
    labels: Tensor,
    quality: Tensor,
    *,
    m: float = 0.4,
    s: float = 64.0,
    variant: Variant = "exact",
    filter_above: float | None = None,
) -> Tensor:
    """AdaFace: `cos(theta - m z) - m (1 + z)` of the own class; z is the image's quality.

    Source: Kim et al. 2022. Hard samples count where images are good (z = 1), less where they are poor (z = -1).

    Args:
        cosines, labels, s, filter_above: see `arcface`.
        quality: z, (N,) in -1..1, see `image_quality`.
        m: Default 0.4.
        variant: "exact" is the authors' first code (cosines end at 1 - 1e-3, the angle at pi - 1e-3, without gradient
            there); "cvlface" their later one: no ends, and the gradient with respect to the cosine is 1.

    Raises:
        TaskkdError: an unknown variant.
    """
    check_variant("adaface", variant)
    cosines = _filtered(cosines, labels, filter_above)
    if variant == "cvlface":
        return _with_target(cosines, labels, lambda c: _straight_through(_adapted(_angle(c), quality, m), c)) * s
    cosines = cosines.clamp(ADAFACE_EPS - 1, 1 - ADAFACE_EPS)
    return _with_target(cosines, labels, lambda c: _adapted(c.acos(), quality, m, ADAFACE_EPS)) * s


@full_precision
def curricularface(
    cosines: Tensor,
    labels: Tensor,
    t: Tensor | float,
    *,
    m: float = 0.5,
    s: float = 64.0,
    targets: Tensor | None = None,
) -> Tensor:
    """CurricularFace: ArcFace ("exact"), with hard negatives weighed more as training goes on.

    A cosine to another class above `cos(theta_y + m)` is multiplied by `t + cos`. Source: Huang et al. 2020.

    Args:
        cosines, labels, m, s: see `arcface`.
        t: how far training is: the running mean of the cosines to the own classes, this batch's included.
        targets: (N,) the cosines to the own classes, where those may be on other ranks; default: from `cosines`.
    """
    own = of_own_class(cosines, labels) if targets is None else targets
    limit = _widened(own.detach(), m)
    if targets is None:
        limit = limit.masked_fill(labels < 0, math.inf)
    others = torch.where(cosines > limit[:, None], cosines * (t + cosines), cosines)
    return _with_target(others, labels, lambda _: _monotone(of_own_class(cosines, labels), m)) * s


# ---- parts


def of_own_class(cosines: Tensor, labels: Tensor) -> Tensor:
    """(N,): the cosines to the own classes; that of the first column where there is none."""
    return cosines.gather(1, labels.clamp(min=0)[:, None])[:, 0]


def _with_target(cosines: Tensor, labels: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`cosines` with `change(c)` in the place of the own class's `c`."""
    own = of_own_class(cosines, labels)
    changed = torch.where(labels >= 0, change(own), own)
    return cosines.scatter(1, labels.clamp(min=0)[:, None], changed[:, None])


def _filtered(cosines: Tensor, labels: Tensor, above: float | None) -> Tensor:
    if above is None:
        return cosines
    other = torch.arange(cosines.shape[1], device=labels.device) != labels[:, None]
    return cosines.masked_fill((cosines > above) & other, 0.0)


def _turn(m: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Cosine and sine of a margin."""
    return (m.cos(), m.sin()) if isinstance(m, Tensor) else (math.cos(m), math.sin(m))


def _widened(c: Tensor, m: float | Tensor) -> Tensor:
    """`cos(acos(c) + m)` with its gradient, which is kept finite where the sine is 0."""
    (cos_m, sin_m), sine = _turn(m), ((1 - c) * (1 + c)).clamp(min=torch.finfo(c.dtype).eps).sqrt()
    return c * cos_m - sine * sin_m


def _monotone(c: Tensor, m: float | Tensor) -> Tensor:
    """`_widened` as far as it falls with the angle, a shifted cosine beyond."""
    cos_m, sin_m = _turn(m)
    return torch.where(c > -cos_m, _widened(c, m), c - m * sin_m)


def _eased(c: Tensor, m: float | Tensor) -> Tensor:
    return torch.where(c > 0, _widened(c, m), c)


def _angle(c: Tensor) -> Tensor:
    """Without gradient, so that it may be that of a cosine of 1."""
    return c.detach().clamp(-1.0, 1.0).acos()


def _adapted(angle: Tensor, z: Tensor, m: float, eps: float | None = None) -> Tensor:
    turned = angle - m * z
    if eps is not None:
        turned = turned.clamp(eps, math.pi - eps)
    return turned.cos() - m * (1 + z)


def _straight_through(value: Tensor, c: Tensor) -> Tensor:
    """`value`, with the gradient of `c`."""
    return c + (value - c).detach()
