"""Time of the losses of face recognition over their usual forms, and of steps of training.

    python benchmarks/face.py [--only SECTION] [--rounds N] [--device cpu|cuda]

Sections `cache`, `live`, `classifier`, `memory` and `verify` are in `face_steps.py`. The others are of losses, each of
several cases; a case is a loss, forward and backward, of random embeddings or similarities. The usual
form is written here from the formula; that both give the same value and gradient is checked first.

    histogram  the four soft histograms of 1000 nodes of a DDL step (two branches, positive and negative) at 32, 256 and
               2048 similarities each: over a loop over the nodes (bar 10 at 256), and over the kernel of all values at
               all nodes, its differences as products of matrices, one distribution after the other.
    ddl        all of DDL, two branches of 32, 128 and 512 identities and as many pairs, 512 features, over the same
               with that histogram. Bar 1; and 128 in less than 60 ms (acceptance A10).
    ekd        all of EKD on 64, 256 and 1024 embeddings, over sorting all negatives and ranks of pairs that are looked
               up one kind after the other. Bar 1; and 256 in less than 60 ms.

Times are CPU time of one thread (on a GPU wall time, synchronised), interleaved in one process in changing order:
medians of ratios with quartiles. Ratios are the usual form's over ours. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from face_steps import KINDS, STEPS, memory_here, seconds
from torch import Tensor
from torch.nn import functional as F

from taskkd.face.histograms import soft_histogram
from taskkd.face.methods.ddl import ddl_loss
from taskkd.face.methods.ekd import ANCHORS, ekd_loss, false_positive_thresholds, pair_similarities

#: of one tensor, with gradient
Loss = Callable[[Tensor], Tensor]
FEATURES = 512
WAVE = torch.linspace(0, 3, 1000).sin()


@dataclass(frozen=True)
class Case:
    """The tensor with gradient, both forms, the ratio that is wanted and the most milliseconds; None: no bar."""

    name: str
    inputs: Callable[[], Tensor]
    usual: Loss
    ours: Loss
    bar: float | None = None
    limit: float | None = None


# ---- histograms


def loop_histogram(values: Tensor, sigma: float = 0.1) -> Tensor:
    """Of one distribution: the kernels at one node after the other."""
    nodes = torch.arange(1000, device=values.device, dtype=values.dtype) / 1000
    counts = torch.stack([torch.exp(-((values - node) ** 2) / (2 * sigma**2)).sum() for node in nodes])
    return counts / counts.sum()


def product_histogram(values: Tensor, sigma: float = 0.1) -> Tensor:
    """Of one distribution: all values at all nodes, both spread by products with ones."""
    nodes = torch.arange(1000, device=values.device, dtype=values.dtype) / 1000
    left, right = values[:, None] @ torch.ones_like(nodes)[None], torch.ones_like(values)[:, None] @ nodes[None]
    counts = torch.exp(-((left - right) ** 2) / (2 * sigma**2)).sum(0)
    return counts / counts.sum()


def spectrum(histogram: Tensor) -> Tensor:
    """Something of a histogram with a gradient to all of it."""
    return (histogram * WAVE.to(histogram.device)).sum()


def histograms() -> list[Case]:
    """At each size over both usual forms."""
    forms = {"loop": loop_histogram, "product": product_histogram}
    return [
        Case(
            f"histogram {count} over {name}",
            lambda count=count: random(4, count).sigmoid(),
            lambda x, form=form: spectrum(torch.stack([form(row) for row in x])),
            lambda x: spectrum(soft_histogram(x)),
            10 if count == 256 and name == "loop" else None,
        )
        for count in (32, 256, 2048)
        for name, form in forms.items()
    ]


# ---- DDL


def usual_ddl(x: Tensor) -> Tensor:
    """Branch by branch, each histogram by products of matrices; what counts is as in our default."""
    identities, pairs = branches(x)
    neg = []
    for own in identities:
        unit = F.normalize(own)
        neg.append((unit @ unit.T - 3 * torch.eye(len(unit), device=x.device)).max(1).values)
    pos = [F.cosine_similarity(a, b) for a, b in pairs]
    kls = []
    for values in (pos, neg):
        easy, hard = (product_histogram(v) + 1e-9 for v in values)
        kls.append((easy * (easy.log() - hard.log())).sum())
    order = sum(n.mean() - p.mean() for n in neg for p in pos)
    return 0.1 * kls[0] + 0.02 * kls[1] + 0.5 * order


def branches(x: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Two branches of identities and of pairs, of rows (6 n, features)."""
    easy, hard, *sides = x.chunk(6)
    return [easy, hard], [(sides[0], sides[1]), (sides[2], sides[3])]


def ddls() -> list[Case]:
    """At each size."""
    return [
        Case(
            f"ddl {count}",
            lambda count=count: random(6 * count, FEATURES) + 0.5,
            usual_ddl,
            lambda x: ddl_loss(*branches(x), detach_easy=False),
            1 if count >= 128 else None,
            60 if count == 128 else None,
        )
        for count in (32, 128, 512)
    ]


