"""Small models, data and trainers for the tests of the training engine: random weights, no network, no GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import taskkd as kd
from taskkd import losses

VOCAB, LENGTH, CLASSES = 97, 8, 3
JOB = Path(__file__).with_name("engine_job.py")
transformers.logging.set_verbosity_error()


def bert(seed: int = 0, *, width: int = 16, dropout: float = 0.0, **config) -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=2 * width,
                max_position_embeddings=16,
                num_labels=CLASSES,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                **config,
            )
        )


class Mlp(nn.Module):
    """A model that no library knows: `forward(x)` returns a bare tensor."""

    def __init__(self, width: int = 8, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def cross_entropy(output, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(output, batch["labels"])


class Sentences(Dataset):
    """Token ids with padding, a label, an id, and a column that no model reads."""

    def __init__(self, count: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(5, VOCAB, (count, LENGTH), generator=generator)
        self.lengths = torch.randint(3, LENGTH + 1, (count,), generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        mask = (torch.arange(LENGTH) < self.lengths[index]).long()
        sample = {"id": index, "input_ids": self.tokens[index] * mask, "attention_mask": mask}
        return {**sample, "labels": self.labels[index], "unread": index}


class Points(Dataset):
    """Vectors for `Mlp`."""

    def __init__(self, count: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 6, generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict:
        return {"id": index, "x": self.x[index], "labels": self.labels[index]}


def mask_a_token(sample: dict, generator: torch.Generator) -> dict:
    """A random augmentation: one token is replaced by another."""
    tokens = sample["input_ids"].clone()
    where = int(torch.randint(0, 3, (1,), generator=generator))
    tokens[where] = int(torch.randint(5, VOCAB, (1,), generator=generator))
    return {**sample, "input_ids": tokens}


def logits_term(weight=1.0, name: str = "logits", tap: str = "out.logits") -> kd.Match:
    return kd.Match(name, losses.kl_divergence, tap, temperature=2.0, weight=weight)


def hidden_term(weight=1.0, name: str = "hidden", tap: str = "bert.encoder.layer.1") -> kd.Match:
    return kd.Match(name, losses.mse, tap, adapter="linear", weight=weight)


class Faulty(kd.Term):
    """The mean of the logits, which is NaN for some sample ids (and 1000 times too strong a teacher of nothing)."""

    student_taps = ("out",)

    def __init__(self, name: str = "faulty", bad=(), weight: float = 0.5) -> None:
        super().__init__(name, weight)
        self.bad = list(bad)

    def forward(self, run: kd.Run) -> torch.Tensor:
        out = run.student["out"]
        value = (out if isinstance(out, torch.Tensor) else out["logits"]).square().mean()
        broken = torch.isin(run.batch["id"], torch.tensor(self.bad, dtype=torch.int64)).any()
        return value * torch.where(broken, torch.nan, 1.0)


def arguments(folder: Path | str, **options) -> TrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


class Recorder(transformers.TrainerCallback):
    """What a user's callback sees."""

    def __init__(self) -> None:
        self.logs: list[dict] = []
        self.steps: list[int] = []

    def on_step_end(self, args, state, control, **_) -> None:
        self.steps.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        self.logs.append(dict(logs))


class StopAfter(transformers.TrainerCallback):
    """Save and stop after this optimiser step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def text_trainer(folder: Path | str, *, train=None, terms=None, student=None, teacher=None, **options) -> kd.Trainer:
    """A BERT student under a wider BERT teacher; options of `arguments` and of `kd.Trainer` alike."""
    own = ("eval_dataset", "compute_metrics", "metric", "callbacks", "on_nonfinite", "adapter_learning_rate", "stage")
    own += ("adapter_weight_decay", "method", "task_weight", "task_loss", "data_collator", "optimizers")
    extra = {k: options.pop(k) for k in own if k in options}
    if terms is None and "method" not in extra:
        terms = [logits_term(), hidden_term()]
    return kd.Trainer(
        student if student is not None else bert(0),
        teacher=teacher if teacher is not None else bert(1, width=32),
        **({"terms": terms} if terms is not None else {}),
        args=arguments(folder, **options),
        train_dataset=train if train is not None else Sentences(),
        **extra,
    )


def point_trainer(folder: Path | str, *, train=None, terms=None, student=None, teacher=None, **options) -> kd.Trainer:
    """The same with `Mlp`s, which cost next to nothing."""
    terms = [logits_term(tap="out"), hidden_term(tap="body")] if terms is None else terms
    options = {"task_loss": cross_entropy, **options}
    return text_trainer(
        folder,
        train=train if train is not None else Points(),
        terms=terms,
        student=student if student is not None else Mlp(8, 0),
        teacher=teacher if teacher is not None else Mlp(12, 1),
        **options,
    )


def doubled(collator: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator whose batches are in double precision."""

    def double(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: double(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(double(v) for v in value)
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return lambda rows: double(collator(rows))


def step_losses(trainer: kd.Trainer) -> list[dict[str, float]]:
    """The mean over the ranks of every loss, at each step that was logged."""
    return [
        {k: v for k, v in log.items() if k.startswith("loss")} for log in trainer.state.log_history if "loss" in log
    ]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any number in two states of the same keys."""
    assert one.keys() == other.keys()
    apart = [0.0]
    for key, value in one.items():
        both = value.isnan() & other[key].isnan()  # the weight of a term that is not automatic
        difference = (value.double() - other[key].double()).masked_fill(both, 0.0).abs().nan_to_num(1e30)
        apart.append(difference.max().item() if difference.numel() else 0.0)
    return max(apart)


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {k for k in one if distance({k: one[k]}, {k: other[k]}) > 0}


def run_job(
    *words: str, ranks: int = 1, script: str = str(JOB), timeout: float = 150, check: bool = True
) -> subprocess.CompletedProcess:
    """Run a script of this folder in a process of its own, under torchrun where there are several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(JOB.parent.parent), environment.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*launcher, script, *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that no rank outlives a timeout
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"{words} hangs; it said:\n{output[-3000:]}") from None
    done = subprocess.CompletedProcess(words, process.returncode, output)
    assert not check or done.returncode == 0, output[-4000:]
    return done


def rank_results(folder: Path, ranks: int, script: str, *, timeout: float = 240) -> list[dict[str, Any]]:
    """What each rank of a script wrote: it is called with a folder, and writes `<rank>.pt` in it."""
    folder.mkdir(exist_ok=True)
    run_job(str(folder), ranks=ranks, script=script, timeout=timeout)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
