"""Runs: what a recipe asks for, step by step, each finished step on record so that an interrupted run goes on.

The steps are in `steps`, the folder of a run at work in `folders`, what is done with a trained student in `inference`.

Folder of a run: `recipe.yaml` (resolved), `run.json` (finished steps and their results), `augmented/`,
`teacher/`, `cache/`, `seed-<n>/alone-<lr>/`, `seed-<n>/distilled/stages/<i>-<name>/`, and at the end `student/`,
`report.html`, `report.json`, `curves.png`.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taskkd import recipes, steps
from taskkd._version import __version__
from taskkd.caches import Cached
from taskkd.checkpoints import staged
from taskkd.errors import RecipeError
from taskkd.files import human
from taskkd.folders import opened
from taskkd.inference import evaluate, predict, recipe_of, trained
from taskkd.session import Say, Session
from taskkd.tasks import Task
from taskkd.teachers import Teacher

__all__ = ["Result", "build_caches", "distill", "evaluate", "predict", "recipe_of", "run_recipe", "trained"]

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a run gives back: the trained student, the report (also in `report.json`), the folder."""

    student: nn.Module
    report: dict[str, Any]
    output_dir: Path


# ---- a recipe


def run_recipe(
    recipe: Any,
    folder: Path,
    *,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    say: Say = print,
    restart: bool = False,
    task: Task | None = None,
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
    with opened(recipe, folder, say, restart=restart, task=task) as session:
        teacher = steps.ready_teacher(session, variants)
        report = _report(session)
        for seed in recipe.seeds:
            if recipe.baseline is not None:
                report["alone"][str(seed)] = steps.alone(session, teacher, seed)
                steps.look_at_teacher(session, report["alone"][str(seed)]["validation"])
            for name, variant in variants.items():
                if variant.method is not None or variant.terms:
                    outcome = steps.distilled(replace(session, recipe=variant), teacher, seed, name)
                    report["distilled"].setdefault(name, {})[str(seed)] = outcome
        student, source = steps.select(session, teacher, report)
        report["models"] = session.record.step("costs", lambda: _costs(session, teacher, student))
        with staged(folder / "student") as final:
            shutil.copytree(source, final, dirs_exist_ok=True)
        _examples(session, teacher, student, report)
        report |= session.record.step("finished", _circumstances)
        reports.write(report, folder)
        pages.write_page([folder], folder / "report.html", pictures=False)
        return Result(student, report, folder)


def _report(session: Session) -> dict[str, Any]:
    """What is known once there is a teacher, with room for the students."""
    recipe, task, data, finished = session.recipe, session.task, session.data, session.record.finished
    return {
        "recipe": recipe.name,
        "metric": session.metric,
        "data": data.summary(),
        "task": recipe.task,
        "method": None if recipe.method is None else recipe.method.name,
        "chance": task.chance(data),
        "test_samples": getattr(data.test, "counted", len(data.test)),
        "further_tests": list(data.further_tests),
        "teacher": {
            **finished["teacher"],
            "test": finished["teacher/test"],
            "by_class": session.by_class("teacher/test"),
        },
        "seeds": recipe.seeds,
        "alone": {},
        "alone_title": "student alone" if task.has_labels(data) else "undistilled",
        "distilled": {},
    }


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
    with opened(recipe, folder, say, restart=restart) as session:
        teacher = steps.ready_teacher(session, variants)
        reasons, built = [], {}
        for name, variant in variants.items():
            own = replace(session, recipe=variant)
            student = own.student(teacher, recipe.seeds[0])
            method = steps.equipped(own, student, teacher)
            for stage in method.stages:
                supplier = steps.supplier(own, student, teacher, stage, live="full_length" in method.needs)
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
    models = {"teacher": teacher}
    alone = report["alone"].get(str(report["selected_seed"]))
    if alone is not None:
        models[report["alone_title"]] = session.student(teacher, report["selected_seed"], alone["model"])
    if report["distilled"] or alone is None:
        models[report["selected"]] = student
    session.task.draw(session.data, models, session.folder / "examples.png")
    if session.task.tells_examples:
        work = partial(session.task.examples, session.data, models)
        report["examples"] = session.record.step("examples", work)


def _circumstances() -> dict[str, Any]:
    """When a run was finished, and with what."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"taskkd": __version__, "python": platform.python_version(), **versions},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; threads of torch: {torch.get_num_threads()}",
    }


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
