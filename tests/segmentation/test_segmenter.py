"""A segmenter runs any network in its own way, and is nothing but that network in a state dict."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import taskkd as kd
from taskkd.errors import TaskkdError
from taskkd.segmentation.segmenter import Segmenter, semantic_map
from tests.segmentation.networks import NETWORKS


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes, 1))


def test_images_are_normalised() -> None:
    model = Segmenter(nn.Identity(), 3, mean=(0.5, 0.25, 0.0), std=(1.0, 2.0, 4.0))
    pixel = torch.tensor([0.5, 0.75, 1.0]).view(1, 3, 1, 1)
    assert model(pixel)["logits"].flatten().tolist() == [0.0, 0.25, 0.25]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"out": x},
        lambda x: {"logits": x},
        lambda x: SimpleNamespace(logits=x),
        lambda x: (x, "labels"),
        lambda x: x,
    ],
)
def test_every_form_of_output(wrap: Any) -> None:
    model = Segmenter(nn.Identity(), ["a", "b", "c"], call=lambda m, x: wrap(m(x)))
    assert model(torch.rand(2, 3, 4, 4))["logits"].shape == (2, 3, 4, 4)


def test_outputs_without_logits_are_refused() -> None:
    model = Segmenter(nn.Identity(), 3, call=lambda m, x: {"scores": x})
    with pytest.raises(TaskkdError, match="this Identity has no logits"):
        model(torch.rand(1, 3, 4, 4))
    with pytest.raises(TaskkdError, match="got NoneType"):
        Segmenter(nn.Identity(), 3, call=lambda m, x: None)(torch.rand(1, 3, 4, 4))
    with pytest.raises(TaskkdError, match="at least one class"):
        Segmenter(net(), [])
    with pytest.raises(TaskkdError, match="divisor"):
        Segmenter(net(), 3, divisor=0)


def test_a_list_gives_lists_and_is_run_one_by_one() -> None:
    model = Segmenter(net(), 3).eval()
    images = [torch.rand(3, 17, 20), torch.rand(3, 32, 16)]
    found = model(images)
    assert [tuple(x.shape) for x in found["logits"]] == [(3, 9, 10), (3, 16, 8)]
    torch.testing.assert_close(found["logits"][1], model(images[1][None])["logits"][0])
    assert model([]) == {"logits": []}


@pytest.mark.parametrize(("size", "out"), [((32, 48), (16, 24)), ((30, 34), (15, 17)), ((31, 33), (31, 33))])
def test_padding_to_a_divisor_is_cut_off_again(size: tuple[int, int], out: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []
    inner = net()
    inner.register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape[2:])))
    model = Segmenter(inner, 3, divisor=16).eval()
    images = torch.rand(2, 3, *size)
    found = model(images)["logits"]
    assert all(side % 16 == 0 for side in seen[0])
    assert found.shape == (2, 3, *out)
    # where the padding does not reach, it is as without
    plain = Segmenter(inner, 3).eval()(images)["logits"]
    if out != size:
        torch.testing.assert_close(found[..., :-1, :-1], plain[..., :-1, :-1])


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet", "upernet", "data2vec"])
def test_auxiliary_logits_are_there_in_training_only(name: str) -> None:
    model = Segmenter(NETWORKS[name][0](4), 4)
    images = torch.rand(2, 3, 64, 64)
    found = model(images)
    assert found["aux"].shape[:2] == (2, 4)
    found["aux"].sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "aux" in n)
    assert set(model.eval()(images)) == {"logits"}
    twin = copy.deepcopy(model).train()  # whose hook is its own
    assert "aux" in twin(images)
    assert model._aux is None


def test_the_state_is_the_networks_own() -> None:
    model = Segmenter(net(), 3)
    assert {k.removeprefix("model.") for k in model.state_dict()} == set(net().state_dict())
    views, images = model.views, torch.rand(1, 3, 16, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.views == views
        torch.testing.assert_close(twin.eval()(images)["logits"], model.eval()(images)["logits"])


def test_it_is_compiled_as_one_graph() -> None:
    model, images = Segmenter(net(), 3, divisor=8).eval(), torch.rand(1, 3, 20, 24)
    expected = model(images)["logits"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images)["logits"], expected)


def test_a_compiled_distiller() -> None:
    torch.manual_seed(0)
    student, teacher = Segmenter(net(), 3), Segmenter(net(), 3)
    taps = student.views.logits, teacher.views.logits
    distiller = kd.Distiller(
        student, kd.Frozen(teacher), [kd.Match("kl", kd.losses.kl_divergence, *taps, dim=1)], task_weight=0.0
    )
    batch = {"images": torch.rand(2, 3, 16, 16)}
    distiller.prepare(batch)
    expected = float(distiller(**batch)["loss"].detach())
    found = torch.compile(distiller, fullgraph=True, backend="eager")(**batch)["loss"]
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_half_precision_weights() -> None:
    model = Segmenter(net(), 3).bfloat16()
    assert model(torch.rand(2, 3, 8, 8))["logits"].dtype == torch.bfloat16


# ---- networks of queries


def test_the_semantic_map_is_a_distribution() -> None:
    torch.manual_seed(0)
    classes, masks = torch.randn(2, 6, 4), torch.randn(2, 6, 5, 7)
    found = semantic_map(classes, masks)
    shares = torch.zeros(2, 3, 5, 7)
    for q in range(6):
        shares += classes[:, q].softmax(-1)[:, :3, None, None] * masks[:, q].sigmoid()[:, None]
    torch.testing.assert_close(found.exp(), shares / shares.sum(1, keepdim=True))
    torch.testing.assert_close(found.argmax(1), shares.argmax(1))


def test_a_semantic_map_of_nothing_is_finite() -> None:
    """Every query is "no object", every mask is empty: each class has the same share."""
    classes, masks = torch.full((1, 2, 4), -1e4).requires_grad_(), torch.full((1, 2, 3, 3), -1e4)
    with torch.no_grad():
        classes[..., -1] = 1e4
    found = semantic_map(classes.half(), masks.half())
    torch.testing.assert_close(found.exp(), torch.full((1, 3, 3, 3), 1 / 3))
    found.sum().backward()
    assert bool(classes.grad.isfinite().all())


def test_double_precision_is_kept() -> None:
    assert semantic_map(torch.randn(1, 2, 4).double(), torch.randn(1, 2, 3, 3).double()).dtype == torch.float64


def test_images_are_shown_in_the_precision_of_the_network_that_is_given() -> None:
    model = Segmenter(net().bfloat16(), 3)
    assert model(torch.rand(1, 3, 8, 8))["logits"].dtype == torch.bfloat16
    assert Segmenter(net(), 3).description == model.description
