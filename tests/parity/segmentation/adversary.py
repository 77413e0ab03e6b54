"""Parity adapters of the segmentation losses: adversary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.losses.adversarial import discriminator_loss, generator_loss, gradient_penalty
from taskkd.segmentation.discriminators import PatchDiscriminator, SelfAttentionDiscriminator, conditioned
from taskkd.segmentation.methods import METHODS
from taskkd.terms import Run

Inputs = Mapping[str, Tensor]


def self_attention(inputs: Inputs, channels: int, **options: Any) -> SelfAttentionDiscriminator:
    """A discriminator with the case's weights; `overwrite`, as their gradients are those of overwritten vectors."""
    width = len(inputs["w_l1.0.module.bias"])
    made = SelfAttentionDiscriminator(channels, width=width, overwrite=True, **options).double()
    names = {"last.weight": "last.0.weight", "last.bias": "last.0.bias"}
    for i in range(4):
        theirs = {"weight": "weight_bar", "bias": "bias", "u": "weight_u", "v": "weight_v"}
        names |= {f"convolutions.{i}.{our}": f"l{i + 1}.0.module.{their}" for our, their in theirs.items()}
    for i in (1, 2):
        names[f"attentions.{i + 1}.gamma"] = f"attn{i}.gamma"
        for layer in ("query", "key", "value"):
            names |= {f"attentions.{i + 1}.{layer}.{n}": f"attn{i}.{layer}_conv.{n}" for n in ("weight", "bias")}
    state = {our: inputs[f"w_{their}"].detach().double() for our, their in names.items()}
    state |= {
        f"preprocessing.{name[len('w_preprocess_additional.') :]}": value
        for name, value in inputs.items()
        if name.startswith("w_preprocess_additional.")
    }
    missing = made.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    return made


def _weights(judge: nn.Module, value: Tensor, name: str) -> dict[str, Tensor]:
    """The gradients that a case holds of the discriminator's weights."""
    assert isinstance(judge, SelfAttentionDiscriminator)
    last, first = torch.autograd.grad(
        value,
        [judge.last.weight, judge.convolutions[0].weight],
        materialize_grads=True,  # type: ignore[list-item]
    )
    return {f"grad_{name}__last.0.weight": last, f"grad_{name}__l1.0.module.weight_bar": first}


def skd_adversarial(inputs: Inputs, params: Mapping[str, Any]) -> dict[str, Tensor]:
    student, teacher = (inputs[f"in_{side}"].detach().double().requires_grad_() for side in "st")

    def judge() -> SelfAttentionDiscriminator:  # every result is from the same state
        mode = str(params["preprocess_GAN_mode"]).lower()
        return self_attention(inputs, student.shape[1], preprocessing="tanh" if "tanh" in mode else "batch_norm")

    found = {"D_s": judge()(student), "D_t": judge()(teacher), "g_loss": generator_loss(judge()(student), game="hinge")}
    (slope,) = torch.autograd.grad(found["g_loss"], student)
    found |= {"grad_s_g_loss_stride8": slope[:, :, ::8, ::8], "grad_s_g_loss_norm": slope.norm()}
    for name, game in (("d_wgan_gp", "wasserstein"), ("d_hinge", "hinge")):
        one = judge()
        real, fake = one(teacher), one(student)  # in this order, as they
        found[name] = discriminator_loss(fake, real, game=game)  # type: ignore[arg-type]
        found |= _weights(one, found[name], name)
    one = judge()
    penalty = gradient_penalty(one, student, teacher, position=inputs["in_alpha"].flatten())
    found["gp"] = params["lambda_gp"] * penalty
    return found | _weights(one, found["gp"], "gp")


def skd_conditional_d(inputs: Inputs, params: Mapping[str, Any]) -> dict[str, Tensor]:
    logits, images = inputs["in_s"].double(), inputs["in_img"].double()
    probabilities = logits.softmax(1)
    channels = logits.shape[1] + images.shape[1]

    def judge() -> SelfAttentionDiscriminator:
        return self_attention(inputs, channels, align_corners=True)

    scores = judge()(probabilities, images)
    together = conditioned(probabilities, images, align_corners=True)
    one = judge()
    penalty = gradient_penalty(one, together, together)  # at the student's own input
    found = {"D_s": scores.flatten(), "g_loss": generator_loss(scores, game="wasserstein"), "gp": penalty}
    return found | _weights(one, penalty, "gp")


