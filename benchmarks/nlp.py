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

    python -m benchmarks.nlp [--only textbrewer|alone|base|loss|relations|memory] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
import threading
import time
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
from benchmarks.figures import (
    Figure,
    MissingPeerError,
    Options,
    Part,
    Quartiles,
    duration,
    fresh_process,
    parser,
    quartiles,
    ratio,
    reset_peak,
    resident,
    run,
    steady,
    take_turns,
)
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
    "small": Pair("6 layers of 384 -> 3 of 384", sizes(6, 384), sizes(3, 384), 128, 6),
    "base": Pair("BERT-base -> 4 layers of 312", sizes(12, 768), sizes(4, 312), 96, 4),
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
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
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
        self.stopped.release()
        self.go.acquire()

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


def train_side_by_side(makers: dict[str, Callable[[Contender], None]], rounds: int, steps: int) -> Seconds:
    """CPU seconds of every contender, epoch and step; a first epoch, which warms up, is left out."""
    contenders = {name: Contender(name, train) for name, train in makers.items()}
    taken = take_turns({name: c.step for name, c in contenders.items()}, rounds * steps, warm_up=steps)
    return {n: [times[i : i + steps] for i in range(0, rounds * steps, steps)] for n, times in taken.items()}


Seconds = dict[str, list[list[float]]]  # contender -> epoch -> step


def epochs_ratio(seconds: Seconds, over: str, under: str) -> Quartiles:
    """One contender's time over another's: each step's median over the epochs, summed; quartiles over the epochs."""
    typical = {n: sum(statistics.median(steps) for steps in zip(*seconds[n], strict=True)) for n in (over, under)}
    low, _, high = ratio(*([sum(epoch) for epoch in seconds[n]] for n in (over, under)))
    return low, typical[over] / typical[under], high


def compared(title: str, seconds: Seconds, over: str, under: str, at_least: float | None = None) -> Figure:
    """A figure of two contenders, with the median times of a step."""
    each = [duration(statistics.median(t for epoch in seconds[n] for t in epoch)) for n in (over, under)]
    found = epochs_ratio(seconds, over, under)
    return Figure.of(title, found, at_least=at_least, detail=f"{' over '.join(each)} a step")


