"""What two ranks do, and one process in their place: `torchrun --nproc-per-node 2 ranks_job.py all|nan|signal FOLDER`.

Every check writes what it found to `FOLDER/<check>-<rank>.pt`; `test_distributed.py` reads and compares.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

import taskkd as kd
from taskkd import losses
from taskkd.checkpoints import load_state, load_student, save_state, save_student
from taskkd.errors import NonFiniteError
from taskkd.nlp.methods import METHODS
from taskkd.nlp.metrics import Classification
from tests.engine import (
    CLASSES,
    Faulty,
    Mlp,
    Points,
    Sentences,
    StopAfter,
    arguments,
    bert,
    cross_entropy,
    hidden_term,
    logits_term,
    point_trainer,
    text_trainer,
    weights,
)

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
#: of all ranks together
BATCH = 8
COMMON = {"per_device_train_batch_size": BATCH // WORLD, "optim": "sgd", "learning_rate": 0.1, "ddp_timeout": 60}


class Gradients(TrainerCallback):
    """The adapters' gradients at every step, as this rank has them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.terms.named_parameters() if p.grad is not None})


def train(folder: Path, terms=None, callbacks=(), data=None, **options) -> dict[str, Any]:
    """Three steps of BERT in double precision, with two adapters."""
    if terms is None:
        terms = [logits_term(), hidden_term(), kd.Match("cls", losses.mse, "bert.embeddings[:, 0]", adapter="linear")]
    gradients = Gradients()
    trainer = text_trainer(
        folder,
        student=bert(0).double(),
        teacher=bert(1, width=32).double(),
        train=Sentences(24) if data is None else data,
        terms=terms,
        callbacks=[gradients, *callbacks],
        logging_strategy="steps",
        logging_steps=3,
        **{**COMMON, **options},
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "weights": weights(trainer.distiller),
        "gradients": gradients.steps,
        "logs": logs,
        "step": trainer.state.global_step,
    }


def plain(folder: Path) -> dict[str, Any]:
    return train(folder / "plain")


def accumulated(folder: Path) -> dict[str, Any]:
    return train(folder / "accumulated", gradient_accumulation_steps=3, num_train_epochs=3)


def without_search(folder: Path) -> dict[str, Any]:
    return train(folder / "without", ddp_find_unused_parameters=False)


def idle(folder: Path) -> dict[str, Any]:
    """A term of weight 0 with an adapter, and one that begins at the second step."""
    late = kd.schedules.Schedule(1.0, lambda p: float(p.step >= 1))
    terms = [logits_term(), hidden_term(0.0), hidden_term(late, name="late", tap="bert.encoder.layer.0")]
    return train(folder / "idle", terms=terms, ddp_find_unused_parameters=False)


def gathered(folder: Path) -> dict[str, Any]:
    """A loss that relates the samples of a batch, on those of both ranks."""
    relations = kd.Match("rkd", losses.relational_distance, "bert.embeddings[:, 0]", gather=True, weight=10.0)
    labelled = kd.Match("dkd", losses.decoupled, "out.logits", labels="batch.labels", beta=2.0, gather=True)
    return train(folder / "gathered", terms=[hidden_term(), relations, labelled])


