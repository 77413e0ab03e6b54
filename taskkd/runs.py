"""Runs: what a recipe asks for, step by step, each finished step on record so that an interrupted run goes on.

Folder of a run: `recipe.yaml` (resolved), `run.json` (finished steps and their results), `augmented/`,
`teacher/`, `cache/`, `seed-<n>/alone-<lr>/`, `seed-<n>/distilled/stages/<i>-<name>/`, and at the end `student/`,
`report.html`, `report.json`, `curves.png`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from taskkd import recipes
from taskkd._version import __version__
from taskkd.caches import Cached, human
from taskkd.checkpoints import save_student, staged
from taskkd.errors import RecipeError
from taskkd.files import write_whole
from taskkd.plans import build_method, look
from taskkd.session import ADAPTERS, Record, Say, Session, locked, strip, training_arguments
from taskkd.signals import Budget
from taskkd.stages import Method, Stage
from taskkd.teachers import Frozen, Teacher
from taskkd.trainer import Trainer

__all__ = ["Result", "build_caches", "distill", "evaluate", "predict", "recipe_of", "run_recipe", "trained"]

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a run gives back: the trained student, the report (also in `report.json`), the folder."""

    student: nn.Module
    report: dict[str, Any]
    output_dir: Path


# ---- a recipe


def _claim(folder: Path, text: str) -> None:
    """Write the resolved recipe into a run's folder, or see that it is the one the run was started with.

    A run that ended before anything was trained (a wrong name or path) may be started with another recipe.

    Raises:
        RecipeError: the folder holds a run of another recipe; the message has the first difference.
    """
    path = folder / "recipe.yaml"
    if path.is_file():
        old, new = _as_of_now(path).splitlines(), text.splitlines()
        if old != new and not _begun(folder):
            (folder / "run.json").unlink(missing_ok=True)
        elif old != new:
            pairs = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
            shown = f"{pairs[0][0].strip()!r} there, {pairs[0][1].strip()!r} now" if pairs else "keys were added"
            raise RecipeError(
                f"{folder} holds a run of another recipe ({shown}); give another folder (--output-dir), or "
                "delete it (--restart)."
            )
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def _as_of_now(path: Path) -> str:
    """A run's recipe as this version writes it: keys that came since have their defaults."""
    try:
        return recipes.dump_recipe(recipes.load_recipe(path))
    except RecipeError:  # of models and data that a caller held, or of a version that knew other keys
        return path.read_text(encoding="utf-8")