def against_textbrewer(options: Options) -> list[Figure]:
    """Epoch 1 and later epochs over TextBrewer's, as it comes and with what it can be given."""
    if importlib.util.find_spec("textbrewer") is None:
        raise MissingPeerError("textbrewer is not installed here; `make bench` installs it")
    pair = PAIRS["small"]
    rounds, table = options.count(pair.rounds), texts(pair.texts)
    with tempfile.TemporaryDirectory() as name:
        folder, epochs = Path(name), rounds + 2
        makers = {
            "live": taskkd(pair, table, epochs, folder, cached=False),
            "cached": taskkd(pair, table, epochs, folder, cached=True),
            "textbrewer": textbrewer(pair, table, epochs, folder, helped=False),
            "helped": textbrewer(pair, table, epochs, folder, helped=True),
        }
        seconds = train_side_by_side(makers, rounds, len(table) // BATCH)
    return [
        compared("TextBrewer over live (epoch 1)", seconds, "textbrewer", "live", 2.0),
        compared("TextBrewer over cached (from epoch 2)", seconds, "textbrewer", "cached", 3.0),
        compared("TextBrewer with our padding, batches, optimiser over live", seconds, "helped", "live"),
        compared("TextBrewer with our padding, batches, optimiser over cached", seconds, "helped", "cached"),
    ]


def against_alone(options: Options) -> list[Figure]:
    """A step with a full cache over one of fine-tuning the student alone.

    Trainings that are alike differ by some percent for as long as they live (where their memory happens to lie), so
    there are three of each, and the quartiles are those of all pairs.
    """
    pair = PAIRS["small"]
    rounds, table = options.count(pair.rounds), texts(pair.texts)
    with tempfile.TemporaryDirectory() as name:
        makers: dict[str, Callable[[Contender], None]] = {}
        for copy in "123":
            folder = Path(name) / copy
            makers[f"alone-{copy}"] = alone(pair, table, rounds + 2, folder)
            makers[f"cached-{copy}"] = taskkd(pair, table, rounds + 2, folder, cached=True)
        seconds = train_side_by_side(makers, rounds, len(table) // BATCH)
    others = [(f"alone-{a}", f"alone-{b}") for a in "123" for b in "123" if a != b]
    crossed = [(f"cached-{a}", f"alone-{b}") for a in "123" for b in "123"]
    return [
        Figure.of("two trainings of the student alone, one over the other (noise)", spread(seconds, others)),
        Figure.of("cached over the student alone (`transformers.Trainer`)", spread(seconds, crossed), at_most=1.05),
    ]


def spread(seconds: Seconds, pairs: Sequence[tuple[str, str]]) -> Quartiles:
    """Quartiles of the ratios of pairs of contenders."""
    return quartiles([epochs_ratio(seconds, *names)[1] for names in pairs])


def base(options: Options) -> list[Figure]:
    """What a cache is worth for a real pair."""
    pair = PAIRS["base"]
    rounds, table = options.count(pair.rounds), texts(pair.texts)
    with tempfile.TemporaryDirectory() as name:
        makers = {
            "live": taskkd(pair, table, rounds + 2, Path(name), cached=False),
            "cached": taskkd(pair, table, rounds + 2, Path(name), cached=True),
        }
        seconds = train_side_by_side(makers, rounds, len(table) // BATCH)
    return [compared("live over cached", seconds, "live", "cached", 3.5)]


def loss_share(options: Options) -> list[Figure]:
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
        for number in range(options.count(pair.rounds) + 1):
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
    return [Figure.of("all losses, forward and backward, over the whole step", quartiles(shares), at_most=0.03)]


def only_terms(distiller: kd.Distiller, batch: dict[str, Tensor]) -> float:
    """CPU seconds of the terms, forward and backward, on the tensors of one batch."""
    run = distiller._run(batch)
    own = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in run.student.items()}
    run = replace(run, student=own)
    start = time.process_time()
    torch.stack([term(run) for term in distiller.terms.values()]).sum().backward()
    return time.process_time() - start


def relations(options: Options) -> list[Figure]:
    """MiniLMv2's loss on one kind, forward and backward, example by example over all at once, on batches as above."""
    table = texts(128)
    batches = []
    for start in range(0, len(table), BATCH):
        mask = padded([table[i] for i in range(start, start + BATCH)])["attention_mask"]
        batches.append((*(torch.randn(BATCH, 12, mask.shape[1], 32) for _ in range(2)), mask))
    values: dict[str, Tensor] = {}

    def way(name: str, loss: Callable[..., Tensor]) -> None:
        found = []
        for student, teacher, mask in batches:
            found.append(loss(student.requires_grad_(), teacher, mask.bool()))
            found[-1].backward()
        values[name] = torch.stack(found).detach()

    def vectorised(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return losses.self_attention_relation(student, teacher, heads=12, mask=mask)

    works = {"loop": lambda: way("loop", one_by_one), "vectorised": lambda: way("vectorised", vectorised)}
    taken = take_turns(works, options.count(30))
    if not torch.allclose(values["loop"], values["vectorised"], rtol=1e-5):
        sys.exit("the two ways of computing relations differ")
    return [
        Figure.over("a loop over examples over the vectorised loss", taken["loop"], taken["vectorised"], at_least=1)
    ]


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


def memory(_: Options) -> list[Figure]:
    """Resident memory while training on a large data set, [CLS] states read from a cache over computed live."""
    with tempfile.TemporaryDirectory() as folder:
        cases = ("build", "live", "cached")
        found = {case: fresh_process("benchmarks.nlp", "--case", case, folder)[0] for case in cases}
    detail = f"{found['cached']:.0f} MB over {found['live']:.0f} MB; building the cache {found['build']:.0f} MB"
    value = found["cached"] / found["live"]
    return [Figure("resident memory, cached over live", value, at_most=1.1, detail=detail)]


def memory_case(case: str, folder: str) -> float:
    """Build a cache for all samples, or train the small student on some: the peak of resident memory meanwhile, MB."""
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
    reset_peak()  # that of making the data does not count
    if case == "build":
        trainer.args.per_device_eval_batch_size = 1000
        trainer.complete_cache()
    else:
        trainer.train()
    return resident("VmHWM")


SMALL = PAIRS["small"].title
PARTS = {
    "textbrewer": Part(f"{SMALL}: a step of TextBrewer over ours", against_textbrewer),
    "alone": Part(f"{SMALL}: a step with everything cached over the student alone", against_alone),
    "base": Part(f"{PAIRS['base'].title}: the teacher live over cached", base),
    "loss": Part(f"{SMALL}: the share of the losses in a step with a cached teacher", loss_share),
    "relations": Part("MiniLMv2's relations, 12 heads of 32", relations),
    "memory": Part(f"five [CLS] states of 384 of {SAMPLES:,} samples, the small student", memory),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar is missed."""
    command = parser(__doc__, PARTS)
    command.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # of `memory`, in its own process
    given = command.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if given.case:
        steady()
        print(memory_case(*given.case))
        return 0
    return run(PARTS, given)


if __name__ == "__main__":
    sys.exit(main())
