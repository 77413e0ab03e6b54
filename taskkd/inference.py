"""What is done with the student of a finished run: open it, evaluate it, predict with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from taskkd import recipes
from taskkd.errors import RecipeError
from taskkd.session import Record, strip, training_arguments
from taskkd.tasks import Task
from taskkd.trainer import Trainer

__all__ = ["evaluate", "has_given_data", "predict", "recipe_of", "trained"]


def recipe_of(run: Path) -> tuple[Any, Task]:
    """Recipe and task of a finished run.

    Raises:
        RecipeError: the folder is not that of a finished run.
    """
    if not (run / "recipe.yaml").is_file() or not (run / "student").is_dir():
        raise RecipeError(f"{run} is not the folder of a finished run: expected recipe.yaml and student/ in it.")
    transformers.utils.logging.disable_progress_bar()
    recipe = recipes.load_recipe(run / "recipe.yaml")
    return recipe, recipes.task_named(recipe.task)


def trained(run: Path) -> tuple[Any, Task, nn.Module, Any]:
    """Recipe, task, student and tokenizer (or processor) of a finished run.

    Raises:
        RecipeError: the folder is not that of a finished run.
    """
    recipe, task = recipe_of(run)
    return recipe, task, *task.trained(run / "student")


def has_given_data(run: Path) -> bool:
    """Whether a run was given models and data in memory (`kd.distill`), which nothing can load again."""
    return "given:" in (run / "recipe.yaml").read_text(encoding="utf-8")


def evaluate(run: Path, data: str | None = None) -> dict[str, float]:
    """Metrics of a run's student on its test set, or on another file with the same columns."""
    recipe, task, student, tokenizer = trained(run)
    if data is None:
        if has_given_data(run):
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
