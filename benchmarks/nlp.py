"""Speed and memory of distilling BERT students: taskkd, TextBrewer, and fine-tuning the student alone.

Models are random (speed does not depend on the weights), texts are random tokens of log-normal length, mean 26, cut at
64, batches of 16. The losses are those of TinyBERT: hidden states of the embeddings and of every mapped layer,
attention scores, soft targets.

    small  BERT of 6 layers of 384 (12 heads) -> 3 layers of 384
    base   BERT-base (12 layers of 768) -> TinyBERT-4 (4 layers of 312)

The trainings live side by side in one process and take turns, a step each, in random order; the CPU time of an epoch
is divided by that of the contender that the ratio names: each step's median over the epochs, summed; the spread is that
of the epochs' own ratios (quartiles). "live" runs the
teacher, "cached" reads all of its tensors from disk (epoch 2 and later of a training with a cache), "alone" is
`transformers.Trainer` on the student. taskkd and "alone" share data, padding to the longest text of a batch, batches of
like length and fused AdamW. TextBrewer 0.2.1.post1 runs as its examples do: texts padded to 64, AdamW as torch makes it
by default, attention by `eager`, whose probabilities stand in for the scores that it cannot get. A second time it is
given our padding, batches and optimiser, which it takes but does not bring.

    python benchmarks/nlp.py [--only textbrewer|alone|base|loss|relations|memory] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

import taskkd as kd
from taskkd import losses
from taskkd.terms import Match

LENGTH, BATCH, RATE = 64, 16, 1e-4
VOCABULARY = 30522


# ---- models and data


@dataclass(frozen=True)
class Pair:
    """A teacher and a student of other sizes, and how long to look."""

    title: str
    teacher: dict[str, int]
    student: dict[str, int]
    texts: int
    rounds: int

    def models(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher, the same in every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return bert(self.student), bert(self.teacher)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(student, teacher) layers, 0-based, uniformly mapped."""
        own, other = self.student["num_hidden_layers"], self.teacher["num_hidden_layers"]
        return [(i, (i + 1) * other // own - 1) for i in range(own)]


def sizes(layers: int, hidden: int) -> dict[str, int]:
    """The settings of a BERT of 12 heads."""
    wide = {312: 1200}.get(hidden, 4 * hidden)
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 12, "intermediate_size": wide}


def bert(settings: dict[str, int], **options: Any) -> nn.Module:
    """A random sequence classifier."""
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=2, **settings, **options)
    return transformers.BertForSequenceClassification(config)


PAIRS = {
    "small": Pair("6 layers of 384 -> 3 of 384", sizes(6, 384), sizes(3, 384), 128, 8),
    "base": Pair("BERT-base -> 4 layers of 312", sizes(12, 768), sizes(4, 312), 96, 6),
}


