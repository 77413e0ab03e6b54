"""Runs: what a recipe asks for, step by step, each finished step on record so that an interrupted run goes on.

Folder of a run: `recipe.yaml` (resolved), `run.json` (finished steps and their results), `teacher/`, `cache/`,
`seed-<n>/alone-<lr>/`, `seed-<n>/distilled/stages/<i>-<name>/`, and at the end `student/`, `report.json`, `curves.png`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from taskkd import recipes
from taskkd.caches import Cached
from taskkd.errors import RecipeError
from taskkd.progress import ProgressBar
from taskkd.schema import Training
from taskkd.stages import Method, Stage
from taskkd.teachers import Frozen
from taskkd.trainer import SignalStop, Trainer

__all__ = ["Plan", "Record", "Result", "check", "distill", "fit", "run_recipe"]

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass
class Result:
    """What a run gives back: the trained student, the report (also in `report.json`), the folder."""

    student: nn.Module
    report: dict[str, Any]
    output_dir: Path


class Record:
    """`run.json`: the finished steps of a run and what they gave."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.finished: dict[str, Any] = {}
        if self.path.is_file():
            try:
                self.finished = json.loads(self.path.read_text())["finished"]
            except (ValueError, KeyError, TypeError):
                raise RecipeError(f"{self.path} is not readable; delete the folder or give another --output-dir.") from None

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of a step: from the record, or worked out now and put on record."""
        if name not in self.finished:
            result = work()
            self.finished[name] = json.loads(json.dumps(result))
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"finished": self.finished}, indent=1))
            os.replace(temporary, self.path)
        return self.finished[name]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder.

    Raises:
        RecipeError: another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"another run is at work in {folder}; wait for it or give another --output-dir.") from None
        yield


# ---- one training


def training_arguments(folder: Path, training: Training, seed: int, metric: str | None) -> transformers.TrainingArguments:
    """The engine's arguments for a part of a recipe."""
    schedule = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    selected = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": True} if metric else {}
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
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        dataloader_num_workers=training.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="epoch" if metric else "no",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        train_sampling_strategy="group_by_length",
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        **selected,
    )


def fit(
    folder: Path,
    student: nn.Module,
    stage: Stage,
    *,
    teacher: Frozen | Cached | None,
    train: Any,
    data: Any,
    task: Any,
    training: Training,
    seed: int,
    title: str,
) -> dict[str, Any]:
    """One training: the best epoch on validation is kept in `student` and in `folder/model`.

    Returns:
        `validation` metrics, `seconds`, `steps`, and the log `history`.
    """
    metric = f"eval_{task.main_metric(data)}"
    if training.dropout is not None:
        set_dropout(student, training.dropout)
    args = training_arguments(folder, training, seed, metric)
    trainer = Trainer(
        student,
        teacher=teacher,
        terms=stage.terms,
        task_weight=stage.task_weight,
        task_loss=task.task_loss,
        metric=task.metric(data),
        args=args,
        train_dataset=train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=data.collator,
        callbacks=[SignalStop(), ProgressBar(title, task.main_metric(data))],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=True)
    seconds = time.perf_counter() - start
    # The engine keeps the first best epoch; its validation metrics are in the log already.
    evaluated = [h for h in trainer.state.log_history if metric in h]
    results = {
        "validation": _strip(max(evaluated, key=lambda h: h[metric])),
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "history": trainer.state.log_history,
    }
    trainer.distiller.close()
    trainer.save_model(str(folder / "model"))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return results


def set_dropout(model: nn.Module, rate: float) -> None:
    """Give every dropout of a model this rate. The config that is saved keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def _strip(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without the engine's prefixes and timings."""
    plain = {k.partition("_")[2]: v for k, v in metrics.items() if k.startswith(("eval_", "test_"))}
    return {k: v for k, v in plain.items() if not k.endswith(("runtime", "per_second", "preparation_time"))}


# ---- a recipe


