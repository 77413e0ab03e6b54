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


WHICH = (Path(__file__).parent.parent / "docs" / "methods" / "which.md").read_text()
RESULTS = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
TITLES = {
    "nlp": "NLP",
    "detection": "Object detection",
    "segmentation": "Semantic segmentation",
    "face": "Face recognition",
}


def anchor(heading: str) -> str:
    """The name by which a heading is linked, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def which(task: str) -> dict[str, tuple[str, str, str]]:
    section = WHICH.partition(f"\n## {TITLES[task]}\n")[2].partition("\n## ")[0]
    return {m[1]: (m[2], m[3], m[4]) for m in re.finditer(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", section, re.M)}


@pytest.mark.parametrize("task", TITLES)
def test_every_method_says_when_it_helps_when_it_hurts_and_what_it_gave(task: str) -> None:
    rows = which(task)
    assert set(rows) == set(getattr(kd, task).METHODS)
    for helps, hurts, measured in rows.values():
        assert len(helps) > 15
        assert len(hurts) > 15
        assert measured == "not measured here" or measured.startswith("[")


@pytest.mark.parametrize("task", TITLES)
def test_what_a_method_gave_is_what_the_results_say(task: str) -> None:
    """The row is there, in each table that is named, and its first verdict there is the one that is named."""
    tables = {anchor(t): text for t, text in re.findall(r"^##+ (.*?)\n(.*?)(?=^##+ |\Z)", RESULTS, re.M | re.S)}
    for name, (_, _, measured) in which(task).items():
        title = measured[1:].partition("]")[0]  # of the row in all tables
        for where, verdict in re.findall(r"\]\(\.\./results\.md#([\w-]+)\): ([^;]+)", measured):
            assert where in tables, name
            if verdict in ("gain", "loss", "no difference above 2 s.e."):
                (row,) = [line for line in tables[where].splitlines() if line.startswith(f"| {title}")][:1]
                assert re.search(r"\| (gain|loss|no difference above 2 s\.e\.) \|", row)[1] == verdict, name  # type: ignore[index]


@pytest.mark.parametrize("task", TITLES)
def test_every_method_has_its_paper_and_defaults_on_a_page(task: str) -> None:
    pages = [p for p in (Path(__file__).parent.parent / "docs" / "methods").glob("*.md") if p.name != "which.md"]
    text = "".join(p.read_text() for p in pages if p.name.startswith(task) or p.name == "README.md")
    text += (Path(__file__).parent.parent / "docs" / f"{task}.md").read_text()
    for name in getattr(kd, task).METHODS:
        assert f"`{name}`" in text, name
