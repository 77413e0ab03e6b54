"""Recipes: a complete run in YAML 1.2, validated before anything is loaded.

A recipe cannot import or run anything: it is read by a safe loader, tags are refused, unknown keys are refused with the
nearest right one. `distill` is the same run from Python.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from taskkd.deprecations import translate
from taskkd.errors import RecipeError, nearest

if TYPE_CHECKING:
    from taskkd.runs import Result
    from taskkd.tasks import Task
    from taskkd.terms import Match

__all__ = ["distill", "dump_recipe", "load_recipe", "packaged_recipes", "parse_overrides", "task_named"]

TASKS = {
    "detection": "taskkd.detection.task",
    "face": "taskkd.face.task",
    "nlp": "taskkd.nlp.task",
    "segmentation": "taskkd.segmentation.task",
}
#: what a file may hold: aliases let a few lines stand for billions of values
MOST_CHARACTERS, MOST_VALUES, MOST_BRACKETS = 1_000_000, 100_000, 100
PLAIN_TAGS = ("map", "seq", "str", "int", "float", "bool", "null")

# ---- reading


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Any:
    """A validated recipe.

    Args:
        source: a path (`my.yaml`), the name of a packaged recipe (`nlp/sentiment-distil`), or that of a task, whose
            `teacher=`, `student=` and `data=` are then among the overrides, each a name or a path.
        overrides: `key=value` each, keys dotted, values as in YAML: `student.layers=[0,2]`.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, a wrong type or a value out of range; the message has
            the line and the nearest right name.
    """
    if str(source) in TASKS:
        return _short(str(source), overrides)
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"no recipe file {str(source)!r}.")
        try:
            text, title = path.read_text(encoding="utf-8-sig"), str(path)
        except UnicodeDecodeError:
            raise RecipeError(f"{path}: not UTF-8 text.") from None
    else:
        known = packaged_recipes()
        if str(source) not in known:
            raise RecipeError(
                f"no packaged recipe {str(source)!r}{nearest(str(source), known)}; known: {', '.join(known)}."
            )
        text, title = known[str(source)], str(source)
    data, lines = _parse(text, title)
    if "name" not in data:
        data["name"] = path.stem if path.suffix else str(source).rpartition("/")[2]
    return validate(data, title, lines, parse_overrides(overrides))


def _short(name: str, overrides: Sequence[str]) -> Any:
    """A recipe from a teacher, a student and data alone; what else there is overrides the defaults.

    Raises:
        RecipeError: one of the three is missing.
    """
    task, given = task_named(name), parse_overrides(overrides)
    three = {key: given.pop(key, None) for key in ("teacher", "student", "data")}
    for key, value in three.items():
        if value is None:
            raise RecipeError(
                f"{name} is a task: give teacher=..., student=... and data=... (a name or a path each); {key} is "
                "missing."
            )
    return validate({"schema": 1, "task": name, "name": name, **task.shorthand(**three)}, name, overrides=given)


def validate(
    data: Mapping[str, Any],
    title: str,
    lines: Mapping[tuple[Any, ...], int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """A recipe from plain data.

    Args:
        data: what the file holds; `by_task` is applied to it.
        title: of the file, for errors.
        lines: of its keys.
        overrides: dotted key -> value; they are stronger than `by_task`.

    Raises:
        RecipeError: see `load_recipe`.
    """
    lines = dict(lines or {})
    data = _settled(data, title, lines, overrides or {})
    task = task_named(data.get("task"), title)
    try:
        recipe = task.recipe.model_validate(dict(data))
    except ValidationError as error:
        raise RecipeError(_explain(error, task.recipe, title, lines or {})) from None
    if recipe.method is not None:
        known = task.methods
        if recipe.method.name not in known:
            raise RecipeError(
                f"{title}: task {task.name!r} has no method {recipe.method.name!r}"
                f"{nearest(recipe.method.name, known)}; known: {', '.join(known)}."
            )
        schema = options_schema(known[recipe.method.name])
        try:
            schema.model_validate(translate(known[recipe.method.name], recipe.method.model_extra or {}))
        except ValidationError as error:
            raise RecipeError(_explain(error, schema, title, lines or {}, ("method",))) from None
    return recipe


def _settled(
    data: Mapping[str, Any], title: str, lines: dict[tuple[Any, ...], int], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The data with what `by_task` says of its task, then with the overrides; `lines` follow."""
    if any(key.partition(".")[0] == "by_task" for key in overrides):
        raise RecipeError("by_task cannot be overridden: it is weaker than overrides; override the key itself.")
    base = {key: value for key, value in data.items() if key != "by_task"}
    wanted = _changed(base, overrides)
    changes: Mapping[str, Any] = {}
    if data.get("by_task"):
        task = task_named(wanted.get("task"), title)
        _check_by_task(data["by_task"], base, task, title, lines)
        own = _get_key(wanted, task.task_key)
        changes = (data["by_task"].get(own) if isinstance(own, str) else None) or {}
    for key in (*changes, *overrides):
        lines.pop(tuple(key.split(".")), None)
    return _changed(_changed(base, changes), overrides)


