"""What the steps of a run share: the record of what is finished, the lock, one training, one evaluation."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from taskkd.augmentation import Augmented
from taskkd.caches import Cached
from taskkd.checkpoints import hand_on, save_state
from taskkd.errors import CheckpointError, DataError, RecipeError
from taskkd.files import write_whole, writing
from taskkd.progress import ProgressBar
from taskkd.schema import Training
from taskkd.signals import Budget, SignalStop
from taskkd.stages import Method, Stage
from taskkd.tasks import Task
from taskkd.teachers import Teacher
from taskkd.trainer import Trainer

__all__ = ["ADAPTERS", "Record", "Say", "Session", "locked", "of_items", "strip", "training_arguments"]

Say = Callable[[str], None]
ADAPTERS = "adapters.safetensors"


class Record:
    """`run.json`: the finished steps of a run and what they gave."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.finished: dict[str, Any] = {}
        if self.path.is_file():
            try:
                self.finished = json.loads(self.path.read_text())["finished"]
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(
                    f"{self.path} is not readable; delete the folder or give another --output-dir."
                ) from None

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of a step: from the record, or worked out now and put on record."""
        if name not in self.finished:
            result = work()
            self.finished[name] = json.loads(json.dumps(result))
            write_whole(self.path, json.dumps({"finished": self.finished}, indent=1))
        return self.finished[name]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder.

    Raises:
        RecipeError: another process is at work in it, or it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RecipeError(f"the run's folder {folder} cannot be made: it, or a part of it, is a file.") from None
    except OSError as error:
        raise DataError(f"the run's folder {folder} cannot be made: {error.strerror}.") from None
    try:
        lock = (folder / "run.lock").open("a+")
    except OSError as error:
        raise DataError(f"the run's folder {folder} cannot be written to: {error.strerror}.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RecipeError(
                f"another run is at work in {folder} ({lock.read(200).strip() or 'no name yet'}); wait for it or give "
                "another --output-dir."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def training_arguments(
    folder: Path, training: Training, seed: int, metric: str | None, sampling: str = "random"
) -> transformers.TrainingArguments:
    """The engine's arguments for a part of a recipe; `sampling` is its `train_sampling_strategy`."""
    plain = training.schedule in ("constant", "step")
    schedule = "constant_with_warmup" if plain else training.schedule
    own: dict[str, dict[str, Any]] = {
        "step": {"milestones": training.milestones},
        "polynomial": {"power": training.power, "lr_end": 0.0},
    }
    sgd = training.optimizer == "sgd"
    selected = (
        {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": True} if metric else {}
    )
    return transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.accumulation,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=own.get(training.schedule, {}),
        **({"optim": "sgd", "optim_args": f"momentum={training.momentum}"} if sgd else {}),
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        dataloader_num_workers=training.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="epoch" if metric else "no",
        save_strategy="epoch",
        save_total_limit=2,  # the best and the newest: with 1 the engine would delete the newest at the end
        logging_steps=10,
        train_sampling_strategy=sampling,
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        **selected,
    )


def _most_steps(training: Training, stage: Stage, samples: int, ranks: int) -> int:
    """The engine's `max_steps`, which is no limit but a length: -1 where all epochs have no more steps."""
    batches = math.ceil(samples / (training.batch_size * ranks))
    steps = math.ceil(stage.epochs(training.epochs) * math.ceil(batches / training.accumulation))
    return training.max_steps if training.max_steps is not None and training.max_steps < steps else -1


def of_items(training: Training, table: Any) -> Training:
    """The training in items of a data set: where these are whole batches already, a batch is one item."""
    return training.model_copy(update={"batch_size": 1}) if getattr(table, "whole_batches", False) else training


def set_dropout(model: nn.Module, rate: float) -> None:
    """Give every dropout of a model this rate. The config that is saved keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def strip(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without the engine's prefixes and timings."""
    plain = {k.partition("_")[2]: v for k, v in metrics.items() if k.startswith(("eval_", "test_"))}
    return {k: v for k, v in plain.items() if not k.endswith(("runtime", "per_second", "preparation_time"))}


