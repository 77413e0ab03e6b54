"""Where an encoder's hidden states are: taps that equal the model's own `hidden_states`, without asking for them."""

from __future__ import annotations

from typing import Any

from torch import nn

from taskkd.errors import RecipeError
from taskkd.nlp.models import encoder_layers

__all__ = ["attention_heads", "hidden_size", "hidden_taps"]

#: what computes the embedding output, in the order in which they are looked for: ELECTRA and ALBERT map theirs to the
#: hidden size in a module further on
EMBEDDINGS = (
    "embeddings_project", "encoder.embedding_hidden_mapping_in", "embeddings", "embed_tokens", "drop",
)  # fmt: skip
#: the norm after the last layer of models that normalise before each layer
FINALS = ("final_norm", "final_layer_norm", "norm", "ln_f")
#: layers that return a tuple
TUPLES = ("DebertaLayer", "DebertaV2Layer", "LongT5Block", "MPNetLayer", "MT5Block", "T5Block", "UMT5Block")


def hidden_taps(model: nn.Module) -> list[str]:
    """The taps of the hidden states, (batch, tokens, features): of the embeddings, then after each layer.

    Item `i` equals `hidden_states[i]` of the model's output: the last one is taken after the final norm, where the
    model has one (ModernBERT, T5); those before are not normalised there.

    Raises:
        RecipeError: the model's layers or embeddings are not found; its `out.hidden_states[i]` may do, if its config
            asks for them.
    """
    modules = dict(model.named_modules())
    shared = next((p for p in modules if p.endswith("encoder.albert_layer_groups")), None)
    if shared is not None:
        base, layers = shared.removesuffix("encoder.albert_layer_groups"), _albert_taps(model, shared)
    else:
        path, found = encoder_layers(model)
        item = "[0]" if type(found[0]).__name__ in TUPLES else ""
        layers = [f"{path}.{i}{item}" for i in range(len(found))]
        parents = path.split(".")[:-1]
        if path.endswith(".layer") and parents[-1] in ("encoder", "transformer"):
            parents.pop()
        base = "".join(f"{p}." for p in parents)
    embedding = next((base + name for name in EMBEDDINGS if base + name in modules), None)
    if embedding is None:
        raise RecipeError(
            f"{type(model).__name__}: no embedding module found beside {layers[0]!r} (looked for "
            f"{', '.join(base + n for n in EMBEDDINGS)}); name the taps by hand."
        )
    final = next((base + name for name in FINALS if base + name in modules), None)
    if final is not None:
        layers[-1] = final
    return [embedding, *layers]


def _albert_taps(model: nn.Module, path: str) -> list[str]:
    """ALBERT runs a group of layers several times: the calls of each."""
    config: Any = model.config
    count = config.num_hidden_layers
    groups = [int(i / (count / config.num_hidden_groups)) for i in range(count)]
    calls = [groups[:i].count(group) for i, group in enumerate(groups)]
    return [f"{path}.{g}" + (f"@{c}" if groups.count(g) > 1 else "") for g, c in zip(groups, calls, strict=True)]


def hidden_size(model: nn.Module) -> int:
    """The number of features of the hidden states."""
    config: Any = model.config
    return int(config.hidden_size)


def attention_heads(model: nn.Module) -> int:
    """The number of attention heads of a layer."""
    config: Any = model.config
    return int(config.num_attention_heads)
