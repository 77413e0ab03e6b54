"""The pages of docs/ that belong to no task: what can be run in them runs, and links lead somewhere."""

from __future__ import annotations

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
