"""Terms on what lies between input and logits: hidden states and attention, for the methods that match them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from taskkd import losses
from taskkd.adapters import build_adapter
from taskkd.errors import RecipeError
from taskkd.nlp.layers import attention_heads, hidden_size, hidden_taps
from taskkd.terms import Match, Term

__all__ = [
    "MASK",
    "AttentionKind",
    "Projection",
    "attention_terms",
    "hidden_terms",
    "layer_index",
    "schedule_of",
    "shared",
]

MASK = "batch.attention_mask"
Projection = Literal["auto", "shared", "layer"]
AttentionKind = Literal["scores", "head_mean", "probabilities", "none"]


def shared(kind: str) -> Callable[[Tensor, Tensor], nn.Module]:
    """An adapter that all terms have in common which are given what this returns; built for the first of them."""
    made: list[nn.Module] = []

    def make(student: Tensor, teacher: Tensor) -> nn.Module:
        if not made:
            made.append(build_adapter(kind, student, teacher))
        return made[0]

    return make


def hidden_terms(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Sequence[tuple[int, int]],
    *,
    projection: Projection = "auto",
    embeddings: bool = True,
    mask: str | None = MASK,
) -> list[Term]:
    """Mean squared differences of the hidden states of pairs of layers, named `hidden-<student layer>-<teacher's>`.

    Args:
        student, teacher: encoders.
        pairs: 0-based layers.
        projection: "shared": one linear map (with bias) of the student's states for all terms; "layer": one for each;
            "auto": shared where the sizes differ, else none.
        embeddings: also the outputs of the embeddings, named `embeddings`.
        mask: the tap of the tokens that count; None: all, padding too.
    """
    own, others = hidden_taps(student), hidden_taps(teacher)
    adapter: Any = "linear" if projection == "layer" else shared("linear")
    if projection == "auto" and hidden_size(student) == hidden_size(teacher):
        adapter = None
    named = {"embeddings": (own[0], others[0])} if embeddings else {}
    named |= {f"hidden-{i}-{j}": (own[i + 1], others[j + 1]) for i, j in pairs}
    return [Match(name, losses.mse, s, t, adapter=adapter, mask=mask) for name, (s, t) in named.items()]


def attention_terms(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Sequence[tuple[int, int]],
    *,
    kind: AttentionKind = "scores",
    average: Literal["valid", "official"] = "valid",
    method: str = "tinybert",
) -> list[Term]:
    """Mean squared differences of the attention of pairs of layers, named `attention-<student layer>-<teacher's>`.

    Raises:
        RecipeError: the numbers of heads differ and they are compared one by one.
    """
    if kind == "none":
        return []
    heads = attention_heads(student), attention_heads(teacher)
    if heads[0] != heads[1] and kind != "head_mean":
        raise RecipeError(
            f"{method}: the student has {heads[0]} attention heads, the teacher {heads[1]}, and they are compared one "
            "by one. attention='head_mean' compares their means, 'none' leaves attention out; minilm_v2 compares "
            "relations, which heads of any number have."
        )
    tap = "probabilities" if kind == "probabilities" else "scores"
    return [
        Match(
            f"attention-{i}-{j}",
            losses.attention_scores,
            f"attention[{i}].{tap}",
            f"attention[{j}].{tap}",
            mask=MASK,
            heads="mean" if kind == "head_mean" else "each",
            average=average,
        )
        for i, j in pairs
    ]


def layer_index(layer: int | None, model: nn.Module, method: str) -> int:
    """The 0-based number of the layer that is asked for (`teacher_layer`); None: the last (of the encoder).

    Raises:
        RecipeError: there is no such layer.
    """
    count = len(hidden_taps(model)) - 1
    found = count - 1 if layer is None else layer + count if layer < 0 else layer
    if not 0 <= found < count:
        raise RecipeError(f"{method}: teacher_layer {layer}: the teacher has layers 0 to {count - 1}.")
    return found


def schedule_of(epochs: float | None, learning_rate: float | None, **others: Any) -> Mapping[str, Any]:
    """A stage's own training arguments, of those that are not None."""
    given = {"num_train_epochs": epochs, "learning_rate": learning_rate, **others}
    return {name: value for name, value in given.items() if value is not None}
