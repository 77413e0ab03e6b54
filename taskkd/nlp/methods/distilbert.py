"""DistilBERT (Sanh et al. 2019)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from torch import nn

from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.nlp.heads import CAUSAL_LM, MASKED_LM, head_of
from taskkd.nlp.layers import hidden_size, hidden_taps
from taskkd.nlp.methods.intermediate import MASK
from taskkd.nlp.methods.logit_terms import logit_terms
from taskkd.nlp.models import number_of_labels
from taskkd.stages import Method, Stage
from taskkd.terms import Match, Term

__all__ = ["distilbert"]


def distilbert(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: Annotated[float, Gt(0)] = 2.0,
    alpha_ce: Annotated[float, Ge(0)] = 5.0,
    alpha_task: Annotated[float, Ge(0)] = 2.0,
    alpha_cos: Annotated[float, Ge(0)] = 1.0,
    alpha_mse: Annotated[float, Ge(0)] = 0.0,
    masked_only: bool = False,
) -> Method:
    """`alpha_ce * soft targets + alpha_task * task loss + alpha_cos * (1 - cos)` of the last hidden states.

    Source: Sanh, Debut, Chaumond, Wolf 2019, "DistilBERT, a distilled version of BERT", and their code: masked language
    modelling on plain text, the student's layers 0, 2, 4, 7, 9, 11 of the teacher's (`student: {layers: [...]}`), 5e-4,
    batches of 5 x 50, 3 epochs, 5 % warm-up, clipping at 5. Their distillation of a fine-tuned SQuAD teacher is
    `alpha_ce=0.5, alpha_task=0.5, alpha_cos=0`, and averages over all positions of the padded text; ours over context.

    Scaling: as theirs, means over tokens that are no padding; of a causal model, ours over the positions before a token
    with a label. `alpha_mse` belongs to their sum over the vocabulary of
    squared differences of logits.

    Args:
        student, teacher: models with the same head, labels or vocabulary, and hidden size.
        temperature: of the soft targets.
        alpha_ce, alpha_task, alpha_cos, alpha_mse: as in the formula. `alpha_task` is their `alpha_mlm` or `alpha_clm`.
        masked_only: masked language modelling: soft targets where tokens are masked only (`restrict_ce_to_mask`).

    Raises:
        RecipeError: labels, vocabularies or hidden sizes differ.
    """
    sizes = hidden_size(student), hidden_size(teacher)
    if sizes[0] != sizes[1] and alpha_cos > 0:
        raise RecipeError(
            f"distilbert compares hidden states of one size; the student has {sizes[0]}, the teacher {sizes[1]}. "
            "alpha_cos=0 leaves them out."
        )
    positions: Literal["all", "masked"] = "masked" if masked_only else "all"
    config: Any = student.config
    terms: list[Term] = []
    if alpha_ce > 0:
        terms += logit_terms(student, teacher, weight=alpha_ce, temperature=temperature, positions=positions)
    if alpha_mse > 0:
        count = config.vocab_size if head_of(student) in (CAUSAL_LM, MASKED_LM) else number_of_labels(student)
        terms += logit_terms(
            student, teacher, loss=losses.logit_mse, name="logits_mse", weight=alpha_mse * count, positions=positions
        )
    if alpha_cos > 0:
        own, others = hidden_taps(student)[-1], hidden_taps(teacher)[-1]
        terms.append(Match("hidden", losses.cosine, own, others, mask=MASK, weight=alpha_cos))
    return Method("distilbert", [Stage("distil", terms, alpha_task)], ("labels",) if alpha_task > 0 else ())
