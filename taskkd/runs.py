"""Runs: what a recipe asks for, step by step, each finished step on record so that an interrupted run goes on.

Folder of a run: `recipe.yaml` (resolved), `run.json` (finished steps and their results), `teacher/`, `cache/`,
`seed-<n>/alone-<lr>/`, `seed-<n>/distilled/stages/<i>-<name>/`, and at the end `student/`, `report.json`, `curves.png`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from taskkd import recipes
from taskkd.caches import Cached
from taskkd.distiller import Distiller, Preparation
from taskkd.errors import RecipeError
from taskkd.progress import ProgressBar
from taskkd.schema import Training
from taskkd.stages import Method, Stage
from taskkd.teachers import Frozen
from taskkd.trainer import SignalStop, Trainer

__all__ = ["Plan", "Record", "Result", "check", "distill", "run_recipe"]

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
                raise RecipeError(
                    f"{self.path} is not readable; delete the folder or give another --output-dir."
                ) from None

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of a step: from the record, or worked out now and put on record."""
        if name not in self.finished:
            result = work()
            self.finished[name] = json.loads(json.dumps(result))
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"finished": self.finished}, indent=1))
            temporary.replace(self.path)
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
            raise RecipeError(
                f"another run is at work in {folder}; wait for it or give another --output-dir."
            ) from None
        yield


# ---- one training


def training_arguments(
    folder: Path, training: Training, seed: int, metric: str | None
) -> transformers.TrainingArguments:
    """The engine's arguments for a part of a recipe."""
    schedule = "constant_with_warmup" if training.schedule == "constant" else training.schedule
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


def set_dropout(model: nn.Module, rate: float) -> None:
    """Give every dropout of a model this rate. The config that is saved keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def _strip(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without the engine's prefixes and timings."""
    plain = {k.partition("_")[2]: v for k, v in metrics.items() if k.startswith(("eval_", "test_"))}
    return {k: v for k, v in plain.items() if not k.endswith(("runtime", "per_second", "preparation_time"))}


