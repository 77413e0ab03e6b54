"""Pixel-wise knowledge distillation: soft targets at every pixel."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.segmentation.terms import Align, Ignore, MapTerm
from taskkd.stages import Method, Stage

__all__ = ["logit_taps", "pixel_loss", "soft_targets"]


def pixel_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    form: Literal["kl", "cross_entropy"] = "kl",
    upsample: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))` over the classes, mean over pixels.

    Sources: Hinton et al. 2015; as CIRKD's code has it (Yang et al. 2022). `form="cross_entropy"` is that of Liu et al.
    2019, the same gradient; `upsample=8` an option of IFVD's code (Wang et al. 2020).

    Scaling: equal to CIRKD's. IFVD's and Shu et al.'s are `classes * T^2` times smaller; mmrazor's `batchmean` is
    `H * W` times larger; Liu et al. sum over the batch.

    Args:
        student, teacher: logits (batch, classes, H, W).
        temperature: `T`, positive.
        form: "kl", or "cross_entropy", which has the teacher's entropy added.
        upsample: the logits are made so many times as high and wide first (bilinear, corners aligned).
        mask: weights or booleans (batch, H, W) of pixels, or (batch,).

    Raises:
        ShapeError: the shapes differ.
        ValueError: `temperature` is not positive, or `form` neither.
    """
    if form not in ("kl", "cross_entropy"):
        raise ValueError(f"`form` is one of kl, cross_entropy, got {form!r}.")
    if upsample != 1:
        student, teacher = (
            F.interpolate(x, scale_factor=upsample, mode="bilinear", align_corners=True) for x in (student, teacher)
        )
        if mask is not None and mask.ndim == 3:
            mask = mask.repeat_interleave(upsample, 1).repeat_interleave(upsample, 2)
    loss = losses.kl_divergence if form == "kl" else losses.soft_cross_entropy
    return loss(student, teacher, temperature=temperature, dim=1, mask=mask)


def logit_taps(student: nn.Module, teacher: nn.Module, method: str) -> tuple[str, str]:
    """The taps of the native logits of two networks of the same classes.

    Raises:
        RecipeError: they have different numbers of classes.
    """
    counts = [len(m.classes) for m in (student, teacher)]  # type: ignore[arg-type]
    if counts[0] != counts[1]:
        raise RecipeError(f"{method} compares logits: the student has {counts[0]} classes, the teacher {counts[1]}.")
    own, other = (str(m.views.logits) for m in (student, teacher))  # type: ignore[union-attr]
    return own, other


def soft_targets(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: Annotated[float, Gt(0)] = 1.0,
    weight: Annotated[float, Ge(0)] = 1.0,
    form: Literal["kl", "cross_entropy"] = "kl",
    upsample: Annotated[int, Gt(0)] = 1,
    align: Align = "teacher",
    ignore: Ignore = "padding",
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Soft targets at every pixel of the native logits, beside the labels; unlabelled images may be in the batches.

    Source: Hinton, Vinyals, Dean 2015; the defaults are those of CIRKD (Yang et al. 2022), weight 1, temperature 1.

    Scaling: a mean over pixels, `T^2` included. Published weights in it: IFVD's and Shu et al.'s 10 (temperature 1) is
    `10 / classes`; the 10 of Liu et al., a sum over a batch of 8, is 80; mmrazor's `batchmean` weight times `H * W`.

    Args:
        student, teacher: segmentation networks with `views`.
        temperature: of the softmax.
        weight: of the term.
        form, upsample: see `pixel_loss`.
        align, ignore: see `MapTerm`. Papers' code has no mask: `ignore="none"`.
        task_weight: of the labels.

    Raises:
        RecipeError: the networks have different classes.
    """
    taps = logit_taps(student, teacher, "soft_targets")
    term = MapTerm(
        "logits",
        pixel_loss,
        *taps,
        weight=weight,
        align=align,
        ignore=ignore,
        temperature=temperature,
        form=form,
        upsample=upsample,
    )
    return Method("soft_targets", [Stage("distil", [term], task_weight)])
