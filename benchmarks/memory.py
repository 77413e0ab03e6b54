"""Resident memory against the number of samples: data that are streamed, in a table on disk, and a teacher on disk.

    python benchmarks/memory.py                                 # 10k, 100k and 1M samples, each in a fresh process
    python benchmarks/memory.py --samples 10000 100000 --kinds cached

Each process trains one epoch (`kd.Trainer`, batches of 1000, networks of a few hundred weights, six features) and
prints the largest anonymous memory that it had (`RssAnon`: what cannot be dropped and read again) and the largest
resident memory (`VmHWM`), which counts the pages of mapped files as well.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("streamed", "cached", "table")
BATCH = 1000


def status(key: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1000


def sample(index: int) -> dict[str, Any]:
    """One synthetic sample: nothing is held of it."""
    return {"id": index, "x": np.sin(np.arange(1, 7, dtype=np.float32) * (index % 9973)), "labels": index % 3}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    x = torch.from_numpy(np.array([r["x"] for r in rows], np.float32))
    return {"x": x, **{k: torch.tensor([r[k] for r in rows]) for k in ("id", "labels")}}


def table(kind: str, count: int, folder: Path) -> Any:
    """The data of a kind; a table is written by a process of its own, so that what that takes is not counted."""
    import torch

    class Made(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> dict[str, Any]:
            return sample(index)

    class Streamed(torch.utils.data.IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return (sample(i) for i in range(count))

    if kind == "table":
        from datasets import load_from_disk

        write = "import sys; from benchmarks import memory; memory.write(int(sys.argv[1]), sys.argv[2])"
        subprocess.run([sys.executable, "-c", write, str(count), str(folder / "table")], check=True)
        return load_from_disk(str(folder / "table"))
    return Made() if kind == "cached" else Streamed()


def write(count: int, folder: str) -> None:
    """The samples as an HF data set on disk."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    made = Dataset.from_generator(lambda: (sample(i) for i in range(count)), cache_dir=folder + "-made")
    made.save_to_disk(folder)


def measure(kind: str, count: int) -> dict[str, Any]:
    """Train one epoch in this process."""
    import torch
    import transformers
    from torch import nn

    import taskkd as kd
    from taskkd import losses

    torch.set_num_threads(1)
    logging.getLogger("taskkd").setLevel(logging.ERROR)

    class Peak(transformers.TrainerCallback):  # type: ignore[misc]
        most = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % 5 == 0:
                self.most = max(self.most, status("RssAnon"))

    class Network(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(6, width), nn.Tanh()), nn.Linear(width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.body(x))
            return out

    peak = Peak()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        data = table(kind, count, folder)
        teacher = Network(12)
        args = transformers.TrainingArguments(
            output_dir=str(folder / "run"), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            logging_strategy="no", per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            max_steps=count // BATCH, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = kd.Trainer(
            Network(8),
            teacher=kd.Cached(teacher, folder / "cache") if kind == "cached" else kd.Frozen(teacher),
            terms=[
                kd.Match("logits", losses.kl_divergence, "out", temperature=2.0),
                kd.Match("body", losses.mse, "body", adapter="linear"),
            ],
            task_loss=lambda output, batch: nn.functional.cross_entropy(output, batch["labels"]),
            args=args,
            train_dataset=data,
            data_collator=collate,
            callbacks=[peak],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        assert trainer.state.global_step == count // BATCH
    return {"kind": kind, "samples": count, "anonymous": peak.most, "resident": status("VmHWM"), "seconds": seconds}


def main() -> None:
    """Each measurement in a process of its own; the table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    print("| data | samples | anonymous, MB | resident, MB | seconds |\n|---|---|---|---|---|")
    for kind in options.kinds:
        for count in options.samples:
            command = [sys.executable, __file__, "--one", kind, str(count)]
            said = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
            found = json.loads(said.splitlines()[-1])
            sizes = f"{found['anonymous']:.0f} | {found['resident']:.0f} | {found['seconds']:.0f}"
            print(f"| {kind} | {count:,} | {sizes} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