def _claim(folder: Path, text: str) -> None:
    """Write the resolved recipe into a run's folder, or see that it is the one the run was started with.

    Raises:
        RecipeError: the folder holds a run of another recipe; the message has the first difference.
    """
    path = folder / "recipe.yaml"
    if path.is_file():
        old, new = path.read_text(encoding="utf-8").splitlines(), text.splitlines()
        if old != new:
            pairs = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
            shown = f"{pairs[0][0].strip()!r} there, {pairs[0][1].strip()!r} now" if pairs else "keys were added"
            raise RecipeError(
                f"{folder} holds a run of another recipe ({shown}); give another --output-dir, or --restart to delete it."
            )
    path.write_text(text, encoding="utf-8")


def run_recipe(
    recipe: Any,
    folder: Path,
    *,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    say: Say = print,
    restart: bool = False,
    task: Any = None,
) -> Result:
    """Run a recipe: teacher, student alone, distilled student, for every seed; then the report.

    Finished steps are taken from the record of the folder; an unfinished training goes on from its last checkpoint.

    Args:
        recipe: from `load_recipe`.
        folder: of the run.
        sweep: dotted keys under `method` or `training` -> values; every combination is distilled, the best on
            validation (mean over seeds) is the result.
        say: gets one line for each step.
        restart: delete what the folder holds first.
        task: the task object; default: the one that the recipe names.

    Raises:
        TaskkdError: of the kind that says what is wrong.
        Interrupted: a signal came; the run can be started again.
    """
    from taskkd import reports

    transformers.utils.logging.disable_progress_bar()  # one bar a training is enough
    variants = _variants(recipe, sweep or {})
    task = task or recipes.task_named(recipe.task)
    with locked(folder):
        if restart:
            for path in folder.iterdir():
                if path.name != "run.lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        _claim(folder, recipes.dump_recipe(recipe))
        record = Record(folder)
        data = task.load(recipe)
        say(f"data: {data.summary()}")
        teacher = _teacher(recipe, task, data, folder, record, say)
        report: dict[str, Any] = {
            "recipe": recipe.name,
            "metric": task.main_metric(data),
            "data": data.summary(),
            "test_samples": len(data.test),
            "teacher": {**record.finished["teacher"], "test": record.finished["teacher/test"]},
            "seeds": recipe.seeds,
            "alone": {},
            "distilled": {},
        }
        for seed in recipe.seeds:
            if recipe.baseline is not None:
                report["alone"][str(seed)] = _alone(recipe, task, data, teacher, folder, record, seed, say)
            for name, variant in variants.items():
                if variant.method is None:
                    continue
                outcome = _distilled(variant, task, data, teacher, folder, record, seed, name, say)
                report["distilled"].setdefault(name, {})[str(seed)] = outcome
        student, source = _select(recipe, task, data, teacher, folder, report)
        report["models"] = record.step("measure", lambda: reports.measure(teacher, student, task.latency_batches(data, 64)))
        final = folder / "student"
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(source, final)
        reports.write(report, folder)
        return Result(student, report, folder)


