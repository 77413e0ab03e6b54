"""What fits and what does not between a student and a teacher: told before anything is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from taskkd import layer_maps
from taskkd.errors import TapError, TaskkdError
from taskkd.nlp.heads import head_of
from taskkd.nlp.models import is_regression, label_names
from taskkd.nlp.tokenization import positions
from taskkd.taps import Taps

__all__ = ["describe_pair"]


def describe_pair(data: Any, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Lines for the plan: sizes, layers and their map, attention, vocabularies, lengths, labels.

    Args:
        data: an `NlpData`.
        student, teacher: transformers models, or others with such a config.
    """
    own, other = student.config, teacher.config
    return [
        ("sizes", _sizes(student, teacher, own, other)),
        ("layers", _layers(own, other)),
        ("attention", _attention(data, student, teacher, own, other)),
        ("vocabulary", _vocabulary(data, own, other)),
        ("length", _length(data, own, other)),
        ("labels", _labels(student, teacher)),
    ]


def _sizes(student: nn.Module, teacher: nn.Module, own: Any, other: Any) -> str:
    counts = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    text = f"the student has 1/{counts[1] / max(counts[0], 1):.1f} of the teacher's parameters"
    widths = [getattr(config, "hidden_size", None) for config in (own, other)]
    if None in widths:
        return text
    if widths[0] == widths[1]:
        return f"{text}; hidden states of {widths[0]} in both"
    return f"{text}; hidden states of {widths[0]} and {widths[1]}: terms on them need an adapter (`linear`)"


def _layers(own: Any, other: Any) -> str:
    counts = [getattr(config, "num_hidden_layers", 0) for config in (own, other)]
    if 0 in counts:
        return "their number is not in the config"
    text = f"{counts[0]} of {counts[1]}"
    try:
        pairs = layer_maps.uniform(*counts)
    except TaskkdError:
        return f"{text}: the student is deeper, there is no uniform map"
    shown = [f"{i} <- {j}" for i, j in pairs]
    shown = shown if len(shown) <= 6 else [*shown[:2], "...", shown[-1]]
    return f"{text}; uniform map {', '.join(shown)} (from 0)"


def _attention(data: Any, student: nn.Module, teacher: nn.Module, own: Any, other: Any) -> str:
    if data.of_teacher is not None:
        return "of different tokens: it cannot be compared"
    for who, model in (("student", student), ("teacher", teacher)):
        try:
            Taps(model, ["attention[0].scores"], who).close()
        except (TapError, AttributeError):
            return f"not to be had of the {who} ({type(model).__name__}): terms on attention are not possible"
    heads = [getattr(config, "num_attention_heads", None) for config in (own, other)]
    if heads[0] == heads[1]:
        return f"heads: {heads[0]} in both; scores, probabilities and relations can be compared"
    return (
        f"heads: {heads[0]} and {heads[1]}; scores and probabilities (TinyBERT) cannot be compared head by head; "
        "relations, which cut the features anew (MiniLMv2), can"
    )


def _vocabulary(data: Any, own: Any, other: Any) -> str:
    if data.of_teacher is None:
        text = f"the same, {len(data.tokenizer):,} pieces"
        rows = [getattr(config, "vocab_size", None) for config in (own, other)]
        short = [size for size in rows if size is not None and size < len(data.tokenizer)]
        return text + (f"; but a model has embeddings for {short[0]:,} only" if short else "")
    sizes = [len(part.tokenizer) for part in (data, data.of_teacher)]
    return (
        f"different, {sizes[0]:,} and {sizes[1]:,} pieces: logits, [CLS] and sentence embeddings can be compared, "
        "tokens cannot"
    )


def _length(data: Any, own: Any, other: Any) -> str:
    limits = [positions(config) for config in (own, other)]
    shown = [f"{limit:,}" if limit else "no limit known" for limit in limits]
    cut = f"texts are cut to {data.encoding.max_length} tokens"
    if data.of_teacher is not None and data.of_teacher.encoding.max_length != data.encoding.max_length:
        cut += f", the teacher's to {data.of_teacher.encoding.max_length}"
    return f"{cut}; positions: {shown[0]} and {shown[1]}"


def _labels(student: nn.Module, teacher: nn.Module) -> str:
    if is_regression(teacher):
        return "regression"
    if not head_of(teacher).labelled:
        return f"none, {head_of(teacher).title}"
    names = [label_names(model) for model in (student, teacher)]
    shown = ", ".join(names[1][:6]) + (", ..." if len(names[1]) > 6 else "")
    return f"the same {len(names[1])}: {shown}" if names[0] == names[1] else f"{names[0]} and {names[1]}"