def _begun(folder: Path) -> bool:
    """Whether anything in a run's folder would be lost."""
    own = {"run.lock", "recipe.yaml", "recipe.yaml.tmp", "run.json", "run.json.tmp"}
    return any(path.name not in own for path in folder.iterdir()) or bool(Record(folder).finished.keys() - {"inputs"})


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
        Interrupted: a signal came, or the time of `training.wall_time` is up; the run can be started again.
    """
    from taskkd import pages, reports

    variants = _variants(recipe, sweep or {})
    with _opened(recipe, folder, say, restart=restart, task=task) as session:
        task = session.task
        teacher = _ready_teacher(session, variants)
        finished = session.record.finished
        report: dict[str, Any] = {
            "recipe": recipe.name,
            "metric": session.metric,
            "data": session.data.summary(),
            "task": recipe.task,
            "method": None if recipe.method is None else recipe.method.name,
            "chance": task.chance(session.data),
            "test_samples": getattr(session.data.test, "counted", len(session.data.test)),
            "further_tests": list(session.data.further_tests),
            "teacher": {
                **finished["teacher"],
                "test": finished["teacher/test"],
                "by_class": session.by_class("teacher/test"),
            },
            "seeds": recipe.seeds,
            "alone": {},
            "alone_title": "student alone" if task.has_labels(session.data) else "undistilled",
            "distilled": {},
        }
        for seed in recipe.seeds:
            if recipe.baseline is not None:
                report["alone"][str(seed)] = _alone(session, teacher, seed)
                _look_at_teacher(session, report["alone"][str(seed)]["validation"])
            for name, variant in variants.items():
                if variant.method is not None or variant.terms:
                    outcome = _distilled(replace(session, recipe=variant), teacher, seed, name)
                    report["distilled"].setdefault(name, {})[str(seed)] = outcome
        student, source = _select(session, teacher, report)
        report["models"] = session.record.step("costs", lambda: _costs(session, teacher, student))
        with staged(folder / "student") as final:
            shutil.copytree(source, final, dirs_exist_ok=True)
        _examples(session, teacher, student, report)
        report |= session.record.step("finished", _circumstances)
        reports.write(report, folder)
        pages.write_page([folder], folder / "report.html", pictures=False)
        return Result(student, report, folder)


@contextlib.contextmanager
def _opened(recipe: Any, folder: Path, say: Say, *, restart: bool = False, task: Any = None) -> Iterator[Session]:
    """The session of a run whose folder is this process's own, with its data; its time runs from here."""
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RecipeError(
            f"a recipe is run by one process, and this is one of {ranks}: start it without torchrun, or train on "
            "several with `kd.Trainer` in a script of your own (docs/clusters.md)."
        )
    transformers.utils.logging.disable_progress_bar()  # one bar a training is enough
    task = task or recipes.task_named(recipe.task)
    with Budget(recipe.training.wall_time) as budget, locked(folder):
        if restart:
            for path in folder.iterdir():
                if path.name != "run.lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        _claim(folder, recipes.dump_recipe(recipe))
        session = Session(recipe, task, task.load(recipe, folder), folder, Record(folder), say, budget)
        say(f"data: {session.data.summary()}")
        _same_inputs(session)
        yield session


def _ready_teacher(session: Session, variants: Mapping[str, Any]) -> nn.Module:
    """The teacher; a wrong tap or shape is told before it is trained, not after."""
    if "teacher" not in session.record.finished:
        raw = session.task.teacher(session.recipe, session.data)
        for variant in variants.values():
            look(variant, session.task, session.data, session.student(raw, session.recipe.seeds[0]), raw)
    return _teacher(session)


def build_caches(
    recipe: Any,
    folder: Path,
    *,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    say: Say = print,
    restart: bool = False,
) -> list[Path]:
    """Build the teacher's caches that a run of this recipe reads, before it; a build that was stopped goes on.

    The teacher is fine-tuned first where the recipe says so, as the run would.

    Args:
        recipe, folder, sweep, say, restart: as of `run_recipe`, which then goes on in the folder.

    Returns:
        The folders of the caches, each once.

    Raises:
        CacheError: a cache does not fit the budget or the disk, or cannot be built.
        RecipeError: no stage of the recipe's method can read a cache; the message says why.
    """
    variants = _variants(recipe, sweep or {})
    with _opened(recipe, folder, say, restart=restart) as session:
        teacher = _ready_teacher(session, variants)
        reasons, built = [], {}
        for name, variant in variants.items():
            own = replace(session, recipe=variant)
            student = own.student(teacher, recipe.seeds[0])
            method = _equipped(own, student, teacher)
            for stage in method.stages:
                supplier = _supplier(own, student, teacher, stage, live="full_length" in method.needs)
                if not isinstance(supplier, Cached):
                    reasons.append(f"stage {stage.name!r} {_why_live(variant, supplier)}")
                elif supplier.path not in built:
                    count = own.complete(student, stage, supplier, own.data.everything)
                    built[supplier.path] = size = sum(f.stat().st_size for f in supplier.path.rglob("*") if f.is_file())
                    say(f"cache of {name}, {stage.name}: {count:,} samples, {human(size)} in {supplier.path}")
        if not built:
            raise RecipeError(f"{recipe.name}: there is nothing to cache: {'; '.join(dict.fromkeys(reasons))}.")
        for reason in dict.fromkeys(reasons):
            say(f"note: {reason}")
        return list(built)


