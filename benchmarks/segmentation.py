"""Time and memory of the losses of segmentation over their usual forms.

    python -m benchmarks.segmentation [--only pairs-65|pairs|kl|cwd|ifvd|cirkd] [--rounds N] [--device cpu|cuda]

Each case is a loss, forward and backward, of random maps; the usual form is written here from the formula, as released
code has it. Both give the same value and gradient, which is checked first.

    pairs-65  similarities of all pairs of pixels (Liu et al. 2019), 1 x (128|512) x 65 x 65. Bars 4 and 5.
    pairs     the same at 2 x (128|512) x 64 x 128: 8192 pixels, 67 million pairs. Bars 12 and 12.
    kl        soft targets of 19 classes at 2 x 512 x 1024. Bars 1 and 3.
    cwd       channel-wise distillation of the same maps (temperature 4). Bars 1 and 3.
    ifvd      intra-class feature variation, 19 classes, 2 x (128|512) x 65 x 65. Bars 5 and 6.
    cirkd     similarities of pixels across the images of a batch, 2 x (128|512) x 32 x 64. Bar 8 of memory.

Times are CPU time of one thread (on a GPU wall time, synchronised), interleaved in one process in changing order:
medians of ratios with quartiles. Memory is the highest resident memory of a fresh process above what it had with the
inputs in place (on a GPU what torch allocated). Ratios are the usual form's over ours. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.figures import (
    Figure,
    Options,
    Part,
    fresh_process,
    parser,
    reset_peak,
    resident,
    run,
    steady,
    take_turns,
)
from taskkd import losses
from taskkd.segmentation.methods.ifvd import intra_class_variation
from taskkd.segmentation.similarity import cross_image_similarity

CLASSES = 19
Loss = Callable[[Tensor, Tensor], Tensor]


# ---- the usual forms, from the formulas


def all_pairs(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines of all pairs of pixels, the norms as constants; the mean squared difference."""
    cosines = []
    for x in (student.flatten(2), teacher.flatten(2)):
        x = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-8).detach()  # noqa: PLW2901
        cosines.append(torch.einsum("ncp,ncq->npq", x, x))
    squares = (cosines[1] - cosines[0]).square() / cosines[0].shape[1] ** 2 / len(student)
    return squares.sum()


def pixel_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """`F.kl_div` of a log-softmax and a softmax."""
    pixels = student.numel() / student.shape[1]
    return F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="sum") / pixels


def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """The logarithm of a softmax over space."""
    maps = student.shape[0] * student.shape[1]
    s, t = ((x.flatten(2) / temperature).softmax(2) for x in (student, teacher))
    return F.kl_div(s.log(), t, reduction="sum") * (temperature**2 / maps)


