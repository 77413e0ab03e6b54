"""Every training scheme against the student alone, on scikit-learn's digits: `python benchmarks/schemes.py [names]`.

The setting is one in which distillation can help: a small student with 60 labelled and 600 unlabelled images. Teachers
are larger networks trained on 500 other labelled images; schemes without a teacher get the student's data only. All
share the student's start, batches, steps and the learning rate that is best on validation for the student alone, so
what is reported on test is, if anything, to the disadvantage of the schemes. Prints a markdown table and writes
`runs/schemes.json`.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd import gates, losses, schedules
from taskkd.losses import targets
from taskkd.stages import Stage, training_only

SEEDS, STEPS, RATES = 5, 300, (1e-2, 3e-2, 1e-1)
LABELLED, UNLABELLED = 60, 600
Batch = dict[str, Tensor]


class Net(nn.Module):
    """Three convolutions, the last two of stride 2, a mean over space and a linear head."""

    def __init__(self, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stage1 = block(1, width, 1)
            self.stage2 = block(width, 2 * width, 2)
            self.stage3 = block(2 * width, 2 * width, 2)
            self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> dict[str, Any]:
        pool = self.stage3(self.stage2(self.stage1(image))).mean((2, 3))
        return {"logits": self.head(pool), "pool": pool}


def block(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside), nn.ReLU())


class Exits(nn.Module):
    """BYOT: the student with a classifier after each of its earlier stages."""

    def __init__(self, net: Net, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = net
        width = net.head.in_features // 2
        self.first, self.second = nn.Linear(width, 10), nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> dict[str, Any]:
        one = self.net.stage1(image)
        two = self.net.stage2(one)
        pool = self.net.stage3(two).mean((2, 3))
        exits = [self.first(one.mean((2, 3))), self.second(two.mean((2, 3)))]
        return {"logits": self.net.head(pool), "exits": exits, "pool": pool}


class Branches(nn.Module):
    """ONE: further last stages on the student's trunk, and a gate. `out.ensemble` is the gated sum of all."""

    def __init__(self, net: Net, seed: int, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = net
        width = net.head.in_features
        self.others = nn.ModuleList(
            nn.Sequential(block(width, width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
            for _ in range(count)
        )
        self.gate = nn.Linear(width, count + 1)

    def forward(self, image: Tensor) -> dict[str, Any]:
        trunk = self.net.stage2(self.net.stage1(image))
        logits = self.net.head(self.net.stage3(trunk).mean((2, 3)))
        branches = [logits, *(other(trunk) for other in self.others)]
        gate = self.gate(trunk.mean((2, 3))).softmax(1)
        return {"logits": logits, "exits": branches[1:], "ensemble": targets.gated_ensemble(branches, gate)}


class Rocket(nn.Module):
    """Rocket launching: a larger last stage (the booster) beside the light one, on one trunk."""

    def __init__(self, net: Net, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = net
        width = net.head.in_features
        self.booster = nn.Sequential(
            block(width, 32, 1), block(32, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
        )

    def forward(self, image: Tensor) -> dict[str, Any]:
        trunk = self.net.stage2(self.net.stage1(image))
        return {"logits": self.net.head(self.net.stage3(trunk).mean((2, 3))), "exits": [self.booster(trunk)]}


def task(output: dict[str, Any], batch: Batch) -> Tensor:
    """The cross entropy of every output with a label; unlabelled images have -100."""
    heads = [output["logits"], *output.get("exits", ()), *([output["ensemble"]] if "ensemble" in output else [])]
    return torch.stack([F.cross_entropy(x, batch["labels"]) for x in heads]).sum()


# ---- data and training


@dataclass(frozen=True)
class Data:
    """What one seed sees."""

    labelled: tuple[Tensor, Tensor]
    unlabelled: Tensor
    private: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def batches(self, steps: int, seed: int, private: bool = False) -> Iterator[Batch]:
        """16 labelled and 48 unlabelled images (64 labelled ones of the teachers' own), shifted by up to a pixel."""
        generator = torch.Generator().manual_seed(1000 + seed)
        x, y = self.private if private else self.labelled
        for _ in range(steps):
            rows = torch.randint(len(x), (64 if private else 16,), generator=generator)
            image, labels = x[rows], y[rows]
            if not private:
                more = torch.randint(len(self.unlabelled), (48,), generator=generator)
                image = torch.cat([image, self.unlabelled[more]])
                labels = torch.cat([labels, torch.full((48,), -100)])
            shift = (torch.randint(3, (2,), generator=generator) - 1).tolist()
            yield {"image": image.roll(shift, (2, 3)), "labels": labels}


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(found.target)


@cache
def data(seed: int) -> Data:
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([LABELLED, UNLABELLED, 500, 200, len(x) - LABELLED - UNLABELLED - 700])
    labelled, unlabelled, private, validation, test = [(x[p], y[p]) for p in parts]
    return Data(labelled, unlabelled[0], private, validation, test)


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        right = model(image=part[0])["logits"].argmax(1) == part[1]
    return 100 * right.float().mean().item()


def fit(
    student: nn.Module,
    teacher: Any,
    terms: Sequence[kd.Term],
    seed: int,
    rate: float,
    *,
    steps: int | None = None,
    task_weight: float = 1.0,
    trains: tuple[str, ...] | None = None,
    cycles: int = 1,
    private: bool = False,
    observe: Callable[[dict[str, Tensor]], None] = lambda _: None,
) -> nn.Module:
    """Train with AdamW and a cosine that falls to 0, once or in cycles."""
    steps = STEPS if steps is None else steps
    distiller = kd.Distiller(student, teacher, terms, task_loss=task, task_weight=task_weight)
    torch.manual_seed(seed)
    with training_only(student, trains):
        distiller.prepare(next(data(seed).batches(1, seed, private)))
        distiller.set_total(steps)
        distiller.train()
        optimiser = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], rate, weight_decay=1e-3)
        for step, batch in enumerate(data(seed).batches(steps, seed, private)):
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * (step * cycles / steps % 1))) / 2
            out = distiller(**batch)
            observe(out)
            out["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()
            distiller.step()
    distiller.close()
    return student


@cache
def _teacher(seed: int, width: int, number: int, steps: int) -> nn.Module:
    net = Net(width, 100 * seed + number)
    return fit(net, None, (), seed, 1e-2, steps=steps, private=True).eval()


def teacher(seed: int, width: int = 24, number: int = 1, steps: int = 400) -> nn.Module:
    return copy.deepcopy(_teacher(seed, width, number, min(steps, STEPS * 4 // 3)))


# ---- the schemes: (student, seed, fit with this seed's rate) -> the trained student

Fit = Callable[..., nn.Module]
LOGITS = "out.logits"


def kl(name: str, student: str = LOGITS, source: str = LOGITS, t: float = 4.0, weight: Any = 1.0, **o: Any) -> kd.Match:
    return kd.Match(name, losses.kl_divergence, student, source, temperature=t, weight=weight, **o)


def one_teacher(student: Net, seed: int, fit: Fit) -> nn.Module:
    return fit(student, kd.Frozen(teacher(seed)), [kl("kd")])


def ensemble_mean(student: Net, seed: int, fit: Fit) -> nn.Module:
    members = [teacher(seed, number=i) for i in (1, 2, 3)]
    return fit(student, kd.Ensemble(*members, combine="probabilities", temperature=4.0), [kl("kd")])


def ensemble_weights(student: Net, seed: int, fit: Fit) -> nn.Module:
    members = {"big": teacher(seed), "middle": teacher(seed, 12, 2), "small": teacher(seed, 8, 3)}
    return fit(student, kd.Ensemble(**members, weights=[3, 2, 1]), [kl("kd")])


def ensemble_gate(student: Net, seed: int, fit: Fit) -> nn.Module:
    members = [teacher(seed, number=i) for i in (1, 2, 3)]
    gate = kd.LatentGate("stage3", 8, 3)
    return fit(student, kd.Ensemble(*members, gate=gate, combine="probabilities", temperature=4.0), [kl("kd")])


def ensemble_drop(student: Net, seed: int, fit: Fit) -> nn.Module:
    big = teacher(seed)
    middle = fit(Net(12, 7), kd.Frozen(big), [kl("kd")])
    small = fit(Net(8, 8), kd.Ensemble(big, middle, combine="probabilities", temperature=4.0), [kl("kd")])
    guides = kd.Ensemble(big, middle, small, combine="probabilities", temperature=4.0, drop=1)
    return fit(student, guides, [kl("kd")])


def mean_teacher(student: Net, seed: int, fit: Fit) -> nn.Module:
    ramp = schedules.sigmoid_ramp(1.0, fraction=0.3)
    return fit(student, kd.EMA(student, decay=0.98), [kl("ema", t=1.0, weight=ramp)])


def snapshot(student: Net, seed: int, fit: Fit) -> nn.Module:
    return fit(student, kd.Snapshot(student, cycles=3), [kl("snapshot", t=2.0)], cycles=3)


def deep_mutual(student: Net, seed: int, fit: Fit) -> nn.Module:
    peers = kd.Cohort(Net(4, 11), Net(4, 12))
    terms = kd.mutual(["student", "peer1", "peer2"], losses.kl_divergence, LOGITS, temperature=1.0)
    return fit(student, peers, terms)


def native_ensemble(student: Net, seed: int, fit: Fit) -> nn.Module:
    ramp = schedules.sigmoid_ramp(1.0, fraction=0.5)
    learners = [LOGITS, "out.exits[0]", "out.exits[1]"]
    terms = [kl(f"branch{i}", tap, "out.ensemble", 3.0, ramp) for i, tap in enumerate(learners)]
    return fit(Branches(student, seed), kd.SelfTeacher(), terms)


def diverse_peers(student: Net, seed: int, fit: Fit) -> nn.Module:
    peers = [f"peer{i}" for i in (1, 2, 3)]
    taps = [f"{p}/{tap}" for tap in (LOGITS, "out.pool") for p in peers]
    group = kd.Targets(kd.PeerAttention(8, 4), *taps, detach=False)
    cohort = kd.Cohort(*(Net(4, 10 + i) for i in (1, 2, 3)), group=group)
    ramp = schedules.sigmoid_ramp(1.0, fraction=0.5)
    terms = [kl(p, f"{p}/{LOGITS}", f"group/out[:, {i}]", 3.0, ramp) for i, p in enumerate(peers)]
    return fit(student, cohort, [*terms, kl("leader", t=3.0, weight=ramp)])


def own_teacher(student: Net, seed: int, fit: Fit) -> nn.Module:
    return fit(Exits(student, seed), kd.SelfTeacher(), [kl(f"exit{i}", f"out.exits[{i}]", t=3.0) for i in (0, 1)])


def batch_ensemble(student: Net, seed: int, fit: Fit) -> nn.Module:
    supplier = kd.Targets(targets.batch_ensemble, LOGITS, "out.pool", omega=0.5, temperature=4.0)
    return fit(student, supplier, [kl("bake", source="out")])


def trained_teacher(student: Net, seed: int, fit: Fit) -> nn.Module:
    there, back = kl("kd", source=f"teacher/{LOGITS}"), kl("near", f"teacher/{LOGITS}", f"student/{LOGITS}", weight=0.1)
    return fit(student, kd.Cohort(teacher=teacher(seed)), [there, back])


def rocket(student: Net, seed: int, fit: Fit) -> nn.Module:
    hint = kd.Match("rocket", losses.logit_mse, LOGITS, "out.exits[0]", weight=0.1)
    return fit(Rocket(student, seed), kd.SelfTeacher(), [hint])


def collaborative(student: Net, seed: int, fit: Fit) -> nn.Module:
    cohort = kd.Cohort(scratch=Net(24, 13), expert=kd.Frozen(teacher(seed)))
    attention = kd.Match("maps", losses.attention_transfer, "stage2", "expert/stage2", weight=500.0)
    return fit(student, cohort, [kl("steps", source=f"scratch/{LOGITS}"), attention])


def assistant_chain(student: Net, seed: int, fit: Fit) -> nn.Module:
    taught = teacher(seed)
    for pupil in (Net(12, 7), student):
        taught = fit(pupil, kd.Frozen(taught), [kl("kd")])
    return taught


def hint_then_kd(student: Net, seed: int, fit: Fit) -> nn.Module:
    hint = [kd.Match("hint", losses.mse, "stage2", adapter="conv1x1")]
    stages = [Stage("hint", hint, task_weight=0.0, trains=("stage1", "stage2")), Stage("kd", [kl("kd")])]
    return in_stages(student, teacher(seed), stages, fit)


def stage_by_stage(student: Net, seed: int, fit: Fit) -> nn.Module:
    parts = ("stage1", "stage2", "stage3")
    stages = [Stage(p, [kd.Match(p, losses.mse, p, adapter="conv1x1")], task_weight=0.0, trains=(p,)) for p in parts]
    return in_stages(student, teacher(seed), [*stages, Stage("head", [], trains=("head",))], fit)


def in_stages(student: nn.Module, source: nn.Module, stages: Sequence[Stage], fit: Fit) -> nn.Module:
    """The steps are shared out, so that a method of stages trains no longer than another."""
    for stage in stages:
        guide, steps = kd.Frozen(source), STEPS // len(stages)
        fit(student, guide, stage.terms, steps=steps, task_weight=stage.task_weight, trains=stage.trains)
    return student


def early_stopped(student: Net, seed: int, fit: Fit) -> nn.Module:
    return fit(student, kd.Frozen(teacher(seed, steps=150)), [kl("kd", weight=schedules.stop_after(1.0, fraction=0.7))])


def conditional(student: Net, seed: int, fit: Fit) -> nn.Module:
    """The label decides where there is one; where there is none, the teacher is followed."""
    right = gates.teacher_correct()
    gate = gates.Gate(lambda run: right(run) | (run.batch["labels"] == -100), right.student_taps, right.teacher_taps)
    return fit(student, kd.Frozen(teacher(seed)), [kl("kd", gate=gate)])


SCHEMES: dict[str, tuple[str, Callable[[Net, int, Fit], nn.Module]]] = {
    "kd": ("one teacher (Hinton 2015)", one_teacher),
    "ensemble-mean": ("ensemble, mean (You 2017)", ensemble_mean),
    "ensemble-weights": ("ensemble, fixed weights", ensemble_weights),
    "ensemble-gate": ("ensemble, learned gate (AMTML)", ensemble_gate),
    "ensemble-drop": ("ensemble of assistants, random drop (DGKD)", ensemble_drop),
    "ema": ("EMA of the student (mean teacher)", mean_teacher),
    "snapshot": ("snapshots, cyclic rate (Yang 2019)", snapshot),
    "dml": ("two peers (DML)", deep_mutual),
    "one": ("gated branches (ONE)", native_ensemble),
    "okddip": ("three peers and leader (OKDDip)", diverse_peers),
    "byot": ("early exits (BYOT)", own_teacher),
    "bake": ("batch ensemble (BAKE)", batch_ensemble),
    "prokt": ("trainable teacher (ProKT)", trained_teacher),
    "rocket": ("booster (rocket launching)", rocket),
    "ctkd": ("scratch teacher and expert (CTKD)", collaborative),
    "takd": ("teacher assistant (TAKD)", assistant_chain),
    "fitnets": ("hint, then KD (FitNets)", hint_then_kd),
    "stage-wise": ("stage by stage (embarrassingly simple)", stage_by_stage),
    "eskd": ("early-stopped teacher and distillation (ESKD)", early_stopped),
    "conditional": ("conditional teacher (Meng 2019)", conditional),
}


def best_rate(seed: int) -> float:
    """The student's own search, on validation."""
    return max(RATES, key=lambda rate: accuracy(fit(Net(seed=seed), None, (), seed, rate), data(seed).validation))


def run(name: str, seed: int, rate: float, **options: Any) -> nn.Module:
    """Train the student of this seed with a scheme (or "alone")."""

    def fitted(student: nn.Module, source: Any, terms: Sequence[kd.Term], **more: Any) -> nn.Module:
        return fit(student, source, terms, seed, rate, **more, **options)

    student = Net(seed=seed)
    return fitted(student, None, ()) if name == "alone" else SCHEMES[name][1](student, seed, fitted)


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    start, seeds = time.monotonic(), range(SEEDS)
    rates = {seed: best_rate(seed) for seed in seeds}
    alone = {seed: accuracy(run("alone", seed, rates[seed]), data(seed).test) for seed in seeds}
    guides = [accuracy(teacher(seed), data(seed).test) for seed in seeds]
    print(
        f"teacher {statistics.mean(guides):.1f}, student alone {statistics.mean(alone.values()):.1f}, rates {rates}\n"
    )
    print("| scheme | test accuracy | gain over the student alone | standard error | |\n|---|---|---|---|---|")
    table: dict[str, Any] = {"alone": alone, "teacher": guides, "rates": rates, "schemes": {}}
    for name in names or SCHEMES:
        found = {seed: accuracy(run(name, seed, rates[seed]), data(seed).test) for seed in seeds}
        gains = [found[seed] - alone[seed] for seed in seeds]
        mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
        verdict = "gain" if mean > 2 * error else "loss" if mean < -2 * error else "no difference above 2 s.e."
        print(
            f"| {SCHEMES[name][0]} | {statistics.mean(found.values()):.1f} | {mean:+.1f} | {error:.1f} | {verdict} |",
            flush=True,
        )
        table["schemes"][name] = {"test": found, "gain": mean, "standard_error": error, "verdict": verdict}
    table["seconds"] = time.monotonic() - start
    Path("runs").mkdir(exist_ok=True)
    Path("runs/schemes.json").write_text(json.dumps(table, indent=1))
    print(f"\n{len(seeds)} seeds, {STEPS} steps, {table['seconds']:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