# ---- EKD


def ekd_inputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student, a teacher near it, and identities of four images."""
    teacher = x.detach() + 0.5 * random(*x.shape, seed=1).to(x.device)
    return x, teacher, torch.arange(len(x), device=x.device) // 4


def usual_ekd(x: Tensor) -> Tensor:
    """All negatives sorted, in full, for the thresholds and for the hardest ones."""
    student, teacher, labels = ekd_inputs(x)
    above = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    same = labels[:, None] == labels
    ranks: dict[str, list[Tensor]] = {"pos": [], "neg": []}
    hardest = None
    for features in (student, teacher):
        unit = F.normalize(features)
        cosine = unit @ unit.T
        neg, order = cosine[above & ~same].sort(descending=True)
        hardest = order[:2000] if hardest is None else hardest
        levels = torch.stack([neg[len(neg) // a if a <= len(neg) else 0] for a in ANCHORS]).detach()
        for name, values in (("pos", cosine[above & same]), ("neg", cosine[above & ~same][hardest])):
            exponent = ((values[:, None] - levels) / 0.01).clamp(-50, 50)
            ranks[name].append((1 / (1 + (-exponent).exp())).sum(1))
    return 0.02 * F.mse_loss(*ranks["pos"]) + 0.01 * F.mse_loss(*ranks["neg"])


def our_ekd(x: Tensor) -> Tensor:
    """As the term, but with thresholds of this batch alone."""
    student, teacher, labels = ekd_inputs(x)
    place = torch.triu_indices(len(x), len(x), 1, device=x.device)
    negative = labels[place[0]] != labels[place[1]]
    levels = [false_positive_thresholds(v, negative) for v in pair_similarities(x.detach(), teacher)]
    return ekd_loss(student, teacher, labels=labels, student_thresholds=levels[0], teacher_thresholds=levels[1])


def ekds() -> list[Case]:
    """At each size."""
    return [
        Case(
            f"ekd {count}",
            lambda count=count: random(count, FEATURES),
            usual_ekd,
            our_ekd,
            1 if count == 256 else None,
            60 if count == 256 else None,
        )
        for count in (64, 256, 1024)
    ]


SECTIONS: dict[str, Callable[[], list[Case]]] = {"histogram": histograms, "ddl": ddls, "ekd": ekds}


# ---- measuring


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(loss: Loss, x: Tensor) -> Tensor:
    """Forward and backward."""
    x.grad = None
    value = loss(x)
    value.backward()
    return value.detach()


def check_same(case: Case, x: Tensor) -> None:
    """Both forms give the same; also what warms them up.

    Raises:
        SystemExit: they do not.
    """
    found = []
    for loss in (case.usual, case.ours):
        value = step(loss, x)
        assert x.grad is not None
        found.append((value, x.grad.clone()))
    (a, ours), (b, theirs) = found
    if abs(a - b) > 1e-4 * abs(a) or (ours - theirs).norm() > 1e-3 * ours.norm():
        off = (ours - theirs).norm() / ours.norm()
        sys.exit(f"{case.name}: the forms differ: {a:.6g} and {b:.6g}, gradients by {off:.2g}.")


def run(case: Case, rounds: int, device: str) -> bool:
    """Measure and print a case; whether its bars are met."""
    x = case.inputs().to(device).requires_grad_()
    check_same(case, x)
    taken: dict[str, list[float]] = {"usual": [], "ours": []}
    for number in range(rounds):
        for which in ("usual", "ours") if number % 2 else ("ours", "usual"):
            taken[which].append(1e3 * seconds(partial(step, getattr(case, which), x), device))
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*taken.values(), strict=True)], n=4)
    usual, ours = (statistics.median(t) for t in taken.values())
    good = (case.bar is None or middle >= case.bar) and (case.limit is None or ours < case.limit)
    bars = [] if case.bar is None else [f"at least {case.bar:g}"]
    bars += [] if case.limit is None else [f"less than {case.limit:g} ms"]
    print(
        f"{case.name}: {middle:.2f} ({low:.2f} .. {high:.2f}), {usual:.2f} ms over {ours:.2f} ms; "
        f"bar {', '.join(bars) or 'none'}{'' if good else '  MISSED'}",
        flush=True,
    )
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Time of the losses of face recognition, and of steps of training.")
    parser.add_argument("--only", choices=[*SECTIONS, *STEPS])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", choices=list(KINDS), help="print the MB of one kind of classifier")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.memory:
        print(*memory_here(options.memory, options.device))
        return 0
    names = [options.only] if options.only else [*SECTIONS, *STEPS]
    good = [run(case, options.rounds, options.device) for n in names if n in SECTIONS for case in SECTIONS[n]()]
    good += [STEPS[name](options.rounds, options.device) for name in names if name in STEPS]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
