"""Every training scheme, as the benchmark has it, runs on digits from its teachers to an exported student."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import schemes
from taskkd.checkpoints import load_student, save_student
from tests.test_teachers import same_state, state_of

STEPS, RATE = 40, 0.03


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(schemes, "STEPS", STEPS)


def loss_on_labels(model: nn.Module) -> float:
    image, labels = schemes.data(0).labelled
    with torch.no_grad():
        return F.cross_entropy(copy.deepcopy(model).train()(image)["logits"], labels).item()


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_a_scheme_runs_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guides: list[tuple[nn.Module, dict[str, Any]]] = []
    find = schemes.teacher

    def teacher(*args: Any, **options: Any) -> nn.Module:
        guides.append((model := find(*args, **options), state_of(find(*args, **options))))
        return model

    monkeypatch.setattr(schemes, "teacher", teacher)
    seen: list[dict[str, torch.Tensor]] = []
    student = schemes.run(name, 0, RATE, observe=seen.append)
    assert loss_on_labels(student) < loss_on_labels(schemes.Net(seed=0)) - 0.1
    assert all(value.isfinite() for losses in seen for value in losses.values())
    assert any(set(losses) - {"loss", "task"} for losses in seen), "something was distilled"
    for model, before in guides:
        assert same_state(model, before) is (name != "prokt")
        assert not any(m._forward_hooks for m in model.modules())
    alone = getattr(student, "net", student)
    save_student(alone, tmp_path)
    loaded = schemes.Net(seed=1)
    load_student(loaded, tmp_path)
    image = schemes.data(0).test[0][:8]
    assert torch.equal(loaded.eval()(image)["logits"], student.eval()(image)["logits"])


def test_every_scheme_is_short() -> None:
    """Acceptance A14: at most 15 lines of a user's code."""
    for name, (_, function) in schemes.SCHEMES.items():
        lines = [line for line in inspect.getsource(function).splitlines() if line.strip()]
        assert len(lines) - 1 <= 15, name


def test_the_comparison_is_fair() -> None:
    """Same start and batches for the student alone and for a scheme; no sample is in two parts."""
    one, other = (list(schemes.data(0).batches(3, seed=4)) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one, other, strict=True) for k in a)
    assert [int((b["labels"] >= 0).sum()) for b in one] == [16] * 3
    split = schemes.data(0)
    parts = [split.labelled[0], split.unlabelled, split.private[0], split.validation[0], split.test[0]]
    x, _ = schemes.digits()
    assert sum(len(p) for p in parts) == len(x)
    rows = [tuple(row) for part in parts for row in part.flatten(1).tolist()]
    assert sorted(rows) == sorted(map(tuple, x.flatten(1).tolist()))
    first = schemes.Net(seed=3)
    assert same_state(schemes.Net(seed=3), state_of(first))