def texts(count: int, seed: int = 0) -> datasets.Dataset:
    """Tokens of log-normal length (mean 26, at most 64), with ids and labels, in batches of like length.

    The batches are the middles of equal shares of 200 batches, sorted by length, that the engine's groups of like
    length make, so that a short epoch is like a part of a long one; every contender sees them in the same order.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    rng = random.Random(seed)
    lengths = [min(LENGTH, max(4, round(rng.lognormvariate(3.1, 0.55)))) for _ in range(200 * BATCH)]
    grouped = get_length_grouped_indices(lengths, BATCH, generator=torch.Generator().manual_seed(seed))
    batches = [grouped[i : i + BATCH] for i in range(0, len(grouped), BATCH)]
    batches.sort(key=lambda batch: max(lengths[i] for i in batch))
    wanted = count // BATCH
    picked = [batches[(2 * number + 1) * len(batches) // (2 * wanted)] for number in range(wanted)]
    chosen = [i for batch in rng.sample(picked, wanted) for i in batch]
    rows: dict[str, list[Any]] = {"id": list(range(count)), "input_ids": [], "attention_mask": [], "labels": []}
    for length in (lengths[i] for i in chosen):
        rows["input_ids"].append([101, *(rng.randrange(1000, 30000) for _ in range(length - 2)), 102])
        rows["attention_mask"].append([1] * length)
        rows["labels"].append(rng.randrange(2))
    return datasets.Dataset.from_dict(rows)


def padded(features: Sequence[dict[str, Any]], length: int | None = None) -> dict[str, Tensor]:
    """A batch, padded to its longest text or to `length`."""
    length = length or max(len(f["input_ids"]) for f in features)
    batch = {
        k: torch.tensor([[*f[k], *[0] * (length - len(f[k]))] for f in features])
        for k in ("input_ids", "attention_mask")
    }
    return batch | {k: torch.tensor([f[k] for f in features]) for k in ("labels", "id") if k in features[0]}


def terms(pair: Pair) -> list[Match]:
    """TinyBERT's losses; hidden states through a linear map where the sizes differ."""
    adapter = None if pair.student["hidden_size"] == pair.teacher["hidden_size"] else "linear"
    taps = [("bert.embeddings", "bert.embeddings")]
    taps += [(f"bert.encoder.layer.{i}", f"bert.encoder.layer.{j}") for i, j in pair.layers]
    mask = "batch.attention_mask"
    hidden = [Match(f"hidden-{i}", losses.mse, s, t, adapter=adapter, mask=mask) for i, (s, t) in enumerate(taps)]
    scores = [
        Match(f"scores-{i}", losses.attention_scores, f"attention[{i}].scores", f"attention[{j}].scores", mask=mask)
        for i, j in pair.layers
    ]
    return [*hidden, *scores, Match("logits", losses.soft_cross_entropy, "out.logits")]


# ---- contenders: trainings that stop before every step


