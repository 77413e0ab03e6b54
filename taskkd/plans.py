"""Plans: what a recipe would do, found out without training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from taskkd import recipes
from taskkd.distiller import Distiller
from taskkd.errors import RecipeError, nearest
from taskkd.inference import trained
from taskkd.inspection import Seen, seen
from taskkd.preparation import Preparation
from taskkd.schema import Training
from taskkd.session import Record, Session, of_items
from taskkd.stages import Method, Stage
from taskkd.tasks import Task

__all__ = ["Plan", "build_method", "check", "look", "taps_of"]


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
        plan.summary.append((title, f"{_kind(model)}, {parameters(model):,} parameters"))
    plan.summary += task.pair(data, student, teacher)
    if recipe.teacher.finetune is None:
        own = task.teacher_data(data)
        few = own.first(own.validation, evaluate)
        with tempfile.TemporaryDirectory() as folder:
            session = Session(recipe, task, own, Path(folder), Record(Path(folder)), print)
            metrics = session.evaluated(teacher, few)
        name, counted = task.main_metric(data), getattr(few, "counted", len(few))
        plan.summary.append(("teacher's own " + name, f"{metrics[name]:.4f} on {counted} validation samples"))
        if metrics[name] <= task.chance(data) + 0.01:
            plan.warnings.append(f"the teacher is no better than chance ({task.chance(data):.3f}); fine-tune it first.")
    else:
        epochs = recipe.teacher.finetune.epochs
        plan.summary.append(
            ("teacher's own metric", f"it is fine-tuned first: {epochs:g} epochs on {len(data.train)} samples")
        )
        plan.warnings.append("values and gradients are those of a teacher that is not fine-tuned yet.")
    if recipe.method is None and not recipe.terms:
        return plan
    training = of_items(recipe.training, data.everything)
    plan.stages = look(recipe, task, data, student, teacher)
    plan.warnings += [sentence for preparation in plan.stages.values() for sentence in preparation.advice]
    method = build_method(recipe, task, data, student, teacher)
    if "centres" in method.needs and getattr(teacher, "centres", None) is None:
        plan.warnings.append(
            "the teacher has no class centres yet: values and gradients of what reads them are those of zeros; the run "
            "works them out first."
        )
    whole = len(data.everything[0]) if getattr(data.everything, "whole_batches", False) else None
    steps = duration(method, training, len(data.everything), drop_last=task.drop_last, batch=whole)
    plan.summary.append(("distillation", steps))
    return plan


def _kind(model: nn.Module) -> str:
    """The name of a network's class; of what a task wraps around it, that of the network inside."""
    own = getattr(model, "kind", None)
    return own if isinstance(own, str) else type(model).__name__


