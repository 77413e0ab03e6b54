"""LRC-BERT (Fu et al. 2021)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval
from torch import nn

from taskkd import layer_maps, losses
from taskkd.errors import RecipeError, TaskkdError
from taskkd.nlp.layers import hidden_size, hidden_taps
from taskkd.nlp.methods.intermediate import shared
from taskkd.nlp.methods.logit_terms import logit_terms
from taskkd.nlp.models import check_same_labels
from taskkd.perturbation import GradientPerturbation
from taskkd.stages import Method, Stage
from taskkd.terms import Match, Term

__all__ = ["lrc_bert"]


def lrc_bert(
    student: nn.Module,
    teacher: nn.Module,
    *,
    projection: Literal["auto", "layer"] = "auto",
    alpha: Annotated[float, Ge(0)] = 1.0,
    beta: Annotated[float, Ge(0)] = 1.0,
    gamma: Annotated[float, Ge(0)] = 3.0,
    temperature: Annotated[float, Gt(0)] = 1.1,
    contrast_share: Annotated[float, Interval(gt=0, lt=1)] = 0.8,
    perturbation: Literal["l2", "none", "off"] = "l2",
    perturbation_size: Annotated[float, Gt(0)] = 1.0,
    gather: bool = False,
) -> Method:
    """Contrast of hidden states alone, then `alpha * contrast + beta * soft targets + gamma * task loss`, perturbed.

    Source: Fu et al. 2021, "LRC-BERT: Latent-representation Contrastive Knowledge Distillation for Natural Language
    Understanding". No code of the authors is public: losses, weights and the use of [CLS] states are those of a third
    party's code that quotes the paper's formulas. The gradient perturbation is "after Fu et al.": that the loss's
    gradient at the embedding output is added to it for a second forward is the paper's, its scale and norm are ours.
    The paper trains 18 epochs (more on small tasks) in batches of 16 at 5e-5, from a generally distilled student, on
    augmented data.

    Args:
        student, teacher: models with the same head and labels, the student no deeper.
        projection: a linear map of the student's states for each "layer"; "auto": where the sizes differ.
        alpha, beta, gamma: as in the formula.
        temperature: of the soft targets.
        contrast_share: of the epochs, for the first stage; its last student is handed on.
        perturbation: of the second stage: each sample's gradient brought to length 1 ("l2"), as it is ("none"), "off".
        perturbation_size: its factor.
        gather: on several ranks contrast with the samples of all of them; False: of each rank its own.

    Raises:
        RecipeError: layers or labels do not fit.
    """
    check_same_labels(student, teacher)
    own, others = hidden_taps(student), hidden_taps(teacher)
    try:
        pairs = layer_maps.uniform(len(own) - 1, len(others) - 1)
    except TaskkdError as error:
        raise RecipeError(f"lrc_bert: {error}") from None
    same = projection == "auto" and hidden_size(student) == hidden_size(teacher)
    adapters = [None if same else shared("linear") for _ in pairs]  # of both stages

    def contrast(weight: float) -> list[Term]:
        return [
            Match(
                f"contrast-{i}-{j}",
                losses.cosine_nce,
                f"{own[i + 1]}[:, 0]",
                f"{others[j + 1]}[:, 0]",
                adapter=adapter,
                gather=gather,
                weight=weight,
            )
            for (i, j), adapter in zip(pairs, adapters, strict=True)
        ]

    logits = logit_terms(student, teacher, weight=beta, temperature=temperature)
    move = None
    if perturbation != "off":
        move = GradientPerturbation(own[0], size=perturbation_size, norm=perturbation)
    stages = [
        Stage("contrast", contrast(1.0), 0.0, share=contrast_share, keep="last"),
        Stage("all", [*contrast(alpha), *logits], gamma, share=1 - contrast_share, perturbation=move),
    ]
    return Method("lrc_bert", stages, ("labels",) if gamma > 0 else ())
