"""The trainer: `transformers.Trainer` on a distiller. The only place that knows the engine (with `checkpoints`)."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.utils.generic import can_return_loss, find_labels

from taskkd.augmentation import Augmented
from taskkd.cache_inputs import CachedCollator, Parts, caches_of, is_complete, token_counts
from taskkd.caches import Cached
from taskkd.checkpoints import (
    STATE,
    STUDENT,
    commit,
    is_sharded,
    load_state,
    load_student,
    newest_checkpoint,
    save_state,
    save_student,
    seal,
    verify,
)
from taskkd.distiller import Distiller, TaskLoss
from taskkd.errors import CacheError, CheckpointError, NonFiniteError, TaskkdError
from taskkd.files import writing
from taskkd.preparation import Preparation
from taskkd.shuffling import shuffle_in_parts
from taskkd.signals import SignalStop
from taskkd.stages import Method, Stage, training_only
from taskkd.teachers import Teacher
from taskkd.terms import Term

__all__ = ["Metric", "Trainer"]

logger = logging.getLogger(__name__)
SKIPS_IN_A_ROW = 10


class Metric(Protocol):
    """A task's metric: it sees batches one by one, so nothing is gathered but its small state.

    It may have an attribute `columns`: the names of what it reads of a batch that no model does.
    """

    def reset(self) -> None:
        """Forget everything."""

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Count one batch."""

    def state(self) -> Any:
        """What another process needs to merge this one's counts."""

    def merge(self, states: Sequence[Any]) -> None:
        """Take the counts of all processes (this one's among them) instead of the own."""

    def compute(self) -> dict[str, float]:
        """The results by name."""