def _variants(recipe: Any, sweep: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The recipe for every combination of swept values; "distilled" without a sweep."""
    if not sweep:
        return {"distilled": recipe}
    import itertools

    found = {}
    for key in sweep:
        if key.partition(".")[0] not in ("method", "training"):
            raise RecipeError(f"sweep {key!r}: keys under method and training can be swept.")
    for values in itertools.product(*sweep.values()):
        data = recipe.model_dump(by_alias=True)
        for key, value in zip(sweep, values, strict=True):
            recipes._set(data, key, value)
        name = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in zip(sweep, values, strict=True))
        found[name] = recipes.validate(data, f"sweep {name}")
    return found


def _teacher(recipe: Any, task: Any, data: Any, folder: Path, record: Record, say: Say) -> nn.Module:
    """The teacher, fine-tuned if the recipe says so, evaluated, and refused at chance level."""
    own = recipe.teacher
    model_folder = folder / "teacher" / "model"

    def work() -> dict[str, Any]:
        model = task.teacher(recipe, data)
        if own.finetune is None:
            return {"validation": _evaluated(model, recipe, task, data, data.validation, folder)}
        training = recipe.training.model_copy(update=own.finetune.model_dump())
        return fit(
            folder / "teacher", model, Stage("finetune", ()), teacher=None, train=data.train, data=data, task=task,
            training=training, seed=0, title="teacher, fine-tuning",
        )  # fmt: skip

    result = record.step("teacher", work)
    name, chance = task.main_metric(data), task.chance(data)
    value = result["validation"][name]
    say(f"teacher: {name} {value:.4f} on validation")
    if value <= chance + 0.01:
        raise RecipeError(
            f"the teacher's {name} on validation is {value:.3f}, no better than chance ({chance:.3f}): it is not trained for "
            "this task. Fine-tune it first (`teacher: {finetune: {}}`), or check the label names and their order."
        )
    source = str(model_folder) if own.finetune is not None else None
    teacher: nn.Module = task.teacher(recipe, data, source).eval()
    record.step("teacher/test", lambda: _evaluated(teacher, recipe, task, data, data.test, folder))
    return teacher


def _evaluated(model: nn.Module, recipe: Any, task: Any, data: Any, table: Any, folder: Path) -> dict[str, float]:
    """The metrics of a model on a table."""
    trainer = Trainer(
        model,
        metric=task.metric(data),
        args=training_arguments(folder, recipe.training, 0, None),
        processing_class=data.tokenizer,
        data_collator=data.collator,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return _strip(trainer.evaluate(table))


def _alone(recipe: Any, task: Any, data: Any, teacher: nn.Module, folder: Path, record: Record, seed: int, say: Say) -> dict[str, Any]:
    """The student alone: each learning rate from the same start, the best on validation."""
    name = task.main_metric(data)
    runs = {}
    grid = [(rate, dropout) for rate in recipe.baseline.learning_rates for dropout in recipe.baseline.dropouts]
    for rate, dropout in grid:
        changes = {"learning_rate": rate, "dropout": dropout, "epochs": recipe.baseline.epochs}
        training = recipe.training.model_copy(update=changes)
        setting = f"{rate:g}" if dropout is None else f"{rate:g}-dropout-{dropout:g}"
        step = f"seed-{seed}/alone-{setting}"
        runs[setting] = record.step(
            step,
            lambda training=training, step=step, setting=setting: fit(
                folder / step, task.student(recipe, data, teacher, seed), Stage("alone", ()), teacher=None, train=data.train,
                data=data, task=task, training=training, seed=seed, title=f"student alone, learning rate {setting}, seed {seed}",
            ),
        )  # fmt: skip
    best = max(runs, key=lambda r: runs[r]["validation"][name])
    shown = ", ".join(f"{r}: {run['validation'][name]:.4f}" for r, run in runs.items())
    say(f"student alone, seed {seed}: {name} on validation by learning rate {shown}")
    model = f"seed-{seed}/alone-{best}/model"
    student = task.student(recipe, data, teacher, seed)
    tested = record.step(
        f"seed-{seed}/alone/test",
        lambda: _evaluated(task.reload(student, folder / model), recipe, task, data, data.test, folder),
    )
    return {**runs[best], "test": tested, "setting": best, "model": model}


def _distilled(
    recipe: Any, task: Any, data: Any, teacher: nn.Module, folder: Path, record: Record, seed: int, name: str, say: Say
) -> dict[str, Any]:
    """The distilled student: the stages of the method one after the other, from the same start as the student alone."""
    base = f"seed-{seed}/{name}"
    student = task.student(recipe, data, teacher, seed)
    method = build_method(recipe, student, teacher)
    outcome: dict[str, Any] = {}
    for number, stage in enumerate(method.stages):
        step = f"{base}/stages/{number}-{stage.name}"
        if step in record.finished and number + 1 < len(method.stages):
            student = task.reload(student, folder / step / "model")
            continue
        outcome = record.step(
            step,
            lambda stage=stage, step=step: fit(
                folder / step, student, stage, teacher=_supplier(recipe, task, data, teacher, folder, stage), train=data.everything,
                data=data, task=task, training=recipe.training.model_copy(update=dict(stage.overrides)), seed=seed,
                title=f"{name}, {stage.name}, seed {seed}",
            ),
        )  # fmt: skip
    model = f"{base}/stages/{len(method.stages) - 1}-{method.stages[-1].name}/model"
    tested = record.step(
        f"{base}/test", lambda: _evaluated(task.reload(student, folder / model), recipe, task, data, data.test, folder)
    )
    metric = task.main_metric(data)
    say(f"{name}, seed {seed}: {metric} {outcome['validation'][metric]:.4f} on validation")
    return {**outcome, "test": tested, "model": model}


def build_method(recipe: Any, student: nn.Module, teacher: nn.Module) -> Method:
    """The recipe's method for this pair."""
    make = recipes.task_named(recipe.task).methods[recipe.method.name]
    method: Method = make(student, teacher, **recipes.method_options(recipe))
    return method


def _supplier(recipe: Any, task: Any, data: Any, teacher: nn.Module, folder: Path, stage: Stage) -> Frozen | Cached | None:
    taps = sorted({t for term in stage.terms for t in term.teacher_taps})
    if not taps:
        return None
    config = recipe.teacher.cache
    if config is None:
        return Frozen(teacher)
    import hashlib

    # One cache for each set of taps: methods of a sweep that read the same taps share it.
    name = hashlib.sha256("\n".join(taps).encode()).hexdigest()[:12]
    budget = None if config.budget_gb is None else int(config.budget_gb * 1e9)
    return Cached(teacher, folder / "cache" / name, dtype=config.dtype, preprocessing=data.preprocessing, budget=budget)


def _select(
    recipe: Any, task: Any, data: Any, teacher: nn.Module, folder: Path, report: dict[str, Any]
) -> tuple[nn.Module, Path]:
    """The student to hand over: of the best variant on validation, the best seed on validation."""
    name = task.main_metric(data)
    candidates = report["distilled"] or {"alone": report["alone"]}
    if not any(candidates.values()):
        raise RecipeError("the recipe has neither a method nor a baseline: there is nothing to train.")

    def score(variant: str) -> float:
        values = [r["validation"][name] for r in candidates[variant].values()]
        return sum(values) / len(values)

    report["selected"] = max(candidates, key=score)
    runs = candidates[report["selected"]]
    seed = max(runs, key=lambda s: runs[s]["validation"][name])
    report["selected_seed"] = int(seed)
    chosen = runs[seed]
    source = folder / chosen["model"]
    student = task.student(recipe, data, teacher, int(seed))
    return task.reload(student, source), source


# ---- looking before training


@dataclass
class Plan:
    """What `check` found out: lines of text, and the sizes of terms on one batch of each stage."""

    summary: list[tuple[str, str]] = field(default_factory=list)
    stages: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def check(recipe: Any, *, evaluate: int = 200) -> Plan:
    """Build everything that a recipe names and look at one real batch, without training.

    Args:
        recipe: from `load_recipe`.
        evaluate: number of validation samples that a teacher which is not to be fine-tuned is tried on.
    """
    transformers.utils.logging.disable_progress_bar()
    task = recipes.task_named(recipe.task)
    data = task.load(recipe)
    teacher = task.teacher(recipe, data)
    student = task.student(recipe, data, teacher, recipe.seeds[0])
    plan = Plan([("data", data.summary())])
    for title, model in (("teacher", teacher), ("student", student)):
        plan.summary.append((title, f"{type(model).__name__}, {parameters(model):,} parameters"))
    if recipe.teacher.finetune is None:
        few = data.validation.select(range(min(evaluate, len(data.validation))))
        metrics = _evaluated(teacher, recipe, task, data, few, Path("runs") / "check")
        name = task.main_metric(data)
        plan.summary.append(("teacher's own " + name, f"{metrics[name]:.4f} on {len(few)} validation samples"))
        if metrics[name] <= task.chance(data) + 0.01:
            plan.warnings.append(f"the teacher is no better than chance ({task.chance(data):.3f}); fine-tune it first.")
    else:
        own = recipe.teacher.finetune
        plan.summary.append(("teacher's own metric", f"it is fine-tuned first: {own.epochs:g} epochs on {len(data.train)} samples"))
        plan.warnings.append("the sizes below are those of a teacher that is not fine-tuned yet.")
    if recipe.method is None:
        return plan
    training = recipe.training
    for stage in build_method(recipe, student, teacher).stages:
        trainer = Trainer(
            student,
            teacher=Frozen(teacher),
            terms=stage.terms,
            task_weight=stage.task_weight,
            task_loss=task.task_loss,
            args=training_arguments(Path("runs") / "check", training, recipe.seeds[0], None),
            train_dataset=data.everything,
            processing_class=data.tokenizer,
            data_collator=data.collator,
        )
        plan.stages[stage.name] = trainer.prepare()
        plan.warnings += plan.stages[stage.name].advice
        trainer.distiller.close()
    steps = -(-len(data.everything) // (training.batch_size * training.accumulation))
    plan.summary.append(("distillation", f"{training.epochs:g} epochs of {steps} steps, batch {training.batch_size}"))
    return plan


def parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


# ---- after training


def _trained(run: Path) -> tuple[Any, Any, nn.Module, Any]:
    """Recipe, task, student and tokenizer (or processor) of a finished run.

    Raises:
        RecipeError: the folder is not that of a finished run.
    """
    if not (run / "recipe.yaml").is_file() or not (run / "student").is_dir():
        raise RecipeError(f"{run} is not the folder of a finished run: expected recipe.yaml and student/ in it.")
    transformers.utils.logging.disable_progress_bar()
    recipe = recipes.load_recipe(run / "recipe.yaml")
    task = recipes.task_named(recipe.task)
    return recipe, task, *task.trained(run / "student")


def evaluate(run: Path, data: str | None = None) -> dict[str, float]:
    """Metrics of a run's student on its test set, or on another file with the same columns."""
    recipe, task, student, tokenizer = _trained(run)
    loaded = None
    if data is None:
        loaded = task.load(recipe)
        table = loaded.test
    else:
        table = task.read(recipe, data, student, tokenizer)
    metric = task.metric_of(student)
    trainer = Trainer(
        student,
        metric=metric,
        args=training_arguments(run, recipe.training, 0, None),
        processing_class=tokenizer,
        data_collator=task.collator(tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return _strip(trainer.evaluate(table, metric_key_prefix="test"))


def predict(run: Path, inputs: Sequence[str]) -> Iterator[tuple[str, float, str]]:
    """(label, probability, input) for each input, with a run's student."""
    recipe, task, student, tokenizer = _trained(run)
    yield from task.predict(recipe, student, tokenizer, inputs)


# ---- one call


def distill(
    student: Any,
    teacher: Any,
    train: Any,
    eval: Any = None,  # noqa: A002
    *,
    task: str,
    output_dir: str | Path = "runs/distill",
    method: str = "soft_targets",
    options: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    baseline: bool = False,
    seeds: Sequence[int] = (0,),
    **data: Any,
) -> Result:
    """Distil `teacher` into `student` on `train`, in one call.

    Args:
        student: a model, or a list of the teacher's layers (0-based). A model is left as it was: the trained one is in
            the result.
        teacher: a model that is trained for the task, or its name or path.
        train: a path (csv, tsv, jsonl, parquet), a list of dicts, or an HF `Dataset`.
        eval: the same, to validate on; None: a tenth of `train` to validate on and a tenth to test on are held out.
        task: "nlp".
        output_dir: of the run; an interrupted run goes on there.
        method: a key of the task's `METHODS`.
        options: the method's own.
        training: as in a recipe, `{"epochs": 3, "learning_rate": 1e-4}`.
        baseline: whether the student alone is trained as well, for comparison.
        seeds: one run each.
        **data: what else the task's data takes; for nlp `processing_class`, `text`, `label`, `test`, `unlabelled`,
            `max_length` (see `taskkd.nlp.given.GivenTask`).

    Raises:
        TaskkdError: of the kind that says what is wrong.
    """
    held = recipes.task_named(task, "distill").given(student, teacher, train, eval, **data)
    recipe = recipes.validate(
        {
            "schema": 1,
            "name": Path(output_dir).name,
            "task": task,
            **held.describe(),
            "method": {"name": method, **(options or {})},
            "training": dict(training or {}),
            "baseline": {} if baseline else None,
            "seeds": list(seeds),
        },
        "distill",
    )
    return run_recipe(recipe, Path(output_dir), say=logger.info, task=held)
