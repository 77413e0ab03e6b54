"""TinyBERT end to end: the method's own terms on stock transformers models that hold the reference's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import taskkd as kd
from taskkd.nlp import tinybert


def bert(params: Mapping[str, Any], side: str) -> BertForSequenceClassification:
    hidden = params[f"{side}_hidden"]
    config = BertConfig(
        vocab_size=params["vocab"],
        hidden_size=hidden,
        num_hidden_layers=params[f"{side}_layers"],
        num_attention_heads=params[f"heads_{side}"],
        intermediate_size=2 * hidden,
        max_position_embeddings=params["max_position"],
        num_labels=params["labels"],
        layer_norm_eps=params["layer_norm_eps"],
        hidden_dropout_prob=params["dropout"],
        attention_probs_dropout_prob=params["dropout"],
    )
    return BertForSequenceClassification(config).double()


def tinybert_e2e(
    arrays: Mapping[str, Tensor], params: Mapping[str, Any], *, checkpointing: bool = False
) -> dict[str, Tensor]:
    student, teacher = bert(params, "student"), bert(params, "teacher")
    own = {k.removeprefix("w_student."): v for k, v in arrays.items() if k.startswith("w_student.")}
    other = {k.removeprefix("w_teacher."): v.detach() for k, v in arrays.items() if k.startswith("w_teacher.")}
    teacher.load_state_dict({k: v for k, v in other.items() if not k.startswith("fit_dense")}, strict=True)
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stage = tinybert(student, teacher, compat="official").stages[0]
    distiller = kd.Distiller(student, kd.Frozen(teacher), stage.terms, task_weight=0.0)
    batch = {name.removeprefix("in_"): value for name, value in arrays.items() if name.startswith("in_")}
    distiller.prepare(batch)
    given = {f"student.{k}": v for k, v in own.items() if not k.startswith("fit_dense")}
    for name, _ in list(distiller.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        # The reference's tensors themselves, so that backward fills their gradients, also in recomputed layers.
        weight = given.pop(name) if name in given else own[f"fit_dense.{leaf}"]
        distiller.get_submodule(path)._parameters[leaf] = weight  # type: ignore[assignment]
    assert not given
    losses = distiller(**batch)
    distiller.close()
    result = {"loss": losses["loss"]}
    result["loss_att"] = torch.stack([v for n, v in losses.items() if n.startswith("attention")]).sum()
    result["loss_rep"] = torch.stack([v for n, v in losses.items() if n.startswith(("hidden", "embed"))]).sum()
    return result
