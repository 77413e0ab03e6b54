"""Interrupted trainings go on bit by bit as if they had not been: acceptance A13 of the specification.

What is drawn or remembered beside weights: flips, balanced batches, running centres and thresholds, a sampled
classifier with an optimiser of its own, and a cache of both views that the second part finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import taskkd as kd
from taskkd.caches import Cached
from taskkd.face import METHODS, MarginHead, PartialFC, build, collate, read_folder
from taskkd.face.batches import GeneralPlusBalanced
from taskkd.face.datasets import FaceDataset, RandomFlip
from tests.engine import StopAfter, arguments, changed, distance, weights
from tests.face import people

#: method; its options; whether its teacher is on disk, its classifier sampled; workers of the interrupted training
USED: dict[str, tuple[str, dict[str, Any], bool, bool, int]] = {
    "mimic": ("embedding_mimic", {}, False, False, 2),
    "mimic, cached, Partial FC": ("embedding_mimic", {"weight": 8.0}, True, True, 0),
    "centres": ("ada_distill", {}, True, False, 0),
    "thresholds": ("ekd", {}, False, False, 2),
}
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people.folder(tmp_path_factory.mktemp("faces"), 8, 5)


def trainer(folder: Path, out: Path, name: str, *callbacks: Any, workers: int = 0) -> kd.Trainer:
    """Forty images in batches of eight, or half as many balanced batches of 16."""
    method, options, cached, sampled, _ = USED[name]
    faces = read_folder(folder, size=people.SIZE)
    student, teacher = build(people.NET, seed=0), build(people.LARGE, seed=1).eval()
    student.identities = teacher.identities = len(faces.identities)
    own = FaceDataset(faces)
    table: Any = RandomFlip(own, seed=5)
    if method == "ekd":
        table = GeneralPlusBalanced(own, faces.labels, 8, 4, 2, seed=5)
    head = PartialFC if sampled else MarginHead
    torch.manual_seed(2)
    made = kd.Trainer(
        student,
        teacher=Cached(teacher, out / "cache") if cached else teacher,
        method=METHODS[method](student, teacher, **options),
        task_loss=head(len(faces.identities), 8, s=16.0, m=0.2, **({"sample_rate": 0.5} if sampled else {})),
        args=arguments(
            out,
            per_device_train_batch_size=1 if method == "ekd" else 8,
            num_train_epochs=STEPS // 5,
            learning_rate=0.05,
            optim="sgd",
            optim_args="momentum=0.9",
            lr_scheduler_type="cosine",
            max_grad_norm=5.0,
            logging_strategy="steps",
            logging_steps=1,
            dataloader_num_workers=workers,
        ),
        train_dataset=table,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    made.seen = []  # type: ignore[attr-defined]
    keep = made.seen.append  # type: ignore[attr-defined]
    student.backbone.register_forward_pre_hook(lambda _, given: keep(given[0].double().sum().item()))
    return made


def everything(done: kd.Trainer) -> dict[str, Tensor]:
    """Weights, the classifier and what terms remember, and the state of the optimiser."""
    state = weights(done.distiller)
    assert done.optimizer is not None
    for number, values in done.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{k}": torch.as_tensor(v).clone() for k, v in values.items() if v is not None}
    return {n: v for n, v in state.items() if isinstance(v, Tensor)}


@pytest.mark.parametrize("name", USED)
def test_resuming_is_bit_exact(name: str, folder: Path, tmp_path: Path) -> None:
    workers = USED[name][-1]
    whole = trainer(folder, tmp_path / "whole", name)
    whole.train()
    first = trainer(folder, tmp_path / "run", name, StopAfter(STEPS // 2), workers=workers)
    first.train()
    assert distance(everything(first), everything(whole)) > 1e-4
    again = trainer(folder, tmp_path / "run", name, workers=workers)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == STEPS
    seen, fresh = whole.seen, again.seen  # type: ignore[attr-defined]
    assert len(set(seen)) >= STEPS  # flips differ from epoch to epoch
    assert fresh[-STEPS // 2 :] == seen[-STEPS // 2 :]
    logged = [[log for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert logged[0] == logged[1]
    assert changed(everything(whole), everything(again)) == set()
    parts = {"centres": "centres", "thresholds": "thresholds", "mimic, cached, Partial FC": "task_loss.momentum"}
    assert any(parts.get(name, "task_loss.weight") in key for key in everything(whole)), list(everything(whole))
