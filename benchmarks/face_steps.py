"""Steps of training face models: what distilling costs, and classifiers over many identities. See `face.py`.

    cache       a step with a full embedding cache over one of the student alone: crops of a RecordIO file, decoded and
                flipped at random by the loader, MobileFaceNet of width 16 at 56 pixels, batches of 64, and of width 64
                at 112, batches of 16.
                "beside": ArcFace and the cosine, over ArcFace; bar 1.05. "mimic": the cosine alone, over ArcFace.
                "alone" is a loop by hand without taskkd's distiller; a second one tells the noise.
    live        a step with an IResNet-50 run on every batch over one that reads the cache; 112 pixels, batches of 8.
    classifier  64 embeddings of 512 features, 100,000 identities, forward, backward and the weight's step: trained
                (MarginHead) over by hand, over Partial FC (0.1), over frozen centres, and over frozen and sampled (0.1)
                ones. Bar of the first 1; frozen centres must leave the optimiser nothing.
    memory      of the same, each in a fresh process: MB that the classifier holds, that a step takes at its worst, and
                the optimiser's. Frozen centres hold less than 250 MB, in float16 less than 130 (acceptance A11).
    verify      ten folds of 6000 pairs, over a loop over folds, thresholds and both parts of the pairs.

Trainings live side by side in one process and take turns, a step each, in random order, with the same batches.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import taskkd as kd
from benchmarks.face_records import write
from benchmarks.figures import Figure, Options, Part, fresh_process, quartiles, reset_peak, resident, take_turns
from taskkd.caches import CACHE_KEY
from taskkd.face import models
from taskkd.face.datasets import FaceDataset, RandomFlip, collate
from taskkd.face.heads import MarginHead
from taskkd.face.methods import embedding_mimic
from taskkd.face.partial_fc import PartialFC
from taskkd.face.recordio import read_recordio
from taskkd.face.verification import THRESHOLDS, verify
from taskkd.schedules import Progress

IDENTITIES, MANY, FEATURES, BATCH = 100, 100_000, 512, 64
Work = Callable[[], Any]


# ---- trainings


def network(architecture: str, seed: int = 0, **options: Any) -> Any:
    """A random face model."""
    return models.build({"architecture": architecture, **options}, seed=seed)


def batches(dataset: RandomFlip, size: int, cached: kd.Cached | None, device: str) -> Iterator[dict[str, Any]]:
    """Without end, the same for every contender; what is cached is looked up by the loader, as the trainer does it."""

    def made(samples: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(collate(samples))
        return batch if cached is None else {**batch, CACHE_KEY: cached.lookup(batch)}

    loader = DataLoader(
        dataset, size, shuffle=True, drop_last=True, collate_fn=made, generator=torch.Generator().manual_seed(0)
    )
    while True:
        for batch in loader:
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def head(student: Any, device: str) -> MarginHead:
    """ArcFace."""
    return MarginHead(IDENTITIES, student.embedding_size).to(device)


def alone(student: Any, source: Iterator[dict[str, Any]], device: str) -> Work:
    """A step by hand of the student with ArcFace."""
    student.to(device).train()
    loss = head(student, device)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=1e-3, momentum=0.9)

    def step() -> None:
        batch = next(source)
        optimizer.zero_grad()
        loss(student(batch["images"]), batch).backward()
        optimizer.step()

    return step


def distilled(
    student: Any, teacher: kd.Cached | kd.Frozen, source: Iterator[dict[str, Any]], device: str, *, labels: bool
) -> Work:
    """A step of the distiller with the cosine to the teacher, beside ArcFace or alone."""
    model = teacher.live.model if isinstance(teacher, kd.Cached) else teacher.model
    stage = embedding_mimic(student, model, task_weight=1.0 if labels else 0.0).stages[0]
    distiller = kd.Distiller(
        student,
        teacher,
        stage.terms,
        task_weight=stage.task_weight,
        task_loss=head(student, device) if labels else None,
    ).to(device)
    distiller.prepare(next(source))
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        batch = next(source)
        optimizer.zero_grad()
        distiller(**batch)["loss"].backward()
        optimizer.step()
        distiller.step()

    return step


def full_cache(teacher: Any, folder: Path, data: RandomFlip, device: str) -> kd.Cached:
    """Of both views of every image."""
    cached = kd.Cached(teacher.to(device), folder)
    cached.attach(["out.embeddings"])
    views = DataLoader(data.views, 32, collate_fn=collate)
    cached.build(views, total=len(data.views), device=device, announce=lambda _: None)
    return cached


def faces(folder: Path, count: int, size: int) -> RandomFlip:
    """Crops of a RecordIO file, flipped at random."""
    folder.mkdir()
    return RandomFlip(FaceDataset(read_recordio(write(folder, count), size=size)))


def contenders(folder: Path, size: int, width: int, batch: int, device: str) -> dict[str, Work]:
    """Two of each: a student by hand, one with the cosine beside, one with it alone."""
    data = faces(folder / "faces", 256, size)
    cached = full_cache(network("mobilefacenet", 1, width=8, size=size), folder / "cache", data, device)
    works: dict[str, Work] = {}
    for copy in "12":
        students = [network("mobilefacenet", layout="gdc", width=width, size=size) for _ in range(3)]
        works[f"alone{copy}"] = alone(students[0], batches(data, batch, None, device), device)
        for student, labels in zip(students[1:], (True, False), strict=True):
            source = batches(data, batch, cached, device)
            works[f"{'beside' if labels else 'mimic'}{copy}"] = distilled(
                student, cached, source, device, labels=labels
            )
    return works


def cache(options: Options) -> list[Figure]:
    """Distilling from a full cache over training the student alone."""
    found = []
    for size, width, batch in ((56, 16, 64), (112, 64, 16)):
        with tempfile.TemporaryDirectory() as name:
            works = contenders(Path(name), size, width, batch, options.device)
            taken = take_turns(works, options.count(8), device=options.device)
        title, lone = f"{size} pixels, width {width}, batches of {batch}", taken["alone1"] + taken["alone2"]
        beside, mimic = (taken[f"{kind}1"] + taken[f"{kind}2"] for kind in ("beside", "mimic"))
        found += [
            Figure.over(f"{title}: the cosine beside ArcFace over ArcFace alone", beside, lone, at_most=1.05),
            Figure.over(f"{title}: the cosine without the head over ArcFace alone", mimic, lone, at_most=1.05),
            Figure.over(f"{title}: ArcFace alone over itself: the noise", taken["alone1"], taken["alone2"]),
        ]
    return found


def live(options: Options) -> list[Figure]:
    """A large teacher on every batch over its cache."""
    size, batch, device = 112, 8, options.device
    with tempfile.TemporaryDirectory() as name:
        data = faces(Path(name) / "faces", 2 * batch, size)
        teacher = network("iresnet50", 1).eval()
        cached = full_cache(teacher, Path(name) / "cache", data, device)
        students = [network("mobilefacenet", layout="gdc", width=64) for _ in range(2)]
        works = {
            "live": distilled(students[0], kd.Frozen(teacher), batches(data, batch, None, device), device, labels=True),
            "cached": distilled(students[1], cached, batches(data, batch, cached, device), device, labels=True),
        }
        taken = take_turns(works, options.count(5), device=device, warm_up=1)
    return [Figure.over("live over cached", taken["live"], taken["cached"])]


# ---- classifiers


def by_hand(weight: nn.Parameter, embeddings: Tensor, labels: Tensor) -> Tensor:
    """ArcFace as a first version of it is written: a margin by a one-hot matrix."""
    cosines = (F.normalize(embeddings) @ F.normalize(weight).T).clamp(1e-7 - 1, 1 - 1e-7)
    widened = cosines * math.cos(0.5) - (1 - cosines**2).sqrt() * math.sin(0.5)
    widened = torch.where(cosines > -math.cos(0.5), widened, cosines - 0.5 * math.sin(0.5))
    one_hot = F.one_hot(labels, len(weight)).to(cosines.dtype)
    return F.cross_entropy(64 * (one_hot * widened + (1 - one_hot) * cosines), labels)


class Classifier:
    """One of the kinds, with its optimiser."""

    def __init__(self, kind: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embeddings = torch.randn(BATCH, FEATURES, generator=generator).to(device).requires_grad_()
        self.labels = torch.randint(MANY, (BATCH,), generator=generator).to(device)
        self.kind = kind
        self.head: nn.Module = KINDS[kind]().to(device)
        trained = list(self.head.parameters())
        self.optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9) if trained else None

    def step(self) -> None:
        """Forward, backward, the weight's step."""
        self.embeddings.grad = None
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        if self.kind == "by hand":
            by_hand(self.head.weight, self.embeddings, self.labels).backward()  # type: ignore[arg-type]
        else:
            self.head(self.embeddings, {"labels": self.labels}).backward()
        if self.optimizer is not None:
            self.optimizer.step()
        if isinstance(self.head, PartialFC):
            self.head.auxiliary_step(Progress(0))

    @property
    def state(self) -> float:
        """MB of what the optimiser, the classifier's own among them, keeps."""
        kept = [] if self.optimizer is None else [v for s in self.optimizer.state.values() for v in s.values()]
        kept += [self.head.velocity] if isinstance(self.head, PartialFC) else []
        return sum(v.numel() * v.element_size() for v in kept if isinstance(v, Tensor)) / 2**20


