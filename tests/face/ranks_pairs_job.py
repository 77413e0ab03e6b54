"""What two ranks get of DDL and EKD on half a batch each, for `test_pairs_distributed.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import taskkd as kd
from taskkd.face.methods import METHODS
from tests.face.networks import TinyFace, batch

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
#: of 12 samples those of each rank, so that both have some of every branch
HALVES = ([0, 2, 4, 5, 8, 9], [1, 3, 6, 7, 10, 11])


def gradients(name: str) -> dict[str, torch.Tensor]:
    """The mean over ranks of the gradients of one step, as DDP has it, and what the term keeps."""
    student, teacher = TinyFace(), TinyFace(8, 12, seed=1)
    options = {"init": "first_batch"} if name == "ekd" else {}
    terms = METHODS[name](student, teacher, **options).stages[0].terms
    distiller = kd.Distiller(student, kd.Frozen(teacher), terms, task_weight=0.0).double()
    order = HALVES[RANK] if RANKS > 1 else HALVES[0] + HALVES[1]
    data = {n: v[order].double() if v.is_floating_point() else v[order] for n, v in batch().items()}
    distiller.prepare(data)
    distiller.train()
    found = distiller(**data)
    found["loss"].backward()
    result = {"loss": found["loss"].detach()}
    for n, p in student.named_parameters():
        result[n] = p.grad.clone()
        if RANKS > 1:
            torch.distributed.all_reduce(result[n])
            result[n] /= RANKS
    return result | {n: b for t in terms for n, b in t.state_dict().items()}


if __name__ == "__main__":
    if RANKS > 1:
        torch.distributed.init_process_group("gloo")
    torch.save({name: gradients(name) for name in ("ddl", "ekd")}, Path(sys.argv[1]) / f"{RANK}-{RANKS}.pt")
    if RANKS > 1:
        torch.distributed.destroy_process_group()