def class_loop(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """For each class a mask as large as the features, and the mean of what it leaves at all of its pixels."""
    found = []
    for x in (student, teacher):
        centre, own = x.clone(), labels[:, None].expand(x.shape)
        for c in range(CLASSES):
            mask = (own == c).float()
            mean = (mask * x).sum((2, 3), keepdim=True) / (mask.sum((2, 3), keepdim=True) + 1e-6)
            centre = (1 - mask) * centre + mask * mean
        found.append(F.cosine_similarity(x, centre, dim=1))
    return F.mse_loss(found[0], found[1])


def image_loop(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """For each pair of images the matrix of all similarities, its rows as distributions."""
    s, t = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    total = s.new_zeros(())
    for i in range(len(s)):
        for j in range(len(s)):
            own, other = (x[i].T @ x[j] / temperature for x in (s, t))
            total = total + F.kl_div(F.log_softmax(own, 1), F.softmax(other, 1), reduction="batchmean")
    return total / len(s) ** 2


# ---- cases


@dataclass(frozen=True)
class Case:
    """What it is called, sizes, both forms, what the ratios of time and memory are to be (None: no bar), rounds."""

    title: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    usual: Loss
    ours: Loss
    time: float | None
    memory: float
    rounds: int


def labels_of(x: Tensor) -> Tensor:
    """Every pixel's class, in blobs, and some that are ignored."""
    size = (len(x), 1, 9, 9)
    labels = torch.randint(0, CLASSES + 1, size, generator=torch.Generator().manual_seed(0)).float().to(x.device)
    labels = F.interpolate(labels, x.shape[2:], mode="nearest")[:, 0].long()
    return torch.where(labels == CLASSES, 255, labels)


def ifvd(student: Tensor, teacher: Tensor) -> Tensor:
    """Ours, counting as the authors do: ignored pixels too."""
    labels = labels_of(student)
    every = torch.ones_like(labels, dtype=torch.bool)
    return intra_class_variation(student, teacher, labels=labels, classes=CLASSES, mask=every)


def wide(batch: int, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Features of a student and a teacher."""
    return (batch, 128, height, width), (batch, 512, height, width)


def ours_pairs(student: Tensor, teacher: Tensor) -> Tensor:
    """As released: the norms are constants."""
    return losses.pairwise_similarity(student, teacher, detach_norm=True)


LOGITS = (2, CLASSES, 512, 1024)
CASES = {
    "pairs-65": Case(
        "all pairs of pixels (Liu et al. 2019), 1 x (128, 512) x 65 x 65", wide(1, 65, 65), all_pairs, ours_pairs,
        4, 5, 5,
    ),
    "pairs": Case("all pairs of pixels, 2 x (128, 512) x 64 x 128", wide(2, 64, 128), all_pairs, ours_pairs, 12, 12, 3),
    "kl": Case(
        "soft targets, 2 x 19 x 512 x 1024, against `F.kl_div`", (LOGITS, LOGITS), pixel_kl,
        lambda s, t: losses.kl_divergence(s, t, dim=1), 1, 3, 5,
    ),
    "cwd": Case(
        "channel-wise distillation of the same maps", (LOGITS, LOGITS), channel_kl, losses.channel_wise, 1, 3, 5
    ),
    "ifvd": Case(
        "intra-class variation (IFVD), 19 classes, 2 x (128, 512) x 65 x 65", wide(2, 65, 65),
        lambda s, t: class_loop(s, t, labels_of(s)), ifvd, 5, 6, 5,
    ),
    "cirkd": Case(
        "pixels across the images of a batch (CIRKD), 2 x (128, 512) x 32 x 64", wide(2, 32, 64), image_loop,
        cross_image_similarity, None, 8, 5,
    ),
}  # fmt: skip


def maps(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Student's, with gradient, and teacher's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(device) for shape in case.shapes)
    return student.requires_grad_(), teacher


def step(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Forward and backward."""
    student.grad = None
    value = loss(student, teacher)
    value.backward()
    return value.detach()


# ---- measuring


def check_same(name: str, case: Case, student: Tensor, teacher: Tensor) -> None:
    """Both forms give the same; also what warms them up.

    Raises:
        SystemExit: they do not.
    """
    found = []
    for loss in (case.usual, case.ours):
        value = step(loss, student, teacher)
        assert student.grad is not None
        found.append((value, student.grad.clone()))
    (a, x), (b, y) = found
    if abs(a - b) > 1e-4 * a or (x - y).norm() > 1e-3 * x.norm():
        sys.exit(f"{name}: the forms differ: {a:.6g} and {b:.6g}, gradients by {(x - y).norm() / x.norm():.2g}.")


def time_of(case: Case, options: Options) -> Figure:
    """Forward and backward of both forms."""
    student, teacher = maps(case, options.device)
    check_same(case.title, case, student, teacher)
    works = {which: partial(step, getattr(case, which), student, teacher) for which in ("usual", "ours")}
    taken = take_turns(works, options.count(case.rounds), warm_up=0, device=options.device)
    return Figure.over("time, the usual form over ours", taken["usual"], taken["ours"], at_least=case.time)


def memory_here(name: str, which: str, device: str) -> float:
    """MB that a first step takes above its inputs; small maps warm up what is made once."""
    case = CASES[name]
    loss: Loss = getattr(case, which)
    small = [torch.randn(*shape[:2], 16, 16, device=device) for shape in case.shapes]
    step(loss, small[0].requires_grad_(), small[1])
    student, teacher = maps(case, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, student, teacher)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset_peak()
    had = resident("VmRSS")
    step(loss, student, teacher)
    return resident("VmHWM") - had


def memory_of(name: str, options: Options) -> Figure:
    """The median of `memory_here` in three fresh processes each."""
    took = {}
    for which in ("usual", "ours"):
        arguments = ("--only", name, "--memory", which, "--device", options.device)
        runs = [fresh_process("benchmarks.segmentation", *arguments)[0] for _ in range(1 if options.quick else 3)]
        took[which] = statistics.median(runs)
    detail = f"{took['usual']:.0f} MB over {took['ours']:.0f} MB"
    title = "memory, the usual form over ours"
    return Figure(title, took["usual"] / took["ours"], at_least=CASES[name].memory, detail=detail)


def both(name: str, options: Options) -> list[Figure]:
    """Time and memory of a case."""
    return [time_of(CASES[name], options), memory_of(name, options)]


PARTS = {name: Part(case.title, partial(both, name)) for name, case in CASES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar is missed."""
    command = parser(__doc__, PARTS, device=True)
    command.add_argument("--memory", choices=("usual", "ours"), help=argparse.SUPPRESS)  # of a process of its own
    given = command.parse_args(arguments)
    if given.memory:
        steady()
        print(memory_here(given.only[0], given.memory, given.device))
        return 0
    return run(PARTS, given)


if __name__ == "__main__":
    sys.exit(main())
