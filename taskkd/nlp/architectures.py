"""A DistilBERT student from a BERT teacher's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.errors import RecipeError

__all__ = ["distilbert_from_bert"]

LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
#: a model's class after its family's name, and its head's modules that both families have
HEADS: dict[str, dict[str, str]] = {
    "Model": {},
    "ForMaskedLM": {
        "cls.predictions.transform.dense": "vocab_transform",
        "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
        "cls.predictions.decoder": "vocab_projector",
    },
    "ForSequenceClassification": {},
    "ForTokenClassification": {"classifier": "classifier"},
    "ForQuestionAnswering": {"qa_outputs": "qa_outputs"},
}


def distilbert_from_bert(teacher: nn.Module, layers: Sequence[int], *, seed: int = 0) -> nn.Module:
    """A model of DistilBERT's architecture with these layers of a BERT (0-based), its embeddings and head.

    Source: Sanh et al. 2019, who take the layers 0, 2, 4, 7, 9, 11 of 12. DistilBERT has no token types and no pooler.
    The embedding of token type 0 is added to those of the positions, so that all layers give the teacher's states for
    single texts (theirs leaves it out); the second text of a pair is told apart by [SEP] alone. A sequence classifier's
    head, which here stands on the [CLS] state itself, starts at random.

    Args:
        teacher: a `BertModel`, or a BERT for masked LM, sequence or token classification, or question answering.
        layers: at least one, in the student's order.
        seed: of what starts at random; the global random state is left as it was.

    Raises:
        RecipeError: the teacher is none of these, a layer is not there, or its layer norms have another epsilon.
    """
    import transformers

    kind = type(teacher).__name__.removeprefix("Bert")
    config: Any = teacher.config
    if getattr(config, "model_type", None) != "bert" or kind not in HEADS or config.is_decoder:
        known = ", ".join(f"Bert{name}" for name in HEADS)
        raise RecipeError(
            f"architecture distilbert: layers of {type(teacher).__name__} do not fit; those of {known} do."
        )
    if not layers or not all(0 <= i < config.num_hidden_layers for i in layers):
        raise RecipeError(f"student.layers {list(layers)}: expected numbers from 0 to {config.num_hidden_layers - 1}.")
    if config.layer_norm_eps != 1e-12:
        raise RecipeError(
            f"architecture distilbert has layer norms of epsilon 1e-12, the teacher's is {config.layer_norm_eps:g}."
        )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        student: nn.Module = getattr(transformers, f"DistilBert{kind}")(_config(config, len(layers)))
    student.to(next(teacher.parameters()).dtype)
    state = student.state_dict()
    state.update(_mapped(teacher.state_dict(), layers, "" if kind == "Model" else "distilbert.", HEADS[kind]))
    student.load_state_dict(state)
    return student


def _config(own: Any, layers: int) -> Any:
    from transformers import DistilBertConfig

    return DistilBertConfig(
        vocab_size=own.vocab_size,
        max_position_embeddings=own.max_position_embeddings,
        n_layers=layers,
        n_heads=own.num_attention_heads,
        dim=own.hidden_size,
        hidden_dim=own.intermediate_size,
        dropout=own.hidden_dropout_prob,
        attention_dropout=own.attention_probs_dropout_prob,
        activation=own.hidden_act,
        initializer_range=own.initializer_range,
        pad_token_id=own.pad_token_id,
        id2label=own.id2label,
        label2id=own.label2id,
        problem_type=own.problem_type,
        tie_word_embeddings=own.tie_word_embeddings,
    )


def _mapped(state: dict[str, Tensor], layers: Sequence[int], prefix: str, head: dict[str, str]) -> dict[str, Tensor]:
    """The teacher's tensors under the student's names."""
    own = {k.removeprefix("bert."): v for k, v in state.items()}
    mapped = {prefix + k: v for k, v in own.items() if k.startswith("embeddings.") and "token_type" not in k}
    position = "embeddings.position_embeddings.weight"
    mapped[prefix + position] = own[position] + own["embeddings.token_type_embeddings.weight"][0]
    for new, old in enumerate(layers):
        for source, target in LAYER.items():
            for part in ("weight", "bias"):
                value = own[f"encoder.layer.{old}.{source}.{part}"]
                mapped[f"{prefix}transformer.layer.{new}.{target}.{part}"] = value
    for source, target in head.items():
        mapped |= {f"{target}.{part}": own[f"{source}.{part}"] for part in ("weight", "bias")}
    return mapped
