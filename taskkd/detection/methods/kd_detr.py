"""KD-DETR (Wang et al. 2024)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.detection.boxes import paired_giou
from taskkd.detection.families import family_of
from taskkd.detection.terms import DetectionTerm
from taskkd.detection.transformers_families import Queries
from taskkd.errors import RecipeError, ShapeError
from taskkd.losses.primitives import check_temperature, full_precision, safe_divide, softened_kl
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = ["SharedQueries", "kd_detr", "query_difference", "shared_queries", "shared_query_parts"]

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


# ---- the term


def query_difference(student: nn.Module, teacher: nn.Module) -> str | None:
    """Why the student's decoder cannot run on the teacher's queries, in words; None: it can."""
    known = []
    for who, model in (("student", student), ("teacher", teacher)):
        family = family_of(model, who)
        if "queries" not in family.views:
            return f"the {who}, {family.name}, has no queries of its own that another decoder could run on"
        known.append((family, family.notes["queries"]))
    (own, (kind, width)), (other, (teacher_kind, teacher_width)) = known
    if kind != teacher_kind:
        return f"the student, {own.name}, and the teacher, {other.name}, have queries of different kinds"
    if width != teacher_width:
        return f"the student's queries have {width} numbers each, the teacher's {teacher_width}"
    return None


class SharedQueries(DetectionTerm):
    """Student and teacher decode the same queries: the teacher's own, and random ones drawn anew in every step.

    The student's decoder runs once more for each group, on what its encoder gave in this run; the backbone does not.
    Random queries have mean and variance of the teacher's own. The losses of all layers that the student trains on,
    each against the teacher's last, are summed.

    Args:
        name, student, teacher, weight: see `Term`.
        random_queries: how many; 0: none.
        options: of `shared_queries`.

    Raises:
        RecipeError: the two cannot share queries, or their classes differ.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        random_queries: int = 300,
        options: dict[str, Any] | None = None,
        weight: Weight = 1.0,
    ) -> None:
        difference = query_difference(student, teacher)
        if difference is not None:
            decoders = all("decoder" in family_of(model).views for model in (student, teacher))
            other = "`detr_distill` matches the predictions" if decoders else "`pearson_kd` compares the maps"
            raise RecipeError(f"term {name!r}: {difference}; {other} of such pairs.")
        views = {"student_views": ("queries",), "teacher_views": ("queries", "decoder")}
        super().__init__(name, student, teacher, **views, weight=weight)
        check_classes(name, student, teacher)
        self.random_queries, self.options = random_queries, dict(options or {})

    def forward(self, run: Run) -> Tensor:
        own: Queries = self.student_views(run).get("queries")
        teacher = self.teacher_views(run)
        theirs: Queries = teacher.get("queries")
        queries, known = theirs.own.detach(), teacher.decoder
        value = self._compared(own, queries, (known.logits[:, -1], known.boxes[:, -1]))
        if self.random_queries:
            drawn = random_like(queries, self.random_queries)
            with torch.no_grad():
                found = theirs.decode(drawn)
            value = value + self._compared(own, drawn, (found.logits[:, -1], found.boxes[:, -1]))
        return value

    def _compared(self, own: Queries, queries: Tensor, teacher: Predictions) -> Tensor:
        """The sum over the student's layers."""
        found = own.decode(queries)
        layers = found.logits.shape[1]
        logits, boxes = (x.unsqueeze(1).expand(-1, layers, -1, -1).flatten(0, 1) for x in teacher)
        student = found.logits.flatten(0, 1), found.boxes.flatten(0, 1)
        options = {"activation": found.activation, **self.options}
        return layers * shared_queries(student, (logits.detach(), boxes.detach()), **options)


def check_classes(name: str, student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a pair whose predictions are of different classes.

    Raises:
        RecipeError: their numbers, or what makes probabilities of logits, differ.
    """
    own, other = family_of(student, "student").notes, family_of(teacher, "teacher").notes
    if own["classes"] != other["classes"]:
        raise RecipeError(
            f"term {name!r}: the student has {own['classes']} classes, the teacher {other['classes']}; predictions are "
            "compared class by class: expected the same, or a `label_map`. Feature methods (`pearson_kd`) need neither."
        )
    if own["activation"] != other["activation"]:
        raise RecipeError(
            f"term {name!r}: the student's probabilities come of a {own['activation']}, the teacher's of a "
            f"{other['activation']}: DETR goes with DETR, all others with each other."
        )


def random_like(queries: Tensor, count: int) -> Tensor:
    """`count` queries, normally distributed with mean and standard deviation of each of the numbers of `queries`.

    Args:
        queries: (queries, width) or (batch, queries, width).
        count: how many.

    Returns:
        (count, width).
    """
    flat = queries.flatten(0, -2)
    spread, mean = torch.std_mean(flat, 0, correction=0)
    return mean + spread * torch.randn(count, flat.shape[1], dtype=flat.dtype, device=flat.device)


def kd_detr(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: Annotated[float, Gt(0)] = 10.0,
    kl: Annotated[float, Ge(0)] = 1.0,
    l1: Annotated[float, Ge(0)] = 5.0,
    giou: Annotated[float, Ge(0)] = 2.0,
    random_queries: Annotated[int, Ge(0)] = 300,
    weight: Annotated[float, Ge(0)] = 1.0,
    compat: Compat = "none",
) -> Method:
    """The student decodes the teacher's queries and random ones, and learns what the teacher makes of them.

    Source: Wang et al. 2024, "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation
    Points Sampling"; defaults of the released code for DAB-DETR. There the divergence is summed over the images of a
    process, here it is a mean over them: with n images on each GPU `kl=n` (or `compat="official"`) is theirs.

    Args:
        student, teacher: two DETR, two Conditional DETR or two Deformable DETR, with queries of one width.
        temperature: of the divergence of classes.
        kl, l1, giou: weights of the three parts.
        random_queries: drawn in every step.
        weight: of all.
        compat: see `shared_queries`.

    Raises:
        RecipeError: the two cannot share queries, or their classes differ.
    """
    options = {"temperature": temperature, "kl": kl, "l1": l1, "giou": giou, "compat": compat}
    term = SharedQueries("queries", student, teacher, random_queries=random_queries, options=options, weight=weight)
    return Method("kd_detr", [Stage("distil", [term])], ("labels",))
