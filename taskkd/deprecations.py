"""How public names and options go: for at least one minor version the old name works, and warns with the new one.

What is public, and for how long, is in docs/stability.md; `tests/api.json` holds the public names and their options, so
that none goes by accident. A name that moved or was renamed is listed in `RENAMED`; an option is renamed by the
decorator `renamed_options` on its function, which recipes read too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from taskkd.errors import TaskkdError, nearest

__all__ = ["RENAMED", "Renamed", "TaskkdDeprecationWarning", "lookup", "renamed_options", "translate"]

F = TypeVar("F", bound=Callable[..., Any])


class TaskkdDeprecationWarning(FutureWarning):
    """A public name or option goes in a later version. A `FutureWarning`: it is for users, who see it by default."""


@dataclass(frozen=True)
class Renamed:
    """A public name that goes.

    Args:
        old: the dotted name, as "taskkd.losses.kd".
        new: the dotted name to use instead.
        since: the version from which the old one warns.
        until: the version in which the old one is gone.
    """

    old: str
    new: str
    since: str
    until: str


#: the public names that go
RENAMED: tuple[Renamed, ...] = ()


def lookup(module: str, names: Sequence[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: deprecated names warn and are found, others have the nearest name in the error.

    Args:
        module: `__name__` of the package.
        names: what it has.
    """

    def find(name: str) -> Any:
        full = f"{module}.{name}"
        gone = next((r for r in RENAMED if r.old == full), None)
        if gone is None:
            raise AttributeError(f"{module} has no {name!r}{nearest(name, names)}")
        _warn(f"{gone.old} is called {gone.new} since taskkd {gone.since}; the old name goes in {gone.until}.")
        home, _, attribute = gone.new.rpartition(".")
        return getattr(importlib.import_module(home), attribute)

    return find


def renamed_options(since: str, until: str, **names: str) -> Callable[[F], F]:
    """Decorate a function whose options were renamed: `@renamed_options("0.2", "0.4", tau="temperature")`.

    Args:
        since: the version from which the old names warn.
        until: the version in which they are gone.
        **names: old name -> new name.

    Raises:
        TaskkdError: in a call, both the old and the new name are given.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return function(*args, **translate(call, options))

        call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        call.renamed_options = (names, since, until)  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def translate(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under their names of today, with a warning for each that came under an old one.

    Raises:
        TaskkdError: an option is given under both names.
    """
    names, since, until = getattr(function, "renamed_options", ({}, "", ""))
    found = dict(options)
    for old in names.keys() & options.keys():
        title, new = getattr(function, "__name__", repr(function)), names[old]
        if new in options:
            raise TaskkdError(f"`{title}`: {old!r} is the old name of {new!r}; give {new!r} alone.")
        _warn(f"`{title}`: option {old!r} is called {new!r} since taskkd {since}; the old name goes in {until}.")
        found[new] = found.pop(old)
    return found


def _warn(sentence: str) -> None:
    warnings.warn(sentence, TaskkdDeprecationWarning, stacklevel=3)
