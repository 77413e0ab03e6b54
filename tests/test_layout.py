"""The shape of the package: imports point one way, importing is cheap, public names are documented and typed."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import taskkd as kd

ROOT = Path(kd.__file__).parent
TASKS = {"detection", "segmentation", "nlp", "face"}
#: what may know tasks
ABOVE = {
    *("recipes", "plans", "folders", "steps", "inference", "runs"),
    *("reports", "finished", "comparisons", "pages", "exports"),
    *("cli", "__main__"),
}
FILES = sorted(ROOT.rglob("*.py"))
CORE = [
    "errors",
    "losses",
    "packages",
    "perturbation",
    "recorder",
    "shards",
    "taps",
    "schedules",
    "adapters",
    "adversarial",
    "auxiliary",
    "losses.adversarial",
    "gates",
    "layer_maps",
    "ranks",
    "terms",
    "teachers",
    "caches",
    "distiller",
    "augmentation",
    "stages",
    "attention",
    "banks",
    "contrastive",
    "mixup",
]


def imported(file: Path) -> set[str]:
    """The taskkd modules that a file imports, dotted, wherever the import stands."""
    found: set[str] = set()
    package = ["taskkd", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "taskkd"}


def second(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if "." in name}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    parts = file.relative_to(ROOT).parts
    names = second(imported(file))
    if parts[0] in TASKS:
        assert not names & ((TASKS - {parts[0]}) | ABOVE), "a task imports the core and itself"
    elif parts != ("__init__.py",) and file.stem not in ABOVE:
        assert not names & (TASKS | ABOVE), "the core imports no task and nothing that stands on tasks"


def test_the_check_of_imports_sees_every_form(tmp_path: Path) -> None:
    file = ROOT / "losses" / "made_up.py"
    text = "import taskkd.nlp\nfrom taskkd import face\ndef f():\n    from ..detection import boxes\n"
    tree = tmp_path / "made_up.py"
    tree.write_text(text)

    class Elsewhere(type(file)):  # type: ignore[misc]
        def read_text(self, *args: Any, **kwargs: Any) -> str:
            return text

    assert second(imported(Elsewhere(file))) >= {"nlp", "face", "detection"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_file_says_what_it_is(file: Path) -> None:
    if file.read_text().strip():
        assert ast.get_docstring(ast.parse(file.read_text())) or file.stem == "_version"


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=120
    )


def seconds(report: str, *prefixes: str) -> float:
    """Own time of every module with one of these prefixes, from `-X importtime`."""
    total = 0
    for line in report.splitlines():
        own, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
        if own.isdigit() and any(name == p or name.startswith(p + ".") for p in prefixes):
            total += int(own)
    return total / 1e6


def test_importing_is_cheap() -> None:
    code = "import torch, sys; before = set(sys.modules); import taskkd; print(*sorted(set(sys.modules) - before))"
    result = run(code, "-X", "importtime")
    assert seconds(result.stderr, "torch") > 0.01  # the report is read rightly
    assert seconds(result.stderr, "taskkd") < 0.3
    assert result.stdout.split() == ["taskkd", "taskkd._version"]


def test_the_core_needs_no_engine_and_no_task() -> None:
    core = "Adversarial Distiller Match Term Run Frozen Stage Method Augmented losses schedules"
    names = ", ".join(f"kd.{name}" for name in core.split())
    code = (
        f"import torch, sys, time; start = time.process_time(); import taskkd as kd; {names}\n"
        "print(time.process_time() - start, *sys.modules)"
    )
    found = [run(code).stdout.split() for _ in range(2)]
    modules, elapsed = found[0][1:], min(float(f[0]) for f in found)  # the first run may have had to compile
    heavy = {
        "transformers",
        "torchvision",
        "datasets",
        "accelerate",
        "pydantic",
        "typer",
        "rich",
        "matplotlib",
        "pycocotools",
    }
    assert not heavy & set(modules)
    assert not {f"taskkd.{name}" for name in TASKS | {"trainer", "recipes"}} & set(modules)
    assert elapsed < 0.3


# ---- names


def _constants_first(name: str) -> tuple[bool, bool, str]:
    """As ruff sorts `__all__`: constants, classes, functions."""
    return not name.isupper(), name[0].islower(), name


def public() -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for name in [n for n in kd.__all__ if not n.startswith("_")]:
        found[f"taskkd.{name}"] = getattr(kd, name)
    for name in CORE:
        module = importlib.import_module(f"taskkd.{name}")
        assert module.__all__ == sorted(module.__all__), f"{name}.__all__ is sorted"
        found |= {f"taskkd.{name}.{n}": getattr(module, n) for n in module.__all__}
    for name in sorted(TASKS):
        module = importlib.import_module(f"taskkd.{name}")
        assert module.__all__ == sorted(module.__all__, key=_constants_first), f"{name}.__all__ is sorted"
        found |= {f"taskkd.{name}.{n}": getattr(module, n) for n in module.__all__}
    return sorted(found.items())


def functions(value: Any) -> list[Any]:
    """A function, or the public methods of a class that it defines itself."""
    if inspect.isfunction(value):
        return [value]
    if not inspect.isclass(value):
        return []
    if getattr(value, "_is_protocol", False):  # its __init__ is typing's
        return [
            m for n, m in vars(value).items() if inspect.isfunction(m) and n != "__init__" and not n.startswith("_")
        ]
    members = [m for n, m in vars(value).items() if not n.startswith("_") or n in ("__init__", "__call__")]
    members = [m.fget if isinstance(m, property) else getattr(m, "__wrapped__", m) for m in members]
    return [m for m in members if inspect.isfunction(m)]


PUBLIC = [(n, v) for n, v in public() if inspect.isclass(v) or inspect.isfunction(v)]


@pytest.mark.parametrize(("name", "value"), PUBLIC, ids=[n for n, _ in PUBLIC])
def test_public_names_are_documented_and_typed(name: str, value: Any) -> None:
    assert value.__doc__
    assert not value.__doc__.startswith(f"{value.__name__}("), "a dataclass has a docstring of its own"
    for function in functions(value):
        inherited = inspect.isclass(value) and any(function.__name__ in vars(base) for base in value.__mro__[1:])
        assert (
            inspect.getdoc(function)
            or inherited
            or function.__name__.startswith("__")
            or function.__name__ == "forward"
        ), function
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        untyped = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not untyped, (function, untyped)


def test_every_public_name_is_there() -> None:
    assert set(kd.__all__) <= set(dir(kd))
    for name in kd.__all__:
        assert getattr(kd, name) is not None


def test_a_misspelt_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"taskkd has no 'Distiler' \(did you mean 'Distiller'"):
        kd.Distiler  # noqa: B018


def test_losses_share_one_signature() -> None:
    for name in kd.losses.__all__:
        parameters = list(inspect.signature(getattr(kd.losses, name)).parameters.values())
        assert [p.name for p in parameters[:2]] == ["student", "teacher"], name
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:]), name
        assert parameters[-1].name == "mask", name


def test_a_named_loss_is_short() -> None:
    """Acceptance A16: at most 15 lines of code, without docstring and refusals of bad input."""
    from taskkd import losses

    for name in losses.__all__:
        loss = inspect.unwrap(getattr(losses, name))
        (function,) = ast.parse(inspect.getsource(loss)).body
        assert isinstance(function, ast.FunctionDef)
        code = {i for part in function.body[1:] for i in range(part.lineno, (part.end_lineno or 0) + 1)}
        for node in ast.walk(function):
            if isinstance(node, ast.If) and all(isinstance(n, ast.Raise) for n in node.body) and not node.orelse:
                code -= set(range(node.lineno, (node.end_lineno or 0) + 1))
        assert len(code) <= 15, f"{name}: {len(code)} lines"
