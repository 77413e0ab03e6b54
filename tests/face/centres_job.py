"""What ranks do with methods on centres and triplets, for `test_distributed.py`.

`torchrun --nproc-per-node 2 centres_job.py FOLDER`, or a single process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import taskkd as kd
from taskkd.face.methods import METHODS
from tests.engine import weights
from tests.face.embedders import batch, no_task, pair

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS = 10
#: what relates samples sees those of both ranks
CHECKS: dict[str, dict[str, Any]] = {
    "ada_distill": {},
    "margin_distillation": {},
    "triplet_distillation": {"gather": True},
    "relational": {"gather": True, "task_weight": 0.0},
}
#: both ranks have samples of 1 and of 3
LABELS = [0, 1, 3, 3, 1, 1, 3, 5]


def train(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Ten steps of SGD on eight faces each, in double precision; buffers are not sent between ranks."""
    student, teacher = (model.double() for model in pair(6, 8))
    teacher.centres = None if teacher.centres is None else teacher.centres.double()
    (stage,) = METHODS[name](student, teacher, **options).stages
    weight = stage.task_weight
    distiller = kd.Distiller(student, teacher, stage.terms, task_loss=no_task, task_weight=weight).double()
    data = [batch(LABELS, seed=step) for step in range(STEPS)]
    data = [{**d, "images": d["images"].double()} for d in data]
    torch.manual_seed(5)
    distiller.prepare(data[0])
    model: nn.Module = DistributedDataParallel(distiller, broadcast_buffers=False) if RANKS > 1 else distiller
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02)
    share = slice(RANK * len(LABELS) // RANKS, (RANK + 1) * len(LABELS) // RANKS)
    for whole in data:
        model(**{k: v[share] for k, v in whole.items()})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.step()
    return {n: v for n, v in weights(distiller).items() if "_extra" not in n}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if RANKS > 1:
        distributed.init_process_group("gloo")
    found = {name: [train(name, options) for _ in range(2)] for name, options in CHECKS.items()}
    torch.save(found, Path(sys.argv[1]) / f"{RANK}.pt")
    if RANKS > 1:
        distributed.destroy_process_group()
