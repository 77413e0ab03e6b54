"""The examples of docs/migration.md give the other toolkit's numbers, by its formula, value and gradient."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd import detection, losses, nlp, schedules, segmentation
from tests import small

PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()
TEXTBREWER, TORCHDISTILL, MMRAZOR = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def distiller_of(code: str, student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Any:
    names: dict[str, Any] = {"student": student, "teacher": teacher.eval()}
    exec(compile(code, "migration.md", "exec"), names)
    names["distiller"].prepare(batch)
    return names["distiller"]


def same(distiller: Any, batch: dict[str, Tensor], theirs: Tensor) -> None:
    ours = distiller(**batch)["loss"]
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    for own, other in zip(
        torch.autograd.grad(ours, parameters, allow_unused=True),
        torch.autograd.grad(theirs, parameters, allow_unused=True),
        strict=True,
    ):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_textbrewer() -> None:
    student, teacher = small.bert(2, 16, seed=1), small.bert(4, 32, seed=2)
    batch = small.tokens([9, 4, 6])
    distiller = distiller_of(TEXTBREWER, student, teacher, batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    own = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        other = teacher(**inputs, output_hidden_states=True)
    kd_ce = -(F.softmax(other.logits / 8, -1) * F.log_softmax(own.logits / 8, -1)).sum(-1).mean()
    mask = batch["attention_mask"][..., None]
    difference = (distiller.terms["hidden"].adapters[0](own.hidden_states[2]) - other.hidden_states[4]) * mask
    hidden_mse = difference.square().sum() / mask.sum() / other.hidden_states[4].shape[-1]
    same(distiller, batch, 1.0 * kd_ce + 2.0 * hidden_mse + 0.5 * own.loss)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer2, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(x).relu().mean((2, 3)))


def test_torchdistill() -> None:
    student, teacher = Net(4), Net(8)
    batch = {"x": torch.randn(6, 3, 8, 8), "y": torch.randint(0, 4, (6,))}
    distiller = distiller_of(TORCHDISTILL, student, teacher, batch)
    own, other = student(batch["x"]), teacher(batch["x"]).detach()
    soft = F.kl_div(F.log_softmax(own / 4, 1), F.softmax(other / 4, 1), reduction="batchmean")
    kd_loss = 0.1 * F.cross_entropy(own, batch["y"]) + 0.9 * 4**2 * soft
    maps = [F.normalize(net.layer2(batch["x"]).square().mean(1).flatten(1)) for net in (student, teacher)]
    same(distiller, batch, kd_loss + 1000.0 * (maps[0] - maps[1].detach()).square().mean())


def test_torchdistill_without_labels_drops_the_square_of_the_temperature() -> None:
    own, other = torch.randn(5, 7), torch.randn(5, 7)
    theirs = F.kl_div(F.log_softmax(own / 4, 1), F.softmax(other / 4, 1), reduction="batchmean")
    torch.testing.assert_close(losses.kl_divergence(own, other, temperature=4.0) / 4**2, theirs)


def test_mmrazor() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(3, 5, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(images)

    student, teacher = Maps(), Maps()
    batch = {"images": torch.randn(2, 3, 16, 16)}
    distiller = distiller_of(MMRAZOR, student, teacher, batch)
    own, other = student(batch["images"]), teacher(batch["images"]).detach()
    rows = F.log_softmax(own.flatten(0, 1).flatten(1), 1), F.log_softmax(other.flatten(0, 1).flatten(1), 1)
    cwd = (rows[1].exp() * (rows[1] - rows[0])).sum() / (2 * 5)
    kl = 2**2 * F.kl_div(F.log_softmax(own / 2, 1), F.softmax(other / 2, 1), reduction="batchmean")
    same(distiller, batch, 5.0 * cwd + 0.001 * kl)


def test_the_names_of_the_page_are_there() -> None:
    homes = {"losses": losses, "segmentation": segmentation, "detection": detection, "nlp": nlp, "schedules": schedules}
    names = re.findall(r"`(losses|segmentation|detection|nlp|schedules)\.(\w+(?:\.\w+)*)", PAGE)
    assert len(names) > 25
    for home, path in names:
        found: Any = homes[home]
        for part in path.split("."):
            found = getattr(found, part)
