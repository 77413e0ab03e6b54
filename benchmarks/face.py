"""Time of the losses of face recognition over their usual forms, and of steps of training.

    python -m benchmarks.face [--only SECTION] [--rounds N] [--device cpu|cuda]

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

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.face_steps import KINDS, STEPS, memory_here
from benchmarks.figures import Figure, Options, Part, parser, quartiles, run, steady, take_turns
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
    forms = {"over a loop over the nodes": loop_histogram, "over all values at all nodes": product_histogram}
    return [
        Case(
            f"{count} similarities each, {name}",
            lambda count=count: random(4, count).sigmoid(),
            lambda x, form=form: spectrum(torch.stack([form(row) for row in x])),
            lambda x: spectrum(soft_histogram(x)),
            10 if count == 256 and form is loop_histogram else None,
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
            f"{count} identities and pairs",
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
            f"{count} embeddings",
            lambda count=count: random(count, FEATURES),
            usual_ekd,
            our_ekd,
            1 if count == 256 else None,
            60 if count == 256 else None,
        )
        for count in (64, 256, 1024)
    ]


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


def measured(made: Callable[[], list[Case]], options: Options) -> list[Figure]:
    """Both forms of each case."""
    found = []
    for case in made():
        x = case.inputs().to(options.device).requires_grad_()
        check_same(case, x)
        works = {which: partial(step, getattr(case, which), x) for which in ("usual", "ours")}
        taken = take_turns(works, options.count(15), warm_up=0, device=options.device)
        found.append(Figure.over(case.name, taken["usual"], taken["ours"], at_least=case.bar))
        if case.limit is not None:
            own = quartiles([1e3 * t for t in taken["ours"]])
            found.append(Figure.of(f"{case.name}, ours alone", own, unit="ms", at_most=case.limit))
    return found


PARTS = {
    "histogram": Part(
        "histograms of 1000 nodes of a DDL step, the usual forms over ours", partial(measured, histograms)
    ),
    "ddl": Part("DDL, two branches of so many identities and pairs, 512 features", partial(measured, ddls)),
    "ekd": Part("EKD on so many embeddings of 512, over a full sort of all negatives", partial(measured, ekds)),
    **STEPS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar is missed."""
    command = parser(__doc__, PARTS, device=True)
    command.add_argument("--memory", choices=list(KINDS), help="print the MB of one kind of classifier")
    given = command.parse_args(arguments)
    if given.memory:
        steady()
        print(*memory_here(given.memory, given.device))
        return 0
    return run(PARTS, given)


if __name__ == "__main__":
    sys.exit(main())
