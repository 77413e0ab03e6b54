"""Channel-wise distillation (Shu et al. 2021): where each channel is active."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.losses.primitives import (
    NOWHERE,
    check_mask,
    check_same_shape,
    full_precision,
    log_softmax,
    masked_mean,
)
from taskkd.segmentation.methods.beside import feature_of
from taskkd.segmentation.methods.soft_targets import logit_taps
from taskkd.segmentation.terms import Align, Ignore, MapTerm
from taskkd.stages import Method, Stage
from taskkd.terms import Run

__all__ = ["ChannelTerm", "channel_wise", "normalised_loss"]

Norm: TypeAlias = Literal["channel", "spatial", "channel_mean", "none"]
Divergence: TypeAlias = Literal["kl", "mse"]


def normalised_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    norm: Norm = "channel",
    divergence: Divergence = "kl",
    temperature: float | Tensor = 4.0,
    mask: Tensor | None = None,
) -> Tensor:
    """A divergence of maps that are normalised first, in the ways the authors compare.

    Source: Shu, Liu, Gao, Yan, Shen 2021, "Channel-wise Knowledge Distillation for Dense Prediction", and its code.

    Scaling: equal; a mean over batch and channels of "channel" and "channel_mean", else over batch and pixels. Of
    "none" their code looks at the first sample only and divides by the batch.

    Args:
        student, teacher: (batch, channels, H, W) of one shape.
        norm: "channel": each channel's softmax over space (their method); "spatial": each pixel's over channels;
            "channel_mean": each channel's mean; "none".
        divergence: "kl" of the first two, with `T^2`; "mse": the squared difference, summed over what is normalised.
        temperature: `T`, positive, of "kl".
        mask: booleans over pixels (batch, H, W), or over the batch.

    Raises:
        ShapeError: the shapes differ, or the mask does not fit.
        ValueError: `temperature` is not positive, or there is no such divergence of such a norm.
    """
    if norm not in ("channel", "spatial", "channel_mean", "none"):
        raise ValueError(f"`norm` is one of channel, spatial, channel_mean, none, got {norm!r}.")
    if divergence == "mse":
        return _squares(student, teacher, norm, mask)
    if divergence != "kl" or norm in ("channel_mean", "none"):
        raise ValueError(f"norm {norm!r} goes with 'mse', channel and spatial with 'kl' too; got {divergence!r}.")
    if norm == "channel":
        return losses.channel_wise(student, teacher, temperature=temperature, mask=mask)
    return losses.kl_divergence(student, teacher, temperature=temperature, dim=1, mask=mask)


@full_precision
def _squares(student: Tensor, teacher: Tensor, norm: Norm, mask: Tensor | None) -> Tensor:
    check_same_shape(student, teacher, "normalised_loss")
    pixels = student.select(1, 0).shape
    valid = student.new_ones(pixels)
    if mask is not None:
        check_mask(mask, pixels)
        valid = valid * (mask > 0).reshape(mask.shape + (1,) * (len(pixels) - mask.ndim))
    weight = valid.flatten(1)[:, None]
    s, t = (x.flatten(2).masked_fill(weight <= 0, 0) for x in (student, teacher))
    if norm == "channel":
        s, t = (log_softmax(x.masked_fill(weight <= 0, NOWHERE), 1.0, 2).exp() for x in (s, t))
        return masked_mean((s - t).square().sum(2), weight.amax(2)[:, 0])
    if norm == "channel_mean":
        s, t = (x.sum(2) / weight.sum(2).clamp(min=1) for x in (s, t))
        return masked_mean((s - t).square(), weight.amax(2)[:, 0])
    if norm == "spatial":
        s, t = (log_softmax(x, 1.0, 1).exp() for x in (s, t))
    return masked_mean((s - t).square().sum(1), weight[:, 0])


class ChannelTerm(MapTerm):
    """`MapTerm` whose mean over the teacher's channels is one over the student's, as CIRKD's code divides.

    Args:
        divide_by: "teacher", the channels after the adapter; "student": those before it, `teacher's / student's` times
            as much.
        *args, **options: of `MapTerm`.
    """

    def __init__(self, *args: Any, divide_by: Literal["teacher", "student"] = "teacher", **options: Any) -> None:
        super().__init__(*args, **options)
        self.divide_by = divide_by

    def forward(self, run: Run) -> Tensor:
        value: Tensor = super().forward(run)
        if self.divide_by == "teacher":
            return value
        own, other = run.student[self.student_pairs[0]], run.teacher[self.teacher_pairs[0]]
        scaled: Tensor = value * (other.shape[1] / own.shape[1])
        return scaled


def _bare(student: Tensor, teacher: Tensor) -> nn.Module:
    """CIRKD's adapter: a 1x1 convolution without bias, where the numbers of channels differ."""
    own, other = student.shape[1], teacher.shape[1]
    return nn.Identity() if own == other else nn.Conv2d(own, other, 1, bias=False)


def channel_wise(
    student: nn.Module,
    teacher: nn.Module,
    *,
    on: Literal["logits", "feature"] = "logits",
    temperature: Annotated[float, Gt(0)] = 4.0,
    weight: Annotated[float, Ge(0)] | None = None,
    norm: Norm = "channel",
    divergence: Divergence = "kl",
    adapter: Literal["conv1x1_bn_relu", "conv1x1", "none"] = "conv1x1_bn_relu",
    divide_by: Literal["teacher", "student"] = "teacher",
    align: Align = "teacher",
    ignore: Ignore = "padding",
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Each channel's softmax over space: where a class, or a feature, is active counts.

    Source: Shu, Liu, Gao, Yan, Shen 2021, "Channel-wise Knowledge Distillation for Dense Prediction" (CWD). In mmrazor
    logits have temperature 1 and weight 5 (Cityscapes) or 10 (ADE20K).

    Scaling: mean over batch and channels, as the authors'. CIRKD's version divides features by the student's channels,
    not the teacher's (512 over 128 makes its weight of 50 one of 200): `divide_by="student", adapter="conv1x1"`.

    Args:
        student, teacher: segmentation networks with `views`.
        on: "logits", or the "feature" before the classifier.
        temperature: of the softmax.
        weight: None: as published, 3 on logits and 50 on features.
        norm, divergence: see `normalised_loss`; other than "channel" and "kl" for comparisons.
        adapter: of features: "conv1x1_bn_relu", the authors'; "conv1x1", without bias and where the numbers of
            channels differ; or "none", for as many channels.
        divide_by: see above.
        align, ignore: see `MapTerm`. The papers' code has no mask: `ignore="none"`.
        task_weight: of the labels.

    Raises:
        RecipeError: the networks have different classes, or do not name their features.
    """
    options: dict[str, Any] = {"norm": norm, "divergence": divergence, "temperature": temperature}
    options |= {"align": align, "ignore": ignore, "divide_by": divide_by}
    if (norm in ("channel_mean", "none")) and divergence == "kl":
        raise RecipeError(f"channel_wise: norm {norm!r} goes with divergence 'mse'.")
    if on == "logits":
        taps = logit_taps(student, teacher, "channel_wise")
    else:
        taps = feature_of(student, "student"), feature_of(teacher, "teacher")
        options["adapter"] = {"conv1x1": _bare, "none": None}.get(adapter, adapter)
    if weight is None:
        weight = 3.0 if on == "logits" else 50.0
    term = ChannelTerm("channels", normalised_loss, *taps, weight=weight, **options)
    return Method("channel_wise", [Stage("distil", [term], task_weight)])