def _check_by_task(
    table: Any, base: Mapping[str, Any], task: Task, title: str, lines: Mapping[tuple[Any, ...], int]
) -> None:
    """See that every task is known, and that its changes make a valid recipe.

    Raises:
        RecipeError: they do not.
    """
    if not isinstance(table, Mapping) or not all(isinstance(changes, Mapping) for changes in table.values()):
        raise RecipeError(f"{title}: by_task is a mapping of tasks to changes: {{cola: {{training.epochs: 10}}}}.")
    for name, changes in table.items():
        if name not in task.task_names:
            known = ", ".join(task.task_names)
            raise RecipeError(f"{title}: by_task: no task {name!r}{nearest(name, task.task_names)}; known: {known}.")
        moved = {tuple(key.split(".")): lines.get(("by_task", name, key), 0) for key in changes}
        changed = _changed(base, {task.task_key: name, **changes})
        validate(changed, f"{title}, by_task.{name}", {**lines, **moved})


def _changed(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with these dotted keys set."""
    found = copy.deepcopy(dict(data))
    for key, value in changes.items():
        set_key(found, key, copy.deepcopy(value))
    return found


def _get_key(data: Any, key: str) -> Any:
    """The value of a dotted key; None: there is none."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def task_named(name: Any, title: str = "recipe") -> Task:
    """The task object of a task package.

    Raises:
        RecipeError: there is no such task.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise RecipeError(f"{title}: task {name!r} is not known{nearest(str(name), TASKS)}; tasks: {', '.join(TASKS)}.")
    task: Task = importlib.import_module(TASKS[name]).TASK
    return task


def options_schema(method: Callable[..., Any]) -> type[BaseModel]:
    """A model of a method's keyword options, from its signature; unknown options are refused."""
    hints = typing.get_type_hints(method, include_extras=True)
    options = [p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {p.name: (hints[p.name], p.default) for p in options}
    return create_model(method.__name__, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)


def method_options(recipe: Any) -> dict[str, Any]:
    """The validated options of a recipe's method, defaults included."""
    method = task_named(recipe.task).methods[recipe.method.name]
    return options_schema(method).model_validate(translate(method, recipe.method.model_extra or {})).model_dump()


def build_terms(recipe: Any) -> list[Match]:
    """The terms that a recipe lists by hand.

    Raises:
        RecipeError: no such loss or adapter; the options of a loss are checked by `Match`.
    """
    from taskkd import losses
    from taskkd.adapters import ADAPTERS
    from taskkd.schedules import from_config

    kind, built = task_named(recipe.task, "terms").term, []
    for term in recipe.terms:
        if term.loss not in losses.__all__:
            known = ", ".join(losses.__all__)
            raise RecipeError(
                f"term {term.name!r}: no loss {term.loss!r}{nearest(term.loss, losses.__all__)}; known: {known}."
            )
        for adapter in (term.adapter, term.teacher_adapter):
            if adapter is not None and adapter not in ADAPTERS:
                known = ", ".join(ADAPTERS)
                raise RecipeError(
                    f"term {term.name!r}: no adapter {adapter!r}{nearest(adapter, ADAPTERS)}; known: {known}."
                )
        options = dict(term.model_extra or {})
        for option, value in options.items():
            default = inspect.signature(getattr(losses, term.loss)).parameters.get(option)
            if isinstance(value, dict):
                options[option] = from_config(value)
            elif (
                default is not None and isinstance(default.default, int | float) and not isinstance(value, int | float)
            ):
                raise RecipeError(f"term {term.name!r}: {option} must be a number, got {value!r}.")
        built.append(
            kind(
                term.name,
                getattr(losses, term.loss),
                term.student,
                term.teacher,
                adapter=term.adapter,
                teacher_adapter=term.teacher_adapter,
                mask=term.mask,
                weight=_weight(term.weight),
                **options,
            )
        )
    return built


def _weight(given: Any) -> Any:
    """A term's weight from plain data."""
    from taskkd.schedules import from_config
    from taskkd.terms import Auto

    if not isinstance(given, dict):
        return given
    return Auto(float(given["auto"])) if "auto" in given else from_config(given)


def _parse(text: str, title: str) -> tuple[dict[str, Any], dict[tuple[Any, ...], int]]:
    """Plain data, and the line of every key."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"{title}: {len(text):,} characters; a recipe has at most {MOST_CHARACTERS:,}.")
    depths = itertools.accumulate((c in "[{") - (c in "]}") for c in text)
    if max(depths, default=0) > MOST_BRACKETS:
        raise RecipeError(f"{title}: more than {MOST_BRACKETS} brackets stand within each other.")
    try:
        loaded = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{title}{where}: {str(error.problem or error.context).splitlines()[0]}.") from None
    except YAMLError as error:
        raise RecipeError(f"{title}: not YAML ({str(error).splitlines()[0]}).") from None
    except RecursionError:
        raise RecipeError(f"{title}: {TOO_DEEP}.") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # values that the loader itself trips over
        raise RecipeError(f"{title}: a value cannot be read ({type(error).__name__}: {error}).") from None
    if not isinstance(loaded, Mapping):
        raise RecipeError(f"{title}: a recipe is a mapping of keys, found {type(loaded).__name__}.")
    lines: dict[tuple[Any, ...], int] = {}
    try:
        return _plain(loaded, (), lines, title), lines
    except RecursionError:
        raise RecipeError(f"{title}: {TOO_DEEP}.") from None


TOO_DEEP = "values stand within each other too deeply, or within themselves"


def _plain(value: Any, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], title: str) -> Any:
    """The loader's round-trip objects as plain Python; tags, which could mean anything, are refused."""
    tag = getattr(getattr(value, "tag", None), "value", None)
    if tag and str(tag).removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
        raise RecipeError(f"{title}: the tag {tag} is refused; a recipe holds plain values only.")
    if len(lines) > MOST_VALUES:
        raise RecipeError(f"{title}: more than {MOST_VALUES:,} values, with those that aliases repeat.")
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            lines[(*path, key)] = (
                value.lc.key(key)[0] + 1 if hasattr(value, "lc") and key in (value.lc.data or {}) else 0
            )
            result[str(key)] = _plain(item, (*path, key), lines, title)
        return result
    if isinstance(value, list):
        for i in range(len(value)):
            lines[(*path, i)] = value.lc.item(i)[0] + 1 if hasattr(value, "lc") and i in (value.lc.data or {}) else 0
        return [_plain(item, (*path, i), lines, title) for i, item in enumerate(value)]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise RecipeError(f"{title}: {'.'.join(map(str, path))} holds a {type(value).__name__}; expected a plain value.")


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` strings as a dict; values are YAML.

    Raises:
        RecipeError: there is no `=`, or the value is not YAML.
    """
    result = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key.strip():
            raise RecipeError(f"override {override!r}: expected key=value, as in training.epochs=5.")
        result[key.strip()] = _parse(f"value: {value}", f"override {override!r}")[0]["value"]
    return result


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dicts.

    Raises:
        RecipeError: a part of the key is a plain value.
    """
    *parents, last = key.split(".")
    current: Any = data
    for parent in parents:
        if isinstance(current, list):
            current = current[_position(key, parent, current)]
            continue
        if current.get(parent) is None:
            current[parent] = {}
        current = current[parent]
        if not isinstance(current, dict | list):
            raise RecipeError(f"override {key!r}: {parent!r} is a plain value, it has no keys.")
    if isinstance(current, list):
        current[_position(key, last, current)] = value
    else:
        current[last] = value


def _position(key: str, part: str, items: Sequence[Any]) -> int:
    """The position in a list that a part of a key names: a number, or the `name` of an item."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise RecipeError(
        f"override {key!r}: no item {part!r} in a list of {len(items)}{nearest(part, filter(None, names))}."
    )


def _explain(
    error: ValidationError,
    schema: type[BaseModel],
    title: str,
    lines: Mapping[tuple[Any, ...], int],
    prefix: tuple[str, ...] = (),
) -> str:
    """The first validation error as a sentence."""
    first = error.errors(include_url=False)[0]
    unknown, last = first["type"] == "extra_forbidden", len(first["loc"]) - 1
    # Kinds that a value may be of, as list[int], stand between its keys; an unknown key may have brackets, too.
    location = tuple(
        part
        for i, part in enumerate(first["loc"])
        if (unknown and i == last) or not (isinstance(part, str) and "[" in part)
    )
    path = (*prefix, *location)
    line = lines.get(path)
    where = f"{title}, line {line}" if line else title
    name = ".".join(map(str, path)) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _fields(schema, location[:-1])
        return f"{where}: unknown key {name!r}{nearest(str(path[-1]), known)}; it may have {', '.join(known)}."
    if first["type"] == "missing":
        return f"{where}: the key {name!r} is missing."
    message = first["msg"].removeprefix("Value error, ")
    given = f", got {first['input']!r}" if first["type"] != "value_error" else ""
    return f"{where}: {name}: {message[0].lower()}{message[1:]}{given}."


def _fields(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys that a part of the schema has."""
    current: Any = schema
    for part in location:
        info = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        if info is None:
            return []
        options = [info.annotation, *typing.get_args(info.annotation)]
        current = next((o for o in options if inspect.isclass(o) and issubclass(o, BaseModel)), None)
    return [f.alias or n for n, f in current.model_fields.items()] if current is not None else []


def packaged_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes in the package."""
    found = {}
    for task in TASKS:
        folder = files("taskkd") / task / "recipes"
        for file in sorted(folder.iterdir(), key=lambda f: f.name):
            if file.name.endswith(".yaml"):
                found[f"{task}/{file.name.removesuffix('.yaml')}"] = file.read_text(encoding="utf-8")
    return found


def dump_recipe(recipe: BaseModel) -> str:
    """A recipe with every default filled in, as YAML that `load_recipe` reads again."""
    from ruamel.yaml import YAML

    data = recipe.model_dump(by_alias=True)
    if data.get("method") is not None:
        data["method"] = {"name": data["method"]["name"], **method_options(recipe)}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    buffer = io.StringIO()
    yaml.dump(data, buffer)
    return buffer.getvalue()


def distill(student: Any, teacher: Any, train: Any, eval: Any = None, *, task: str, **options: Any) -> Result:  # noqa: A002
    """Distil in one call; see `taskkd.runs.distill`, which this is."""
    from taskkd import runs

    return runs.distill(student, teacher, train, eval, task=task, **options)
