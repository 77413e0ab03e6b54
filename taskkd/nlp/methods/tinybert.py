"""TinyBERT (Jiao et al. 2020)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt
from torch import nn

from taskkd import layer_maps, losses
from taskkd.errors import RecipeError, TaskkdError
from taskkd.nlp.layers import hidden_taps
from taskkd.nlp.methods.intermediate import (
    MASK,
    AttentionKind,
    Projection,
    attention_terms,
    hidden_terms,
    schedule_of,
)
from taskkd.nlp.methods.logit_terms import classes, logit_terms
from taskkd.nlp.models import check_same_labels, is_regression
from taskkd.stages import Method, Stage
from taskkd.terms import Term

__all__ = ["tinybert", "tinybert_general"]

Layers = Literal["uniform", "top", "bottom"]
Compat = Literal["masked", "official"]
MAPS = {"uniform": layer_maps.uniform, "top": layer_maps.last, "bottom": layer_maps.first}


def _intermediate(
    student: nn.Module,
    teacher: nn.Module,
    layers: Layers,
    attention: AttentionKind,
    projection: Projection,
    compat: Compat,
) -> list[Term]:
    counts = len(hidden_taps(student)) - 1, len(hidden_taps(teacher)) - 1
    official = compat == "official"
    try:
        pairs = layer_maps.skip(*counts) if official and layers == "uniform" else MAPS[layers](*counts)
    except TaskkdError as error:
        raise RecipeError(f"tinybert: {error}") from None
    if official and projection == "auto":
        projection = "shared"
    return [
        *attention_terms(student, teacher, pairs, kind=attention, average="official" if official else "valid"),
        *hidden_terms(student, teacher, pairs, projection=projection, mask=None if official else MASK),
    ]


def tinybert(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layers: Layers = "uniform",
    attention: AttentionKind = "scores",
    projection: Projection = "auto",
    temperature: Annotated[float, Gt(0)] = 1.0,
    intermediate_epochs: Annotated[float, Gt(0)] | None = 20.0,
    intermediate_learning_rate: Annotated[float, Gt(0)] | None = 5e-5,
    compat: Compat = "masked",
) -> Method:
    """Two stages: attention scores, hidden states and embeddings of mapped layers; then soft cross-entropy of logits.

    Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", task distillation. The
    first stage is long (20 epochs, 10 on large tasks, 50 on CoLA, on augmented data, constant learning rate 5e-5) and
    has no labels and no logits, so the last epoch is kept; the second follows the run's own training (3 epochs, 1e-5 to
    3e-5 and the best epoch in the paper). Start from a generally distilled student (`tinybert_general`) or from layers
    of the teacher; `data.augment` is their augmentation. In the paper's ablation the first stage, attention and
    augmentation each are worth more than the mapping.

    Scaling: means over the tokens that are no padding, where the released code averages over the padded batch;
    `compat="official"` does as it does, and pads every batch to the full length since its value depends on it: masked
    keys count 0 in the mean, padded queries and states are compared, one shared projection even for equal sizes, whole
    ratios of layers, soft cross-entropy over `batch * labels` without T^2; for regression labels alone, no teacher.
    Unlike the released code the teacher runs without dropout, and the student's head is the model's own.

    Args:
        student, teacher: models with the same head and labels, the student no deeper.
        layers: "uniform" (every k-th), "top" or "bottom" teacher layers.
        attention: "scores" before the softmax; "head_mean", their mean over heads, for other numbers of heads;
            "probabilities", for models whose scores cannot be recorded; "none".
        projection: of the student's states: "auto" (one shared where sizes differ), "shared", or one for each "layer".
        temperature: of the prediction stage.
        intermediate_epochs, intermediate_learning_rate: of the first stage; None: as the run's training.
        compat: averaging, see above.

    Raises:
        RecipeError: layers, heads or labels do not fit.
        TapError: the scores of a model cannot be recorded.
    """
    check_same_labels(student, teacher)
    official = compat == "official"
    terms = _intermediate(student, teacher, layers, attention, projection, compat)
    overrides = schedule_of(
        intermediate_epochs, intermediate_learning_rate, lr_scheduler_type="constant", warmup_steps=0
    )
    first = Stage("intermediate", terms, 0.0, overrides=overrides, keep="last")
    if official and is_regression(student):
        return Method("tinybert", [first, Stage("prediction", [], 1.0)], ("labels", "full_length"))
    weight = 1 / (classes(student) * temperature**2) if official else 1.0
    logits = logit_terms(student, teacher, loss=losses.soft_cross_entropy, temperature=temperature, weight=weight)
    return Method("tinybert", [first, Stage("prediction", logits, 0.0)], ("full_length",) if official else ())


def tinybert_general(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layers: Layers = "uniform",
    attention: AttentionKind = "scores",
    projection: Projection = "auto",
    compat: Compat = "masked",
) -> Method:
    """General distillation: the intermediate losses alone, on plain text, from a teacher that is not fine-tuned.

    Source: Jiao et al. 2020 (TinyBERT): 3 epochs of Wikipedia in batches of 256, 5e-5, no prediction and no masked
    language modelling loss. What comes of it is the start of a task's student: `student: {model: <its folder>}`.

    Args, raises: as `tinybert`.
    """
    terms = _intermediate(student, teacher, layers, attention, projection, compat)
    needs = ("full_length",) if compat == "official" else ()
    return Method("tinybert_general", [Stage("general", terms, 0.0, keep="last")], needs)
