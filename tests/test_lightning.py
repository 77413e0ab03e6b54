"""A distiller in Lightning's loop has the losses of a plain loop. Runs where Lightning is installed; CI has none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import taskkd as kd
from taskkd import losses
from tests import small

lightning = pytest.importorskip("lightning", reason="Lightning is no dependency: pip install lightning")
STEPS = 20


def distiller() -> kd.Distiller:
    torch.manual_seed(0)
    student, teacher = small.ConvNet(), small.ConvNet(8)
    terms = [
        kd.Match("soft", losses.kl_divergence, "out.logits", temperature=2.0, weight=kd.schedules.warmup(1.0, steps=5)),
        kd.Match("map", losses.mse, "block", adapter="conv1x1"),
    ]
    made = kd.Distiller(student, teacher, terms)
    made.prepare(small.conv_batch())
    return made


def batches() -> list[dict[str, Tensor]]:
    return [small.conv_batch(seed=i) for i in range(STEPS)]


def test_lightning_trains_as_a_plain_loop(tmp_path: Any) -> None:
    by_hand = distiller()
    by_engine = copy.deepcopy(by_hand)
    expected = []
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    by_hand.train()
    for batch in batches():
        loss = by_hand(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_hand.step()
        expected.append(loss.item())

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.distiller, self.seen = by_engine, []

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss = self.distiller(**batch)["loss"]
            self.seen.append(loss.item())
            return loss

        def optimizer_step(self, *args: Any, **options: Any) -> None:
            super().optimizer_step(*args, **options)
            self.distiller.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.distiller.parameters(), lr=0.05)

    module = Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    engine = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    engine.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    assert module.seen == pytest.approx(expected, rel=1e-6)
    assert len(expected) == STEPS