class Network(nn.Module):
    """What the methods look at."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = tuple(map(str, range(classes)))
        self.views = SimpleNamespace(logits="head", feature="feature", aux="aux", stages=())


def _patches(inputs: Inputs) -> PatchDiscriminator:
    """The case's judge; their label of the source is 0, ours 1, so the sign of the scores turns."""
    made = PatchDiscriminator(inputs["w_conv1.weight"].shape[1], width=len(inputs["w_conv1.bias"])).double()
    layers = zip(made.convolutions, ["conv1", "conv2", "conv3", "conv4", "classifier"], strict=True)
    made.convolutions.load_state_dict(
        {
            f"{i}.{n}": inputs[f"w_{theirs}.{n}"].detach() * (-1 if theirs == "classifier" else 1)
            for i, (_, theirs) in enumerate(layers)
            for n in ("weight", "bias")
        }
    )
    return made


def dakd(inputs: Inputs, params: Mapping[str, Any]) -> dict[str, Tensor]:
    maps = {n[3:]: x.detach().double() for n, x in inputs.items() if n.startswith(("in_s_", "in_t_"))}
    for level in ("aux", "final"):
        maps[f"s_{level}"].requires_grad_()
    labels, (batch, classes) = inputs["in_label"].long(), maps["s_final"].shape[:2]
    method = METHODS["domain_adaptive"](
        Network(classes),
        Network(classes),
        pseudo_label_weight=params["lambda_targetce"],
        kl_weight=params["lambda_kl"],
        mse_weight=params["lambda_mse"],
        aux_weight=params["lambda_seg"],
        adversarial_weight=0.0,
        adversarial_aux_weight=0.0,
    )
    data = {"unlabelled": torch.zeros(batch, dtype=torch.bool)}
    sides = ({"head": maps[f"{side}_final"], "aux": maps[f"{side}_aux"]} for side in "st")
    run = Run(data, None, *sides)
    terms = {t.name: t for t in method.stages[0].terms}
    values = {name: term(run) for name, term in terms.items()}
    seg = [F.cross_entropy(maps[f"s_{level}"], labels, ignore_index=255) for level in ("final", "aux")]
    total = seg[0] + params["lambda_seg"] * seg[1] + sum(terms[n].schedule.value * v for n, v in values.items())
    aux, final = torch.autograd.grad(total, [maps["s_aux"], maps["s_final"]])
    judge, one, none = _patches(inputs), torch.ones(batch), torch.zeros(batch)
    scores = judge(maps["s_final"].softmax(1))
    adversarial = generator_loss(scores, game="cross_entropy")
    (misled,) = torch.autograd.grad(adversarial, maps["s_final"], retain_graph=True)
    game = partial(discriminator_loss, scores, scores, game="cross_entropy")
    return {
        "seg_final": seg[0],
        "seg_aux": seg[1],
        "mse": values["log-probabilities-aux"],
        "pseudo_ce": values["pseudo-labels"],
        "kl_as_written": values["kl"],  # theirs is NaN: ours is the one that was meant, and finite
        "kl_intended_final": values["kl"] / classes,
        "kl_intended_aux": values["kl-aux"] / classes,
        "adv_g": adversarial,
        "d_source": game(mask=none, teacher_mask=one),
        "d_target": game(mask=one, teacher_mask=none),
        "total_source": total,
        "grad_s_aux_stride4": aux[:, :, ::4, ::4],
        "grad_s_final_stride4": final[:, :, ::4, ::4],
        "grad_s_final_adv_stride4": misled[:, :, ::4, ::4],
    }


__all__ = ["ADAPTERS", "Network", "self_attention"]

ADAPTERS: dict[str, Callable[..., Any]] = {
    "segmentation/dakd": dakd,
    "segmentation/skd_adversarial": skd_adversarial,
    "segmentation/skd_conditional_d": skd_conditional_d,
}
