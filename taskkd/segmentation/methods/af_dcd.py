"""Af-DCD: augmentation-free dense contrastive distillation (Fan et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.generation import masked_generative_loss
from taskkd.losses.primitives import check_mask, check_same_shape, check_temperature, full_precision, masked_mean
from taskkd.segmentation.methods.beside import feature_of, last_stage, soft_terms
from taskkd.segmentation.methods.masked_generative import MaskedGeneration
from taskkd.segmentation.terms import Ignore
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term

__all__ = ["OmniContrastive", "af_dcd", "kept_border", "omni_contrastive"]


def _patches(x: Tensor, patch: tuple[int, int], groups: int) -> Tensor:
    """(patches, cells of a patch * groups, C / groups); rows and columns beyond the last whole patch are left out."""
    n, c, h, w = x.shape
    rows, columns = min(patch[0], h), min(patch[1], w)
    whole = x[:, :, : h // rows * rows, : w // columns * columns]
    cut = whole.reshape(n, groups, c // groups, h // rows, rows, w // columns, columns)
    return cut.permute(0, 3, 5, 4, 6, 1, 2).reshape(-1, rows * columns * groups, c // groups)


@full_precision
def omni_contrastive(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.07,
    groups: int = 16,
    pool: int = 4,
    patch: int | tuple[int, int] = 4,
    mask: Tensor | None = None,
) -> Tensor:
    """Each group of channels of each cell is told from other groups of channels in its patch.

    `-log exp(-d(s_i, t_i) / T) / (exp(-d(s_i, t_i) / T) + sum_j exp(-d(s_i, t_j) / T))`, `d` the sum of absolute
    differences, `j` all other groups of channels of all cells of the patch; mean over batch, cells and groups, after
    taking the largest of `pool` x `pool` pixels. Not 0 for equal maps.

    Source: Fan, Li, Liu, Yao 2023, "Augmentation-free Dense Contrastive Knowledge Distillation for Efficient Semantic
    Segmentation" (omni-contrasting).

    Scaling: a mean; the authors sum over groups, `groups` times this.

    Args:
        student, teacher: (N, C, h, w) of one shape.
        temperature: positive.
        groups: divides C.
        pool: pixels, each way, that become one cell.
        patch: cells, each way or (high, wide), of a patch; those beyond the last whole patch are left out, where the
            authors' code fails.
        mask: booleans (N, h, w); cells with a pixel that is left out neither count nor are negatives.

    Raises:
        ShapeError: shapes differ, or the channels are no multiple of `groups`.
        ValueError: `temperature` is not positive.
    """
    check_same_shape(student, teacher, "omni_contrastive")
    check_temperature(temperature)
    n, c, h, w = student.shape
    if c % groups:
        raise ShapeError(
            f"`omni_contrastive` splits {c} channels into {groups} groups; expected a divisor of {c}, "
            f"as {max(g for g in range(1, groups + 1) if c % g == 0)}."
        )
    size, cells = (min(pool, h), min(pool, w)), (patch, patch) if isinstance(patch, int) else patch
    s, t = (_patches(F.max_pool2d(x, size), cells, groups) for x in (student, teacher))
    scores = -torch.cdist(s, t, p=1.0) / temperature
    group = torch.arange(s.shape[1], device=s.device) % groups
    left_out = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool, device=s.device)
    counts = None
    if mask is not None:
        check_mask(mask, student[:, 0].shape)
        whole = -F.max_pool2d(-mask[:, None].to(s.dtype), size)
        counts = _patches(whole.expand(n, groups, *whole.shape[2:]), cells, groups)[..., 0] > 0
        left_out = left_out | ~counts[:, None]
    own = scores.diagonal(dim1=1, dim2=2)
    others = scores.masked_fill(left_out, torch.finfo(scores.dtype).min)
    return masked_mean(others.logsumexp(2) - own, counts)


def kept_border(like: Tensor) -> Tensor:
    """(N, 1, h, w), 0 in the middle ninth of a map, else 1: the authors' mask that is not random.

    Args:
        like: (N, C, h, w).
    """
    n, _, h, w = like.shape
    kept = like.new_ones(n, 1, h, w)
    kept[:, :, h // 3 : 2 * h // 3, w // 3 : 2 * w // 3] = 0
    return kept


class OmniContrastive(MaskedGeneration):
    """Masked generation ("mimic") and `omni_contrastive` of what is generated ("contrast").

    Args:
        name, student, teacher, masked, ignore: see `MaskedGeneration`.
        mask: a "random" one, or the "middle" ninth.
        contrast_temperature, groups, pool, patch: of `omni_contrastive`.
        weights, **options: of `PartsTerm`.
    """

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str,
        *,
        mask: Literal["random", "middle"] = "random",
        contrast_temperature: float = 0.07,
        groups: int = 16,
        pool: int = 4,
        patch: int | tuple[int, int] = 4,
        **options: Any,
    ) -> None:
        super().__init__(name, student, teacher, **options)
        self.mask = mask
        self.contrast: dict[str, Any] = {
            "temperature": contrast_temperature,
            "groups": groups,
            "pool": pool,
            "patch": patch,
        }

    def keep(self, like: Tensor) -> Tensor:
        """See `MaskedGeneration`."""
        return kept_border(like) if self.mask == "middle" else super().keep(like)

    def parts(self, run: Run) -> Mapping[str, Tensor]:
        """Both losses of what is generated once."""
        s, t, valid = self.aligned(run)
        kept = self.keep(s) if valid is None else self.keep(s) * valid[:, None]
        generated = self.layers["generator"](s * kept.to(s.dtype))
        mimic = masked_generative_loss(generated, t, generator=nn.Identity(), kept=torch.ones_like(kept), mask=valid)
        return {"mimic": mimic, "contrast": omni_contrastive(generated, t, mask=valid, **self.contrast)}


def af_dcd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    on: Literal["backbone", "feature"] = "backbone",
    mimic: Annotated[float, Ge(0)] = 4e-5,
    contrast: Annotated[float, Ge(0)] = 1e-3,
    masked: Annotated[float, Interval(ge=0, lt=1)] = 0.75,
    mask: Literal["random", "middle"] = "random",
    contrast_temperature: Annotated[float, Gt(0)] = 0.07,
    groups: Annotated[int, Gt(0)] = 16,
    pool: Annotated[int, Gt(0)] = 4,
    patch: Annotated[int, Gt(0)] = 4,
    kd: Annotated[float, Ge(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    ignore: Ignore = "padding",
) -> Method:
    """A masked map generates the teacher's, and its groups of channels are told from others nearby; soft targets.

    Source: Fan, Li, Liu, Yao 2023, "Augmentation-free Dense Contrastive Knowledge Distillation for Efficient Semantic
    Segmentation" (Af-DCD), and their code. Their weights of `mimic`, `contrast` and `kd` are the defaults, on
    Cityscapes 2e-6, 0.005 and 1, on ADE20K 4e-5, 0.04 and 0.5; they clip the gradient of the generator at 15
    (`max_grad_norm` here is of all).

    Scaling: `mimic` is of a sum over channels and cells, as theirs; `contrast` is multiplied by `groups`, over which
    they sum.

    Args:
        student, teacher: models with `views.stages` or `views.feature`, and `views.logits`.
        on: the "backbone"'s last map, or the "feature" before the classifier.
        mimic, contrast: weights.
        masked: the share of cells that a random mask leaves out.
        mask: a "random" one, or the "middle" ninth (their `rand_mask=False`).
        contrast_temperature, groups, pool, patch: see `omni_contrastive`.
        kd, temperature: of the soft targets on logits.
        ignore: pixels that do not count; the authors count all ("none").
    """
    tap = last_stage if on == "backbone" else feature_of
    term = OmniContrastive(
        "contrast",
        tap(student, "student"),
        tap(teacher, "teacher"),
        weights={"mimic": mimic, "contrast": contrast * groups},
        masked=masked,
        mask=mask,
        contrast_temperature=contrast_temperature,
        groups=groups,
        pool=pool,
        patch=patch,
        ignore=ignore,
    )
    terms: list[Term] = [term, *soft_terms(student, teacher, kd, temperature, ignore)]
    return Method("af_dcd", [Stage("distil", terms)], ("labels",))
