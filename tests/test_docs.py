"""The pages of docs/ that belong to no task: what can be run in them runs, and links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def python_blocks(page: str) -> dict[str, str]:
    """The Python blocks of a page, by the heading that they stand under."""
    found: dict[str, str] = {}
    for section in re.split(r"^#+ ", (DOCS / page).read_text(), flags=re.M)[1:]:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.S)):
            found[section.splitlines()[0] + (f" ({number + 1})" if number else "")] = block
    return found


OWN = python_blocks("your-own-model.md")


@pytest.mark.parametrize("title", OWN)
def test_an_example_of_a_model_of_your_own_runs_as_it_stands(title: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(OWN[title], title, "exec"), names)
    student = names["distiller"].student
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)
    assert not any(m._forward_hooks for m in student.modules())


def test_there_is_an_example_for_every_task() -> None:
    assert {"NLP", "Detection", "Segmentation", "Face recognition"} < set(OWN)
    assert torch.is_grad_enabled()


def test_the_numbers_of_the_concepts_are_right() -> None:
    (block,) = python_blocks("concepts.md").values()
    names: dict[str, Any] = {}
    exec(compile(block, "concepts.md", "exec"), names)  # it asserts the sum itself
    assert set(names["out"]) == {"loss", "task", "logits", "body"}
    assert names["weights"] == pytest.approx({"task": 0.1, "logits": 0.9, "body": 0.2})


ROOT = DOCS.parent
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "benchmarks" / "README.md"])


def anchors(page: Path) -> set[str]:
    """The headings of a page as code hosts name them; the second of a name has `-1`."""
    found: dict[str, int] = {}
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if i == 0 else f"{name}-{i}" for name, count in found.items() for i in range(count + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue  # of another site: `make linkcheck`, with a network
        path, _, name = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: no such file"
        assert there.is_relative_to(ROOT), f"{target}: outside of the repository"
        if name and "api" not in there.parts:  # headings of the API's pages are checked by the site
            assert name in anchors(there), f"{target}: no such heading"


def test_every_page_is_in_the_table_of_contents() -> None:
    """Every name is one of a page, and no page is lost; some appear by a pattern, when they are there."""
    index = (DOCS / "index.md").read_text()
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.S)
    names = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    found = {path.resolve() for name in names for path in DOCS.glob(f"{name}.md") if "*" in name}
    found |= {(DOCS / f"{name}.md").resolve() for name in names if "*" not in name}
    assert all(path.is_file() for path in found)
    assert found >= set(DOCS.rglob("*.md")) - {DOCS / "index.md"}


def test_every_public_name_is_in_the_api_reference() -> None:
    """Those of the packages that the reference has pages of; the strict build sees that they can be rendered."""
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for module in ("taskkd", "taskkd.losses", "taskkd.nlp", "taskkd.detection", "taskkd.segmentation", "taskkd.face"):
        package = importlib.import_module(module)
        for name in set(package.__all__) - {"METHODS", "__version__"}:
            if inspect.ismodule(getattr(package, name)):
                continue
            assert re.search(rf":: {re.escape(module)}\.{name}$", text, re.M), f"{module}.{name} has no entry"
    errors = importlib.import_module("taskkd.errors")
    assert all(f":: taskkd.errors.{name}\n" in text for name in errors.__all__)
