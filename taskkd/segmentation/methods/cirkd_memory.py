"""CIRKD's terms with a memory: similarities to pixels and regions of earlier images, to channels of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd import losses
from taskkd.banks import ClassQueues
from taskkd.errors import TaskkdError
from taskkd.losses.primitives import l2_normalise
from taskkd.segmentation.methods.ifvd import class_means
from taskkd.segmentation.parts import PartsTerm, as_weights, placed
from taskkd.segmentation.similarity import MOST, average_pool, cross_image_similarity, queue_similarity
from taskkd.segmentation.terms import Ignore, labels_at, resized, valid_at
from taskkd.terms import Run

__all__ = ["ChannelMemory", "PixelMemory", "Storage", "projection"]

#: a number -> a permutation of so many
Draw: TypeAlias = Callable[[int], Tensor]
Storage: TypeAlias = Literal["float16", "float32"]


class _Norm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where there is one number of each channel alone."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.training and input[:, 0].numel() > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def projection(student: int, teacher: int) -> nn.Sequential:
    """`(N, student, h, w) -> (N, teacher, h, w)`: 1x1 convolution, BN, ReLU, 1x1 convolution, without biases."""
    first = nn.Conv2d(student, teacher, 1, bias=False)
    second = nn.Conv2d(teacher, teacher, 1, bias=False)
    return nn.Sequential(first, _Norm(teacher), nn.ReLU(inplace=True), second)


def _stored(storage: Storage, like: Tensor) -> torch.dtype:
    if storage == "float16":
        return torch.float16
    return torch.float64 if like.dtype == torch.float64 else torch.float32


class PixelMemory(PartsTerm):
    """Each pixel's similarities to remembered pixels ("pixel") and regions ("region") of all classes.

    The teacher's features are remembered, L2-normalised: of each image and class the mean of its pixels, and up to 16
    of them drawn at random. In each step the queues take in the batch, then some rows of each class are drawn; the
    softmax over a pixel's similarities to them is compared. The student's features pass a projection first. Pixels
    without a label do not take part; a batch without any label gives 0.

    Source: Yang C. et al. 2022 (CIRKD). Draws are torch's global generator's, so a resumed run draws the same.

    Args:
        name, student, teacher: see `PartsTerm`.
        classes: how many.
        pixels, regions: remembered for each class, at most.
        draw_pixels, draw_regions: drawn of each class in a step.
        temperature, kd_temperature: similarities are divided by both; the loss is multiplied by the latter's square.
        most: pixels of an image; larger maps are resized to so many.
        limit: MB that both queues may take together; they are as long as fits, but no shorter than what is drawn.
        storage: of the queues, "float16" or "float32".
        compat: "official": the defects of the released code, which remembers the first pixels of an image for each of
            its classes, whatever class they are of, and leaves rows unwritten where a queue wraps.
        draw: other permutations.
        weights, **options: of `PartsTerm`; parts "pixel" and "region".

    Raises:
        TaskkdError: a number is out of range.
    """

    #: pixels of an image and class that are remembered at a time
    PUSHED = 16

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str,
        *,
        classes: int,
        pixels: int = 20000,
        regions: int = 2000,
        draw_pixels: int | None = None,
        draw_regions: int | None = None,
        temperature: float = 0.1,
        kd_temperature: float = 1.0,
        most: int = MOST,
        limit: float = 400.0,
        storage: Storage = "float16",
        compat: Literal["official"] | None = None,
        draw: Draw = torch.randperm,
        weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, student, teacher, weights=weights or {"pixel": 0.1, "region": 0.1}, **options)
        drawn = {
            "pixel": 4096 // max(classes, 1) + 1 if draw_pixels is None else draw_pixels,
            "region": 1024 // max(classes, 1) + 1 if draw_regions is None else draw_regions,
        }
        if min(classes, pixels, regions, *drawn.values()) < 1 or not temperature > 0 or not kd_temperature > 0:
            raise TaskkdError(
                f"term {name!r}: `classes`, `pixels`, `regions`, what is drawn and the temperatures must be positive, "
                f"got {classes}, {pixels}, {regions}, {drawn}, {temperature} and {kd_temperature}."
            )
        self.classes, self.drawn, self.most, self.limit = classes, drawn, most, limit
        self.sizes = {"pixel": pixels, "region": regions}
        self.temperatures: dict[str, Any] = {"temperature": temperature, "kd_temperature": kd_temperature}
        self.storage, self.compat, self.draw = storage, compat, draw
        self.layers, self.queues = nn.ModuleDict(), nn.ModuleDict()

    @property
    def built(self) -> bool:
        return len(self.queues) == 2

    def build(self, run: Run) -> None:
        """Make the projection and the queues."""
        if self.built:
            return
        s, t = self.maps(run)
        self.layers["project"] = placed(projection(s.shape[1], t.shape[1]), s)
        dtype = _stored(self.storage, t)
        share = self.limit * 1e6 / (self.classes * sum(self.sizes.values()) * t.shape[1] * dtype.itemsize)
        wrap: Literal["ring", "restart"] = "restart" if self.compat == "official" else "ring"
        for kind, size in self.sizes.items():
            fits = min(size, max(int(size * min(share, 1.0)), self.drawn[kind]))
            of = wrap if kind == "pixel" else "ring"
            self.queues[kind] = ClassQueues(self.classes, fits, t.shape[1], dtype=dtype, wrap=of).to(t.device)

    def maps(self, run: Run) -> tuple[Tensor, Tensor]:
        """See `PartsTerm`; no larger than `most`."""
        s, t = super().maps(run)
        share = (self.most / t[0, 0].numel()) ** 0.5
        size = [max(1, int(share * n)) for n in t.shape[2:]] if share < 1 else t.shape[2:]
        return resized(s, size), resized(t, size)

    @torch.no_grad()
    def _remember(self, teacher: Tensor, labels: Tensor) -> None:
        """Push the batch: (N, C, h, w) L2-normalised, (N, h, w)."""
        means, count = class_means(teacher, labels, self.classes)
        image, label = (count > 0).nonzero().unbind(1)
        self.queues["region"].push(label, torch.ones_like(label), l2_normalise(means[image, label]))  # type: ignore[operator]
        flat, own = teacher.flatten(2), labels.flatten(1).cpu()
        chunks, counts = [teacher.new_zeros(0, teacher.shape[1])], []
        for i, k in zip(image.tolist(), label.tolist(), strict=True):
            places = (own[i] == k).nonzero()[:, 0]
            chosen = self.draw(len(places))[: self.PUSHED]
            if self.compat != "official":
                chosen = places[chosen]
            chunks.append(l2_normalise(flat[i, :, chosen.to(flat.device)].T))
            counts.append(len(chosen))
        self.queues["pixel"].push(label, label.new_tensor(counts), torch.cat(chunks))  # type: ignore[operator]

    def parts(self, run: Run) -> Mapping[str, Tensor]:
        """Both losses."""
        s, t = self.maps(run)
        project: nn.Module = self.layers["project"]
        s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (project(as_weights(s, project)), t))
        labels = labels_at(run.batch, t.shape[2:])
        s, t = l2_normalise(s, 1), l2_normalise(t, 1)
        self._remember(t, labels)
        known = (labels >= 0) & (labels < self.classes)
        rows = [x.movedim(1, 3)[known] for x in (s, t)]
        return {kind: queue_similarity(*rows, queue=self._some(kind), **self.temperatures) for kind in self.queues}

    def _some(self, kind: str) -> Tensor:
        queues: ClassQueues = self.queues[kind]  # type: ignore[assignment]
        return queues.take(self.draw(queues.rows.shape[1])[: self.drawn[kind]])


class ChannelMemory(PartsTerm):
    """Channels as vectors over space: their similarities within the batch, to remembered ones, their distance.

    Parts: "batch", "memory", "mse". Maps are averaged over 4 x 4 pixels, the student's projected to the teacher's
    channels, each channel brought to length 1. The queue holds channels at the size of the maps of the first batch;
    maps of another size are averaged or repeated to it (the released code fails there).

    Source: Yang C. et al. 2025 (CIRKDv2). Draws are torch's global generator's.

    Args:
        name, student, teacher: see `PartsTerm`.
        channels: remembered.
        drawn: of them in a step.
        pushed: channels of a batch that are remembered.
        temperature, kd_temperature: of similarities; the latter for the memory alone.
        pool: pixels each way that are averaged.
        storage: of the queue.
        compat: "official": leaves rows unwritten where the queue wraps.
        draw: other permutations.
        ignore: pixels that do not count, see `valid_at`; the authors count all ("none").
        weights, **options: of `PartsTerm`.

    Raises:
        TaskkdError: a number is out of range.
    """

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str,
        *,
        channels: int = 10000,
        drawn: int = 2048,
        pushed: int = 256,
        temperature: float = 0.1,
        kd_temperature: float = 1.0,
        pool: int = 4,
        storage: Storage = "float16",
        compat: Literal["official"] | None = None,
        draw: Draw = torch.randperm,
        ignore: Ignore = "padding",
        weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        default = {"batch": 1.0, "memory": 0.1, "mse": 100.0}
        super().__init__(name, student, teacher, weights=weights or default, **options)
        if min(channels, drawn, pushed, pool) < 1 or not temperature > 0 or not kd_temperature > 0:
            raise TaskkdError(
                f"term {name!r}: `channels`, `drawn`, `pushed`, `pool` and the temperatures must be positive, got "
                f"{channels}, {drawn}, {pushed}, {pool}, {temperature} and {kd_temperature}."
            )
        self.size, self.drawn, self.pushed, self.pool = channels, drawn, pushed, pool
        self.temperature, self.kd_temperature = temperature, kd_temperature
        self.storage, self.compat, self.draw, self.ignore = storage, compat, draw, ignore
        self.layers, self.queues = nn.ModuleDict(), nn.ModuleDict()
        self.grid = (0, 0)

    @property
    def built(self) -> bool:
        return len(self.queues) == 1

    def build(self, run: Run) -> None:
        """Make the projection and the queue."""
        if self.built:
            return
        s, t, _ = self._pooled(run)
        self.layers["project"] = placed(projection(s.shape[1], t.shape[1]), s)
        wrap: Literal["ring", "restart"] = "restart" if self.compat == "official" else "ring"
        dtype, self.grid = _stored(self.storage, t), (t.shape[2], t.shape[3])
        self.queues["channel"] = ClassQueues(1, self.size, t[0, 0].numel(), dtype=dtype, wrap=wrap).to(t.device)

    def _pooled(self, run: Run) -> tuple[Tensor, Tensor, Tensor | None]:
        s, t = self.maps(run)
        valid = valid_at(run.batch, t.shape[2:], self.ignore)
        (small, counts), (other, _) = (average_pool(x, self.pool, valid) for x in (s, t))
        return small, other, counts

    def parts(self, run: Run) -> Mapping[str, Tensor]:
        """The three losses."""
        s, t, counts = self._pooled(run)
        project: nn.Module = self.layers["project"]
        s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (project(as_weights(s, project)), t))
        if counts is not None:
            s, t = (x.masked_fill(~counts[:, None], 0) for x in (s, t))
        apart = l2_normalise(s.flatten(2)), l2_normalise(t.flatten(2))
        found = {
            "batch": cross_image_similarity(*apart, temperature=self.temperature),
            "mse": losses.mse(*apart),
        }
        if tuple(t.shape[2:]) != self.grid:
            s, t = (F.adaptive_avg_pool2d(x, self.grid) for x in (s, t))
        rows = [l2_normalise(x.flatten(2)).flatten(0, 1) for x in (s, t)]
        queue: ClassQueues = self.queues["channel"]  # type: ignore[assignment]
        self._remember(queue, rows[1])
        some = queue.take(self.draw(queue.rows.shape[1])[: self.drawn])
        options: dict[str, Any] = {"temperature": self.temperature, "kd_temperature": self.kd_temperature}
        return {**found, "memory": queue_similarity(rows[0], rows[1], queue=some, **options)}

    @torch.no_grad()
    def _remember(self, queue: ClassQueues, rows: Tensor) -> None:
        chosen = self.draw(len(rows))[: self.pushed].to(rows.device)
        number = torch.zeros(1, dtype=torch.int64, device=rows.device)
        queue.push(number, number + len(chosen), rows[chosen])
