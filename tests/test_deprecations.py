"""Public names and options go by a rule, and none goes by accident."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Annotated

import pytest
import torch
from annotated_types import Gt

import taskkd as kd
from taskkd import deprecations, losses, recipes
from taskkd.deprecations import RENAMED, Renamed, TaskkdDeprecationWarning, renamed_options
from taskkd.errors import RecipeError, TaskkdError
from tests import public_api

ROOT = Path(__file__).parent.parent


def test_public_names_options_keys_and_commands_are_those_on_record() -> None:
    """A name that is gone breaks users: it is renamed by the rule of docs/stability.md. A new one goes on record."""
    now, before = public_api.public(), json.loads(public_api.RECORD.read_text())
    for part, entries in before.items():
        for name, options in entries.items():
            assert name in now[part], f"{name} is gone: list it in deprecations.RENAMED for a minor version first"
            lost = [o for o in options.split() if o not in now[part][name].split()]
            assert not lost, f"{name} lost {lost}: rename by deprecations.renamed_options for a minor version first"
    assert now == before, "new public names: python -m tests.public_api, and a line in CHANGELOG.md"


def test_what_was_deprecated_is_gone_in_the_version_that_was_promised() -> None:
    version = tuple(int(part) for part in kd.__version__.split(".")[:2])
    for gone in RENAMED:
        assert version < tuple(int(part) for part in gone.until.split(".")[:2]), f"{gone.old} should be gone by now"


def test_the_version_is_semantic_and_in_the_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?", kd.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert changelog.index("## [Unreleased]") > 0
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert all(released[i] > released[i + 1] for i in range(len(released) - 1))


@pytest.mark.parametrize("package", [kd, losses], ids=["taskkd", "losses"])
def test_an_old_name_works_and_warns(package, monkeypatch) -> None:
    old = Renamed(f"{package.__name__}.old_name", "taskkd.losses.kl_divergence", since="0.2", until="0.3")
    monkeypatch.setattr(deprecations, "RENAMED", (old,))
    with pytest.warns(TaskkdDeprecationWarning, match=r"is called taskkd.losses.kl_divergence since taskkd 0\.2"):
        found = package.old_name
    assert found is losses.kl_divergence


@pytest.mark.parametrize("package", public_api.PACKAGES)
def test_a_wrong_name_has_the_nearest_in_its_error(package) -> None:
    module = __import__("importlib").import_module(package)
    name = next(n for n in module.__all__ if not n.startswith("_"))
    with pytest.raises(AttributeError, match=f"did you mean '{name}'"):
        getattr(module, f"{name}x")


@renamed_options("0.2", "0.3", tau="temperature")
def made_up(student, teacher, *, temperature: Annotated[float, Gt(0)] = 1.0):
    """A loss whose option was called `tau`."""
    return temperature * (student - teacher).square().mean()


def test_an_old_option_works_and_warns() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    with pytest.warns(TaskkdDeprecationWarning, match="option 'tau' is called 'temperature' since taskkd 0.2"):
        assert made_up(x, y, tau=3.0) == 3
    with pytest.raises(TaskkdError, match="'tau' is the old name of 'temperature'"):
        made_up(x, y, tau=3.0, temperature=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made_up(x, y, temperature=2.0) == 2


def test_an_old_option_works_in_a_term_and_in_a_recipe(monkeypatch) -> None:
    with pytest.warns(TaskkdDeprecationWarning, match="tau"):
        assert kd.Match("m", made_up, "out", tau=3.0).options == {"temperature": 3.0}
    methods = recipes.task_named("segmentation").methods

    @renamed_options("0.2", "0.3", heat="temperature")
    def method(student, teacher, *, temperature: Annotated[float, Gt(0)] = 1.0):
        """A method whose option was renamed."""

    monkeypatch.setitem(methods, "made_up", method)
    data = {"schema": 1, "task": "segmentation", "data": {"sample": {"name": "nuclei"}}, "teacher": {"model": "t"}}
    data |= {"student": {"model": "s"}, "method": {"name": "made_up", "heat": 2.0}}
    with pytest.warns(TaskkdDeprecationWarning, match="heat"):
        recipe = recipes.validate(data, "recipe")
    with pytest.warns(TaskkdDeprecationWarning, match="heat"):
        assert recipes.method_options(recipe) == {"temperature": 2.0}
    with pytest.raises(RecipeError, match="temperature"):
        recipes.validate(data | {"method": {"name": "made_up", "heat": -2.0}}, "recipe")


def test_experimental_methods_are_listed_and_say_so() -> None:
    page = (ROOT / "docs" / "stability.md").read_text().partition("## Experimental")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", page.partition("Methods:")[2].partition("\n\n")[0]))
    marked = {
        name
        for task in recipes.TASKS
        for name, method in recipes.task_named(task).methods.items()
        if "xperimental" in (method.__doc__ or "")
    }
    assert marked
    assert listed == marked
