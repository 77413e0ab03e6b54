"""KD-DETR (Wang et al. 2024)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from taskkd.detection.boxes import paired_giou
from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_temperature, full_precision, safe_divide, softened_kl

__all__ = ["shared_queries", "shared_query_parts"]

Compat = Literal["none", "official"]
Activation = Literal["sigmoid", "softmax"]
Predictions = tuple[Tensor, Tensor]


def _parts(
    student: Predictions, teacher: Predictions, temperature: float, activation: Activation, compat: Compat
) -> tuple[Tensor, Tensor, Tensor]:
    (s, s_boxes), (t, t_boxes) = student, teacher
    if s.shape != t.shape or s_boxes.shape != t_boxes.shape or s.shape[:-1] != s_boxes.shape[:-1]:
        raise ShapeError(
            "`shared_queries` needs logits (batch, queries, classes) and boxes (batch, queries, 4) of the same "
            f"queries, got {tuple(s.shape)}, {tuple(s_boxes.shape)} of the student and {tuple(t.shape)}, "
            f"{tuple(t_boxes.shape)} of the teacher."
        )
    check_temperature(temperature)
    probability = t.sigmoid() if activation == "sigmoid" else t.softmax(-1)[..., :-1]
    weight = probability.amax(-1)
    images = 1 if compat == "official" else max(len(s), 1)
    kl = (weight * softened_kl(s, t, temperature, -1)).sum() / (s.shape[-1] * images)
    l1 = (weight * (s_boxes - t_boxes).abs().mean(-1)).sum()
    overlap = paired_giou(s_boxes, t_boxes, eps=1e-6 if compat == "official" else 1e-7)
    giou = (weight * (1 - overlap)).sum()
    return kl, safe_divide(l1, weight.sum()), safe_divide(giou, weight.sum())


def shared_query_parts(
    student: Predictions,
    teacher: Predictions,
    *,
    temperature: float = 10.0,
    activation: Activation = "sigmoid",
    compat: Compat = "none",
) -> dict[str, Tensor]:
    """The three unweighted parts of `shared_queries`: `{"kl", "l1", "giou"}`."""
    found: dict[str, Tensor] = {}
    for name, weights in (("kl", (1.0, 0.0, 0.0)), ("l1", (0.0, 1.0, 0.0)), ("giou", (0.0, 0.0, 1.0))):
        kl, l1, giou = weights
        found[name] = shared_queries(
            student, teacher, temperature=temperature, kl=kl, l1=l1, giou=giou, activation=activation, compat=compat
        )
    return found


@full_precision
def shared_queries(
    student: Predictions,
    teacher: Predictions,
    *,
    temperature: float = 10.0,
    kl: float = 1.0,
    l1: float = 5.0,
    giou: float = 2.0,
    activation: Activation = "sigmoid",
    compat: Compat = "none",
) -> Tensor:
    """Predictions of student and teacher from the same queries, weighted by how sure the teacher is.

    `w = max_c p_t`; `kl / N * sum_q w T^2 mean_c KL(softmax(t / T) || softmax(s / T))
    + l1 * sum_q w mean|s - t| / sum w + giou * sum_q w (1 - GIoU) / sum w`, with N images.

    Source: Wang et al. 2024, "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation
    Points Sampling". The authors sum the first part over the images of a batch, too: their value is N times ours there.

    Args:
        student, teacher: logits (batch, queries, classes) and boxes (batch, queries, 4), centre x, centre y, width,
            height in 0 to 1.
        temperature: of the softmax over classes.
        kl, l1, giou: weights of the parts.
        activation: what makes probabilities of logits: "sigmoid", or "softmax", whose last channel is "no object" and
            does not count in `w`.
        compat: "official": as released, summed over the batch, with 1e-6 added to areas.

    Raises:
        ShapeError: these are not predictions of the same queries.
        ValueError: the temperature is not positive.
    """
    first, second, third = _parts(student, teacher, temperature, activation, compat)
    return kl * first + l1 * second + giou * third
