"""The terms on the logits of a pair of models, whatever their heads: what every method with soft targets shares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.nlp.heads import CAUSAL_LM, MASKED_LM, QUESTION_ANSWERING, SEQUENCE, head_of
from taskkd.nlp.models import check_same_labels, is_regression, number_of_labels
from taskkd.terms import Match, Term, Weight

__all__ = ["classes", "logit_terms", "next_tokens"]

#: a logit that softmax turns into exactly 0 at any temperature up to a million, and that stays finite
NEVER = -1e9


def logit_terms(
    student: nn.Module,
    teacher: nn.Module,
    *,
    loss: Callable[..., Tensor] = losses.kl_divergence,
    name: str = "logits",
    weight: Weight = 1.0,
    positions: Literal["all", "masked"] = "all",
    **options: Any,
) -> list[Term]:
    """The terms that compare the logits of two models with the same head; one, named `name`, for every head.

    Sequence classification: (batch, labels). Regression: the mean squared difference of the predictions (Ba & Caruana
    2014), whatever `loss` and `options` are. Token classification: (batch, tokens, labels) at the first piece of each
    word (`batch["word_mask"]`). Question answering: the mean of `loss` on start and on end logits (batch, tokens),
    whose distributions are over [CLS] and the context (`batch["context_mask"]`); question and padding have probability
    0 on both sides. Masked language modelling: (batch, tokens, vocabulary) at all tokens that are no padding.
    Causal language modelling: the same at the positions before a token with a label (an answer's).

    Args:
        student, teacher: models with the same head and labels (or vocabulary).
        loss: of `taskkd.losses`, on logits.
        name, weight: of the term.
        positions: masked language modelling: "all", or "masked", those that have a label.
        **options: of `loss`.

    Raises:
        RecipeError: heads or labels differ, or there are no logits.
    """
    check_same_labels(student, teacher)
    head = head_of(student)
    if not head.logits:
        raise RecipeError(f"a {head.title} has no logits to compare; the method embedding_mimic is for it.")
    if is_regression(student):
        return [Match(name, losses.logit_mse, "out.logits", weight=weight)]
    if head is SEQUENCE:
        return [Match(name, loss, "out.logits", weight=weight, **options)]
    if head is QUESTION_ANSWERING:
        return [Match(name, _over_positions(loss), head.logits, mask=head.mask, weight=weight, **options)]
    mask: Any = _labelled if head is MASKED_LM and positions == "masked" else head.mask
    if head is CAUSAL_LM:
        mask = next_tokens
    if loss is not losses.logit_mse:
        options = {"dim": -1, **options}
    return [Match(name, loss, "out.logits", mask=mask, weight=weight, **options)]


def classes(student: nn.Module) -> int:
    """By how much a loss that its authors divide by the number of classes is smaller than ours: the number of labels.

    1 for regression, and where the logits are not of labels (positions, a vocabulary): nobody publishes a weight there.
    """
    return number_of_labels(student) if head_of(student).labelled and not is_regression(student) else 1


def next_tokens(batch: Mapping[str, Any], _: Tensor) -> Tensor:
    """The positions (batch, tokens) before a token with a label: those whose logits a causal model is asked for."""
    return torch.nn.functional.pad(batch["labels"][:, 1:] >= 0, (0, 1))


def _labelled(batch: Mapping[str, Any], _: Tensor) -> Tensor:
    labels: Tensor = batch["labels"]
    return labels >= 0


def _over_positions(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss` with positions for classes, on several logits; those outside of `mask` (batch, tokens) take no part."""

    @functools.wraps(loss)
    def wrapped(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], *, mask: Tensor, **options: Any) -> Tensor:
        values = []
        for own, other in zip(student, teacher, strict=True):
            if loss is losses.logit_mse:
                values.append(loss(own, other, mask=mask, **options))
            else:
                values.append(loss(_only(own, mask), _only(other, mask), **options))
        return torch.stack(values).mean()

    return wrapped


def _only(logits: Tensor, mask: Tensor) -> Tensor:
    full = logits if logits.dtype == torch.float64 else logits.float()
    return full.masked_fill(mask == 0, NEVER)
