"""How cost grows with data, classes and layers.

    python -m benchmarks.growth [--only data|logits|maps|boxes|layers] [--rounds N] [--json FILE]

    data    samples from 1,000 to a million, a cached teacher: opening the cache, and a training of one step from its
            first line to its last, grow no faster than the data; a later step costs the same with any number.
    logits  losses of soft targets of 32 samples with 10 to 100,000 classes: no faster than the classes; memory at
            100,000 in logits (the tensor's size), of which one is the gradient.
    maps    segmentation: soft targets and intra-class variation with 2 to 150 classes: no faster than the classes.
    boxes   detection: general instances of 20,000 anchors with 1 to 1,200 classes: no faster than the classes.
    layers  terms on 1 to 48 layers, over a loop by hand of as many; taps on as many, over a plain forward.

Every size of a case is timed in turn with the others, CPU time of one thread. The bars are loose, and of the largest
size: they are missed where a cost has another shape (quadratic, say), not where it is some percent more.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from benchmarks.figures import Figure, Options, Part, parser, peak, quartiles, run, take_turns
from taskkd import losses
from taskkd.taps import Taps

Work = Callable[[], Any]
#: the bar of all shapes: a cost of another one is well beyond; memory that no longer fits the processor's cache, or
#: pages of a file that are touched for the first time, are not
LOOSE = 2.0


def growth(title: str, works: Mapping[int, Work], what: str, rounds: int, *, flat: bool = False) -> list[Figure]:
    """The time at every size, and how the largest compares: with the smallest if flat, else, by the piece, with the one
    before it."""
    taken = take_turns({str(size): work for size, work in works.items()}, rounds, warm_up=1)
    times = {size: quartiles([1e3 * t for t in taken[str(size)]]) for size in works}
    sizes = list(works)
    first, last = sizes[0] if flat else sizes[-2], sizes[-1]
    found = []
    for size, own in times.items():
        detail = "" if size == sizes[0] else f"{own[1] / times[sizes[0]][1]:.3g} times that of {sizes[0]:,}"
        found.append(Figure.of(f"{title}, {what}: {size:,}", own, unit="ms", detail=detail))
    value = times[last][1] / times[first][1] / (1 if flat else last / first)
    share = "" if flat else f", for each of the {what}"
    return [*found, Figure(f"{title}: {last:,} over {first:,} {what}{share}", value, at_most=LOOSE)]


# ---- data


class Points(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen numbers, a label and an id each."""

    def __init__(self, count: int) -> None:
        self.x = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "labels": torch.tensor(0), "id": index}

    def rows(self, ids: Tensor) -> dict[str, Tensor]:
        """A batch."""
        return {"x": self.x[ids], "labels": torch.zeros(len(ids), dtype=torch.long), "id": ids}


class Net(nn.Module):
    """Two layers and ten classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).relu())
        return logits


def cross_entropy(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The task's loss."""
    return F.cross_entropy(output, batch["labels"])


