"""Two ratios of acceptance: a tapped forward over a plain one, and a step with a cached teacher over one with it live.

    python -m benchmarks.pieces [--only taps|cache] [--rounds N] [--json FILE]

CPU time, interleaved in one process, medians with quartiles. Taps: ResNet-18, its four stages, batch 4 of 224 x 224
(bar 1.03). Cache: a random BERT-base teacher (12 layers of 768) and a student of 4 layers of 312, batch 8 of 64 tokens,
soft targets (bar: the live step takes at least 1.5 times as long).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
import torchvision
import transformers

import taskkd as kd
from benchmarks.figures import Figure, Options, Part, parser, run, take_turns
from taskkd import losses
from taskkd.taps import Taps


def taps(options: Options) -> list[Figure]:
    """A forward of ResNet-18 with its four stages tapped and read, over the same forward without."""
    model = torchvision.models.resnet18().train()
    x = torch.randn(4, 3, 224, 224)
    tapped = Taps(model, [f"layer{i}" for i in (1, 2, 3, 4)])

    def recorded() -> None:
        with tapped.record():
            output = model(x)
        tapped.read(output, {})

    taken = take_turns({"tapped": recorded, "plain": lambda: model(x)}, options.count(40))
    return [Figure.over("tapped forward over plain", taken["tapped"], taken["plain"], at_most=1.03)]


def cache(options: Options) -> list[Figure]:
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
    steps: dict[str, Callable[[], None]] = {}
    for name, source in (("live", kd.Frozen(teacher)), ("cached", kd.Cached(teacher, folder))):
        student = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
        soft = kd.Match("logits", losses.kl_divergence, "out.logits", temperature=2.0)
        distiller = kd.Distiller(student, source, [soft])
        if isinstance(source, kd.Cached):
            source.build([batch], total=8, announce=lambda _: None)
        distiller.prepare(batch)
        distiller.train()
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-5)
        steps[name] = _step(distiller, optimizer, batch)
    taken = take_turns(steps, options.count(10))
    shutil.rmtree(folder)
    return [Figure.over("teacher live over cached", taken["live"], taken["cached"], at_least=1.5)]


def _step(
    distiller: kd.Distiller, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        distiller(**batch)["loss"].backward()
        optimizer.step()
        distiller.step()

    return step


PARTS = {
    "taps": Part("a forward of ResNet-18 with four tapped stages, batch 4 of 224 x 224", taps),
    "cache": Part("a step of a student of 4 layers of 312 beside BERT-base, batch 8 of 64 tokens, soft targets", cache),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print both; 1 if a bar is missed."""
    torch.manual_seed(0)
    return run(PARTS, parser(__doc__, PARTS).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
