"""MobileBERT's progressive knowledge transfer (Sun Z. et al. 2020)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Interval
from torch import nn

from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.nlp.layers import attention_heads, hidden_size, hidden_taps
from taskkd.nlp.methods.intermediate import MASK
from taskkd.nlp.methods.logit_terms import logit_terms
from taskkd.stages import Method, Stage
from taskkd.terms import Match, Term

__all__ = ["mobilebert"]


def mobilebert(
    student: nn.Module,
    teacher: nn.Module,
    *,
    feature_weight: Annotated[float, Ge(0)] = 100.0,
    attention_weight: Annotated[float, Ge(0)] = 1.0,
    mean_weight: Annotated[float, Ge(0)] = 5000.0,
    variance_weight: Annotated[float, Ge(0)] = 5.0,
    earlier: Annotated[float, Interval(ge=0, le=1)] = 0.1,
    transfer_share: Annotated[float, Interval(gt=0, lt=1)] = 1 / 3,
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5,
) -> Method:
    """One stage for each layer, from the bottom: feature maps, attention and statistics; then logits and task.

    Source: Sun Z., Yu, Song, Liu, Yang, Zhou 2020, "MobileBERT: a Compact Task-Agnostic BERT", and its code: 240,000
    steps of transfer, 500,000 of masked language modelling with half of the truth and half of the teacher's soft
    labels. Weights are divided by the number of layers, as theirs; layers of former stages go on with the weight
    `earlier`. Their code compares the means of a layer with those of all teacher layers at once; that is not copied.

    Args:
        student, teacher: models with the same head, labels or vocabulary, number of layers, heads and hidden size.
        feature_weight, attention_weight, mean_weight, variance_weight: of a layer's terms.
        earlier: factor of the terms of layers below the one whose stage it is; 0: only that one.
        transfer_share: of the epochs, for all layers' stages together.
        alpha: of soft targets in the last stage; the task loss has `1 - alpha`.

    Raises:
        RecipeError: layers, heads, sizes or labels differ.
    """
    own, others = hidden_taps(student), hidden_taps(teacher)
    count = len(own) - 1
    pairs = (student, own), (teacher, others)
    shapes = [(len(taps) - 1, hidden_size(model), attention_heads(model)) for model, taps in pairs]
    if shapes[0] != shapes[1]:
        raise RecipeError(
            "mobilebert transfers layer by layer and head by head; layers, hidden size and heads are "
            f"{', '.join(map(str, shapes[0]))} of the student and {', '.join(map(str, shapes[1]))} of the teacher."
        )

    def transfer(layer: int, factor: float) -> list[Term]:
        states = own[layer + 1], others[layer + 1]
        scores = f"attention[{layer}].scores"
        features, attention, rest = (w * factor / count for w in (feature_weight, attention_weight, 1.0))
        return [
            Match(f"features-{layer}", losses.feature_map_transfer, *states, mask=MASK, weight=features),
            Match(f"attention-{layer}", losses.attention_cross_entropy, scores, mask=MASK, weight=attention),
            Match(
                f"statistics-{layer}",
                losses.feature_statistics,
                *states,
                mask=MASK,
                weight=rest,
                mean=mean_weight,
                variance=variance_weight,
            ),
        ]

    stages = []
    for layer in range(count):
        below = [term for i in range(layer) for term in transfer(i, earlier)] if earlier > 0 else []
        terms = [*below, *transfer(layer, 1.0)]
        stages.append(Stage(f"layer-{layer}", terms, 0.0, share=transfer_share / count, keep="last"))
    logits = logit_terms(student, teacher, weight=alpha) if alpha > 0 else []
    stages.append(Stage("logits", logits, 1 - alpha, share=1 - transfer_share))
    return Method("mobilebert", stages, ("labels",) if alpha < 1 else ())
