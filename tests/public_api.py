"""What is public: names, the options of functions and methods, recipe keys, commands. `api.json` holds it as it was.

python -m tests.public_api      writes `api.json` anew; the difference belongs into CHANGELOG.md
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

RECORD = Path(__file__).with_name("api.json")
PACKAGES = ("taskkd", "taskkd.losses", "taskkd.nlp", "taskkd.detection", "taskkd.segmentation", "taskkd.face")
MODULES = ("taskkd.adapters", "taskkd.errors", "taskkd.gates", "taskkd.layer_maps", "taskkd.schedules", "taskkd.taps")


def parameters(thing: Any) -> list[str]:
    """The names of the parameters of a function or class: those by position in order, then the keywords, sorted."""
    try:
        found = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):  # no function; built in
        return []
    ordered = [p.name for p in found if p.kind is not p.KEYWORD_ONLY]
    return ordered + sorted(f"{p.name}=" for p in found if p.kind is p.KEYWORD_ONLY)


def names() -> dict[str, list[str]]:
    """Every public name and its parameters."""
    found = {}
    for package in (*PACKAGES, *MODULES):
        module = importlib.import_module(package)
        for name in module.__all__:
            if not name.startswith("_"):
                found[f"{package}.{name}"] = parameters(getattr(module, name))
    return dict(sorted(found.items()))


def _fields(kind: type[BaseModel], prefix: str) -> list[str]:
    found = []
    for name, field in kind.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        found.append(key)
        inner = [a for a in _arguments(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        for model in inner:
            found += _fields(model, f"{key}.")
    return found


def _arguments(annotation: Any) -> list[Any]:
    """An annotation and all that it is made of."""
    return [annotation, *(a for inner in getattr(annotation, "__args__", ()) for a in _arguments(inner))]


def recipe_keys() -> dict[str, list[str]]:
    """The keys of the recipes of each task."""
    from taskkd import recipes

    return {task: sorted(set(_fields(recipes.task_named(task).recipe, ""))) for task in recipes.TASKS}


def commands() -> dict[str, list[str]]:
    """The commands and their options."""
    import typer

    from taskkd.cli import app

    group = typer.main.get_command(app)
    found = group.commands  # type: ignore[attr-defined]
    return {name: sorted(o for p in c.params for o in p.opts if o.startswith("--")) for name, c in found.items()}


def public() -> dict[str, dict[str, str]]:
    """All of it; what belongs to a name is one line, so that a difference reads well."""
    found = {"names": names(), "recipe_keys": recipe_keys(), "commands": commands()}
    return {part: {name: " ".join(own) for name, own in entries.items()} for part, entries in found.items()}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(public(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
