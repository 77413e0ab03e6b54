"""What ranks do with a Partial FC, for `test_partial_fc.py`.

`torchrun --nproc-per-node 2 partial_fc_job.py FOLDER`, or a single process; a network and a head are trained on the
same samples either way, of which every rank has its own.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from taskkd.face.heads import MarginHead
from taskkd.face.partial_fc import PartialFC
from taskkd.schedules import Progress

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
CASES = Path(__file__).parents[1] / "parity" / "cases" / "face"
#: (what a run is of, by which numbers must agree between one process and two)
RUNS: dict[str, dict[str, Any]] = {
    "arcface": {},
    "adaface": {"kind": "adaface", "ema": 0.5},
    "curricularface": {"kind": "curricularface", "ema": 0.5},
    "insightface": {"variant": "insightface", "filter_above": 0.2},
}
CLASSES, SIZE = 21, 6


def samples(step: int, split: int = 5) -> tuple[Tensor, Tensor]:
    """Eight samples, of which two ranks have 5 and 3; one is of nobody."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(0, CLASSES, (8,), generator=generator)
    y[1] = -1
    part = slice(None) if RANKS == 1 else slice(split) if RANK == 0 else slice(split, None)
    return x[part], y[part]


class Run:
    """A student, its optimiser and its head."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = nn.Linear(4, SIZE)
        if RANKS > 1:
            self.net = DistributedDataParallel(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.02, momentum=0.9)
        self.head = PartialFC(CLASSES, SIZE, **{"sample_rate": 1.0, "learning_rate": 0.5, **options})

    def train(self, steps: range, accumulate: int = 1) -> list[float]:
        losses = []
        for step in steps:
            for part in range(accumulate):
                quiet = RANKS > 1 and part < accumulate - 1
                x, y = samples(step * accumulate + part)
                with self.net.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
                    loss = self.head({"embeddings": self.net(x)}, {"labels": y})
                    (loss / accumulate).backward()
                losses.append(loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.head.auxiliary_step(Progress(step))
        return losses

    def state(self) -> dict[str, Any]:
        net = self.net.module if RANKS > 1 else self.net
        return {
            "net": {k: v.clone() for k, v in net.state_dict().items()},
            "head": {k: v.clone() for k, v in self.head.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load(self, state: dict[str, Any]) -> None:
        (self.net.module if RANKS > 1 else self.net).load_state_dict(state["net"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


def parity(case: str) -> dict[str, Tensor]:
    """This rank's loss and gradients of a case of insightface's code on two ranks."""
    arrays = {k: torch.from_numpy(np.array(v)) for k, v in np.load(CASES / f"{case}.npz").items()}
    weight, each = arrays["w_weight"], len(arrays["in_x"]) // RANKS
    x = arrays["in_x"][RANK * each :][:each].clone().requires_grad_()
    head = PartialFC(
        *weight.shape, kind="cosface", m=0.4, centres=weight, sample_rate=1.0, compat="official", seed=RANK
    )
    assert head.first == int(arrays[f"in_class_start_rank{RANK}"])
    loss = head.loss(x, arrays["in_y"][RANK * each :][:each], arrays.get(f"in_weight_index_rank{RANK}"))
    loss.backward()
    ((_, gradient),) = head._gradients
    return {"loss": loss.detach(), "grad_x": x.grad, "grad_weight": gradient}


def everything(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in RUNS.items():
        run = Run(**options)
        found[name] = {"losses": run.train(range(4)), **run.state()}
    accumulated = Run()
    found["accumulated"] = {"losses": accumulated.train(range(2), accumulate=2), **accumulated.state()}
    sampled = Run(sample_rate=0.5)
    found["sampled"] = {"losses": sampled.train(range(10)), **sampled.state(), "first": sampled.head.first}
    found["sampled"]["more"] = sampled.train(range(10, 20))
    resumed = Run(sample_rate=0.5)
    resumed.load({k: found["sampled"][k] for k in ("net", "head", "optimizer")})
    found["resumed"] = {"more": resumed.train(range(10, 20)), **resumed.state()}
    found["sampled"]["end"] = sampled.state()
    late = PartialFC(CLASSES, SIZE)  # as if it had been made before the ranks knew of each other
    whole = late.full_weight()
    late.weight, late.velocity, late.first, late.rank, late.ranks = whole, torch.zeros_like(whole), 0, 0, 1
    late.loss(torch.randn(2, SIZE), torch.tensor([0, 1]))
    found["late"] = {"rows": len(late.weight), "same": torch.equal(late.full_weight(), whole)}
    late.collect()
    if RANK == 0:
        found["late"]["collected"] = late.state_dict()["weight"].shape  # nobody else is asked
    head = MarginHead(CLASSES, 4, kind="adaface", gather=True, ema=0.5)
    for step in range(2):
        head.loss(*samples(step))
    found["statistics"] = {"mean": head.margin.norm_mean, "std": head.margin.norm_std}
    if (folder / "other.pt").exists():  # what another number of ranks saved
        run = Run()
        run.load(torch.load(folder / "other.pt", weights_only=True))
        found["loaded"] = {"losses": run.train(range(4, 8)), **run.state()}
    if RANKS > 1:
        found["parity"] = parity("pfc_ws2_full_cos")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if RANKS > 1:
        dist.init_process_group("gloo")
    target = Path(sys.argv[1])
    torch.save(everything(target), target / f"{RANK}.pt")
    if RANKS > 1:
        dist.destroy_process_group()