class Even(Sentences):
    """As many tokens in every four samples: means over the tokens of a rank are means over those of both."""

    def __init__(self, lengths: tuple[int, ...] = (3, 8, 5, 6)) -> None:
        super().__init__(24)
        self.lengths = torch.tensor(lengths).repeat(24 // len(lengths))


def staged(folder: Path) -> dict[str, Any]:
    """Both stages of TinyBERT: linear maps, masked means, losses of attention; the second goes on from the first."""
    student, teacher = bert(0).double(), bert(1, width=32).double()
    found = {}
    for number in (0, 1):
        trainer = text_trainer(
            folder / f"staged-{number}",
            student=student,
            teacher=teacher,
            train=Even(),
            method=METHODS["tinybert"](student, teacher, intermediate_epochs=1.0, intermediate_learning_rate=0.1),
            stage=number,
            train_sampling_strategy="sequential",
            logging_strategy="steps",
            logging_steps=1,
            **COMMON,
        )
        trainer.train()
        logs = [{k: v for k, v in log.items() if "loss" in k} for log in trainer.state.log_history if "loss" in log]
        found[str(number)] = {"weights": weights(trainer.distiller), "logs": logs}
        trainer.distiller.close()
    return found


def masked(folder: Path) -> dict[str, Any]:
    """Means over other numbers of tokens on each rank: each its own, or with `gather` those of both; and LRC-BERT."""
    student, teacher = bert(0).double(), bert(1, width=32).double()
    found = {}
    options = {"data": Even((3, 4, 3, 5, 8, 8, 7, 8)), "train_sampling_strategy": "sequential"}
    for gather in (False, True):
        term = kd.Match(
            "hidden", losses.mse, "bert.encoder.layer.1", adapter="linear", mask="batch.attention_mask", gather=gather
        )
        found[f"mean, gather={gather}"] = train(folder / f"mean-{gather}", terms=[term], **options)["weights"]
        term = METHODS["lrc_bert"](student, teacher, gather=gather).stages[0].terms[-1]
        found[f"contrast, gather={gather}"] = train(folder / f"contrast-{gather}", terms=[term], **options)["weights"]
    return found


def sharded(folder: Path) -> dict[str, Any]:
    """FSDP2 by hand: student, adapters and optimiser spread over the ranks; saved whole, and loaded again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.random.fork_rng():
        torch.manual_seed(7)
        distiller = kd.Distiller(bert(0).double(), bert(1, width=32).double(), [logits_term(), hidden_term()])
        batches = [
            torch.utils.data.default_collate([Sentences(24)[j] for j in range(i, i + BATCH)]) for i in (0, 8, 16)
        ]
        distiller.prepare(batches[0])
    if WORLD > 1:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in distiller.student.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(distiller, mesh=mesh)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.01)
    share = slice(RANK * BATCH // WORLD, (RANK + 1) * BATCH // WORLD)
    values = []
    for batch in batches:
        loss = distiller(**{k: v[share] for k, v in batch.items() if k != "unread"})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.step()
        values.append(loss.detach().clone())
    saved, state = folder / f"sharded-{WORLD}", folder / f"sharded-{WORLD}.safetensors"
    save_student(distiller.student, saved)
    save_state(distiller, state)
    if WORLD > 1:
        torch.distributed.barrier()
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter.zero_()
    load_student(distiller.student, saved)
    load_state(distiller, state)
    whole = {n: p.full_tensor() if WORLD > 1 else p for n, p in distiller.named_parameters()}
    return {
        "losses": torch.stack(values),
        "spread": all(hasattr(p, "full_tensor") for p in distiller.parameters()),
        "weights": {n: p.detach().clone() for n, p in whole.items()},
        "saved": weights(type(distiller.student).from_pretrained(saved, dtype=torch.float64)),
    }


def evaluation(folder: Path) -> dict[str, Any]:
    """Eleven samples in batches of two for each rank: the last are not as many on both."""

    def count(prediction) -> dict[str, float]:
        logits, labels = prediction
        return {"count": float(len(labels)), "accuracy": float((logits.argmax(-1) == labels).mean())}

    data = Sentences(11)
    options = {"per_device_eval_batch_size": 2, "eval_dataset": data, "ddp_timeout": 60}
    streaming = Classification(CLASSES)
    streamed = text_trainer(folder / "streamed", metric=streaming, **options).evaluate()
    engine = text_trainer(folder / "engine", compute_metrics=count, **options).evaluate()
    few = text_trainer(
        folder / "few", metric=Classification(CLASSES), **{**options, "eval_dataset": Sentences(1)}
    ).evaluate()
    keep = ("eval_accuracy", "eval_count", "eval_loss")
    pick = lambda found: {k: v for k, v in found.items() if k in keep}  # noqa: E731
    return {
        "streamed": pick(streamed),
        "engine": pick(engine),
        "few": pick(few),
        "counted": int(streaming.matrix.sum()),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Stopped in the middle of an epoch by two ranks, gone on with by two new trainers; with dropout."""

    def build(name: str, *callbacks):
        return text_trainer(
            folder / name,
            student=bert(0, dropout=0.2),
            train=Sentences(24),
            terms=[logits_term("auto"), hidden_term(kd.schedules.warmup(1.0, fraction=0.9))],
            callbacks=list(callbacks),
            num_train_epochs=2,
            **COMMON,
        )

    whole = build("whole")
    whole.train()
    build("again", StopAfter(2)).train()
    again = build("again")
    again.train(resume_from_checkpoint=True)
    files = sorted(p.name for p in (folder / "again" / "checkpoint-2").iterdir())
    return {"whole": weights(whole.distiller), "again": weights(again.distiller), "files": files}


def cached(folder: Path) -> dict[str, Any]:
    """Built by rank 0 while rank 1 waits; then found complete."""
    found = {}
    for turn in ("built", "found"):
        teacher = kd.Cached(bert(1, width=32), folder / f"cache-{WORLD}")
        trainer = text_trainer(folder / turn, teacher=teacher, terms=[logits_term()], **COMMON)
        trainer.train()
        found[turn] = weights(trainer.distiller)
    return found


def by_hand(folder: Path, **options) -> dict[str, Any]:
    """A plain loop of a DDP-wrapped distiller, without the trainer."""
    from torch.nn.parallel import DistributedDataParallel

    distiller = kd.Distiller(
        Mlp(8), Mlp(12, 1), [logits_term(tap="out"), hidden_term(tap="body")], task_loss=cross_entropy
    )
    data = Points(24)
    batches = [
        {"id": torch.arange(i, i + BATCH), "x": data.x[i : i + BATCH], "labels": data.labels[i : i + BATCH]}
        for i in (0, 8, 16)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(7)  # one process and two must draw the same adapter
        distiller.prepare(batches[0])
    model: nn.Module = DistributedDataParallel(distiller, **options) if WORLD > 1 else distiller
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    share = slice(RANK * BATCH // WORLD, (RANK + 1) * BATCH // WORLD)
    for batch in batches:
        model(**{k: v[share] for k, v in batch.items()})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.step()
    return {"weights": weights(distiller)}


def memories(folder: Path) -> dict[str, Any]:
    """Contrastive terms with memories under DDP; the last batch is smaller on rank 1."""
    from torch.nn.parallel import DistributedDataParallel

    def next_ones(ids: torch.Tensor) -> torch.Tensor:  # one process and two must draw the same negatives
        return (ids[:, None] + torch.arange(1, 4, device=ids.device)) % 24

    options = {"samples": 24, "features": 4, "draw": next_ones}
    terms = [kd.ContrastiveRepresentation("crd", "body", **options)]
    distiller = kd.Distiller(Mlp(8), Mlp(12, 1), terms, task_loss=cross_entropy)
    data = Points(24)
    batches = [
        {"id": torch.arange(i, i + n), "x": data.x[i : i + n], "labels": data.labels[i : i + n]}
        for i, n in ((0, 8), (8, 8), (0, 8), (16, 7))
    ]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        distiller.prepare(batches[0])
    model: nn.Module = DistributedDataParallel(distiller) if WORLD > 1 else distiller
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    share = slice(RANK * BATCH // WORLD, (RANK + 1) * BATCH // WORLD)
    states = []
    for batch in batches:
        model(**{k: v[share] for k, v in batch.items()})["loss"].backward()
        states.append({n: v.clone() for n, v in weights(distiller).items() if "banks" in n or "log_z" in n})
        optimizer.step()
        optimizer.zero_grad()
        distiller.step()
    return {"states": states}


def with_accelerate(folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    distiller = kd.Distiller(
        Mlp(8), Mlp(12, 1), [logits_term(tap="out"), hidden_term(tap="body")], task_loss=cross_entropy
    )
    loader = DataLoader(Points(24), batch_size=BATCH // WORLD)
    first = next(iter(DataLoader(Points(24), batch_size=BATCH)))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        distiller.prepare(first)
    distiller.set_total(3)
    model, optimizer, loader = accelerator.prepare(distiller, torch.optim.SGD(distiller.parameters(), lr=0.1), loader)
    for batch in loader:
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        distiller.step()
    return {"weights": weights(distiller)}


def suppliers(student: nn.Module) -> dict[str, dict[str, Any]]:
    """Teachers that learn with a student, follow it, draw lots or read its run, with terms."""

    def kl(name: str, tap: str = "out", source: str = "out", **options: Any) -> kd.Match:
        return kd.Match(name, losses.kl_divergence, tap, source, temperature=2.0, **options)

    with torch.random.fork_rng():
        torch.manual_seed(6)
        gate = kd.LatentGate("body", 8, 2)
        attention = kd.PeerAttention(8, 4)
    taps = [f"peer{i}/{tap}" for tap in ("out", "body") for i in (1, 2)]
    group = kd.Targets(attention, *taps, detach=False)
    late = kd.schedules.Schedule(1.0, lambda p: float(p.step >= 1))
    peers = [kl(f"p{i}", f"peer{i + 1}/out", f"group/out[:, {i}]", weight=late) for i in (0, 1)]
    return {
        "ema": {"teacher": kd.EMA(student, decay=0.9), "terms": [kl("t")]},
        "snapshot": {"teacher": kd.Snapshot(student, cycles=3), "terms": [kl("t"), hidden_term(tap="body")]},
        "drop": {"teacher": kd.Ensemble(*(Mlp(12, i) for i in (1, 2, 3)), drop=1), "terms": [kl("t")]},
        "gate": {"teacher": kd.Ensemble(Mlp(12, 1), Mlp(12, 2), gate=gate), "terms": [kl("t", weight=late)]},
        "self": {"teacher": kd.SelfTeacher(), "terms": [kd.Match("t", losses.mse, "body[:, :4]", "body[:, 4:]")]},
        "cohort": {
            "teacher": kd.Cohort(Mlp(8, 4, dropout=0.1), Mlp(8, 5), group=group),
            "terms": [*peers, kl("leader"), kl("back", "peer1/out", "student/out")],
        },
    }


def supplied(folder: Path) -> dict[str, Any]:
    """Three steps with each of them that draws no lots, without a search for unused parameters."""
    found = {}
    for name in ("ema", "snapshot", "gate", "self", "cohort"):
        student = Mlp(8)
        options = {**COMMON, **suppliers(student)[name]}
        if name == "cohort":
            options["teacher"].networks["peer1"].body[2].p = 0.0
        trainer = point_trainer(folder / name, student=student, ddp_find_unused_parameters=False, **options)
        trainer.train()
        found[name] = weights(trainer.distiller)
    return found


class _Normed(Mlp):
    """With statistics, which differ between ranks until DDP makes them the same."""

    def __init__(self) -> None:
        super().__init__(8)
        self.body.append(nn.BatchNorm1d(8))


def averaged(folder: Path) -> dict[str, Any]:
    """The buffers of an average are those of rank 0 everywhere."""
    student = _Normed()
    terms = [kd.Match("t", losses.mse, "out")]
    trainer = point_trainer(folder / "averaged", student=student, teacher=kd.EMA(student), terms=terms, **COMMON)
    trainer.train()
    return weights(trainer.distiller.teacher.model)


def _judge(*_: torch.Tensor) -> nn.Module:
    """Drawn from the global generator, which two processes need not share."""
    torch.manual_seed(50 + RANK)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def adversarial(folder: Path) -> dict[str, Any]:
    """Under the trainer, in double precision; and the discriminator as both ranks have it after each step."""
    steps: list[dict[str, torch.Tensor]] = []
    adv = kd.Adversarial("adv", "out", discriminator=_judge, game="cross_entropy", learning_rate=1e-2)

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **_) -> None:
            steps.append(weights(adv.discriminator))

    data = Points(24)
    data.x = data.x.double()
    trainer = point_trainer(
        folder / "adversarial", terms=[logits_term(tap="out"), adv], student=Mlp(8).double(),
        teacher=Mlp(12, 1).double(), train=data, callbacks=[Keep()], logging_strategy="steps", logging_steps=3,
        **COMMON,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    steps.append(weights(adv.discriminator))
    return {"weights": weights(trainer.distiller.student), "steps": steps, "logs": logs}


def adversarial_by_hand(folder: Path) -> dict[str, Any]:
    """A DDP-wrapped distiller whose discriminator was given, other on each rank, and prepared by nobody."""
    from torch.nn.parallel import DistributedDataParallel

    adv = kd.Adversarial("adv", "out", discriminator=_judge(), learning_rate=1e-2)
    distiller = kd.Distiller(Mlp(8), Mlp(12), [adv], task_loss=cross_entropy)
    model: nn.Module = DistributedDataParallel(distiller) if WORLD > 1 else distiller
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    data, share = Points(24), slice(RANK * BATCH // WORLD, (RANK + 1) * BATCH // WORLD)
    steps = []
    for start in (0, 8, 16):
        batch = {"x": data.x[start : start + BATCH][share], "labels": data.labels[start : start + BATCH][share]}
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.auxiliary_step()
        distiller.step()
        steps.append(weights(adv.discriminator))
    return {"weights": weights(distiller.student), "steps": steps}


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": plain,
    "accumulated": accumulated,
    "without_search": without_search,
    "idle": idle,
    "gathered": gathered,
    "staged": staged,
    "masked": masked,
    "sharded": sharded,
    "evaluation": evaluation,
    "resumed": resumed,
    "cached": cached,
    "by_hand": by_hand,
    "by_hand_with_search": lambda folder: by_hand(folder, find_unused_parameters=True),
    "memories": memories,
    "with_accelerate": with_accelerate,
    "supplied": supplied,
    "averaged": averaged,
    "adversarial": adversarial,
    "adversarial_by_hand": adversarial_by_hand,
}


def record(folder: Path, name: str, found: dict[str, Any]) -> None:
    torch.save(found, folder / f"{name}-{RANK}.pt")


def everything(folder: Path) -> None:
    arguments(folder, ddp_timeout=60)._setup_devices  # noqa: B018  (joins the process group)
    for name, check in CHECKS.items():
        print(f"rank {RANK}: {name}", flush=True)
        record(folder, name, check(folder))


def nan_on_one_rank(folder: Path) -> None:
    """Rank 1 alone sees the broken sample, in the third step."""
    options = {**COMMON, "train_sampling_strategy": "sequential"}
    trainer = text_trainer(folder / "run", terms=[logits_term(), Faulty(bad=[21])], **options)
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            kept.update(weights(trainer.distiller.student))

    trainer.add_callback(Keep())
    try:
        trainer.train()
    except NonFiniteError as error:
        record(folder, "nan", {"sentence": str(error), "before": kept, "after": weights(trainer.distiller.student)})
        raise


def signal_to_one_rank(folder: Path) -> None:
    """Rank 1 alone gets SIGTERM in the third step."""
    from taskkd.signals import SignalStop

    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **_) -> None:
            if RANK == 1 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = point_trainer(folder / "run", callbacks=[SignalStop(), Send()], num_train_epochs=4, **COMMON)
    try:
        trainer.train()
    except SystemExit as exit_:
        record(folder, "signal", {"code": exit_.code, "step": trainer.state.global_step})


def fsdp(folder: Path) -> None:
    """The trainer under FSDP2, stopped and gone on with. accelerate has it for accelerators only, unless told so."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    spread = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["BertLayer"],
    }
    engine = {"fsdp": True, "fsdp_config": {**spread, "state_dict_type": "FULL_STATE_DICT"}} if WORLD > 1 else {}
    options = {**COMMON, **engine, "optim": "adamw_torch", "learning_rate": 0.01, "num_train_epochs": 2}
    logged = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "epoch"}
    for callbacks in ([StopAfter(4)], []):
        args = arguments(folder / f"run-{WORLD}", **options, **logged)
        args._setup_devices  # noqa: B018
        if WORLD > 1:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = kd.Trainer(
            bert(0).double(),
            teacher=bert(1, width=32).double(),
            terms=[logits_term(), hidden_term()],
            args=args,
            train_dataset=Sentences(24),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=True)
    loaded = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    record(folder, f"fsdp-{WORLD}", {"losses": loaded, "spread": "FSDP" in type(trainer.model_wrapped).__name__})


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"all": everything, "nan": nan_on_one_rank, "signal": signal_to_one_rank, "fsdp": fsdp}[sys.argv[1]](
        Path(sys.argv[2])
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