def duration(
    method: Method, training: Training, samples: int, *, drop_last: bool = False, batch: int | None = None
) -> str:
    """How long the stages are, as "20 epochs at 5e-05, then 3 epochs at 3e-05; 313 steps an epoch, batch 32".

    `drop_last`: of a last batch that is not full, where there is another; `batch`: what an item has, where items are
    whole batches.
    """
    batches = samples // training.batch_size if drop_last else 0
    steps = -(-(batches or -(-samples // training.batch_size)) // training.accumulation)
    stages = []
    for stage in method.stages:
        epochs, rate = stage.epochs(training.epochs), stage.overrides.get("learning_rate", training.learning_rate)
        stages.append(f"{epochs:g} epochs at {rate:g}")
    most = f", at most {training.max_steps} steps a stage" if training.max_steps is not None else ""
    return f"{', then '.join(stages)}; {steps} steps an epoch{most}, batch {batch or training.batch_size}"


def build_method(recipe: Any, task: Task, data: Any, student: nn.Module, teacher: nn.Module) -> Method:
    """The recipe's method for this pair, with the recipe's own terms in every stage of it."""
    method = _method(recipe, student, teacher)
    return replace(method, stages=[replace(s, terms=task.fit_terms(data, s.terms)) for s in method.stages])


def _method(recipe: Any, student: nn.Module, teacher: nn.Module) -> Method:
    own = recipes.build_terms(recipe)
    if recipe.method is None:
        return Method("terms", [Stage("distil", own)] if own else [])
    make = recipes.task_named(recipe.task).methods[recipe.method.name]
    method = make(student, teacher, **recipes.method_options(recipe))
    if own and len(method.stages) > 1:
        raise RecipeError(f"`terms` go with a method of one stage; {recipe.method.name!r} has {len(method.stages)}.")
    return replace(method, stages=[replace(s, terms=[*s.terms, *own]) for s in method.stages])


def look(recipe: Any, task: Task, data: Any, student: nn.Module, teacher: nn.Module) -> dict[str, Preparation]:
    """What `prepare` says of every stage on one real batch; both models are left as they were.

    Raises:
        TaskkdError: a tap, shape or option does not work out.
    """
    found = {}
    rows = [
        data.everything[i]
        for i in range(min(of_items(recipe.training, data.everything).batch_size, len(data.everything)))
    ]
    method = build_method(recipe, task, data, student, teacher)
    collator = data.full_length_collator if "full_length" in method.needs else data.collator
    batch = dict(collator(rows))
    for stage in method.stages:
        task.check_terms(data, stage.terms, student, batch)
        distiller = Distiller(
            student,
            task.supplier(recipe, student, teacher),
            stage.terms,
            task_weight=stage.task_weight,
            task_loss=task.loss(recipe, student, recipe.seeds[0]),
            perturbation=stage.perturbation,
        )
        try:
            found[stage.name] = distiller.prepare(batch)
        finally:
            distiller.close()
    return found


# ---- taps


def taps_of(
    source: str, overrides: Sequence[str] = (), *, task: str | None = None, depth: int = 3
) -> dict[str, list[Seen]]:
    """The taps of models on one input: of a recipe a sample of its test set, else a synthetic one.

    Args:
        source: a recipe (its teacher, not fine-tuned, and its student), a finished run's folder (its student), or a
            model by what a recipe of `task` calls it.
        overrides: of a recipe.
        task: of a model that is named by itself.
        depth: of module names; numbers in them do not count.

    Returns:
        The taps by what the model is.

    Raises:
        RecipeError: it is none of the three.
    """
    transformers.utils.logging.disable_progress_bar()
    if task is None and (Path(source) / "recipe.yaml").is_file():
        recipe, known, student, processing = trained(Path(source))
        own = known.portable(recipe, student, processing)
        return {
            f"student of {source}: {_kind(student)}, on a synthetic input": seen(student, own.synthetic()[0], depth)
        }
    if task is not None:
        known = recipes.task_named(task, "--task")
        model, processing = known.named(source)
        sample = known.portable(None, model, processing).synthetic()[0]
        return {f"{source}: {_kind(model)}, on a synthetic input": seen(model, sample, depth)}
    if source not in recipes.TASKS and Path(source).suffix not in (".yaml", ".yml"):
        packaged = recipes.packaged_recipes()
        if source not in packaged:
            raise RecipeError(
                f"{source!r} is no recipe and no finished run{nearest(source, packaged)}; to look at a model by its "
                f"name or path, say of which task it is: --task {'|'.join(recipes.TASKS)}."
            )
    recipe = recipes.load_recipe(source, overrides)
    known = recipes.task_named(recipe.task)
    data = known.load(recipe)
    teacher = known.teacher(recipe, data)
    student = known.student(recipe, data, teacher, recipe.seeds[0])
    batches = {"teacher": known.latency_batches(known.teacher_data(data), 1)[0]}
    batches["student"] = known.latency_batches(data, 1)[0]
    models = {"teacher": teacher, "student": student}
    return {f"{who}: {_kind(model)}": seen(model, batches[who], depth) for who, model in models.items()}


def parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())
