"""Every recipe of docs/methods/survey.md runs, is short, and every row of the survey is there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import taskkd as kd

PAGE = (Path(__file__).parent.parent / "docs" / "methods" / "survey.md").read_text()
FRAME, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.S)
RECIPES = {
    match[1]: match[2]
    for match in re.finditer(r"### (\d+ .*?)\n.*?```python\n(.*?)```", PAGE.partition("## Recipes")[2], re.S)
}
STEPS = 2


def batches(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(8, 1, 8, 8, generator=generator),
            "labels": torch.randint(0, 10, (8,), generator=generator),
            "id": torch.arange(8) + 8 * i,
        }
        for i in range(STEPS)
    ]


def train(distiller: kd.Distiller, change: Any = dict) -> Any:
    """Prepare and take two steps, as a user's loop would; the student must move, every loss must be finite."""
    data = [change(batch) for batch in batches()]
    before = [p.detach().clone() for p in distiller.student.parameters()]
    distiller.prepare(data[0])
    distiller.set_total(STEPS)
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for batch in data:
        losses = distiller(**batch)
        assert all(bool(v.isfinite()) for v in losses.values())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        distiller.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, distiller.student.parameters(), strict=True))
    distiller.close()
    return distiller.student


@pytest.fixture
def names() -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {"batch": batches()[0], "train": train}
    exec(compile(FRAME, "the frame", "exec"), names)
    return names


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs(title: str, names: dict[str, Any]) -> None:
    exec(compile(RECIPES[title], title, "exec"), names)
    if "method" in names:
        for stage in names["method"].stages:
            with kd.stages.training_only(names["student"], stage.trains):
                train(
                    kd.Distiller(
                        names["student"],
                        names["teacher"],
                        stage.terms,
                        task_weight=stage.task_weight,
                        task_loss=names["task_loss"],
                    )
                )
    elif "from_teacher" not in names:  # a chain trains by itself
        train(names["distiller"], names.get("mixed", dict))


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_is_short(title: str) -> None:
    lines = [line for line in RECIPES[title].splitlines() if line.strip()]
    assert len(lines) <= 15, f"{title}: {len(lines)} lines"


def test_every_row_of_the_survey_is_there() -> None:
    rows = re.findall(r"^\| (\d+) \|", PAGE, re.M)
    assert [int(r) for r in rows] == list(range(1, 77))


def test_every_link_has_its_heading() -> None:
    """GitHub's anchors: lower case, no punctuation, hyphens for spaces."""
    folder = Path(__file__).parent.parent / "docs" / "methods"
    for target, anchor in re.findall(r"\]\(([\w./]*)#([^)]*)\)", PAGE):
        text = (folder / target).read_text() if target else PAGE
        headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
        assert anchor in headings, (target, anchor)


def test_every_public_name_exists() -> None:
    from taskkd import gates, losses, schedules

    for module, path in re.findall(r"`(losses|gates|schedules|kd)\.([\w.]+)", PAGE):
        value: Any = {"losses": losses, "gates": gates, "schedules": schedules, "kd": kd}[module]
        for part in path.split("."):
            value = getattr(value, part)
