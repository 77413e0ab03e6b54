"""The probe finds the maps of every family that is known, and says what it does not find (acceptance A8)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd.errors import TapError
from taskkd.segmentation.segmenter import Segmenter
from taskkd.taps import Taps
from tests.segmentation.networks import NETWORKS, some


def maps(model: Segmenter, height: int, width: int) -> dict[str, Tensor]:
    """What the views give on one image."""
    views = model.views
    names = [n for n in (views.logits, views.feature, views.aux, *views.stages) if n is not None]
    taps, images = Taps(model.eval(), names), torch.rand(1, 3, height, width)
    with torch.no_grad(), taps.record():
        output = model(images)
    found = taps.read(output, {"images": images})
    taps.close()
    return found


@pytest.mark.parametrize(
    "name", some(NETWORKS, "deeplabv3_resnet101", "unetplusplus", "manet", "linknet", "pan", "smp_upernet")
)
def test_the_views_of_every_family(name: str) -> None:
    build, logits, channels, stride = NETWORKS[name]
    torch.manual_seed(0)
    model = Segmenter(build(5), 5)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    views = model.views
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert views.logits == f"model.{logits}"
    assert (views.aux is not None) == any("aux" in n and n.endswith("weight") for n in before)
    side = 128 if name == "pan" else 64  # whose pyramid is three levels deep
    found = maps(model, side, side)
    assert found[views.logits].shape == (1, 5, side // stride, side // stride)
    assert found[views.feature or ""].shape[:2] == (1, channels)
    strides = [side / found[s].shape[2] for s in views.stages]
    assert strides == sorted(set(strides))
    assert len(strides) >= 3


class Odd(nn.Module):
    """Several convolutions with as many channels as classes, and an output that is none of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return (self.first(x) + self.second(x)).softmax(1)


def test_what_is_not_clear_is_refused_with_the_candidates() -> None:
    with pytest.raises(TapError, match=r"of 'stem', 'first', 'second'.*none is.*logits='second'") as error:
        Segmenter(Odd(), 4).views  # noqa: B018
    assert "out.logits" in str(error.value)
    named = Segmenter(Odd(), 4, logits="second", feature="stem", stages=["stem"]).views
    assert (named.logits, named.feature, named.stages) == ("model.second", "model.stem", ("model.stem",))
    assert Segmenter(Odd(), 4, logits="model.first").views.feature == "model.first:in"
    assert Segmenter(Odd(), 4, logits="out.logits").views.feature is None
    with pytest.raises(TapError, match=r"no module 'secnd' \(did you mean 'second'"):
        Segmenter(Odd(), 4, logits="secnd").views  # noqa: B018


def test_several_layers_of_as_many_channels_are_told_apart_by_the_output() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 1))
    views = Segmenter(net, 6).views
    assert views == type(views)("model.4", "model.4:in", None, ("model.1", "model.3"))


def test_a_network_without_such_a_layer_has_its_output() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).movedim(1, -1)).movedim(-1, 1)

    views = Segmenter(Projected(), 3).views
    assert views == type(views)("out.logits", None, None, ("model.encoder.0", "model.encoder"))


def test_a_wrong_number_of_classes_is_told() -> None:
    with pytest.raises(TapError, match=r"Sequential gives 4 channels of logits, for 3 classes \(0, 1, 2\)"):
        Segmenter(nn.Sequential(nn.Conv2d(3, 4, 1)), 3).views  # noqa: B018
    with pytest.raises(TapError, match=r"does not run on an image"):
        Segmenter(nn.Sequential(nn.Conv2d(1, 4, 1)), 4).views  # noqa: B018


def test_views_survive_copies_and_serve_terms() -> None:
    build, *_ = NETWORKS["segformer"]
    teacher, student = Segmenter(build(4), 4, divisor=32), Segmenter(nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1)), 4)
    assert copy.deepcopy(teacher).views == teacher.views
    term = kd.Match("kl", kd.losses.kl_divergence, student.views.logits, teacher.views.logits, dim=1)
    batch = {"images": torch.rand(2, 3, 64, 64), "labels": torch.zeros(2, 64, 64, dtype=torch.int64)}
    distiller = kd.Distiller(student, kd.Frozen(teacher), [term], task_weight=0.0)
    distiller.prepare(batch)
    distiller(**batch)["loss"].backward()
    assert student.model[0].weight.grad.abs().sum() > 0
