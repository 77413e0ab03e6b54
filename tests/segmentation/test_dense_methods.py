"""Soft targets, channel-wise distillation and DIST: what their terms compute, and on which maps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.segmentation.methods import METHODS
from taskkd.segmentation.methods.channel_wise import normalised_loss
from taskkd.segmentation.methods.soft_targets import pixel_loss
from taskkd.terms import Run

CASES = Path(__file__).parent.parent / "parity" / "cases" / "segmentation"


class Net(nn.Module):
    """A network that names its maps, as a `Segmenter` does: a stride, a width, classes, and auxiliary logits."""

    def __init__(self, width: int, stride: int, classes: int = 3, aux: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Conv2d(width, classes, 1)
        self.other = nn.Conv2d(width, classes, 1) if aux else None
        self.classes = tuple(f"c{i}" for i in range(classes))
        self.views = SimpleNamespace(
            logits="classifier", feature="classifier:in", aux="other" if aux else None, stages=("backbone",)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.backbone(images)
        out = {"logits": self.classifier(x)}
        if self.other is not None:
            out["aux"] = self.other(x)
        return out


def batch() -> dict[str, Tensor]:
    labels = torch.randint(0, 3, (2, 24, 32))
    labels[0, :8] = 255
    valid = torch.ones(2, 24, 32, dtype=torch.bool)
    valid[1, :, 16:] = False
    return {"images": torch.rand(2, 3, 24, 32), "labels": labels, "valid": valid}


def task(out: Any, batch: Any) -> Tensor:
    logits = F.interpolate(out["logits"], size=batch["labels"].shape[1:], mode="bilinear")
    return F.cross_entropy(logits, batch["labels"], ignore_index=255)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("soft_targets", {"temperature": 2.0}),
        ("soft_targets", {"form": "cross_entropy", "upsample": 2, "ignore": "labels", "align": "student"}),
        ("channel_wise", {}),
        ("channel_wise", {"on": "feature", "divide_by": "student", "adapter": "conv1x1"}),
        ("channel_wise", {"on": "feature", "norm": "channel_mean", "divergence": "mse"}),
        ("dist", {}),
        ("dist", {"over": "batch", "ignore": "none"}),
    ],
    ids=str,
)
def test_a_step_trains_the_student_and_leaves_the_teacher(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    student, teacher = Net(4, 4), Net(6, 2)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    stage = METHODS[name](student, teacher, **options).stages[0]
    distiller = kd.Distiller(student, kd.Frozen(teacher), stage.terms, task_loss=task, task_weight=stage.task_weight)
    given = batch()
    distiller.prepare(given)
    distiller.train()
    found = distiller(**given)
    assert set(found) == {"loss", "task", *(term.name for term in stage.terms)}
    assert all(v.isfinite() for v in found.values())
    (found["loss"] - found["task"]).backward()
    assert student.backbone[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("name", ["soft_targets", "channel_wise", "dist"])
def test_padding_counts_nothing(name: str) -> None:
    torch.manual_seed(0)
    term = METHODS[name](Net(4, 4), Net(6, 4)).stages[0].terms[0]
    given, s, t = batch(), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    run = Run(given, None, {"classifier": s}, {"classifier": t})
    value = term(run)
    s[1, :, :, 4:], t[1, :, :, 4:] = 1e4, -1e4
    torch.testing.assert_close(term(run), value, rtol=0, atol=0)
    given["valid"][:] = False
    assert term(run) == 0


def test_published_weights_and_both_heads() -> None:
    student, teacher = Net(4, 4), Net(6, 4)

    def weights(name: str, *, of: tuple[Net, Net] = (student, teacher), **options: Any) -> dict[str, float]:
        return {t.name: t.schedule.value for t in METHODS[name](*of, **options).stages[0].terms}

    assert weights("soft_targets") == {"logits": 1.0}
    assert weights("channel_wise") == {"channels": 3.0}
    assert weights("channel_wise", on="feature") == {"channels": 50.0}
    assert weights("dist") == {"logits": 1.0, "aux": 0.4}
    assert weights("dist", aux_weight=0.0) == weights("dist", of=(Net(4, 4, aux=False), teacher)) == {"logits": 1.0}


PARITY = [
    ("kd_pixel_cirkd", "soft_targets", {"temperature": "temperature"}, "classifier"),
    ("cwd_mmrazor", "channel_wise", {"temperature": "tau", "weight": "loss_weight"}, "classifier"),
    ("dist_seg", "dist", {"inter": "beta", "intra": "gamma"}, "classifier"),
    ("dist_mmrazor4d", "dist", {"temperature": "tau"}, "classifier"),
]


@pytest.mark.parametrize(("key", "method", "options", "tap"), PARITY, ids=str)
def test_methods_build_the_terms_that_were_tested(key: str, method: str, options: dict[str, str], tap: str) -> None:
    for path in sorted(CASES.glob(f"{key}-*.json")):
        params, arrays = json.loads(path.read_text())["params"], np.load(path.with_suffix(".npz"))
        s, t = (torch.from_numpy(arrays[f"in_{side}"]) for side in "st")
        chosen: dict[str, Any] = {ours: params[theirs] for ours, theirs in options.items() if theirs in params}
        if key == "dist_mmrazor4d":
            chosen["over"] = "batch"
        if method != "channel_wise":
            chosen["weight"] = 1.0
        nets = Net(4, 4, classes=s.shape[1]), Net(4, 4, classes=s.shape[1])
        term = METHODS[method](*nets, **chosen).stages[0].terms[0]
        value = term.schedule.value * term(Run({}, None, {tap: s}, {tap: t}))
        assert value.item() == pytest.approx(float(arrays["out_loss"]), rel=1e-10)


def test_norms_of_channels_and_pixels_that_are_left_out() -> None:
    s, t = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    maps = [x.flatten(2).softmax(2) for x in (s, t)]
    value = normalised_loss(s, t, norm="channel", divergence="mse")
    torch.testing.assert_close(value, (maps[0] - maps[1]).square().sum(2).mean())
    value = normalised_loss(s, t, norm="spatial", divergence="mse")
    torch.testing.assert_close(value, (s.softmax(1) - t.softmax(1)).square().sum(1).mean())
    torch.testing.assert_close(normalised_loss(s, t, norm="none", divergence="mse"), 4 * F.mse_loss(s, t))
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[:, 3:] = False
    for norm, divergence in (("channel", "kl"), ("channel", "mse"), ("channel_mean", "mse"), ("spatial", "kl")):
        options: Any = {"norm": norm, "divergence": divergence}
        kept = normalised_loss(s[:, :, :3], t[:, :, :3], **options)
        torch.testing.assert_close(normalised_loss(s, t, mask=mask, **options), kept)
        none = normalised_loss(s.requires_grad_(), t, mask=mask & False, **options)
        assert none == 0
        assert torch.autograd.grad(none, s)[0].eq(0).all()


def test_upsampled_soft_targets_take_the_mask_along() -> None:
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    whole = pixel_loss(s, t, upsample=2)
    assert pixel_loss(s, t, upsample=2, mask=mask).allclose(whole)
    both = [F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True) for x in (s, t)]
    assert whole.allclose(losses.kl_divergence(*both, dim=1))
    assert pixel_loss(s, t, upsample=2, mask=mask & False) == 0


def test_errors_are_sentences() -> None:
    for name in ("soft_targets", "channel_wise", "dist"):
        with pytest.raises(RecipeError, match=f"{name} compares logits: the student has 3 classes, the teacher 4"):
            METHODS[name](Net(4, 4), Net(4, 4, classes=4))
    with pytest.raises(RecipeError, match="norm 'none' goes with divergence 'mse'"):
        METHODS["channel_wise"](Net(4, 4), Net(4, 4), norm="none")
    with pytest.raises(ValueError, match="`form` is one of kl"):
        pixel_loss(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), form="ce")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`over` is one of all, batch"):
        losses.dist(torch.ones(1, 2), torch.ones(1, 2), over="pixels")  # type: ignore[arg-type]