def _why_live(recipe: Any, supplier: Teacher | None) -> str:
    if supplier is None:
        return "reads nothing of the teacher"
    if recipe.teacher.cache is None:
        return "has no cache: `teacher.cache` is null, as it is by default where a cache cannot hold what is read"
    return "reads what the teacher gives for padding, which a cache does not hold"


def _costs(session: Session, teacher: nn.Module, student: nn.Module) -> dict[str, dict[str, float | None]]:
    """What both cost on test samples, one by one and eight at once."""
    from taskkd import reports

    single, several = (session.task.latency_batches(session.data, 64, size) for size in (1, 8))
    return reports.measure(teacher, student, single, several)


def _examples(session: Session, teacher: nn.Module, student: nn.Module, report: dict[str, Any]) -> None:
    """What the models find on test samples, side by side: in a picture, or in the report, as the task has it."""
    draw, tell = (getattr(session.task, name, None) for name in ("draw", "examples"))
    if draw is None and tell is None:
        return
    models = {"teacher": teacher}
    alone = report["alone"].get(str(report["selected_seed"]))
    if alone is not None:
        models[report["alone_title"]] = session.student(teacher, report["selected_seed"], alone["model"])
    if report["distilled"] or alone is None:
        models[report["selected"]] = student
    if draw is not None:
        draw(session.data, models, session.folder / "examples.png")
    if tell is not None:
        report["examples"] = session.record.step("examples", lambda: tell(session.data, models))


