"""Segmentation networks under distillation by every method: acceptance A6, end to end.

Untouched teachers, gradients for the student and adapters alone, and finite losses of batches that have nothing in them
to learn from; the loops of a user.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
from taskkd.segmentation import METHODS, PixelCrossEntropy, Segmenter
from tests.segmentation import toy

CLASSES = 5
#: what makes methods small
OPTIONS: dict[str, dict[str, Any]] = {
    "cirkd": {"pixels": 40, "regions": 8, "channel": 1.0, "channel_memory": 0.1, "channel_mse": 1.0},
    "domain_adaptive": {"width": 2},
    "structured": {"width": 2},
}
CASES = [*METHODS, "channel_wise, feature"]  # which has an adapter with batch norm
#: height and width, batch, labels; taps see maps of 13 x 17 and 7 x 9, and of 2 x 1 pixels
BATCHES: dict[str, tuple[tuple[int, int], int, str]] = {
    "plain": ((64, 48), 2, "any"),
    "ignored": ((64, 48), 2, "ignored"),
    "one class": ((64, 48), 2, "one"),
    "a class absent": ((64, 48), 2, "without 4"),
    "no multiples": ((103, 135), 2, "any"),
    "one image": ((64, 48), 1, "any"),
    "one image, ignored": ((64, 48), 1, "ignored"),
    "unlabelled": ((64, 48), 3, "unlabelled"),
    "two pixels": ((32, 16), 1, "any"),
}


class Net(nn.Module):
    """Like torchvision's: `out` and, in training, `aux`, of a stride from 8 on."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()

        def layer(own: int, out: int, step: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(own, out, 3, step, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True))

        self.stem, self.middle = layer(3, width, 4), layer(width, 2 * width, 2)
        self.last = layer(2 * width, 4 * width, stride // 8)
        self.classifier, self.aux = nn.Conv2d(4 * width, CLASSES, 1), nn.Conv2d(2 * width, CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        middle = self.middle(self.stem(images))
        return {"out": self.classifier(self.last(middle)), "aux": self.aux(middle)}


def segmenter(width: int, stride: int, seed: int) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(Net(width, stride), CLASSES, stages=["stem", "middle", "last"], logits="classifier")


def pair() -> tuple[Segmenter, Segmenter]:
    """A student of stride 16 and a wider teacher of stride 8."""
    return segmenter(2, 16, 0), segmenter(4, 8, 1)


def batch(name: str = "plain", seed: int = 0) -> dict[str, Tensor]:
    size, count, kind = BATCHES[name]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES - (kind == "without 4"), (count, *size), generator=generator)
    labels[:, :2] = 255
    if kind == "ignored":
        labels.fill_(255)
    elif kind == "one":
        labels.fill_(3)
    unlabelled = torch.zeros(count, dtype=torch.bool)
    valid = torch.ones(count, *size, dtype=torch.bool)
    if kind == "unlabelled":
        unlabelled[1:] = True
        labels[1:] = 255
    if count > 1:
        valid[-1, :, -5:], labels[-1, :, -5:] = False, 255
    images = torch.rand(count, 3, *size, generator=generator)
    return {"images": images, "labels": labels, "valid": valid, "unlabelled": unlabelled, "id": torch.arange(count)}


def made(case: str) -> tuple[kd.Distiller, Segmenter]:
    student, teacher = pair()
    method, _, feature = case.partition(", ")
    options: dict[str, Any] = {"on": "feature"} if feature else OPTIONS.get(method, {})
    terms = METHODS[method](student, teacher, **options).stages[0].terms
    torch.manual_seed(3)
    distiller = kd.Distiller(student, teacher, terms, task_loss=PixelCrossEntropy())
    distiller.prepare(batch())
    distiller.set_total(20)
    return distiller.train(), teacher


@pytest.mark.parametrize("case", CASES)
def test_every_batch_gives_finite_losses_and_the_teacher_stays_as_it_was(case: str) -> None:
    distiller, teacher = made(case)
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
    for seed, name in enumerate(BATCHES):
        losses = distiller(**batch(name, seed))
        losses["loss"].backward()
        judged = distiller.auxiliary_step()
        assert all(bool(v.isfinite()) for v in {**losses, **judged}.values()), (name, losses, judged)
        found = {n: p.grad for n, p in distiller.named_parameters()}
        wrong = [n for n, g in found.items() if g is not None and not bool(g.isfinite().all())]
        assert not wrong, (name, wrong)
        if name == "plain":
            assert [n for n, g in found.items() if g is None] == []
            assert all(n.startswith(("student.", "terms.")) for n in found)
            assert any(bool((g != 0).any()) for n, g in found.items() if n.startswith("student.") and g is not None)
        if "ignored" in name:
            assert losses["task"] == 0
        optimizer.step()
        optimizer.zero_grad()
        distiller.step()
    assert not any(p.grad is not None or p.requires_grad for p in teacher.parameters())
    after = teacher.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert "model.last.1.running_mean" in before
    assert not any(m.training for m in teacher.modules())
    assert not any(key.startswith("teacher") for key in distiller.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method: str) -> None:
    distiller, teacher = made(method)
    student = distiller.student
    distiller.close()
    fresh = segmenter(2, 16, 0)
    for model in (student, teacher):
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert list(student.state_dict()) == list(fresh.state_dict())


def test_labels_pixels_and_streams_need_not_be_said() -> None:
    """A loop by hand has images and labels: where a method needs more, a sentence says so."""
    data = batch()
    for method in METHODS:
        student, teacher = pair()
        terms = METHODS[method](student, teacher, **OPTIONS.get(method, {})).stages[0].terms
        distiller = kd.Distiller(student, teacher, terms, task_loss=PixelCrossEntropy())
        plain = {k: data[k] for k in ("images", "labels")}
        if method == "domain_adaptive":
            with pytest.raises(kd.errors.TaskkdError, match=r"needs `unlabelled` \(batch,\)"):
                distiller.prepare(plain)
            continue
        distiller.prepare(plain)
        distiller.set_total(1)
        assert distiller(**plain)["loss"].isfinite()


def test_the_loop_of_a_user() -> None:
    """Networks of any kind, wrapped; as the README's loop, with a method."""
    student, teacher = Segmenter(Net(2, 16), CLASSES), Segmenter(Net(4, 8), CLASSES)
    method = METHODS["channel_wise"](student, teacher)
    distiller = kd.Distiller(
        student, kd.Frozen(teacher), method.stages[0].terms, task_loss=PixelCrossEntropy(aux_weight=0.4)
    )
    loader = [batch("plain", seed) for seed in range(2)]
    report = distiller.prepare(loader[0])
    assert report
    distiller.set_total(len(loader) * 2)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
    found = []
    for _ in range(2):
        for data in loader:
            losses = distiller(**data)
            losses["loss"].backward()
            if distiller.check_finite():
                optimizer.step()
            optimizer.zero_grad()
            distiller.step()
            found.append(losses["loss"].item())
    assert found[2] < found[0]
    assert student.eval()(loader[0]["images"])["logits"].shape == (2, CLASSES, 4, 3)


def test_the_same_seed_gives_the_same_losses() -> None:
    def losses() -> list[float]:
        distiller, _ = made("cirkd")
        torch.manual_seed(5)
        return [distiller(**batch("plain", seed))["loss"].item() for seed in range(3)]

    first = losses()
    assert first == losses()
    assert len(set(first)) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("method", ["channel_wise", "dist", "soft_targets", "structured"])
def test_distillers_of_maps_compile_as_a_whole(method: str) -> None:
    found = []
    options = {"holistic_weight": 0.0} if method == "structured" else {}
    for compiled in (False, True):
        student, teacher = toy.network(2, seed=0), toy.network(4, seed=1, stride=2)
        terms = METHODS[method](student, teacher, **options).stages[0].terms
        distiller = kd.Distiller(student, teacher, terms, task_loss=PixelCrossEntropy())
        data = batch()
        distiller.prepare(data)
        call = torch.compile(distiller, fullgraph=True, backend="aot_eager") if compiled else distiller
        losses = call(**data)
        losses["loss"].backward()
        found.append((losses["loss"].detach(), student.model.head.weight.grad))
    for plain, whole in zip(*found, strict=True):
        torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-6)
