"""Code of this package in one file that does without it: what a function needs, taken from the modules it is in."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["standalone"]

PACKAGE = "taskkd"
Key = tuple[str, str]  # module, name


@dataclass
class _Module:
    """A module's top level: where its names are defined, and what it imports."""

    name: str
    lines: list[bytes]
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    #: name -> the line that imports it
    external: dict[str, str] = field(default_factory=dict)
    #: name -> where in this package it is from; "" for a module itself
    internal: dict[str, Key] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> _Module:
        source = inspect.getsource(importlib.import_module(name))
        found = cls(name, source.encode().splitlines())
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.defined[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.defined |= {n.id: node for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found._imported(node)
        return found

    def _imported(self, node: ast.Import | ast.ImportFrom) -> None:
        origin = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            if origin.partition(".")[0] == PACKAGE:
                is_module = _is_module(f"{origin}.{alias.name}")
                self.internal[name] = (f"{origin}.{alias.name}", "") if is_module else (origin, alias.name)
            elif origin != "__future__":
                renamed = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                self.external[name] = f"from {origin} import {renamed}" if origin else f"import {renamed}"


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None if _parent_is_package(name) else False


def _parent_is_package(name: str) -> bool:
    return hasattr(importlib.import_module(name.rpartition(".")[0]), "__path__")


class _Bundle:
    """What was reached from the roots, in an order in which it can be executed."""

    def __init__(self, without: Mapping[str, Collection[str]]) -> None:
        self.without = without
        self.modules: dict[str, _Module] = {}
        self.order: list[Key] = []
        self.seen: set[Key] = set()
        self.imports: set[str] = set()

    def module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _Module.read(name)
        return self.modules[name]

    def visit(self, key: Key) -> None:
        """Take in a name, after all that it refers to."""
        module = self.module(key[0])
        if key[1] in module.internal:  # handed on by a module that is not its own
            return self.visit(module.internal[key[1]])
        if key in self.seen or key[1] not in module.defined:
            return None
        self.seen.add(key)
        for node, evaluated in self._names(module.defined[key[1]]):
            target = self.target(module, node)
            if target is not None and evaluated:
                self.visit(target)
            elif isinstance(node, ast.Name) and node.id in module.external:
                self.imports.add(module.external[node.id])
        self.order.append(key)
        return None

    def target(self, module: _Module, node: ast.expr) -> Key | None:
        """What of this package a name, or an attribute of a module, refers to."""
        if isinstance(node, ast.Attribute):
            inside = module.internal.get(node.value.id) if isinstance(node.value, ast.Name) else None
            return (inside[0], node.attr) if inside is not None and not inside[1] else None
        assert isinstance(node, ast.Name)
        if node.id in module.defined:
            return (module.name, node.id)
        found = module.internal.get(node.id)
        while found is not None and found[1] and found[1] in self.module(found[0]).internal:
            found = self.module(found[0]).internal[found[1]]
        return found if found is not None and found[1] else None

    def _names(self, statement: ast.AST, evaluated: bool = True) -> Iterator[tuple[Any, bool]]:
        """Names and attributes in a definition; of annotations, which are never evaluated, it is said so."""
        left_out = self.without.get(getattr(statement, "name", ""), ())
        for name, value in ast.iter_fields(statement):
            for node in value if isinstance(value, list) else [value]:
                if not isinstance(node, ast.AST) or (isinstance(statement, ast.ClassDef) and _named(node) in left_out):
                    continue
                now = evaluated and name not in ("annotation", "returns")
                if isinstance(node, ast.Name | ast.Attribute):
                    yield node, now
                yield from self._names(node, now)

    def text(self, key: Key, names: Mapping[Key, str]) -> str:
        """The source of a definition, with its comments, where names that clash are other ones."""
        module, own = self.module(key[0]), key[1]
        node = module.defined[own]
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
        while start and module.lines[start - 1].startswith(b"#") and b"# ----" not in module.lines[start - 1]:
            start -= 1
        lines = list(module.lines)
        found = ((n, self.target(module, n)) for n, _ in self._names(node))
        changes = [(n, target) for n, target in found if target is not None and target in names]
        for part, target in sorted(changes, key=lambda c: (c[0].lineno, c[0].col_offset), reverse=True):
            if isinstance(part, ast.Attribute) or names[target] != part.id:
                line = lines[part.lineno - 1]
                lines[part.lineno - 1] = line[: part.col_offset] + names[target].encode() + line[part.end_col_offset :]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and names[key] != own:
            kind = b"class " if isinstance(node, ast.ClassDef) else b"def "
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(kind + own.encode(), kind + names[key].encode(), 1)
        dropped: set[int] = set()
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if _named(part) in self.without.get(own, ()):
                first = min([part.lineno, *(d.lineno for d in getattr(part, "decorator_list", ()))])
                dropped |= set(range(first - 1, part.end_lineno or part.lineno))
        kept = [line for i, line in enumerate(lines[start : node.end_lineno], start) if i not in dropped]
        return b"\n".join(kept).decode()


def _named(node: ast.AST) -> str:
    return str(getattr(node, "name", ""))


def standalone(root: Callable[..., Any], *, title: str, without: Mapping[str, Collection[str]] | None = None) -> str:
    """The text of a module that has a function of this package and all it needs, and imports nothing of the package.

    Definitions are copied as they are, with their comments; where two have one name, the second gets that of its module
    in front. Annotations, which are not evaluated, may name what is not there.

    Args:
        root: the function.
        title: what the file is, its first line.
        without: methods of classes that are left out, by the name of the class.

    Example:
        >>> from taskkd.errors import nearest
        >>> print(standalone(nearest, title="One function.").splitlines()[0])
        \"\"\"One function.
    """
    bundle = _Bundle(without or {})
    bundle.visit((root.__module__, root.__name__))
    names: dict[Key, str] = {}
    for key in sorted(bundle.order, key=lambda k: k[0] != root.__module__):
        taken = set(names.values())
        names[key] = key[1] if key[1] not in taken else f"{key[0].rpartition('.')[2]}_{key[1].lstrip('_')}"
    origin = ", ".join(sorted({key[0] for key in bundle.order}))
    head = [f'"""{title}', "", f"Made by taskkd of {origin} (Apache-2.0); it does without taskkd.", '"""', ""]
    imports = ["from __future__ import annotations", "", *sorted(bundle.imports)]
    parts, done = [], set()
    for key in bundle.order:
        node = id(bundle.module(key[0]).defined[key[1]])
        if node not in done:
            done.add(node)
            parts.append(bundle.text(key, names))
    return "\n".join([*head, *imports, "", "", ""]) + "\n\n\n".join(parts) + "\n"
