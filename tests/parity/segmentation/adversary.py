"""Parity adapters of the segmentation losses: adversary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.losses.adversarial import discriminator_loss, generator_loss, gradient_penalty
from taskkd.segmentation.discriminators import SelfAttentionDiscriminator, conditioned

Inputs = Mapping[str, Tensor]


def _self_attention(inputs: Inputs, channels: int, **options: Any) -> SelfAttentionDiscriminator:
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
        return _self_attention(inputs, student.shape[1], preprocessing="tanh" if "tanh" in mode else "batch_norm")

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
        return _self_attention(inputs, channels, align_corners=True)

    scores = judge()(probabilities, images)
    together = conditioned(probabilities, images, align_corners=True)
    one = judge()
    penalty = gradient_penalty(one, together, together)  # at the student's own input
    found = {"D_s": scores.flatten(), "g_loss": generator_loss(scores, game="wasserstein"), "gp": penalty}
    return found | _weights(one, penalty, "gp")


ADAPTERS: dict[str, Callable[..., Any]] = {
    "segmentation/skd_adversarial": skd_adversarial,
    "segmentation/skd_conditional_d": skd_conditional_d,
}
