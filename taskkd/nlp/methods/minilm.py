"""MiniLM (Wang et al. 2020) and MiniLMv2 (Wang et al. 2021)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt
from torch import nn

from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.nlp.layers import attention_heads, hidden_size
from taskkd.nlp.methods.intermediate import MASK, layer_index, schedule_of
from taskkd.nlp.methods.logit_terms import logit_terms
from taskkd.stages import Method, Stage
from taskkd.terms import Match, Term

__all__ = ["minilm", "minilm_v2"]

Then = Literal["task", "soft_targets", "none"]


def _stages(
    name: str, student: nn.Module, teacher: nn.Module, terms: list[Term], overrides: Any, then: Then, temperature: float
) -> Method:
    first = Stage("relations", terms, 0.0, overrides=overrides, keep="last")
    if then == "none":
        return Method(name, [first])
    if then == "task":
        return Method(name, [first, Stage("task", [], 1.0)], ("labels",))
    logits = logit_terms(student, teacher, temperature=temperature)
    return Method(name, [first, Stage("soft-targets", logits, 0.0)])


def minilm(
    student: nn.Module,
    teacher: nn.Module,
    *,
    teacher_layer: int | None = None,
    relation_epochs: Annotated[float, Gt(0)] | None = None,
    relation_learning_rate: Annotated[float, Gt(0)] | None = None,
    then: Then = "task",
    temperature: Annotated[float, Gt(0)] = 1.0,
) -> Method:
    """Attention distributions and value relations of the last layer; then the task.

    Source: Wang W., Wei, Dong, Bao, Yang, Zhou 2020, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
    Compression of Pre-Trained Transformers": the sum of both divergences, on plain text, with as many heads on both
    sides. Sizes and numbers of layers are free. The authors publish no distillation code.

    Args:
        student, teacher: encoders with the same number of heads.
        teacher_layer: 0-based; None: the last.
        relation_epochs, relation_learning_rate: of the first stage; None: as the run's training.
        then: the "task" loss on the labels (the paper fine-tunes), "soft_targets" of the teacher, or "none" (plain
            text: what comes of it is the start of a task's student).
        temperature: of the soft targets.

    Raises:
        RecipeError: the heads differ (use `minilm_v2`), or there is no such layer.
    """
    heads = attention_heads(student), attention_heads(teacher)
    if heads[0] != heads[1]:
        raise RecipeError(
            f"minilm: the student has {heads[0]} attention heads, the teacher {heads[1]}, and they are compared one by "
            "one; minilm_v2 takes any numbers."
        )
    own, layer = layer_index(None, student, "minilm"), layer_index(teacher_layer, teacher, "minilm")
    terms: list[Term] = [
        Match("attention", losses.attention_kl, f"attention[{own}].scores", f"attention[{layer}].scores", mask=MASK),
        Match(
            "relation-v",
            losses.self_attention_relation,
            f"attention[{own}].value",
            f"attention[{layer}].value",
            mask=MASK,
        ),
    ]
    overrides = schedule_of(relation_epochs, relation_learning_rate)
    return _stages("minilm", student, teacher, terms, overrides, then, temperature)


def minilm_v2(
    student: nn.Module,
    teacher: nn.Module,
    *,
    relation_heads: Annotated[int, Gt(0)] = 48,
    teacher_layer: int | None = None,
    relation_epochs: Annotated[float, Gt(0)] | None = None,
    relation_learning_rate: Annotated[float, Gt(0)] | None = None,
    then: Then = "task",
    temperature: Annotated[float, Gt(0)] = 1.0,
) -> Method:
    """Relations of queries, of keys and of values of one layer, split into any number of heads; then the task.

    Source: Wang W., Bao, Huang, Dong, Wei 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for
    Compressing Pretrained Transformers": 48 relation heads for base teachers, 64 for large ones; the last layer of
    BERT-base, the 21st of 24 of BERT-large (`teacher_layer=20`), the 19th of RoBERTa-large (18); weights 1; on plain
    text, 6e-4, batches of 256, 400,000 steps, then fine-tuning. Heads, sizes and layers of the two may differ. The
    authors publish no distillation code; the loss equals Bloomberg's.

    Args:
        student, teacher: encoders.
        relation_heads: must divide the hidden sizes of both.
        teacher_layer: 0-based; None: the last. The teacher stops there.
        relation_epochs, relation_learning_rate, then, temperature: as `minilm`.

    Raises:
        RecipeError: the relation heads do not divide a size, or there is no such layer.
    """
    sizes = hidden_size(student), hidden_size(teacher)
    if any(size % relation_heads for size in sizes):
        able = [n for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes)]
        closest = min(able, key=lambda n: abs(n - relation_heads))
        raise RecipeError(
            f"minilm_v2: {relation_heads} relation heads do not divide the hidden sizes {sizes[0]} and {sizes[1]}; the "
            f"nearest number that does is {closest}."
        )
    own, layer = layer_index(None, student, "minilm_v2"), layer_index(teacher_layer, teacher, "minilm_v2")
    terms: list[Term] = [
        Match(
            name,
            losses.self_attention_relation,
            f"attention[{own}].{kind}",
            f"attention[{layer}].{kind}",
            heads=relation_heads,
            mask=MASK,
        )
        for name, kind in (("relation-q", "query"), ("relation-k", "key"), ("relation-v", "value"))
    ]
    overrides = schedule_of(relation_epochs, relation_learning_rate)
    return _stages("minilm_v2", student, teacher, terms, overrides, then, temperature)