def _circumstances() -> dict[str, Any]:
    """When a run was finished, and with what."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"taskkd": __version__, "python": platform.python_version(), **versions},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; threads of torch: {torch.get_num_threads()}",
    }


def _same_inputs(session: Session) -> None:
    """Put on record what the run reads, or see that it is what it was started with.

    Raises:
        RecipeError: the data or the teacher's files changed since.
    """
    recipe = session.recipe
    now = {"data": session.data.fingerprint(), "teacher": session.task.fingerprint(recipe)}
    for name, before in session.record.step("inputs", lambda: now).items():
        if before != now[name]:
            raise RecipeError(
                f"{session.folder} was started with another {name}: what the recipe names has changed since; give "
                "another folder (--output-dir), or delete it (--restart)."
            )


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
        name = ",".join(f"{k}={v}" for k, v in zip(sweep, values, strict=True))
        found[name] = recipes.validate(data, f"sweep {name}")
    return found


def _teacher(session: Session) -> nn.Module:
    """The teacher, fine-tuned if the recipe says so, evaluated, and refused at chance level."""
    recipe, task, data = session.recipe, session.task, session.task.teacher_data(session.data)
    session = replace(session, data=data)
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
            f"trained for this task. Fine-tune it first (`teacher: {{finetune: {{}}}}`), or check {task.at_chance}."
        )
    source = str(session.folder / "teacher" / "model") if finetune is not None else None
    teacher: nn.Module = task.teacher(recipe, data, source).eval()
    if (ready := getattr(task, "ready", None)) is not None:
        ready(session, teacher)
    session.tested("teacher/test", lambda: teacher)
    return teacher


def _alone(session: Session, teacher: nn.Module, seed: int) -> dict[str, Any]:
    """The student alone: every setting of its own search from the same start, the best on validation.

    Where there are no labels it has nothing to learn from: it is the student at its start.
    """
    if not session.task.has_labels(session.data):
        return _untrained(session, teacher, seed)
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
    own = session.by_class(f"seed-{seed}/alone/test")
    return {**runs[best], "test": test, "by_class": own, "setting": best, "model": model}


def _look_at_teacher(session: Session, alone: Mapping[str, float]) -> None:
    """Say so where the student alone is better than its teacher: mostly that has not the weights it should have."""
    own, name = session.record.finished["teacher"]["validation"], session.metric
    if own[name] < alone[name]:
        logger.warning(
            "the teacher's %s on validation, %.4f, is below that of the student alone, %.4f: see that its weights were "
            "loaded, and that it was trained for this data.", name, own[name], alone[name],
        )  # fmt: skip


def _untrained(session: Session, teacher: nn.Module, seed: int) -> dict[str, Any]:
    """The student at its start."""
    step = f"seed-{seed}/start"
    student = session.student(teacher, seed)

    def work() -> dict[str, Any]:
        save_student(student, session.folder / step / "model", session.data.processing)
        return {"validation": session.evaluated(student, session.data.validation)}

    result = session.record.step(step, work)
    test = session.tested(f"{step}/test", lambda: student)
    session.say(f"student at its start, seed {seed}: {session.metric} {result['validation'][session.metric]:.4f}")
    own = session.by_class(f"{step}/test")
    return {
        **result, "test": test, "by_class": own, "setting": "undistilled", "model": f"{step}/model", "seconds": 0.0,
        "steps": 0, "history": [],
    }  # fmt: skip


def _distilled(session: Session, teacher: nn.Module, seed: int, name: str) -> dict[str, Any]:
    """The distilled student: the stages of the method one after the other, from the start of the student alone."""
    base = f"seed-{seed}/{name}"
    student = session.student(teacher, seed)
    method = _equipped(session, student, teacher)
    outcome: dict[str, Any] = {}
    seconds, steps, model = 0.0, 0, ""
    full_length = "full_length" in method.needs
    before: Path | None = None
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
            teacher=None if finished else _supplier(session, student, teacher, stage, live=full_length),
            train=session.data.everything,
            full_length=full_length,
            adapters=before,
        )
        model, before = f"{step}/model", session.folder / step / ADAPTERS
        seconds, steps = seconds + outcome["seconds"], steps + outcome["steps"]
        if finished:
            session.task.reload(student, session.folder / model)
    outcome = outcome | {"seconds": seconds, "steps": steps}
    if not outcome["validation"]:
        own = session.record.step(f"{base}/validation", lambda: session.evaluated(student, session.data.validation))
        outcome["validation"] = own
    test = session.tested(f"{base}/test", lambda: student)
    session.say(f"{name}, seed {seed}: {session.metric} {outcome['validation'][session.metric]:.4f} on validation")
    return {**outcome, "test": test, "by_class": session.by_class(f"{base}/test"), "model": model}


def _equipped(session: Session, student: nn.Module, teacher: nn.Module) -> Method:
    """The method, after the teacher was given what the method needs of it."""
    method = build_method(session.recipe, session.task, session.data, student, teacher)
    equip = getattr(session.task, "equip", None)
    if equip is not None and equip(session, method, teacher):
        method = build_method(session.recipe, session.task, session.data, student, teacher)
    return method


def _supplier(
    session: Session, student: nn.Module, teacher: nn.Module, stage: Stage, *, live: bool = False
) -> Teacher | None:
    """The teacher of a stage: from disk as the recipe says; one cache for each set of taps, shared by a sweep.

    `live`: what it gives for padding counts, which a cache does not hold.
    """
    taps = sorted({t for term in stage.terms for t in term.teacher_taps})
    config = session.recipe.teacher.cache
    if not taps:
        return None
    dtype = session.recipe.teacher.dtype
    if config is None or live:
        live_teacher: Teacher = session.task.supplier(session.recipe, student, teacher)
        return live_teacher
    path = session.folder / "cache" / hashlib.sha256("\n".join(taps).encode()).hexdigest()[:12]
    budget = None if config.budget_gb is None else int(config.budget_gb * 1e9)
    source = Frozen(teacher, dtype="float32" if dtype in (None, "auto") else dtype)
    return Cached(source, path, dtype=config.dtype, preprocessing=session.data.preprocessing, budget=budget)


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


# ---- after training


def recipe_of(run: Path) -> tuple[Any, Any]:
    """Recipe and task of a finished run.

    Raises:
        RecipeError: the folder is not that of a finished run.
    """
    if not (run / "recipe.yaml").is_file() or not (run / "student").is_dir():
        raise RecipeError(f"{run} is not the folder of a finished run: expected recipe.yaml and student/ in it.")
    transformers.utils.logging.disable_progress_bar()
    recipe = recipes.load_recipe(run / "recipe.yaml")
    return recipe, recipes.task_named(recipe.task)


def trained(run: Path) -> tuple[Any, Any, nn.Module, Any]:
    """Recipe, task, student and tokenizer (or processor) of a finished run.

    Raises:
        RecipeError: the folder is not that of a finished run.
    """
    recipe, task = recipe_of(run)
    return recipe, task, *task.trained(run / "student")


def evaluate(run: Path, data: str | None = None) -> dict[str, float]:
    """Metrics of a run's student on its test set, or on another file with the same columns."""
    recipe, task, student, tokenizer = trained(run)
    if data is None:
        if "given:" in (run / "recipe.yaml").read_text(encoding="utf-8"):
            raise RecipeError(f"{run} was given its data in memory; evaluate it on a file with --data.")
        loaded = task.load(recipe, run)
        if loaded.fingerprint() != Record(run).finished.get("inputs", {}).get("data"):
            raise RecipeError(f"the data of {run} has changed since it was trained; name a file with --data.")
        table = loaded.test
    else:
        table = task.read(recipe, data, student, tokenizer)
    metric = task.metric_of(recipe, student, table)
    trainer = Trainer(
        student,
        metric=metric,
        task_loss=task.loss(recipe),
        args=training_arguments(run, recipe.training, 0, None, task.sampling),
        processing_class=tokenizer,
        data_collator=task.collator(recipe, tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return strip(trainer.evaluate(table, metric_key_prefix="test"))


def predict(run: Path, inputs: Sequence[str]) -> Iterator[tuple[str, float | None, str]]:
    """(label, probability, input) for each input, with a run's student; (value, None, input) for regression."""
    recipe, task, student, tokenizer = trained(run)
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
    method: str | None = None,
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
        train: nlp: a path (csv, tsv, jsonl, parquet), a list of dicts, or an HF `Dataset`; detection: a COCO json
            file, a folder in the layout of Pascal VOC, an HF `Dataset`, or `Annotations`; segmentation: a folder of
            images and masks, one in the layout of Cityscapes, ADE20K, Pascal VOC or CamVid, an HF `Dataset`, or
            `Annotations`; face: a folder of aligned crops (one folder in it for each identity), one with `train.rec`
            and `train.idx`, "orl", an HF `Dataset`, or `Faces`.
        eval: the same, to validate on (face: also a .bin file, a list of pairs, or `Pairs`); None: a tenth of `train`
            to validate on and a tenth to test on are held out (face: a tenth and a fifth of the identities).
        task: "nlp", "detection", "segmentation" or "face".
        output_dir: of the run; an interrupted run goes on there.
        method: a key of the task's `METHODS`; None: "soft_targets" for nlp, "auto" for detection,
            "dist" for segmentation, "embedding_mimic" for face.
        options: the method's own.
        training: as in a recipe, `{"epochs": 3, "learning_rate": 1e-4}`.
        baseline: whether the student alone is trained as well, for comparison.
        seeds: one run each.
        **data: what else the task's data takes; for nlp `processing_class`, `text`, `label`, `test`, `unlabelled`,
            `max_length`, `stride`, `no_answer`, `masking`, `mask_share` (see `taskkd.nlp.given.GivenNlp`); for
            detection `test`, `images`, `classes`, `augment`, `metric`, `size`, `bad` (see
            `taskkd.detection.given.GivenDetection`); for segmentation `test`, `classes`, `ignore`, `unlabelled`,
            `augment`, `metric`, `bad` (see `taskkd.segmentation.given.GivenSegmentation`); for face `test`,
            `unlabelled`, `size`, `batches`, `asymmetric`, `flip`, `metric`, `pairs`, `far`, `bad` (see
            `taskkd.face.given.GivenFace`).

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
            "method": {"name": method or held.default_method, **(options or {})},
            "training": dict(training or {}),
            "baseline": {} if baseline else None,
            "seeds": list(seeds),
        },
        "distill",
    )
    return run_recipe(recipe, Path(output_dir), say=logger.info, task=held)
