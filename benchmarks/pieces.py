"""Two ratios of acceptance: a tapped forward over a plain one, and a step with a cached teacher over one with it live.

    python benchmarks/pieces.py

CPU time, interleaved in one process, medians with quartiles. Taps: ResNet-18, its four stages, batch 4 of 224 x 224
(bar 1.03). Cache: a random BERT-base teacher (12 layers of 768) and a student of 4 layers of 312, batch 8 of 64 tokens,
soft targets (bar: the live step takes at least 1.5 times as long).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import transformers

import taskkd as kd
from taskkd import losses
from taskkd.taps import Taps


def ratios(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Quartiles of the time of `first` over that of `second`, in rounds of changing order."""
    found = []
    for number in range(rounds + 2):
        seconds = {}
        for name, work in sorted({"first": first, "second": second}.items(), reverse=bool(number % 2)):
            start = time.process_time()
            work()
            seconds[name] = time.process_time() - start
        if number >= 2:  # the first are warm-up
            found.append(seconds["first"] / seconds["second"])
    low, middle, high = statistics.quantiles(found, n=4)
    return low, middle, high


def taps(rounds: int = 40) -> tuple[float, float, float]:
    """A forward of ResNet-18 with its four stages tapped and read, over the same forward without."""
    model = torchvision.models.resnet18().train()
    x = torch.randn(4, 3, 224, 224)
    tapped = Taps(model, [f"layer{i}" for i in (1, 2, 3, 4)])

    def recorded() -> None:
        with tapped.record():
            output = model(x)
        tapped.read(output, {})

    return ratios(recorded, lambda: model(x), rounds)


def cache(rounds: int = 10) -> tuple[float, float, float]:
    """A step with the teacher live over one that reads it from a cache."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1200}
    teacher = transformers.BertForSequenceClassification(transformers.BertConfig()).eval()
    tokens = torch.randint(1000, (8, 64), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.zeros(8, dtype=torch.long),
        "id": torch.arange(8),
    }
    folder = tempfile.mkdtemp()
    steps = []
    for source in (kd.Frozen(teacher), kd.Cached(teacher, folder)):
        student = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
        soft = kd.Match("logits", losses.kl_divergence, "out.logits", temperature=2.0)
        distiller = kd.Distiller(student, source, [soft])
        if isinstance(source, kd.Cached):
            source.build([batch], total=8)
        distiller.prepare(batch)
        distiller.train()
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-5)
        steps.append(_step(distiller, optimizer, batch))
    return ratios(*steps, rounds)


def _step(
    distiller: kd.Distiller, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        distiller(**batch)["loss"].backward()
        optimizer.step()
        distiller.step()

    return step


def main() -> int:
    """Measure and print both; 1 if a bar is missed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    missed = 0
    for title, work, good in (
        ("tapped forward over plain (bar: at most 1.03)", taps, lambda r: r <= 1.03),
        ("live teacher over cached (bar: at least 1.5)", cache, lambda r: r >= 1.5),
    ):
        low, middle, high = work()
        print(f"{title}: {middle:.3f} ({low:.3f} .. {high:.3f})")
        missed += not good(middle)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