class CachedRun:
    """A data set of a size, and a full cache for it."""

    def __init__(self, count: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.points, self.teacher, self.folder = Points(count), Net(64), folder
        self.opened = self.open()
        size = min(count, 8192)
        batches = (self.points.rows(ids) for ids in torch.arange(count).split(size))
        self.opened.build(batches, total=count, announce=lambda _: None)
        self.batches = iter(torch.randint(count, (10_000, 64), generator=torch.Generator().manual_seed(1)))
        self.distiller = kd.Distiller(Net(16), self.opened, [self.soft()], task_loss=cross_entropy).train()
        self.distiller.prepare(self.points.rows(torch.arange(64)))
        self.optimizer = torch.optim.SGD(self.distiller.parameters(), lr=1e-3)

    def open(self) -> kd.Cached:
        """The cache, as a new process finds it."""
        cached = kd.Cached(self.teacher, self.folder / "cache", shard_size=65_536)
        cached.attach(["out"])
        return cached

    def soft(self) -> kd.Match:
        """The term."""
        return kd.Match("logits", losses.kl_divergence, "out", temperature=4.0)

    def step(self) -> None:
        """On samples from anywhere."""
        self.optimizer.zero_grad()
        self.distiller(**self.points.rows(next(self.batches)))["loss"].backward()
        self.optimizer.step()
        self.distiller.step()

    def train(self) -> None:
        """A whole training, of one step."""
        from transformers import PrinterCallback, TrainingArguments

        arguments = TrainingArguments(
            output_dir=str(self.folder / "run"), max_steps=1, per_device_train_batch_size=64, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=10,
        )  # fmt: skip
        trainer = kd.Trainer(
            Net(16), teacher=self.open(), terms=[self.soft()], task_loss=cross_entropy,
            args=arguments, train_dataset=self.points,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def data(options: Options) -> list[Figure]:
    """Runs with a full cache."""
    sizes = [1_000, 10_000] if options.quick else [1_000, 10_000, 100_000, 1_000_000]
    folder = Path(tempfile.mkdtemp())
    try:
        runs = {size: CachedRun(size, folder / str(size)) for size in sizes}
        opened = {size: made.open for size, made in runs.items()}
        trained = {size: made.train for size, made in runs.items()}
        steps = {size: partial(repeat, made.step, 20) for size, made in runs.items()}
        return [
            *growth("opening a cache", opened, "samples", options.count(5)),
            *growth("a training of one step", trained, "samples", options.count(3)),
            *growth("twenty later steps of 64", steps, "samples", options.count(20), flat=True),
        ]
    finally:
        shutil.rmtree(folder)


def repeat(work: Work, times: int) -> None:
    """As often as that."""
    for _ in range(times):
        work()


# ---- classes


def backward(loss: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> None:
    """Forward and backward to the first input."""
    inputs[0].grad = None
    loss(*inputs, **options).backward()


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """A student's tensor, with gradient, and a teacher's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def logits(options: Options, batch: int = 32) -> list[Figure]:
    """Losses of soft targets."""
    sizes = [10, 100, 1_000] if options.quick else [10, 100, 1_000, 10_000, 100_000]
    labels = torch.arange(batch) % 10
    cases: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
        "soft targets": (losses.kl_divergence, {"temperature": 4.0}),
        "soft cross-entropy": (losses.soft_cross_entropy, {}),
        "DKD": (losses.decoupled, {"labels": labels}),
        "DIST": (losses.dist, {}),
    }
    found = []
    for name, (loss, own) in cases.items():
        works = {size: partial(backward, loss, *pair(batch, size), **own) for size in sizes}
        found += growth(name, works, "classes", options.count(10))
        taken = peak(partial(backward, loss, *pair(batch, sizes[-1]), **own)) * 2**20 / (4 * batch * sizes[-1])
        found.append(Figure(f"{name}: memory, classes: {sizes[-1]:,}", taken, unit="logits", at_most=12))
    return found


def maps(options: Options, side: int = 96) -> list[Figure]:
    """Losses of segmentation."""
    from taskkd.segmentation.methods.ifvd import intra_class_variation

    sizes = [2, 19] if options.quick else [2, 19, 150]
    soft = {size: partial(backward, losses.kl_divergence, *pair(2, size, side, side), dim=1) for size in sizes}
    features = pair(2, 64, side, side)
    place = torch.arange(side * side).view(1, side, side).expand(2, -1, -1)
    ifvd = {
        size: partial(backward, intra_class_variation, *features, labels=place % size, classes=size) for size in sizes
    }
    return [
        *growth("soft targets of 2 maps of 96 x 96", soft, "classes", options.count(10)),
        *growth("intra-class variation of 64 channels", ifvd, "classes", options.count(10)),
    ]


def boxes(options: Options, anchors: int = 20_000) -> list[Figure]:
    """Losses of detection."""
    from taskkd.detection.methods.gid import general_instances

    sizes = [1, 20] if options.quick else [1, 20, 80, 365, 1_200]
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(1, anchors, 2, generator=generator) * 600
    places = torch.cat([corners, corners + 4 + 60 * torch.rand(1, anchors, 2, generator=generator)], 2)

    def case(size: int) -> Work:
        sides = [torch.rand(1, anchors, size, generator=generator) ** 8 for _ in range(2)]
        return lambda: general_instances(*sides, places, places)

    return growth("general instances (GID)", {size: case(size) for size in sizes}, "classes", options.count(8))


# ---- layers


class Deep(nn.Module):
    """Layers of one width."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


DEPTH, WIDTH, ROWS = 48, 256, 64


def spread(count: int) -> list[str]:
    """So many of the layers, evenly."""
    return [f"layers.{(i + 1) * DEPTH // count - 1}" for i in range(count)]


def by_hand(student: nn.Module, teacher: nn.Module, names: Sequence[str], x: Tensor) -> Work:
    """A step of plain torch with forward hooks."""
    seen: dict[str, Tensor] = {}
    for whose, model in (("s", student), ("t", teacher)):
        for name in names:
            key = f"{whose}.{name}"
            model.get_submodule(name).register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out))
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)

    def step() -> None:
        with torch.no_grad():
            teacher(x)
        loss = student(x).square().mean()
        for name in names:
            loss = loss + F.mse_loss(seen[f"s.{name}"], seen[f"t.{name}"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def distilled(student: nn.Module, teacher: nn.Module, names: Sequence[str], x: Tensor) -> Work:
    """The same of the distiller."""
    terms = [kd.Match(name.replace(".", "-"), losses.mse, name) for name in names]
    distiller = kd.Distiller(student, kd.Frozen(teacher), terms, task_loss=lambda output, _: output.square().mean())
    distiller.train().prepare({"x": x})
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)

    def step() -> None:
        loss = distiller(x=x)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distiller.step()

    return step


def tapped(model: nn.Module, names: Sequence[str], x: Tensor) -> Work:
    """A forward with taps, and reading them."""
    taps = Taps(model, names)

    def forward() -> None:
        with taps.record():
            output = model(x)
        taps.read(output, {})

    return forward


def layers(options: Options) -> list[Figure]:
    """Terms and taps."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH)
    counts = [1, 12, 48] if options.quick else [1, 6, 12, 24, 48]
    made = {
        way: {n: make(Deep(DEPTH, WIDTH), Deep(DEPTH, WIDTH), spread(n), x) for n in counts}
        for way, make in (("ours", distilled), ("by hand", by_hand))
    }
    found = growth("a step", made["ours"], "terms", options.count(20))
    for n in counts:
        works = {way: partial(repeat, made[way][n], 3) for way in made}
        taken = take_turns(works, options.count(20))
        bar = 1.15 if n == counts[-1] else None
        found.append(
            Figure.over(f"a step over a loop by hand, terms: {n}", taken["ours"], taken["by hand"], at_most=bar)
        )
    plain = Deep(DEPTH, WIDTH)
    for n in counts:
        works = {"tapped": partial(repeat, tapped(Deep(DEPTH, WIDTH), spread(n), x), 5)}
        taken = take_turns({**works, "plain": partial(repeat, partial(plain, x), 5)}, options.count(20))
        bar = 1.1 if n == counts[-1] else None
        found.append(
            Figure.over(f"a forward over a plain one, taps: {n}", taken["tapped"], taken["plain"], at_most=bar)
        )
    return found


PARTS = {
    "data": Part("a cached teacher, samples of 16 numbers", data),
    "logits": Part("soft targets of 32 samples, forward and backward", logits),
    "maps": Part("segmentation, forward and backward", maps),
    "boxes": Part("detection, 20,000 anchors", boxes),
    "layers": Part(f"{DEPTH} layers of {WIDTH}, {ROWS} rows", layers),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar is missed."""
    return run(PARTS, parser(__doc__, PARTS).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