class Contender(threading.Thread):
    """A training in a thread that runs only while it is its turn, one step at a time."""

    def __init__(self, name: str, train: Callable[[Contender], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.train, self.error = train, None
        self.seconds: list[float] = []
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.began: float | None = None
        self.start()
        self._wait()

    def run(self) -> None:
        """The whole training."""
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # of this thread
        try:
            self.train(self)
        except BaseException as error:
            self.error = error
        self.stopped.release()

    def pause(self) -> None:
        """Called by the training before each step."""
        if self.began is not None:
            self.seconds.append(time.process_time() - self.began)
        self.stopped.release()
        self.go.acquire()
        self.began = time.process_time()

    def step(self) -> None:
        """Let it train for one step."""
        self.go.release()
        self._wait()

    def _wait(self) -> None:
        self.stopped.acquire()
        if self.error is not None:
            raise self.error


class Paused(transformers.TrainerCallback):
    """Stops a trainer before every step."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.contender.pause()


def arguments(folder: str, epochs: int) -> transformers.TrainingArguments:
    """Of taskkd and of the student alone. The default optimiser is fused AdamW."""
    return transformers.TrainingArguments(
        output_dir=folder, num_train_epochs=epochs, learning_rate=RATE, per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential", logging_steps=10, save_strategy="no", report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip


def taskkd(pair: Pair, table: datasets.Dataset, epochs: int, folder: Path, *, cached: bool) -> Any:
    """`kd.Trainer`; with a cache, built before the first epoch."""

    def train(contender: Contender) -> None:
        student, teacher = pair.models()
        name = "cached" if cached else "live"
        source = kd.Cached(teacher, folder / "cache") if cached else kd.Frozen(teacher)
        trainer = kd.Trainer(
            student, teacher=source, terms=terms(pair), task_weight=0.0, args=arguments(str(folder / name), epochs),
            train_dataset=table, data_collator=padded, callbacks=[Paused(contender)],
        )  # fmt: skip
        quiet(trainer)
        trainer.train()

    return train


def alone(pair: Pair, table: datasets.Dataset, epochs: int, folder: Path) -> Any:
    """The engine's own trainer on the student and its labels."""

    def train(contender: Contender) -> None:
        trainer = transformers.Trainer(
            pair.models()[0], args=arguments(str(folder / "alone"), epochs), train_dataset=table, data_collator=padded,
            callbacks=[Paused(contender)],
        )  # fmt: skip
        quiet(trainer)
        trainer.train()

    return train


def quiet(trainer: transformers.Trainer) -> None:
    """No lines of the engine between ours."""
    trainer.remove_callback(transformers.PrinterCallback)


def textbrewer(pair: Pair, table: datasets.Dataset, epochs: int, folder: Path, *, helped: bool) -> Any:
    """`GeneralDistiller`, without its saving at the end of epochs.

    The attentions it can get from models of today are probabilities, and only with the implementation `eager`.
    """

    def train(contender: Contender) -> None:
        import textbrewer as tb

        class Unsaved(tb.GeneralDistiller):  # type: ignore[misc,name-defined]
            def save_and_callback(self, *_: Any) -> None:
                pass

        student, teacher = pair.models()
        for model in (student, teacher):
            model.set_attn_implementation("eager")  # type: ignore[operator]
        sides = pair.student["hidden_size"], pair.teacher["hidden_size"]
        proj = {} if sides[0] == sides[1] else {"proj": ["linear", *sides]}
        hidden = [(0, 0), *((i + 1, j + 1) for i, j in pair.layers)]
        matches = [
            {"layer_S": s, "layer_T": t, "feature": "hidden", "loss": "hidden_mse", "weight": 1, **proj}
            for s, t in hidden
        ]
        matches += [
            {"layer_S": s, "layer_T": t, "feature": "attention", "loss": "attention_mse", "weight": 1}
            for s, t in pair.layers
        ]
        distiller = Unsaved(
            tb.TrainingConfig(output_dir=str(folder / "textbrewer"), device="cpu"),
            tb.DistillationConfig(temperature=1, kd_loss_weight=1, intermediate_matches=matches),
            teacher, student, adaptor, adaptor,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, fused=True if helped else None)
        loader = Batches(table, contender, dynamic=helped)
        with distiller:
            distiller.train(
                optimizer, loader, num_epochs=epochs, max_grad_norm=1.0,
                output_hidden_states=True, output_attentions=True,
            )  # fmt: skip

    return train


def adaptor(batch: dict[str, Tensor], output: Any) -> dict[str, Any]:
    """What TextBrewer reads of a model's output."""
    return {
        "logits": output.logits,
        "hidden": output.hidden_states,
        "attention": output.attentions,
        "inputs_mask": batch["attention_mask"],
    }


class Batches:
    """A loader for TextBrewer: plain dicts; it pauses before every step."""

    def __init__(self, table: datasets.Dataset, contender: Contender, *, dynamic: bool) -> None:
        rows = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in table]
        collate = padded if dynamic else lambda features: padded(features, LENGTH)
        self.contender, self.loader = contender, DataLoader(rows, BATCH, collate_fn=collate)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            self.contender.pause()
            yield batch


# ---- measuring


def take_turns(makers: dict[str, Callable[[Contender], None]], rounds: int, steps: int) -> Seconds:
    """CPU seconds of an epoch for every contender and round; a first epoch, which warms up, is left out."""
    contenders = [Contender(name, train) for name, train in makers.items()]
    order = random.Random(0)
    for number in range((rounds + 1) * steps):
        for contender in order.sample(contenders, len(contenders)):
            contender.step()
        if sys.stderr.isatty():
            print(f"  step {number + 1} of {(rounds + 1) * steps}", end="\r", file=sys.stderr, flush=True)
    epochs = range(steps, (rounds + 1) * steps, steps)
    return {c.name: [c.seconds[i : i + steps] for i in epochs] for c in contenders}


Quartiles = tuple[float, float, float]
Seconds = dict[str, list[list[float]]]  # contender -> epoch -> step


def ratio(seconds: Seconds, over: str, under: str) -> Quartiles:
    """One contender's time over another's: each step's median over the epochs, summed; quartiles over the epochs."""
    typical = {n: sum(statistics.median(steps) for steps in zip(*seconds[n], strict=True)) for n in (over, under)}
    epochs = [sum(a) / sum(b) for a, b in zip(seconds[over], seconds[under], strict=True)]
    low, _, high = statistics.quantiles(epochs, n=4)
    return typical[over] / typical[under], low, high


@dataclass
class Figure:
    """A measured ratio and its bar."""

    title: str
    value: Quartiles
    bar: float | None = None
    at_least: bool = True

    @property
    def good(self) -> bool:
        """Whether the bar is met."""
        return self.bar is None or (self.value[0] >= self.bar if self.at_least else self.value[0] <= self.bar)

    def __str__(self) -> str:
        middle, low, high = self.value
        bar = "" if self.bar is None else f"{'at least' if self.at_least else 'at most'} {self.bar:g}"
        missed = "" if self.good else "  MISSED"
        return f"{self.title:74}{middle:8.3f}{f'{low:.3f} .. {high:.3f}':>18}  {bar}{missed}"


def against_textbrewer(rounds: int | None) -> list[Figure]:
    """Epoch 1 and later epochs over TextBrewer's, as it comes and with what it can be given."""
    try:
        import textbrewer as _  # noqa: F401
    except ImportError:
        print("  textbrewer is not installed here (`make bench` installs it); left out", file=sys.stderr)
        return []
    pair = PAIRS["small"]
    rounds, table = rounds or pair.rounds, texts(pair.texts)
    with tempfile.TemporaryDirectory() as name:
        folder, epochs = Path(name), rounds + 2
        makers = {
            "live": taskkd(pair, table, epochs, folder, cached=False),
            "cached": taskkd(pair, table, epochs, folder, cached=True),
            "textbrewer": textbrewer(pair, table, epochs, folder, helped=False),
            "helped": textbrewer(pair, table, epochs, folder, helped=True),
        }
        seconds = take_turns(makers, rounds, len(table) // BATCH)
    return [
        Figure("TextBrewer over live (epoch 1)", ratio(seconds, "textbrewer", "live"), 2.0),
        Figure("TextBrewer over cached (from epoch 2)", ratio(seconds, "textbrewer", "cached"), 3.0),
        Figure("TextBrewer with our padding, batches, optimiser over live", ratio(seconds, "helped", "live")),
        Figure("TextBrewer with our padding, batches, optimiser over cached", ratio(seconds, "helped", "cached")),
    ]


def against_alone(rounds: int | None) -> list[Figure]:
    """A step with a full cache over one of fine-tuning the student alone.

    Trainings that are alike differ by some percent for as long as they live (where their memory happens to lie), so
    there are three of each, and the quartiles are those of all pairs.
    """
    pair = PAIRS["small"]
    rounds, table = rounds or pair.rounds, texts(pair.texts)
    with tempfile.TemporaryDirectory() as name:
        makers: dict[str, Callable[[Contender], None]] = {}
        for copy in "123":
            folder = Path(name) / copy
            makers[f"alone-{copy}"] = alone(pair, table, rounds + 2, folder)
            makers[f"cached-{copy}"] = taskkd(pair, table, rounds + 2, folder, cached=True)
        seconds = take_turns(makers, rounds, len(table) // BATCH)
    others = [(f"alone-{a}", f"alone-{b}") for a in "123" for b in "123" if a != b]
    crossed = [(f"cached-{a}", f"alone-{b}") for a in "123" for b in "123"]
    return [
        Figure("two trainings of the student alone, one over the other (noise)", spread(seconds, others)),
        Figure("cached over the student alone", spread(seconds, crossed), 1.05, at_least=False),
    ]


def spread(seconds: Seconds, pairs: Sequence[tuple[str, str]]) -> Quartiles:
    """Median and quartiles of the ratios of pairs of contenders."""
    low, middle, high = statistics.quantiles([ratio(seconds, *names)[0] for names in pairs], n=4)
    return middle, low, high


def base(rounds: int | None) -> list[Figure]:
    """What a cache is worth for a real pair."""
    pair = PAIRS["base"]
    rounds = rounds or pair.rounds
    table = texts(pair.texts)
    with tempfile.TemporaryDirectory() as name:
        makers = {
            "live": taskkd(pair, table, rounds + 2, Path(name), cached=False),
            "cached": taskkd(pair, table, rounds + 2, Path(name), cached=True),
        }
        seconds = take_turns(makers, rounds, len(table) // BATCH)
    return [Figure("live over cached", ratio(seconds, "live", "cached"), 3.5)]


def loss_share(rounds: int | None) -> list[Figure]:
    """All terms, forward and backward to the tensors they read, over the whole step with a cached teacher."""
    pair = PAIRS["small"]
    table = texts(pair.texts)
    student, teacher = pair.models()
    with tempfile.TemporaryDirectory() as name:
        cached = kd.Cached(teacher, name)
        distiller = kd.Distiller(student, cached, terms(pair), task_weight=0.0)
        batches = [padded([table[i] for i in range(k, k + BATCH)]) for k in range(0, len(table), BATCH)]
        cached.build(batches, total=len(table), announce=lambda _: None)
        distiller.prepare(batches[0])
        distiller.train()
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=RATE, fused=True)
        shares = []
        for number in range((rounds or pair.rounds) + 1):
            whole = part = 0.0
            for batch in batches:
                start = time.process_time()
                distiller(**batch)["loss"].backward()
                torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                whole += time.process_time() - start
                part += only_terms(distiller, batch)
            if number:
                shares.append(part / whole)
    low, middle, high = statistics.quantiles(shares, n=4)
    return [Figure("losses over the whole step", (middle, low, high), 0.03, at_least=False)]


def only_terms(distiller: kd.Distiller, batch: dict[str, Tensor]) -> float:
    """CPU seconds of the terms, forward and backward, on the tensors of one batch."""
    run = distiller._run(batch)
    own = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in run.student.items()}
    run = replace(run, student=own)
    start = time.process_time()
    torch.stack([term(run) for term in distiller.terms.values()]).sum().backward()
    return time.process_time() - start


def relations(rounds: int | None) -> list[Figure]:
    """MiniLMv2's loss on one kind, forward and backward, example by example over all at once, on batches as above."""
    table = texts(128)
    batches = []
    for start in range(0, len(table), BATCH):
        mask = padded([table[i] for i in range(start, start + BATCH)])["attention_mask"]
        batches.append((*(torch.randn(BATCH, 12, mask.shape[1], 32) for _ in range(2)), mask))
    ways: dict[str, Callable[..., Tensor]] = {
        "loop": one_by_one,
        "vectorised": lambda s, t, mask: losses.self_attention_relation(s, t, heads=12, mask=mask),
    }
    seconds: Seconds = {name: [] for name in ways}
    for number in range((rounds or 30) + 2):
        values: dict[str, list[Tensor]] = {name: [] for name in ways}
        for name in sorted(ways, reverse=bool(number % 2)):
            start = time.process_time()
            for student, teacher, mask in batches:
                values[name].append(ways[name](student.requires_grad_(), teacher, mask.bool()))
                values[name][-1].backward()
            seconds[name].append([time.process_time() - start])
        if not torch.allclose(*map(torch.stack, values.values()), rtol=1e-5):
            sys.exit("the two ways of computing relations differ")
    warm = {name: values[2:] for name, values in seconds.items()}
    return [Figure("a loop over examples over the vectorised loss", ratio(warm, "loop", "vectorised"), 1.0)]


def one_by_one(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The same loss as a loop over examples, cut to their tokens."""
    values = []
    for s, t, own in zip(student, teacher, mask, strict=True):
        scores = [x[:, own] @ x[:, own].mT / x.shape[-1] ** 0.5 for x in (s, t)]
        log_s, log_t = (x.log_softmax(-1) for x in scores)
        values.append((log_t.exp() * (log_t - log_s)).sum(-1).mean())
    return torch.stack(values).mean()


# ---- memory: each case in a process of its own

SAMPLES = 50_000


class Lookup(nn.Module):
    """Stands in for a teacher of a large data set: five states of 384 for each sample, from a table."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.states = nn.ModuleList(nn.Embedding(1000, 384) for _ in range(5))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """The states of each sample's second token."""
        for table in self.states:
            table(input_ids[:, 1] % 1000)


def memory(_: int | None) -> list[Figure]:
    """Resident memory while training on a large data set, [CLS] states read from a cache over computed live."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in ("build", "live", "cached"):
            command = [sys.executable, __file__, "--case", case, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found[case] = int(done.stdout.split()[-1])
    value = found["cached"] / found["live"]
    return [Figure("resident memory, cached over live", (value, value, value), 1.1, at_least=False)]


def memory_case(case: str, folder: str) -> int:
    """Build a cache for all samples, or train the small student on some: the peak of resident memory meanwhile, kB."""
    rng = random.Random(0)
    words = [[101, *(rng.randrange(1000, 30000) for _ in range(6)), 102] for _ in range(SAMPLES)]
    table = datasets.Dataset.from_dict(
        {"id": range(SAMPLES), "input_ids": words, "attention_mask": [[1] * 8] * SAMPLES, "labels": [0] * SAMPLES}
    )
    student, teacher = PAIRS["small"].models()[0], Lookup()
    own = ["bert.embeddings[:, 0]", *(f"bert.encoder.layer.{i}[:, 0]" for i in range(3)), "bert.pooler"]
    term = Match("patience", losses.patience, own, [f"states.{i}" for i in range(5)])
    settings = replace(arguments(folder, 1), max_steps=60, train_sampling_strategy="random")
    trainer = kd.Trainer(
        student,
        teacher=kd.Frozen(teacher) if case == "live" else kd.Cached(teacher, Path(folder) / "cache"),
        terms=[term],
        task_weight=0.0,
        args=settings,
        train_dataset=table,
        data_collator=padded,
    )
    quiet(trainer)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of making the data does not count
    if case == "build":
        trainer.args.per_device_eval_batch_size = 1000
        trainer.complete_cache()
    else:
        trainer.train()
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


MEASURES: dict[str, tuple[str, Callable[[int | None], list[Figure]]]] = {
    "textbrewer": (PAIRS["small"].title, against_textbrewer),
    "alone": (PAIRS["small"].title, against_alone),
    "base": (PAIRS["base"].title, base),
    "loss": (PAIRS["small"].title + ", cached", loss_share),
    "relations": ("MiniLMv2, 12 relation heads of 32", relations),
    "memory": (f"five [CLS] states of 384 of {SAMPLES:,} samples, the small student", memory),
}


def main() -> int:
    """Measure, print a table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Speed and memory of distilling BERT students.")
    parser.add_argument("--only", choices=sorted(MEASURES), action="append", help="one part (may be repeated)")
    parser.add_argument("--rounds", type=int, help="epochs of each contender")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # of `memory`, in its own process
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.case:
        print(memory_case(*options.case))
        return 0
    found: list[Figure] = []
    for key in options.only or MEASURES:
        title, measure = MEASURES[key]
        print(f"\n{key}: {title}")
        for figure in measure(options.rounds):
            print(f"  {figure}", flush=True)
            found.append(figure)
    if options.json:
        options.json.write_text(json.dumps([vars(f) for f in found], indent=2) + "\n")
    return int(not all(f.good for f in found))


if __name__ == "__main__":
    sys.exit(main())