@dataclass
class Session:
    """What the steps of a run share."""

    recipe: Any
    task: Task
    data: Any
    folder: Path
    record: Record
    say: Say
    budget: Budget = field(default_factory=Budget)

    @property
    def metric(self) -> str:
        """The metric that models are selected by."""
        return self.task.main_metric(self.data)

    def fit(
        self,
        step: str,
        student: Any,
        stage: Stage,
        training: Training,
        *,
        title: str,
        seed: int,
        teacher: Teacher | None = None,
        train: Any = None,
        full_length: bool = False,
        adapters: Path | None = None,
    ) -> dict[str, Any]:
        """One training, unless it is on record: the epoch that the stage keeps is saved in `<step>/model`.

        Args:
            step: its name on record, and its folder in the run's.
            student: at its start.
            stage: what is trained with which terms.
            training: for how long, and how.
            title: for the progress bar.
            seed: of the order of samples, dropout and new weights.
            teacher: for the terms.
            train: the data; None: the labelled training data.
            full_length: pad every batch to the longest text that there may be.
            adapters: what a former stage has left of adapters; those of terms of the same name go on from there.

        Returns:
            `validation` metrics, `seconds`, `steps`, and the log `history`.
        """

        def work() -> dict[str, Any]:
            self.budget.check()
            folder, metric = self.folder / step, f"eval_{self.metric}"
            judged = stage.keep == "best"
            if training.dropout is not None:
                set_dropout(student, training.dropout)
            table = self.data.train if train is None else train
            if isinstance(table, Augmented):
                table = table.with_seed(seed)
            own = of_items(training, table)
            args = training_arguments(folder, own, seed, metric if judged else None, self.task.sampling)
            # A batch of one sample has no statistics for the normalisation of a vector.
            args.dataloader_drop_last = self.task.drop_last and len(table) >= own.batch_size
            args.max_steps = _most_steps(own, stage, len(table), args.world_size)
            # Short epochs, and short trainings, are logged as well: at least once each.
            often = min(10, len(table) // (own.batch_size * own.accumulation), own.max_steps or 10)
            args.logging_steps = max(1, often)
            bar = ProgressBar(f"{title}, seed {seed}", self.metric)
            trainer = Trainer(
                student,
                teacher=teacher,
                method=Method(stage.name, [stage]),
                task_loss=self.task.loss(self.recipe, student, seed),
                metric=self.task.metric(self.data, self.data.validation),
                args=args,
                train_dataset=table,
                eval_dataset=self.data.validation,
                processing_class=self.data.processing,
                data_collator=self.data.full_length_collator if full_length else self.data.collator,
                callbacks=[SignalStop(self.budget), bar],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            if adapters is not None:
                trainer.prepare()
                hand_on(trainer.distiller, adapters)
            start = time.perf_counter()
            try:
                trainer.train(resume_from_checkpoint=True)
            finally:
                bar.stop()
            seconds = time.perf_counter() - start
            trainer.distiller.close()
            with writing(str(folder / "model")):
                trainer.save_model(str(folder / "model"))
                save_state(trainer.distiller, folder / ADAPTERS)
            # The engine keeps the first best epoch; its validation metrics are in the log already.
            history = trainer.state.log_history
            best = max((h for h in history if metric in h), key=lambda h: h[metric]) if judged else {}
            steps = trainer.state.global_step
            return {"validation": strip(best), "seconds": seconds, "steps": steps, "history": history}

        result: dict[str, Any] = self.record.step(step, work)
        # Only now: a process that is killed among them could use none of those that are left.
        for checkpoint in (self.folder / step).glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        return result

    def complete(self, student: nn.Module, stage: Stage, teacher: Cached, train: Any) -> int:
        """Build what is missing of a teacher's cache, as `fit` would before it trains; the number of its samples."""
        self.budget.check()
        trainer = Trainer(
            student,
            teacher=teacher,
            method=Method(stage.name, [stage]),
            task_loss=self.task.loss(self.recipe, student, self.recipe.seeds[0]),
            args=training_arguments(self.folder, self.recipe.training, 0, None, self.task.sampling),
            train_dataset=train,
            processing_class=self.data.processing,
            data_collator=self.data.collator,
            callbacks=[SignalStop(self.budget)],
        )
        trainer.complete_cache()
        count = len(teacher)
        trainer.distiller.close()  # and with it the cache
        return count

    def evaluated(self, model: nn.Module, table: Any, metric: Any = None) -> dict[str, float]:
        """The metrics of a model on a table; `metric`: that counts them, default: a fresh one of the task."""
        trainer = Trainer(
            model,
            metric=self.task.metric(self.data, table) if metric is None else metric,
            args=training_arguments(self.folder, self.recipe.training, 0, None, self.task.sampling),
            processing_class=self.data.processing,
            data_collator=self.data.collator,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return strip(trainer.evaluate(table))

    def tested(self, step: str, model: Callable[[], nn.Module]) -> dict[str, float]:
        """The metrics of a finished model on the test sets, worked out once; `by_class` has those of classes."""

        def work() -> dict[str, float]:
            self.budget.check()
            trained, metric = model(), self.task.metric(self.data, self.data.test)
            found = self.evaluated(trained, self.data.test, metric)
            if hasattr(metric, "by_class"):
                self.record.step(f"{step}/by_class", metric.by_class)
            for name, table in self.data.further_tests.items():
                found |= {f"{name}_{key}": value for key, value in self.evaluated(trained, table).items()}
            return found

        result: dict[str, float] = self.record.step(step, work)
        return result

    def by_class(self, step: str) -> dict[str, dict[str, float]]:
        """Class -> metrics on the test set, of a step that `tested` has worked out; empty where there are none."""
        found: dict[str, dict[str, float]] = self.record.finished.get(f"{step}/by_class", {})
        return found

    def student(self, teacher: nn.Module, seed: int, source: str | None = None) -> nn.Module:
        """The student at its start, or as it was saved in `source` of this run."""
        student = self.task.student(self.recipe, self.data, teacher, seed)
        return student if source is None else self.task.reload(student, self.folder / source)
