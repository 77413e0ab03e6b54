"""The fixed cost of one distillation step: taskkd and its peers over the same loop written by hand.

Workloads (student cross-entropy + logit KL at T = 4 + MSE on three tapped layers of equal channels):

    P1  a tiny pair of three convolutions, batch 8: nothing but overhead
    P2  ResNet-56 -> ResNet-20 for CIFAR, batch 32: a real, small pair

The loop by hand is plain torch: forward hooks that put three features of either model into a dictionary, the teacher
in eval mode under no_grad, the weighted sum of five losses, zero_grad, backward, SGD. Everybody starts from the same
weights and sees the same batches; that the losses agree is asserted before anything is timed. Then blocks of steps
alternate in one process, in rotating order, and each block's CPU time is divided by that of the hand-written block of
the same round. "by hand, again" is a second copy of the hand-written loop: what it differs from 1 is noise.

    python benchmarks/overhead.py [--only P1] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE = 4.0
TASK, LOGITS, FEATURE = 0.3, 0.4, 0.1  # they sum to 1 (three features), as modelopt's balancer wants
HAND, AGAIN = "by hand", "by hand, again"
BARS = {"P1": 1.03, "P2": 1.01}
NOISE = 0.01

Step = Callable[[Tensor, Tensor], Tensor]


# ---- models


class Tiny(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut (option A of He et al. 2016: padded channels, no parameters)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.grow = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow)) if self.grow else x
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016: 6n + 2 layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(n)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(n - 1)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Workload:
    """A pair of models, a batch, and how long to look."""

    title: str
    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    layers: tuple[str, str, str]
    batch: int
    steps: int  # in a block
    rounds: int


WORKLOADS = {
    "P1": Workload("tiny pair of 3 convolutions, batch 8", Tiny, Tiny, ("conv1", "conv2", "conv3"), 8, 10, 200),
    "P2": Workload(
        "ResNet-56 -> ResNet-20, CIFAR, batch 32",
        lambda: ResNet(20),
        lambda: ResNet(56),
        ("layer1", "layer2", "layer3"),
        32,
        1,
        32,
    ),
}


# ---- contenders: each takes its own copy of student and teacher and gives a function that does one whole step


def by_hand(student: nn.Module, teacher: nn.Module, layers: tuple[str, ...]) -> Step:
    """Plain torch with forward hooks."""
    teacher.eval().requires_grad_(False)
    seen: dict[str, Tensor] = {}
    for whose, model in (("s", student), ("t", teacher)):
        for layer in layers:
            key = f"{whose}.{layer}"
            model.get_submodule(layer).register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out))
    optimizer = sgd(student.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            t = teacher(x)
        s = student(x)
        log_s, log_t = F.log_softmax(s / TEMPERATURE, 1), F.log_softmax(t / TEMPERATURE, 1)
        loss = TASK * F.cross_entropy(s, y)
        loss = loss + LOGITS * TEMPERATURE**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
        for layer in layers:
            loss = loss + FEATURE * F.mse_loss(seen["s." + layer], seen["t." + layer])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def taskkd(student: nn.Module, teacher: nn.Module, layers: tuple[str, ...]) -> Step:
    """`Distiller` in a plain loop, with its look for NaN."""
    import taskkd as kd
    from taskkd import losses

    distiller = kd.Distiller(
        student,
        kd.Frozen(teacher),
        [
            kd.Match("logits", losses.kl_divergence, "out", temperature=TEMPERATURE, weight=LOGITS),
            *(kd.Match(f"mse-{layer}", losses.mse, layer, weight=FEATURE) for layer in layers),
        ],
        task_weight=TASK,
        task_loss=lambda output, batch: F.cross_entropy(output, batch["labels"]),
    )
    distiller.train()
    optimizer = sgd(distiller.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        if not distiller.prepared:
            distiller.prepare({"x": x, "labels": y})
        loss: Tensor = distiller(x=x, labels=y)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distiller.step()
        return loss

    return step


def torchdistill(student: nn.Module, teacher: nn.Module, layers: tuple[str, ...]) -> Step:
    """Its distillation box. `KDLoss` leaves out T^2, so the weight has it; it leaves the teacher in train mode."""
    from torchdistill.core.distillation import get_distillation_box

    teacher.eval()
    mean = {"reduction": "mean"}
    output = {"is_from_teacher": False, "module_path": "fc", "io": "output"}
    label = {"input": output, "target": {"uses_label": True}}
    terms: dict[str, Any] = {
        "task": {
            "criterion": {"key": "CrossEntropyLoss", "kwargs": mean},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": label},
            "weight": TASK,
        },
        "logits": {
            "criterion": {
                "key": "KDLoss",
                "kwargs": {
                    **{f"{whose}_module_path": "fc" for whose in ("student", "teacher")},
                    **{f"{whose}_module_io": "output" for whose in ("student", "teacher")},
                    "temperature": TEMPERATURE,
                    "beta": 1.0,
                    "alpha": None,
                },
            },
            "weight": LOGITS * TEMPERATURE**2,
        },
    }
    for layer in layers:
        where = {"module_path": layer, "io": "output"}
        pair = {"input": {"is_from_teacher": False, **where}, "target": {"is_from_teacher": True, **where}}
        terms[layer] = {
            "criterion": {"key": "MSELoss", "kwargs": mean},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": pair},
            "weight": FEATURE,
        }
    hooks = {"forward_hook": {"output": [*layers, "fc"]}, "forward_proc": "forward_batch_only"}
    box = get_distillation_box(
        teacher,
        student,
        {},
        {
            "num_epochs": 1,
            "teacher": {**hooks, "requires_grad": False},
            "student": dict(hooks),
            "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9}},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        },
        torch.device("cpu"),
        None,
        False,
        1.0,
    )
    box.pre_epoch_process(epoch=0)

    def step(x: Tensor, y: Tensor) -> Tensor:
        box.pre_forward_process()
        loss: Tensor = box.forward_process(x, targets=y, supp_dict=None)
        box.post_forward_process(loss=loss)
        return loss

    return step


def modelopt(student: nn.Module, teacher: nn.Module, layers: tuple[str, ...]) -> Step:
    """`mtd.convert` with one criterion a layer; its logit loss is told to divide by the batch, not by the classes."""
    import modelopt.torch.distill as mtd

    criterion: dict[tuple[str, str], nn.Module] = {
        ("fc", "fc"): mtd.LogitsDistillationLoss(temperature=TEMPERATURE, reduction="batchmean")
    }
    criterion |= {(layer, layer): nn.MSELoss() for layer in layers}
    config = {
        "teacher_model": teacher,
        "criterion": criterion,
        "loss_balancer": mtd.StaticLossBalancer([LOGITS, *(FEATURE for _ in layers)]),
    }
    model = mtd.convert(student, mode=[("kd_loss", config)])
    model.train()
    optimizer = sgd(p for p in model.parameters() if p.requires_grad)

    def step(x: Tensor, y: Tensor) -> Tensor:
        output = model(x)
        loss: Tensor = model.compute_kd_loss(student_loss=F.cross_entropy(output, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


CONTENDERS = {HAND: by_hand, AGAIN: by_hand, "taskkd": taskkd, "torchdistill": torchdistill, "modelopt": modelopt}


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of everybody."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


# ---- measuring


def set_up(workload: Workload, names: list[str]) -> dict[str, Step]:
    """One step function each, from the same weights."""
    torch.manual_seed(0)
    student, teacher = workload.student(), workload.teacher()
    return {n: CONTENDERS[n](copy.deepcopy(student), copy.deepcopy(teacher), workload.layers) for n in names}


def batches(workload: Workload, count: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(workload.batch, 3, 32, 32, generator=generator),
            torch.randint(10, (workload.batch,), generator=generator),
        )
        for _ in range(count)
    ]


def check_same_losses(workload: Workload, names: list[str], steps: int = 5) -> dict[str, float]:
    """The largest relative difference of each contender's losses to the hand-written loop's.

    Raises:
        SystemExit: one differs by more than rounding, so that there is nothing to compare.
    """
    contenders = set_up(workload, names)
    data = batches(workload, steps)
    losses = {name: [step(*batch).item() for batch in data] for name, step in contenders.items()}
    differences = {}
    for name, values in losses.items():
        differences[name] = max(abs(v / r - 1) for v, r in zip(values, losses[HAND], strict=True))
        if not differences[name] < 1e-5:
            sys.exit(f"{name} computes other losses than the loop by hand: {values} instead of {losses[HAND]}")
    return differences


def measure(workload: Workload, names: list[str], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a step, for every round and contender."""
    contenders = set_up(workload, names)
    data = batches(workload)
    for step in contenders.values():
        for batch in data[: max(3, workload.steps)]:
            step(*batch)
    gc.collect()
    gc.freeze()  # what the libraries have loaded is not to be walked through in somebody's step
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            step = contenders[name]
            start = time.process_time()
            for i in range(workload.steps):
                step(*data[(number + i) % len(data)])
            seconds[name].append((time.process_time() - start) / workload.steps)
    gc.unfreeze()
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the ratios to the hand-written block of the same round; the median extra microseconds."""
    summary = {}
    for name, values in seconds.items():
        ratios = [v / h for v, h in zip(values, seconds[HAND], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        extra = statistics.median(v - h for v, h in zip(values, seconds[HAND], strict=True))
        summary[name] = {"ratio": middle, "low": low, "high": high, "extra_us": extra * 1e6}
    return summary


def available(names: list[str]) -> list[str]:
    """The contenders that can be imported here; says which cannot."""
    found = [n for n in names if n in (HAND, AGAIN) or importlib.util.find_spec(n) is not None]
    for name in names:
        if name not in found:
            print(f"{name} is not installed here (`make bench` installs it); left out", file=sys.stderr)
    return found


def main() -> int:
    """Measure, print a table; 1 if taskkd misses a bar."""
    parser = argparse.ArgumentParser(description="The fixed cost of a distillation step over a loop written by hand.")
    parser.add_argument("--only", choices=sorted(WORKLOADS), help="one workload instead of both")
    parser.add_argument("--rounds", type=int, help="rounds of blocks (default: 200 of 10 steps for P1, 32 of 1 for P2)")
    parser.add_argument("--without", action="append", default=[], choices=sorted(CONTENDERS), help="leave one out")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    names = available([n for n in CONTENDERS if n == HAND or n not in options.without])
    report: dict[str, Any] = {}
    missed = False
    for key in [options.only] if options.only else sorted(WORKLOADS):
        workload = WORKLOADS[key]
        rounds = options.rounds or workload.rounds
        differences = check_same_losses(workload, names)
        summary = summarise(measure(workload, names, rounds))
        report[key] = {n: {**s, "loss_difference": differences[n]} for n, s in summary.items()}
        print(f"\n{key}: {workload.title}; {rounds} rounds of {workload.steps} steps, CPU time over the loop by hand")
        print(f"{'':16}{'median':>8}{'quartiles':>18}{'us a step':>12}{'losses differ by':>19}")
        for name, s in summary.items():
            spread = f"{s['low']:.3f} .. {s['high']:.3f}"
            print(f"{name:16}{s['ratio']:8.3f}{spread:>18}{s['extra_us']:+12.0f}{differences[name]:19.0e}")
        if "taskkd" in summary:
            missed |= summary["taskkd"]["ratio"] > BARS[key] + NOISE
            print(f"taskkd's bar: {BARS[key]} (noise {NOISE})")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
