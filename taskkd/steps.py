"""The steps of a run: the teacher, the student alone, the distilled student, and which student is handed over.

Each finished step is on the record of the session; an unfinished training goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from taskkd.caches import Cached
from taskkd.checkpoints import save_student
from taskkd.errors import RecipeError
from taskkd.plans import build_method, look
from taskkd.session import ADAPTERS, Session
from taskkd.stages import Method, Stage
from taskkd.teachers import Frozen, Teacher

__all__ = ["alone", "distilled", "equipped", "look_at_teacher", "ready_teacher", "select", "supplier"]

logger = logging.getLogger(__name__)


# ---- the teacher


def ready_teacher(session: Session, variants: Mapping[str, Any]) -> nn.Module:
    """The teacher; a wrong tap or shape is told before it is trained, not after."""
    if "teacher" not in session.record.finished:
        raw = session.task.teacher(session.recipe, session.data)
        for variant in variants.values():
            look(variant, session.task, session.data, session.student(raw, session.recipe.seeds[0]), raw)
    return _teacher(session)


def _teacher(session: Session) -> nn.Module:
    """The teacher, fine-tuned if the recipe says so, evaluated, and refused at chance level."""
    recipe, task, data = session.recipe, session.task, session.task.teacher_data(session.data)
    session = replace(session, data=data)
    finetune = recipe.teacher.finetune
    if finetune is None:
        given = task.teacher(recipe, data)
        result = session.record.step("teacher", lambda: {"validation": session.evaluated(given, data.validation)})
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
    teacher = task.teacher(recipe, data, source).eval()
    task.ready(session, teacher)
    session.tested("teacher/test", lambda: teacher)
    return teacher


# ---- the student alone


def alone(session: Session, teacher: nn.Module, seed: int) -> dict[str, Any]:
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


def look_at_teacher(session: Session, alone: Mapping[str, float]) -> None:
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


# ---- the distilled student


def distilled(session: Session, teacher: nn.Module, seed: int, name: str) -> dict[str, Any]:
    """The distilled student: the stages of the method one after the other, from the start of the student alone."""
    base = f"seed-{seed}/{name}"
    student = session.student(teacher, seed)
    method = equipped(session, student, teacher)
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
            teacher=None if finished else supplier(session, student, teacher, stage, live=full_length),
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


def equipped(session: Session, student: nn.Module, teacher: nn.Module) -> Method:
    """The method, after the teacher was given what the method needs of it."""
    method = build_method(session.recipe, session.task, session.data, student, teacher)
    if session.task.equip(session, method, teacher):
        method = build_method(session.recipe, session.task, session.data, student, teacher)
    return method


def supplier(
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
        return session.task.supplier(session.recipe, student, teacher)
    path = session.folder / "cache" / hashlib.sha256("\n".join(taps).encode()).hexdigest()[:12]
    budget = None if config.budget_gb is None else int(config.budget_gb * 1e9)
    source = Frozen(teacher, dtype="float32" if dtype in (None, "auto") else dtype)
    return Cached(source, path, dtype=config.dtype, preprocessing=session.data.preprocessing, budget=budget)


# ---- the student to hand over


def select(session: Session, teacher: nn.Module, report: dict[str, Any]) -> tuple[nn.Module, Path]:
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
