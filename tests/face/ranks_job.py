"""What ranks do with faces, for `test_distributed.py`.

`torchrun --nproc-per-node 2 ranks_job.py FOLDER`, or a single process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import taskkd as kd
from taskkd.caches import Cached
from taskkd.face import METHODS, FaceModel, MarginHead, PartialFC, VerificationMetric, collate, make_pairs, read_folder
from taskkd.face.datasets import FaceDataset, RandomFlip
from tests.engine import arguments, doubled, step_losses, weights
from tests.face import people

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
#: method, whether its teacher is on disk and its classifier spread over the ranks
RUNS: dict[str, tuple[str, bool, bool]] = {
    "mimic": ("embedding_mimic", True, False),
    "mimic, Partial FC": ("embedding_mimic", False, True),
    "centres": ("ada_distill", True, False),
}


def network(width: int, seed: int) -> FaceModel:
    """Without batch norm, so that what an image gives does not depend on the others of its batch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, width, 3, stride=2), nn.PReLU(), nn.Conv2d(width, width, 3, stride=2), nn.PReLU()
        return FaceModel(nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * width, 8)), size=people.SIZE)


def train(folder: Path, name: str) -> dict[str, Any]:
    """Six steps on twelve faces, four in each, of which every rank sees its own; then pairs are verified."""
    method, cached, spread = RUNS[name]
    student, teacher = network(4, seed=0).double(), network(8, seed=1).double().eval()
    faces = read_folder(folder / "data", size=people.SIZE)
    student.identities = teacher.identities = 4
    before = weights(teacher)
    torch.manual_seed(RANK)  # what is drawn for new weights need not be the same
    head: Any = PartialFC(4, 8, sample_rate=1.0, s=16.0, m=0.2) if spread else MarginHead(4, 8, s=16.0, m=0.2)
    pairs = make_pairs(faces, 16, folds=2)
    trainer = kd.Trainer(
        student,
        teacher=Cached(teacher, folder / f"cache-{name}") if cached else teacher,
        method=METHODS[method](student, teacher),
        task_loss=head.double(),
        metric=VerificationMetric(pairs, folds=2, far=(0.1,)),
        args=arguments(
            folder / name,
            per_device_train_batch_size=4 // RANKS,
            per_device_eval_batch_size=5,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.01,
            ddp_timeout=60,
            train_sampling_strategy="sequential",
            logging_strategy="steps",
            logging_steps=1,
        ),
        train_dataset=RandomFlip(FaceDataset(faces), seed=5),
        eval_dataset=pairs.table,
        data_collator=doubled(collate),
    )
    trainer.train()
    measured = trainer.evaluate()
    names = ("eval_accuracy", "eval_auc", "eval_tar", "eval_threshold")
    return {
        "step": trainer.state.global_step,
        "losses": step_losses(trainer),
        "parameters": {n: v for n, v in weights(trainer.distiller).items() if v.is_floating_point() and "_ex" not in n},
        "measured": {k: v for k, v in measured.items() if k.startswith(names)},
        "untouched": all(torch.equal(value, before[n]) for n, value in weights(teacher).items()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    arguments(root, ddp_timeout=60)._setup_devices  # noqa: B018  (joins the process group)
    if RANK == 0:
        people.folder(root / "data", 4, 3)
    if RANKS > 1:
        torch.distributed.barrier()
    torch.save({name: train(root, name) for name in RUNS}, root / f"{RANK}.pt")
    if RANKS > 1:
        torch.distributed.destroy_process_group()
