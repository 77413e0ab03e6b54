"""Interrupted trainings go on bit by bit as if they had not been: acceptance A12 of the specification.

There is a judge with an optimiser of its own, a memory of pixels of which some are drawn, a mask from the global
generator, random augmentation, and unlabelled images beside the labelled ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import taskkd as kd
from taskkd.segmentation import METHODS, PixelCrossEntropy, SegmentationDataset, collate
from taskkd.segmentation.datasets import WithUnlabelled
from taskkd.segmentation.readers import read_folder, read_images
from taskkd.segmentation.transforms import build
from tests.engine import StopAfter, arguments, changed, distance, weights
from tests.segmentation import toy, trees

#: a judge and a generator draw, a memory remembers
USED: dict[str, dict[str, Any]] = {
    "structured": {"width": 4},
    "cirkd": {"pixels": 24, "regions": 6, "minibatch": 0.0, "kd": 0.0},
    "masked_generative": {"channels": 0.0},
}
AUGMENT = [
    {"name": "RandomScale", "scale_range": [0.6, 1.4]},
    {"name": "RandomCrop", "size": [40, 40], "pad_if_needed": True},
    "RandomHorizontalFlip",
    "RandomPhotometricDistort",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("shapes")
    return trees.folder(root / "labelled", 6, side=48), trees.folder(root / "others", 5, side=48)


def trainer(data: tuple[Path, Path], folder: Path, *callbacks: Any, workers: int) -> kd.Trainer:
    """Six labelled images, each with one unlabelled, in batches of two pairs: two epochs of three steps."""
    labelled = read_folder(data[0] / "images", data[0] / "masks", classes=toy.CLASSES)
    own = SegmentationDataset(labelled, training=True)
    others = SegmentationDataset(read_images(data[1] / "images"), training=True)
    student, teacher = toy.network(2, seed=0), toy.network(4, seed=1, stride=2)
    torch.manual_seed(2)
    made = kd.Trainer(
        student,
        teacher=teacher,
        terms=[t for name, given in USED.items() for t in METHODS[name](student, teacher, **given).stages[0].terms],
        task_loss=PixelCrossEntropy(),
        args=arguments(
            folder,
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            logging_strategy="steps",
            logging_steps=1,
            dataloader_num_workers=workers,
        ),
        train_dataset=WithUnlabelled(own, others, build(AUGMENT), build(AUGMENT), seed=5),
        data_collator=collate,
        callbacks=list(callbacks),
    )
    made.seen = []  # type: ignore[attr-defined]
    keep = made.seen.append  # type: ignore[attr-defined]
    student.model.register_forward_pre_hook(lambda _, args: keep(args[0].double().sum().item()))
    return made


def everything(done: kd.Trainer) -> dict[str, Tensor]:
    """Weights, memories and the judge, and the states of all optimisers."""
    state = {n: v for n, v in weights(done.distiller).items() if not n.endswith("holistic._extra_state")}  # see below
    slots = {"student": done.optimizer.state_dict()["state"]}
    for term in done.distiller._adversaries:
        slots[term.name] = term._built().optimizer.state_dict()["state"]
        state |= {f"{term.name}.{n}": v for n, v in weights(term.discriminator).items()}
    for name, own in slots.items():
        for number, values in own.items():
            state |= {f"optimizer.{name}.{number}.{k}": torch.as_tensor(v).clone() for k, v in values.items()}
    return state


@pytest.fixture(scope="module")
def whole(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> kd.Trainer:
    """The training that nothing interrupts."""
    done = trainer(data, tmp_path_factory.mktemp("whole"), workers=0)
    done.train()
    return done


@pytest.mark.parametrize(("workers", "stop"), [(0, 2), (2, 4)])
def test_resuming_is_bit_exact(
    whole: kd.Trainer, data: tuple[Path, Path], tmp_path: Path, workers: int, stop: int
) -> None:
    first = trainer(data, tmp_path / "run", StopAfter(stop), workers=workers)
    first.train()
    assert distance(everything(first), everything(whole)) > 1e-4
    again = trainer(data, tmp_path / "run", workers=workers)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 6
    seen, fresh = whole.seen, again.seen  # type: ignore[attr-defined]
    assert len(set(seen)) >= 6
    assert fresh[stop - 6 :] == seen[stop - 6 :]
    logged = [[log for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert logged[0] == logged[1]
    terms = ("pixels", "pairs", "holistic", "holistic_discriminator", "memory", "generation")
    assert {f"loss_{term}" for term in terms} <= logged[0][0].keys()
    assert changed(everything(whole), everything(again)) == set()


def test_a_judge_with_its_optimiser_a_memory_and_a_generator_are_looked_at(whole: kd.Trainer) -> None:
    state = everything(whole)
    for part in (
        "optimizer.holistic.",
        "holistic.",
        "optimizer.student.",
        "memory.queues.pixel",
        "memory.queues.region",
        "generator",
    ):
        assert any(part in name for name in state), (part, list(state))