def plain_weight() -> nn.Module:
    """A linear layer of the same start as our heads'."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(MarginHead(MANY, FEATURES).weight.detach())
    return layer


KINDS: dict[str, Callable[[], nn.Module]] = {
    "by hand": plain_weight,
    "trained": lambda: MarginHead(MANY, FEATURES),
    "partial": lambda: PartialFC(MANY, FEATURES, sample_rate=0.1, learning_rate=1e-3),
    "frozen": lambda: MarginHead(MANY, FEATURES, trained=False),
    "sampled": lambda: MarginHead(MANY, FEATURES, trained=False, sample_rate=0.1),
    "half": lambda: MarginHead(MANY, FEATURES, trained=False, storage="float16"),
}


TITLES = {
    "by hand": "a weight by hand",
    "trained": "`MarginHead`",
    "partial": "Partial FC of 0.1 (rows updated in place)",
    "frozen": "frozen centres",
    "sampled": "frozen centres, 0.1 sampled",
    "half": "frozen centres in float16",
}
#: MB that these may hold; they leave the optimiser nothing
LIMITS = {"frozen": 250, "sampled": 250, "half": 130}


def classifier(options: Options) -> list[Figure]:
    """Time of a step."""
    made = {kind: Classifier(kind, options.device) for kind in KINDS}
    works = {kind: c.step for kind, c in made.items()}
    taken = take_turns(works, options.count(7), device=options.device)
    first, second = (made[k].embeddings.grad for k in ("by hand", "trained"))
    assert first is not None and second is not None
    if (first - second).norm() > 1e-3 * first.norm():
        sys.exit(f"by hand and trained differ by {float((first - second).norm() / first.norm()):.2g}.")
    trained = taken["trained"]
    return [
        Figure.over("by hand with a one-hot margin over `MarginHead`", taken["by hand"], trained, at_least=1),
        *(
            Figure.over(f"`MarginHead`, trained, over {name}", trained, taken[kind], at_least=1)
            for kind, name in TITLES.items()
            if kind not in ("by hand", "trained")
        ),
    ]


def memory_here(kind: str, device: str) -> tuple[float, float, float]:
    """MB that a classifier holds, what three steps take above that at the worst, and what the optimiser keeps."""
    warm = MarginHead(8, FEATURES).to(device)
    warm(torch.randn(4, FEATURES, device=device, requires_grad=True), {"labels": torch.arange(4)}).backward()
    torch.optim.SGD(warm.parameters()).step()  # what it imports
    had = resident("VmRSS")
    made = Classifier(kind, device)
    held = resident("VmRSS")
    reset_peak()
    for _ in range(3):
        made.step()
    return held - had, resident("VmHWM") - held, made.state


def memory(options: Options) -> list[Figure]:
    """Of each kind, in a process of its own."""
    found = []
    for kind, name in TITLES.items():
        held, more, state = fresh_process("benchmarks.face", "--memory", kind)
        detail = f"a step at its worst takes {more:.0f} MB more, the optimiser's state is {state:.0f} MB"
        found.append(Figure(f"{name}: held", held, unit="MB", at_most=LIMITS.get(kind), detail=detail))
        if kind in LIMITS:
            found.append(Figure(f"{name}: the optimiser's state", state, unit="MB", at_most=0))
    return found


# ---- verification


def looped(distances: np.ndarray[Any, Any], same: np.ndarray[Any, Any]) -> list[float]:
    """Of each fold the accuracy at the threshold that is best on the others: every threshold is tried on both parts."""
    found = []
    for own in np.array_split(np.arange(len(same)), 10):
        others = np.setdiff1d(np.arange(len(same)), own)
        rates: dict[str, list[float]] = {"others": [], "own": []}
        for name, part in (("others", others), ("own", own)):
            for threshold in THRESHOLDS:
                accepted = distances[part] < threshold
                right = np.sum(accepted & same[part]) + np.sum(~accepted & ~same[part])
                rates[name].append(float(right) / len(part))
        found.append(rates["own"][int(np.argmax(rates["others"]))])
    return found


def verification(options: Options) -> list[Figure]:
    """6000 pairs, both give the same accuracies."""
    generator = np.random.default_rng(0)
    same = np.arange(6000) // 300 % 2 == 0
    distances = np.clip(generator.normal(np.where(same, 1.0, 1.6), 0.35), 0, 4)
    if not np.array_equal(verify(distances, same).accuracies, looped(distances, same)):
        sys.exit("verification: the loop and ours differ.")
    works = {"loop": lambda: looped(distances, same), "ours": lambda: verify(distances, same)}
    taken = take_turns(works, options.count(15))
    own = quartiles([1e3 * t for t in taken["ours"]])
    return [
        Figure.over("a loop over folds and thresholds over ours", taken["loop"], taken["ours"], at_least=10),
        Figure.of("ours alone", own, unit="ms", at_most=100),
    ]


STEPS: dict[str, Part] = {
    "cache": Part("MobileFaceNet: a step with a full cache over one of the student alone", cache),
    "live": Part("IResNet-50 to MobileFaceNet, 112 pixels, batches of 8: the teacher on every batch", live),
    "classifier": Part("a step of a classifier, 64 embeddings of 512, 100,000 identities", classifier),
    "memory": Part("resident memory of the same classifiers, each in a fresh process", memory),
    "verify": Part("ten folds of 6000 pairs", verification),
}
