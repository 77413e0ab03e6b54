"""The snippets of docs/methods/nlp.md run on tiny models, and the page knows every method."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import taskkd as kd
from taskkd import recipes
from taskkd.nlp import METHODS
from tests.nlp.test_methods import batch, bert

PAGE = (Path(__file__).parents[2] / "docs" / "methods" / "nlp.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def train(distiller: kd.Distiller) -> None:
    distiller.prepare(batch())
    before = [p.detach().clone() for p in distiller.student.parameters()]
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    losses = distiller(**batch())
    losses["loss"].backward()
    optimizer.step()
    distiller.close()
    assert losses["loss"].isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, distiller.student.parameters(), strict=True))


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number: int) -> None:
    names: dict[str, Any] = {"student": bert(2), "teacher": bert(4, seed=1), "train": train}
    exec(compile(SNIPPETS[number], f"snippet {number}", "exec"), names)
    if "method" not in names:
        train(names["distiller"])
    assert len(SNIPPETS) >= 4


def test_whole_recipes_are_valid(tmp_path: Path) -> None:
    whole = [y for y in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "schema" in y]
    assert whole
    for number, text in enumerate(whole):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert recipes.load_recipe(path).method.name in METHODS


def test_every_method_has_a_row() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) >= set(METHODS)
