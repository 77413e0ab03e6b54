"""Distillation of language models on given texts: generalized knowledge distillation, universal logits."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Interval
from torch import nn

from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.nlp.heads import CAUSAL_LM, head_of
from taskkd.nlp.methods.logit_terms import logit_terms, next_tokens
from taskkd.stages import Method, Stage
from taskkd.terms import Match

__all__ = ["generalized_kd", "universal_logits"]


def generalized_kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    beta: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    temperature: Annotated[float, Gt(0)] = 1.0,
    weight: Annotated[float, Ge(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 0.0,
) -> Method:
    """`task_weight * task loss + weight * JSD_beta(teacher, student)` on the logits; for decoders, of given texts.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), its supervised part: the texts are
    those of the data. Texts that the student writes itself, which the paper trains on too, need generation: that is
    trl's `GKDTrainer`. `beta=0` is the KL from the teacher (as `soft_targets` at temperature 1), `beta=1` the reverse.

    Scaling: theirs, a mean over answer tokens, but for the factor `temperature^2`, 1 by default.

    Args:
        student, teacher: models with the same head and vocabulary (or labels).
        beta: between the two divergences.
        temperature: of both sides.
        weight: of the term.
        task_weight: of the loss on the texts themselves.

    Raises:
        RecipeError: heads, vocabularies or labels differ.
    """
    terms = logit_terms(
        student, teacher, loss=losses.generalised_jsd, weight=weight, beta=beta, temperature=temperature
    )
    return Method("generalized_kd", [Stage("distil", terms, task_weight)], ("labels",) if task_weight > 0 else ())


def universal_logits(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: Annotated[float, Gt(0)] = 1.0,
    weight: Annotated[float, Ge(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """`task_weight * next-token loss + weight * sum |sorted p_s - sorted p_t|`: decoders of different vocabularies.

    Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation" (ULD). In a recipe each model reads the texts by
    its own tokenizer; the first answer token of one is compared with the first of the other, and so on, what one of
    them has more is left out. See `taskkd.losses.universal_logits`. By hand, where tokenizers differ, the term needs
    `teacher_mask`: the teacher's positions before each of its answer tokens.

    Args:
        student, teacher: causal language models.
        temperature: of both sides.
        weight: of the term.
        task_weight: of the loss on the texts themselves; sorted probabilities alone do not say which token is meant.

    Raises:
        RecipeError: one of them is no causal language model.
    """
    for who, model in (("student", student), ("teacher", teacher)):
        if head_of(model) is not CAUSAL_LM:
            raise RecipeError(
                f"universal_logits is for causal language models; the {who}, {type(model).__name__}, is for "
                f"{head_of(model).title}."
            )
    term = Match(
        "logits", losses.universal_logits, "out.logits", mask=next_tokens, temperature=temperature, weight=weight
    )
    return Method("universal_logits", [Stage("distil", [term], task_weight)], ("labels",) if task_weight > 0 else ())
