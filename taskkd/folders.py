"""The folder of a run while it is at work: whose it is, and that the run reads what it was started with."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from taskkd import recipes
from taskkd.errors import RecipeError
from taskkd.files import write_whole
from taskkd.session import Record, Say, Session, locked
from taskkd.signals import Budget
from taskkd.tasks import Task

__all__ = ["opened"]


@contextlib.contextmanager
def opened(
    recipe: Any, folder: Path, say: Say, *, restart: bool = False, task: Task | None = None
) -> Iterator[Session]:
    """The session of a run whose folder is this process's own, with its data; its time runs from here.

    Args:
        recipe: from `load_recipe`.
        folder: of the run, made if it is not there.
        say: gets a line for each step.
        restart: delete what the folder holds first.
        task: the task object; None: the one that the recipe names.

    Raises:
        RecipeError: the folder is another run's, another process is at work in it, data or teacher changed since it was
            started, or this is one process of several.
        DataError: the folder cannot be made or written to, or the data is wrong.
    """
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