@dataclass
class Session:
    """What the steps of a run share."""

    recipe: Any
    task: Any
    data: Any
    folder: Path
    record: Record
    say: Say

    @property
    def metric(self) -> str:
        """The metric that models are selected by."""
        name: str = self.task.main_metric(self.data)
        return name

    def fit(
        self,
        step: str,
        student: Any,
        stage: Stage,
        training: Training,
        *,
        title: str,
        seed: int,
        teacher: Frozen | Cached | None = None,
        train: Any = None,
    ) -> dict[str, Any]:
        """One training, unless it is on record: the best epoch on validation is kept in `<step>/model`.

        Returns:
            `validation` metrics, `seconds`, `steps`, and the log `history`.
        """

        def work() -> dict[str, Any]:
            folder, metric = self.folder / step, f"eval_{self.metric}"
            if training.dropout is not None:
                set_dropout(student, training.dropout)
            trainer = Trainer(
                student,
                teacher=teacher,
                method=Method(stage.name, [stage]),
                task_loss=self.task.task_loss,
                metric=self.task.metric(self.data),
                args=training_arguments(folder, training, seed, metric),
                train_dataset=self.data.train if train is None else train,
                eval_dataset=self.data.validation,
                processing_class=self.data.tokenizer,
                data_collator=self.data.collator,
                callbacks=[SignalStop(), ProgressBar(f"{title}, seed {seed}", self.metric)],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            start = time.perf_counter()
            trainer.train(resume_from_checkpoint=True)
            seconds = time.perf_counter() - start
            trainer.distiller.close()
            trainer.save_model(str(folder / "model"))
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
            # The engine keeps the first best epoch; its validation metrics are in the log already.
            history = trainer.state.log_history
            best = max((h for h in history if metric in h), key=lambda h: h[metric])
            steps = trainer.state.global_step
            return {"validation": _strip(best), "seconds": seconds, "steps": steps, "history": history}

        result: dict[str, Any] = self.record.step(step, work)
        return result

    def evaluated(self, model: nn.Module, table: Any) -> dict[str, float]:
        """The metrics of a model on a table."""
        trainer = Trainer(
            model,
            metric=self.task.metric(self.data),
            args=training_arguments(self.folder, self.recipe.training, 0, None),
            processing_class=self.data.tokenizer,
            data_collator=self.data.collator,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return _strip(trainer.evaluate(table))

    def tested(self, step: str, model: Callable[[], nn.Module]) -> dict[str, float]:
        """The metrics of a finished model on the test set, worked out once."""
        result: dict[str, float] = self.record.step(step, lambda: self.evaluated(model(), self.data.test))
        return result

    def student(self, teacher: nn.Module, seed: int, source: str | None = None) -> nn.Module:
        """The student at its start, or as it was saved in `source` of this run."""
        student: nn.Module = self.task.student(self.recipe, self.data, teacher, seed)
        return student if source is None else self.task.reload(student, self.folder / source)


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
                f"{folder} holds a run of another recipe ({shown}); give another --output-dir, or --restart to "
                "delete it."
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
        sweep: dotted keys under `method`, `terms` or `training` -> values; every combination is distilled, the best on
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
        session = Session(recipe, task, task.load(recipe), folder, Record(folder), say)
        say(f"data: {session.data.summary()}")
        if "teacher" not in session.record.finished:
            # A wrong tap or shape is told before the teacher is trained, not after.
            raw = task.teacher(recipe, session.data)
            for variant in variants.values():
                look(variant, task, session.data, session.student(raw, recipe.seeds[0]), raw)
        teacher = _teacher(session)
        finished = session.record.finished
        report: dict[str, Any] = {
            "recipe": recipe.name,
            "metric": session.metric,
            "data": session.data.summary(),
            "test_samples": len(session.data.test),
            "teacher": {**finished["teacher"], "test": finished["teacher/test"]},
            "seeds": recipe.seeds,
            "alone": {},
            "distilled": {},
        }
        for seed in recipe.seeds:
            if recipe.baseline is not None:
                report["alone"][str(seed)] = _alone(session, teacher, seed)
            for name, variant in variants.items():
                if variant.method is not None or variant.terms:
                    outcome = _distilled(replace(session, recipe=variant), teacher, seed, name)
                    report["distilled"].setdefault(name, {})[str(seed)] = outcome
        student, source = _select(session, teacher, report)
        batches = task.latency_batches(session.data, 64)
        report["models"] = session.record.step("measure", lambda: reports.measure(teacher, student, batches))
        final = folder / "student"
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(source, final)
        reports.write(report, folder)
        return Result(student, report, folder)


def _variants(recipe: Any, sweep: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The recipe for every combination of swept values; "distilled" without a sweep."""
    if not sweep:
        return {"distilled": recipe}
    found = {}
    for key in sweep:
        if key.partition(".")[0] not in ("method", "terms", "training"):
            raise RecipeError(f"sweep {key!r}: keys under method, terms and training can be swept.")
    for values in itertools.product(*sweep.values()):
        data = recipe.model_dump(by_alias=True)
        for key, value in zip(sweep, values, strict=True):
            recipes.set_key(data, key, value)
        name = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in zip(sweep, values, strict=True))
        found[name] = recipes.validate(data, f"sweep {name}")
    return found


def _teacher(session: Session) -> nn.Module:
    """The teacher, fine-tuned if the recipe says so, evaluated, and refused at chance level."""
    recipe, task, data = session.recipe, session.task, session.data
    finetune = recipe.teacher.finetune
    if finetune is None:
        model = task.teacher(recipe, data)
        result = session.record.step("teacher", lambda: {"validation": session.evaluated(model, data.validation)})
    else:
        training = recipe.training.model_copy(update={"dropout": None, **finetune.model_dump()})
        model = None if "teacher" in session.record.finished else task.teacher(recipe, data)
        stage = Stage("finetune", ())
        result = session.fit("teacher", model, stage, training, title="teacher, fine-tuning", seed=0)
    name, chance = session.metric, task.chance(data)
    value = result["validation"][name]
    session.say(f"teacher: {name} {value:.4f} on validation")
    if value <= chance + 0.01:
        raise RecipeError(
            f"the teacher's {name} on validation is {value:.3f}, no better than chance ({chance:.3f}): it is not "
            "trained for this task. Fine-tune it first (`teacher: {finetune: {}}`), or check the label names and "
            "their order."
        )
    source = str(session.folder / "teacher" / "model") if finetune is not None else None
    teacher: nn.Module = task.teacher(recipe, data, source).eval()
    session.tested("teacher/test", lambda: teacher)
    return teacher


def _alone(session: Session, teacher: nn.Module, seed: int) -> dict[str, Any]:
    """The student alone: every setting of its own search from the same start, the best on validation."""
    baseline, training = session.recipe.baseline, session.recipe.training
    runs = {}
    for rate, dropout in itertools.product(baseline.learning_rates, baseline.dropouts):
        changes = {"learning_rate": rate, "dropout": dropout, "epochs": baseline.epochs}
        setting = f"{rate:g}" if dropout is None else f"{rate:g}-dropout-{dropout:g}"
        runs[setting] = session.fit(
            f"seed-{seed}/alone-{setting}",
            session.student(teacher, seed),
            Stage("alone", ()),
            training.model_copy(update=changes),
            title=f"student alone, learning rate {setting}",
            seed=seed,
        )
    best = max(runs, key=lambda r: runs[r]["validation"][session.metric])
    shown = ", ".join(f"{r}: {run['validation'][session.metric]:.4f}" for r, run in runs.items())
    session.say(f"student alone, seed {seed}: {session.metric} on validation by learning rate {shown}")
    model = f"seed-{seed}/alone-{best}/model"
    test = session.tested(f"seed-{seed}/alone/test", lambda: session.student(teacher, seed, model))
    return {**runs[best], "test": test, "setting": best, "model": model}


def _distilled(session: Session, teacher: nn.Module, seed: int, name: str) -> dict[str, Any]:
    """The distilled student: the stages of the method one after the other, from the start of the student alone."""
    base = f"seed-{seed}/{name}"
    student = session.student(teacher, seed)
    method = build_method(session.recipe, student, teacher)
    outcome: dict[str, Any] = {}
    model = ""
    for number, stage in enumerate(method.stages):
        step = f"{base}/stages/{number}-{stage.name}"
        finished = step in session.record.finished
        outcome = session.fit(
            step,
            student,
            stage,
            session.recipe.training,
            title=f"{name}, {stage.name}",
            seed=seed,
            teacher=None if finished else _supplier(session, teacher, stage),
            train=session.data.everything,
        )
        model = f"{step}/model"
        if finished:
            session.task.reload(student, session.folder / model)
    test = session.tested(f"{base}/test", lambda: student)
    session.say(f"{name}, seed {seed}: {session.metric} {outcome['validation'][session.metric]:.4f} on validation")
    return {**outcome, "test": test, "model": model}


def build_method(recipe: Any, student: nn.Module, teacher: nn.Module) -> Method:
    """The recipe's method for this pair, with the recipe's own terms in every stage of it."""
    own = recipes.build_terms(recipe)
    if recipe.method is None:
        return Method("terms", [Stage("distil", own)] if own else [])
    make = recipes.task_named(recipe.task).methods[recipe.method.name]
    method: Method = make(student, teacher, **recipes.method_options(recipe))
    if own and len(method.stages) > 1:
        raise RecipeError(f"`terms` go with a method of one stage; {recipe.method.name!r} has {len(method.stages)}.")
    return replace(method, stages=[replace(s, terms=[*s.terms, *own]) for s in method.stages])


def _supplier(session: Session, teacher: nn.Module, stage: Stage) -> Frozen | Cached | None:
    """The teacher of a stage: from disk as the recipe says; one cache for each set of taps, shared by a sweep."""
    taps = sorted({t for term in stage.terms for t in term.teacher_taps})
    config = session.recipe.teacher.cache
    if not taps:
        return None
    if config is None:
        return Frozen(teacher)
    path = session.folder / "cache" / hashlib.sha256("\n".join(taps).encode()).hexdigest()[:12]
    budget = None if config.budget_gb is None else int(config.budget_gb * 1e9)
    return Cached(teacher, path, dtype=config.dtype, preprocessing=session.data.preprocessing, budget=budget)


def _select(session: Session, teacher: nn.Module, report: dict[str, Any]) -> tuple[nn.Module, Path]:
    """The student to hand over: of the best variant on validation, the best seed on validation."""
    candidates = report["distilled"] or {"alone": report["alone"]}
    if not any(candidates.values()):
        raise RecipeError("the recipe has neither a method nor a baseline: there is nothing to train.")

    def score(run: Mapping[str, Any]) -> float:
        return float(run["validation"][session.metric])

    best = max(candidates, key=lambda v: sum(map(score, candidates[v].values())) / len(candidates[v]))
    runs = candidates[best]
    seed = max(runs, key=lambda s: score(runs[s]))
    report["selected"], report["selected_seed"] = best, int(seed)
    source = runs[seed]["model"]
    return session.student(teacher, int(seed), source), session.folder / source


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
        metrics = Session(recipe, task, data, Path("runs") / "check", Record(Path()), print).evaluated(teacher, few)
        name = task.main_metric(data)
        plan.summary.append(("teacher's own " + name, f"{metrics[name]:.4f} on {len(few)} validation samples"))
        if metrics[name] <= task.chance(data) + 0.01:
            plan.warnings.append(f"the teacher is no better than chance ({task.chance(data):.3f}); fine-tune it first.")
    else:
        own = recipe.teacher.finetune
        plan.summary.append(
            ("teacher's own metric", f"it is fine-tuned first: {own.epochs:g} epochs on {len(data.train)} samples")
        )
        plan.warnings.append("the sizes below are those of a teacher that is not fine-tuned yet.")
    if recipe.method is None and not recipe.terms:
        return plan
    training = recipe.training
    plan.stages = look(recipe, task, data, student, teacher)
    plan.warnings += [sentence for preparation in plan.stages.values() for sentence in preparation.advice]
    steps = -(-len(data.everything) // (training.batch_size * training.accumulation))
    plan.summary.append(("distillation", f"{training.epochs:g} epochs of {steps} steps, batch {training.batch_size}"))
    return plan


def look(recipe: Any, task: Any, data: Any, student: nn.Module, teacher: nn.Module) -> dict[str, Preparation]:
    """What `prepare` says of every stage on one real batch; both models are left as they were.

    Raises:
        TaskkdError: a tap, shape or option does not work out.
    """
    found = {}
    rows = [data.everything[i] for i in range(min(recipe.training.batch_size, len(data.everything)))]
    batch = dict(data.collator(rows))
    for stage in build_method(recipe, student, teacher).stages:
        distiller = Distiller(
            student, Frozen(teacher), stage.terms, task_weight=stage.task_weight, task_loss=task.task_loss
        )
        try:
            found[stage.name] = distiller.prepare(batch)
        finally:
            distiller.close()
    return found


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
