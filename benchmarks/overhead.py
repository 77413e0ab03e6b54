"""The fixed cost of one distillation step: taskkd and its peers over the same loop written by hand.

Workloads (student cross-entropy + logit KL at T = 4 + MSE on three tapped layers of equal channels):

    P1  a tiny pair of three convolutions, batch 8: nothing but overhead
    P2  ResNet-56 -> ResNet-20 for CIFAR, batch 32: a real, small pair

The loop by hand is plain torch: forward hooks that put three features of either model into a dictionary, the teacher
in eval mode under no_grad, the weighted sum of five losses, zero_grad, backward, SGD. Everybody starts from the same
weights and sees the same batches; that the losses agree is asserted before anything is timed. Then blocks of steps
alternate in one process, in random order, and each block's CPU time is divided by that of the hand-written block of
the same round. Where in memory a copy of the models happens to lie makes it some percent faster or slower than another,
so all contenders are made anew several times, and the rounds of all copies count together. "by hand, again" is a second
copy of the hand-written loop: what it differs from 1 is noise.

    python -m benchmarks.overhead [--only P1] [--rounds N] [--without PEER] [--json FILE]
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.figures import Figure, Options, Part, parser, ratio, run, take_turns

TEMPERATURE = 4.0
TASK, LOGITS, FEATURE = 0.3, 0.4, 0.1  # they sum to 1 (three features), as modelopt's balancer wants
HAND, AGAIN = "by hand", "by hand, again"
BARS = {"P1": 1.03, "P2": 1.01}
#: how often all contenders are made anew
COPIES = 8

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
    "P1": Workload("tiny pair of 3 convolutions, batch 8", Tiny, Tiny, ("conv1", "conv2", "conv3"), 8, 10, 400),
    "P2": Workload(
        "ResNet-56 -> ResNet-20, CIFAR, batch 32",
        lambda: ResNet(20),
        lambda: ResNet(56),
        ("layer1", "layer2", "layer3"),
        32,
        1,
        64,
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
    taken: dict[str, list[float]] = {name: [] for name in names}
    copies = min(COPIES, rounds)
    for number in range(copies):
        blocks = {name: block(step, workload) for name, step in set_up(workload, names).items()}
        gc.collect()
        gc.freeze()  # what the libraries have loaded is not to be walked through in somebody's step
        share = len(range(number, rounds, copies))
        for name, times in take_turns(blocks, share, warm_up=3).items():
            taken[name] += [t / workload.steps for t in times]
        gc.unfreeze()
    return taken


def block(step: Step, workload: Workload) -> Callable[[], None]:
    """Some steps, on the batches that are next."""
    data = itertools.cycle(batches(workload))

    def steps() -> None:
        for _ in range(workload.steps):
            step(*next(data))

    return steps


def compared(workload: Workload, options: Options, bar: float, without: Sequence[str]) -> list[Figure]:
    """Every contender over the loop by hand; a peer that is not installed says so."""
    names = [n for n in CONTENDERS if n == HAND or n not in without]
    there = available(names)
    differences = check_same_losses(workload, there)
    seconds = measure(workload, there, options.count(workload.rounds))
    found = []
    for name in names[1:]:
        if name not in there:
            found.append(Figure(name, None, detail="not installed here; `make bench` installs it"))
            continue
        extra = statistics.median(a - b for a, b in zip(seconds[name], seconds[HAND], strict=True))
        detail = f"{1e6 * extra:+.0f} µs a step, losses differ by {differences[name]:.0e}"
        at_most = bar if name == "taskkd" else None
        found.append(Figure.of(name, ratio(seconds[name], seconds[HAND]), detail=detail, at_most=at_most))
    return found


def available(names: list[str]) -> list[str]:
    """The contenders that can be imported here."""
    return [n for n in names if n in (HAND, AGAIN) or importlib.util.find_spec(n) is not None]


def parts(without: Sequence[str] = ()) -> dict[str, Part]:
    """One for each workload."""
    return {
        key: Part(
            f"{workload.title}: a step over the loop by hand",
            lambda options, key=key: compared(WORKLOADS[key], options, BARS[key], without),  # type: ignore[misc]
        )
        for key, workload in WORKLOADS.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if taskkd misses a bar."""
    command = parser(__doc__, parts())
    command.add_argument("--without", action="append", default=[], choices=sorted(CONTENDERS), help="leave one out")
    given = command.parse_args(arguments)
    return run(parts(given.without), given)


if __name__ == "__main__":
    sys.exit(main())
