"""The games and the gradient penalty equal the authors' code of structured knowledge distillation (Liu et al. 2019).

The reference is of losses after a discriminator, so the discriminator (self-attention, spectral normalisation with one
power iteration for each forward, batch statistics) is written here from the notes of the case.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.losses.adversarial import discriminator_loss, generator_loss, gradient_penalty

CASE = Path(__file__).parent / "adversarial" / "skd_adversarial-0.npz"
ARRAYS = {k: torch.from_numpy(np.array(v)).double() for k, v in np.load(CASE).items()}
STUDENT, TEACHER = ARRAYS["in_s"], ARRAYS["in_t"]


class Spectral(nn.Module):
    """A 4x4 convolution of stride 2. Its vectors are overwritten past autograd, as theirs: the backward of a first
    forward uses those of the second."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(ARRAYS[prefix + "weight_bar"].clone()), ARRAYS[prefix + "bias"]
        self.u, self.v = (nn.Parameter(ARRAYS[f"{prefix}weight_{n}"].clone(), requires_grad=False) for n in "uv")

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        with torch.no_grad():
            v = flat.T @ self.u
            self.v.data = v / (v.norm() + 1e-12)
            u = flat @ self.v
            self.u.data = u / (u.norm() + 1e-12)
        return F.conv2d(x, self.weight / self.u.dot(flat.mv(self.v)), self.bias, stride=2, padding=1)


def attention(x: Tensor, prefix: str) -> Tensor:
    query, key, value = (
        F.conv2d(x, ARRAYS[f"{prefix}{n}_conv.weight"], ARRAYS[f"{prefix}{n}_conv.bias"]).flatten(2)
        for n in ("query", "key", "value")
    )
    found = value @ torch.softmax(query.mT @ key, -1).mT
    return ARRAYS[f"{prefix}gamma"] * found.view_as(x) + x


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Spectral(f"w_l{i}.0.module.") for i in (1, 2, 3, 4))
        self.last = nn.Parameter(ARRAYS["w_last.0.weight"].clone())

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, None, None, training=True)
        for number, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(x), 0.1)
            if number >= 2:
                x = attention(x, f"w_attn{number - 1}.")
        return F.conv2d(x, self.last, ARRAYS["w_last.0.bias"])


def same(got: Tensor, name: str, tolerance: float) -> None:
    want = ARRAYS[name].reshape(got.shape)
    assert (got.detach() - want).abs().max() <= tolerance * want.abs().max(), name


def test_the_discriminator_is_theirs() -> None:
    same(Discriminator()(STUDENT), "out_D_s", 1e-12)


def test_the_students_loss() -> None:
    student = STUDENT.clone().requires_grad_()
    for game in ("wasserstein", "hinge"):
        value = generator_loss(Discriminator()(student), game=game)  # type: ignore[arg-type]
        same(value, "out_g_loss", 1e-7)
        same(torch.autograd.grad(value, student)[0][:, :, ::8, ::8], "grad_s_g_loss_stride8", 1e-6)


@pytest.mark.parametrize("case", ["d_wgan_gp", "d_hinge", "gp"])
def test_the_discriminators_loss(case: str) -> None:
    judge = Discriminator()
    if case == "gp":
        value = 10 * gradient_penalty(judge, STUDENT, TEACHER, position=ARRAYS["in_alpha"].flatten())
    else:
        teacher, student = judge(TEACHER), judge(STUDENT)  # in this order, as they: each advances the vectors
        value = discriminator_loss(student, teacher, game="hinge" if case == "d_hinge" else "wasserstein")
    same(value, f"out_{case}", 1e-7)
    last, first = torch.autograd.grad(value, [judge.last, judge.layers[0].weight])
    same(last, f"grad_{case}__last.0.weight", 1e-6)
    same(first, f"grad_{case}__l1.0.module.weight_bar", 1e-6)