class _Drive(transformers.TrainerCallback):  # type: ignore[misc]
    """What the distiller needs at the turns of the engine's loop."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.distiller.set_total(state.max_steps)
        self.trainer._start_sums()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        set_epoch = getattr(self.trainer.train_dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._hand_rate_on()
        self.trainer._stop_or_skip()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._count(self.trainer.distiller.auxiliary_step())
        self.trainer.distiller.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.distiller.check_finite()  # the last auxiliary step's losses, which nobody has seen


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` that distils: the same arguments, callbacks, metrics, precision, accumulation, DDP.

    Args:
        student: the model to train.
        teacher: a model, `Frozen`, `Cached`, `Ensemble`, ...; a cache that is not complete is built before training.
        method: a paper's method. Without it and `terms` the student is trained alone.
        terms: the terms themselves, instead of a method.
        stage: which stage of a method with several (`kd.distill` runs them all).
        task_weight: factor of the task loss (with `terms`; a method brings its own).
        task_loss: `(output, batch) -> scalar`; default: the student's own loss.
        metric: a streaming `Metric`, used instead of `compute_metrics`: no logits are gathered.
        adapter_learning_rate, adapter_weight_decay: of adapters and learned losses; default: as the student's.
        on_nonfinite: "raise" stops with the name of a non-finite term; "skip" leaves the step out, at most 10 in a row.
        args: as in `transformers.Trainer`, and so are `data_collator`, `train_dataset`, `eval_dataset`,
            `processing_class`, `compute_metrics`, `callbacks`, `optimizers` and `preprocess_logits_for_metrics`.

    Raises:
        TaskkdError: arguments that contradict each other.
        CacheError: a cached teacher, and a method whose losses look at padding (`needs` "full_length").
        TapError: a tap is in neither model.

    A checkpoint holds the student alone in `student/`; `save_model(folder)` writes it there.
    `train(resume_from_checkpoint=True)` uses the newest complete checkpoint, and starts from the beginning if there is
    none.
    """

    # The engine is untyped; these are its attributes that are read here.
    _signature_columns: list[str] | None
    data_collator: Any
    control: Any
    lr_scheduler: Any

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: nn.Module | Teacher | None = None,
        method: Method | None = None,
        terms: Iterable[Term] = (),
        stage: int | None = None,
        task_weight: float = 1.0,
        task_loss: TaskLoss | None = None,
        metric: Metric | None = None,
        adapter_learning_rate: float | None = None,
        adapter_weight_decay: float | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        args: transformers.TrainingArguments | None = None,
        **engine: Any,
    ) -> None:
        args = copy.copy(args) if args is not None else transformers.TrainingArguments(output_dir="runs/trainer")
        current = _stage(method, stage, tuple(terms), task_weight)
        if method is not None and "full_length" in method.needs and isinstance(teacher, Teacher) and caches_of(teacher):
            raise CacheError(
                f"method {method.name!r} compares what the models give for padding, which a cache does not hold: give "
                "the teacher as a model or as `Frozen`."
            )
        if current.share != 1:
            args.num_train_epochs *= current.share
        if current.overrides:
            args = dataclasses.replace(args, **current.overrides)
        if args.label_smoothing_factor:
            raise TaskkdError(
                "`label_smoothing_factor` is not applied to a distiller's losses: give a `task_loss` that smooths."
            )
        _see_all_ranks(args)
        # A NaN that is logged as 0 trains on, and is checkpointed.
        args.logging_nan_inf_filter = False
        if args.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible, one is used; for all: accelerate launch --num_processes %d ...",
                args.n_gpu,
                args.n_gpu,
            )
            args._n_gpu = 1
        self._trains = current.trains
        with training_only(student, self._trains):
            pass  # its parts exist: a wrong name is told now
        self.distiller = Distiller(
            student,
            teacher,
            current.terms,
            task_weight=current.task_weight,
            task_loss=task_loss,
            on_nonfinite=on_nonfinite,
            perturbation=current.perturbation,
        )
        self.distiller.check_in_forward = False
        self.metric = metric
        self.preparation: Preparation | None = None
        self._adapter_options = {"lr": adapter_learning_rate, "weight_decay": adapter_weight_decay}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._kept: tuple[Tensor, dict[str, Tensor], dict[str, int]] | None = None
        self._skipped = self._left_out = self._last_log = 0
        super().__init__(model=self.distiller, args=args, **engine)
        self.add_callback(_Drive(self))
        # The engine looks at `Distiller.forward(**batch)` and finds no names; the student has them.
        if self.args.label_names is None:
            # A plain module names no labels; with a task loss of its own they are `labels`, as everywhere.
            self.label_names = find_labels(type(student)) or (["labels"] if task_loss is not None else [])
        self.can_return_loss = can_return_loss(type(student))

    # ---- data

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            # Also where no model reads labels: a task loss or a term may.
            names = self.distiller.columns() | {"label", "labels", "label_ids", *self.label_names}
            names |= set(getattr(self.metric, "columns", ())) | set(getattr(self.data_collator, "columns", ()))
            self._signature_columns = sorted(names)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches; with a cached teacher, what it gave travels in them."""
        cached = self.distiller.teacher
        if not isinstance(cached, Cached) or not self.distiller._uses_teacher:
            loader: DataLoader[Any] = super().get_train_dataloader()
            shuffle_in_parts(loader)
            return loader
        collator = self.data_collator
        self.data_collator = CachedCollator(collator, cached)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        shuffle_in_parts(loader)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """All samples: `dataloader_drop_last`, which the engine applies here too, is for training."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop
        return loader

    def _collated(self, indices: Sequence[int], dataset: Any = None) -> dict[str, Any]:
        """These samples of the training set, or of another, as one batch."""
        dataset = self.train_dataset if dataset is None else dataset
        if isinstance(dataset, torch.utils.data.IterableDataset):
            iterator = iter(dataset)
            samples = [next(iterator) for _ in indices]
        else:
            samples = [dataset[int(i)] for i in indices]
        return dict(self._get_collator_with_removed_columns(self.data_collator)(samples))

    def complete_cache(self) -> None:
        """Build what is missing of cached teachers, on the main process; the others wait."""
        if self.distiller._uses_teacher:
            for cached in caches_of(self.distiller.teacher):
                self._build(cached)

    def _build(self, cached: Cached) -> None:
        # All that the training can see of a data set whose augmentation has finitely many outcomes (flips).
        dataset: Any = getattr(self.train_dataset, "views", self.train_dataset)
        if isinstance(dataset, Augmented):
            raise CacheError(
                "a cached teacher cannot follow random augmentation: use `Frozen`, or train without `Augmented`."
            )
        if not hasattr(dataset, "__len__"):
            raise CacheError("a cached teacher needs a dataset with a length and sample ids, not a stream.")
        complete = is_complete(cached, dataset)
        if complete and self.args.world_size == 1:
            return
        # All ranks meet here: one that started late may find complete what another has just built.
        with self.accelerator.main_process_first():
            if complete:
                return
            if self.accelerator.is_main_process:
                from taskkd.progress import track

                lengths, batches = self._cache_batches(dataset)
                budgets = [c.budget for c in self.callback_handler.callbacks if isinstance(c, SignalStop) and c.budget]

                with track("teacher cache", len(dataset)) as advance:

                    def progress(done: int) -> None:
                        advance(done)
                        for budget in budgets:
                            budget.check()

                    cached.build(
                        batches,
                        total=len(dataset),
                        lengths=lengths,
                        device=self.args.device,
                        announce=logger.info,
                        progress=progress,
                    )
            else:
                cached._open()

    def _cache_batches(self, dataset: Any) -> tuple[NDArray[np.int32] | None, Iterable[dict[str, Any]]]:
        """The numbers of tokens of all samples, and the samples from the shortest to the longest, in batches."""
        lengths = token_counts(dataset)
        order = np.arange(len(dataset)) if lengths is None else np.argsort(lengths, kind="stable")
        size = self.args.eval_batch_size
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=Parts(order, size),
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # the global one stays as it is: a run that finds its cache draws the same
        )
        return lengths, (dict(batch) for batch in loader)

    def prepare(self) -> Preparation:
        """Prepare the distiller on the first training batch (adapters, taps, sizes of terms); done once."""
        if self.preparation is None:
            size = self.args.per_device_train_batch_size
            count = min(size, len(self.train_dataset)) if hasattr(self.train_dataset, "__len__") else size
            if count == 0:
                raise TaskkdError("the training set is empty.")
            batch = self._prepare_inputs(self._collated(range(count)))
            with training_only(self.distiller.student, self._trains):
                self.preparation = self.distiller.prepare(batch)
            for sentence in self.preparation.advice:
                logger.warning("%s", sentence)
        return self.preparation

    # ---- training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`.

        Raises:
            NonFiniteError: a term became NaN or infinite.
            CheckpointError: the checkpoint to resume from is damaged or of something else.
        """
        if resume_from_checkpoint is True:
            found = newest_checkpoint(Path(self.args.output_dir))
            resume_from_checkpoint = str(found) if found is not None else None
        elif resume_from_checkpoint:
            verify(Path(resume_from_checkpoint))
        if resume_from_checkpoint:
            self._check_batches(Path(resume_from_checkpoint))
        self.complete_cache()
        self.prepare()
        stops = [c for c in self.callback_handler.callbacks if isinstance(c, SignalStop)]
        try:
            with training_only(self.distiller.student, self._trains):
                result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            for stop in stops:
                stop.restore()
        for stop in stops:
            if (error := stop.stopped()) is not None:
                raise error
        return result

    def _run_epoch(self, **where: Any) -> None:
        """As the engine's; but from a checkpoint of the last step, within an epoch, it would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**where)

    def _check_batches(self, checkpoint: Path) -> None:
        """Refuse to go on with other batches than the checkpoint's: what was seen of its epoch would be other samples.

        Raises:
            CheckpointError: the size of a batch or the number of processes is another.
        """
        state = checkpoint / "trainer_state.json"
        if not state.is_file():  # no checkpoint, as is told when it is loaded
            return
        size = json.loads(state.read_text()).get("train_batch_size")
        ranks = len([*checkpoint.glob("rng_state_*.pth")]) or (1 if (checkpoint / "rng_state.pth").is_file() else None)
        now = (self._train_batch_size, self.args.world_size)
        for what, before, own in zip(("batch size", "number of processes"), (size, ranks), now, strict=True):
            if before not in (None, own):
                raise CheckpointError(
                    f"checkpoint {checkpoint} was saved with a {what} of {before}, this training has {own}: go on with "
                    f"{before}, or begin a new training with the student in {STUDENT}/."
                )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The engine's optimiser; adapters in a group of their own where they have their own options."""
        self.prepare()
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        own = {id(p): p for p in self.distiller.own_parameters()}
        if fresh:
            self._split_groups(optimizer, {id(p) for p in self.distiller.terms.parameters() if p.requires_grad})
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for key, p in own.items() if key not in held]
        if missing:  # an optimiser of the user's own, made before there were adapters
            if self.lr_scheduler is not None:
                raise TaskkdError(
                    "the optimiser that was given does not hold the adapters, and its scheduler knows no group for "
                    "them: give the optimiser alone, or none (`optimizers=(optimizer, None)`)."
                )
            options = {k: v for k, v in self._adapter_options.items() if v is not None}
            optimizer.add_param_group({"params": missing, **options})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As the engine's; a classifier that the task loss trains is not clipped, nor does it add to the norm."""
        head = self.distiller.task_loss
        if not isinstance(head, nn.Module):
            return super()._clip_grad_norm(model)
        own = {id(p) for p in head.parameters()}
        kept = [p for p in model.parameters() if id(p) not in own]
        return self.accelerator.clip_grad_norm_(kept, self.args.max_grad_norm)

    def _hand_rate_on(self) -> None:
        """Tell a task loss that trains rows of its own the learning rate of this step."""
        head: Any = self.distiller.task_loss
        if getattr(head, "follows_trainer", False):
            head.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if hasattr(head, "gradient_scale") and (scaler := self.accelerator.scaler) is not None:
            head.gradient_scale = scaler.get_scale()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The engine's schedule; with `milestones` in `lr_scheduler_kwargs`, which it does not know, steps of 0.1.

        Milestones are shares of the training; the learning rate rises linearly over the warm-up before.
        """
        milestones = (self.args.lr_scheduler_kwargs or {}).get("milestones")
        if getattr(self, "lr_scheduler", None) is not None or milestones is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            passed = sum(step >= share * num_training_steps for share in milestones)
            return float(min(1.0, (step + 1) / (warmup + 1)) * 0.1**passed)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _split_groups(self, optimizer: torch.optim.Optimizer, own: set[int]) -> None:
        """Move these parameters to groups of their own that differ from the engine's in what was asked for only."""
        rate, decay = self._adapter_options["lr"], self._adapter_options["weight_decay"]
        if rate is None and decay is None:
            return
        decayed = set(self.get_decay_parameter_names(self.distiller))
        decayed_ids = {id(p) for n, p in self.distiller.named_parameters() if n in decayed}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in own]
            if not moved:
                continue
            group["params"] = [p for p in group["params"] if id(p) not in own]
            fresh = {**group, "params": moved}
            if rate is not None:
                fresh["lr"] = rate
            if decay is not None and all(id(p) in decayed_ids for p in moved):
                fresh["weight_decay"] = decay
            optimizer.add_param_group(fresh)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum in training, the task loss (the student's own by default) in evaluation."""
        if not model.training:
            if self.distiller.task_loss is None:
                return super().compute_loss(model, inputs, return_outputs=return_outputs)
            output = model(**inputs)
            # The engine takes a bare tensor apart as if it were (loss, logits).
            outputs = dict(output) if isinstance(output, Mapping) else {"logits": output}
            loss = self.distiller.task_loss(output, inputs)
            return (loss, outputs) if return_outputs else loss
        losses = model(**inputs)
        self.distiller.watch(losses, inputs)
        self._count(losses)
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def _count(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            if name != "loss":
                total = self._sums.get(name)
                self._sums[name] = value.clone() if total is None else total.add_(value)
                self._counts[name] = self._counts.get(name, 0) + 1

    def _stop_or_skip(self) -> None:
        if self.distiller.check_finite():
            self._skipped = 0
            self._keep_sums()
            return
        self._skipped += 1
        if self._skipped >= SKIPS_IN_A_ROW:
            raise NonFiniteError(f"{self._skipped} steps in a row had a non-finite term; the run stops.")
        logger.warning("step %d is left out: a term is not finite.", self.state.global_step)
        self._left_out += 1
        for parameter in self.distiller.parameters():
            parameter.grad = None
        # What is logged is the mean of the other steps; a NaN in the engine's running sum would stay there for ever.
        if self._kept is None:
            self._tr_loss.zero_()
            self._sums, self._counts = {}, {}
        else:
            loss, sums, counts = self._kept
            self._tr_loss.copy_(loss)
            self._sums, self._counts = {n: s.clone() for n, s in sums.items()}, dict(counts)

    def _start_sums(self) -> None:
        self._sums, self._counts, self._kept = {}, {}, None
        self._skipped = self._left_out = 0
        self._last_log = self.state.global_step

    def _keep_sums(self) -> None:
        if self.distiller.on_nonfinite == "skip":
            sums = {n: s.clone() for n, s in self._sums.items()}
            self._kept = (self._tr_loss.clone(), sums, dict(self._counts))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; every term's mean since the last log is added to the training's entries, read from the device here only.

        The mean of a term is over the batches in which it was computed; steps that were skipped count in no mean.
        """
        if "loss" in logs:
            steps = self.state.global_step - self._last_log
            if self._left_out:
                done = steps - self._left_out
                logs["loss"] = logs["loss"] * steps / done if done else float("nan")
            if self._sums:
                counts = [self._counts[n] for n in self._sums]
                means = torch.stack([s.float() / c for s, c in zip(self._sums.values(), counts, strict=True)])
                if self.args.world_size > 1:
                    means = self.accelerator.reduce(means, "mean")
                logs |= {f"loss_{n}": v for n, v in zip(self._sums, means.tolist(), strict=True)}
            self._sums, self._counts, self._kept = {}, {}, None
            self._left_out, self._last_log = 0, self.state.global_step
        super().log(logs, *args, **kwargs)

    # ---- evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As the engine's, but hidden states and attentions, which terms made the student give, are not gathered."""
        if ignore_keys is None:
            ignore_keys = [*getattr(getattr(self.distiller.student, "config", None), "keys_to_ignore_at_inference", [])]
            ignore_keys += [k for k in ("past_key_values", "hidden_states", "attentions") if k not in ignore_keys]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """With a `metric`: stream over this process's own share of the data, merge small states. Else the engine's.

        `predict` is the engine's always: its caller wants the predictions.
        """
        if self.metric is None or description == "Prediction":
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self.callback_handler.eval_dataloader = dataloader
        was_training = self.distiller.training
        self.distiller.eval()
        self.metric.reset()
        loss, count = 0.0, 0
        for raw in self._own_share(dataloader):
            batch = self._prepare_inputs(raw)
            with torch.no_grad(), self.autocast_smart_context_manager(), self.accelerator.autocast():
                output = self.distiller(**batch)
            self.metric.update(output, batch)
            value = self._eval_loss(output, batch)
            size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
            if isinstance(value, Tensor):
                loss += float(value) * size
            count += size
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.distiller.train(was_training)
        states: list[Any] = [(self.metric.state(), loss, count)]
        if self.args.world_size > 1:
            from accelerate.utils import gather_object

            states = gather_object(states)
        self.metric.merge([s for s, _, _ in states])
        total = sum(c for _, _, c in states)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.metric.compute().items()}
        if total and any(value for _, value, _ in states):
            metrics[f"{metric_key_prefix}_loss"] = sum(value for _, value, _ in states) / total
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=total)

    def _eval_loss(self, output: Any, batch: Mapping[str, Any]) -> Any:
        """The task loss of an output in eval mode, or None where it has none (a detector's list of boxes)."""
        if getattr(self.distiller.task_loss, "training_only", False):  # of classes that only the training data has
            return None
        if self.distiller.task_loss is not None and isinstance(output, Tensor | Mapping):
            return self.distiller.task_loss(output, batch)
        return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)

    def _own_share(self, dataloader: DataLoader[Any]) -> DataLoader[Any]:
        """The batches of this process, without the samples that the engine repeats to make shares equal."""
        if self.args.world_size <= 1:
            return dataloader
        dataset: Any = dataloader.dataset
        own = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        return DataLoader(
            own,
            batch_size=self.args.eval_batch_size,
            collate_fn=dataloader.collate_fn,
            num_workers=self.args.dataloader_num_workers,
        )

    # ---- saving and loading

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save or is_sharded(self.distiller):
            processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            save_student(self.distiller.student, Path(output_dir or self.args.output_dir), processing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the engine's, but written beside, sealed by a manifest, and renamed.

        Raises:
            CheckpointError: it cannot be written; those before are as they were.
        """
        self.store_flos()
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        staging = final.with_name(final.name + ".tmp")
        try:
            with writing(f"checkpoint {final}"):
                self._write_checkpoint(run, staging, final)
        except CheckpointError:
            shutil.rmtree(staging, ignore_errors=True)  # gives the space back
            raise
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final / STUDENT))
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, run: Path, staging: Path, final: Path) -> None:
        if self.args.should_save:
            # What a killed save left behind would count as a checkpoint when the oldest are deleted.
            for left in (*run.glob("checkpoint-*.tmp"), *run.glob("checkpoint-*.old")):
                shutil.rmtree(left, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._save(str(staging / STUDENT))
        head: Any = self.distiller.task_loss
        if hasattr(head, "collect"):  # each rank has a part of it
            head.collect()
        if self.args.should_save or is_sharded(self.distiller):
            save_state(self.distiller, staging / STATE)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step:
                best = run / f"checkpoint-{self.state.best_global_step}"
                if best == final or best.exists():
                    self.state.best_model_checkpoint = str(best)
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(staging / "trainer_state.json"))
            seal(staging)
            commit(staging, final)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STUDENT).is_dir() or not (folder / STATE).is_file():
            raise CheckpointError(f"{folder} is not a checkpoint of taskkd: expected {STUDENT}/ and {STATE} in it.")
        self.prepare()
        load_student(self.distiller.student, folder / STUDENT)
        load_state(self.distiller, folder / STATE)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        verify(best)
        self._load_from_checkpoint(str(best))


def _see_all_ranks(args: transformers.TrainingArguments) -> None:
    """Refuse processes that do not know of each other: each would train alone and save into the same folder.

    Raises:
        TaskkdError: a launcher has started several, and the arguments know of one.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if args.world_size == 1 and started.isdecimal() and int(started) > 1:
        raise TaskkdError(
            f"{started} processes were started (WORLD_SIZE), but the training arguments know of one: without a GPU "
            "give `TrainingArguments(use_cpu=True)`."
        )


def _stage(method: Method | None, stage: int | None, terms: tuple[Term, ...], task_weight: float) -> Stage:
    if method is None:
        return Stage("train", terms, task_weight)
    if terms:
        raise TaskkdError("give `method` or `terms`, not both.")
    if stage is None and len(method.stages) > 1:
        names = ", ".join(s.name for s in method.stages)
        raise TaskkdError(
            f"method {method.name!r} has {len(method.stages)} stages ({names}): use `kd.distill`, or say stage=0."
        )
    return method.stages[stage or 0]
