"""Suppliers that read the student's own run: the student as teacher, and computed targets."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
import taskkd.suppliers
from taskkd import losses
from taskkd.errors import ShapeError, TapError, TaskkdError
from taskkd.losses import targets
from tests import small

CASES = Path(__file__).parent / "parity" / "cases" / "core"


class Exits(nn.Module):
    """Three linear exits on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.exits = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        pool = self.trunk(x)
        return [e(pool) for e in self.exits]


def nothing(output: Any, batch: Any) -> Tensor:
    return 0.0 * output[0].sum()


def branches(teacher: Any, terms: list[kd.Term]) -> kd.Distiller:
    torch.manual_seed(2)
    return kd.Distiller(Exits(), teacher, terms, task_loss=nothing)


def moved(layer: nn.Module) -> bool:
    """Whether it has a gradient."""
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}


def test_the_docstring_examples_run() -> None:
    result = doctest.testmod(taskkd.suppliers)
    assert (result.failed, result.attempted >= 3) == (0, True)


def test_a_supplier_asks_nothing_by_default() -> None:
    supplier = kd.SelfTeacher()
    supplier.load(supplier.state())
    assert supplier.module is None
    assert supplier.step(kd.schedules.Progress(1)) is False
    assert supplier.columns() == set()
    assert supplier.needs_run


@pytest.mark.parametrize("detach", [True, False])
def test_exits_learn_from_the_last(detach: bool) -> None:
    terms = [kd.Match(f"e{i}", losses.kl_divergence, f"out[{i}]", "out[2]", temperature=3.0) for i in (0, 1)]
    distiller = branches(kd.SelfTeacher(detach=detach), terms)
    student = distiller.student
    distiller.prepare(batch())
    losses_ = distiller(**batch())
    z = student(batch()["x"])
    for i in (0, 1):
        expected = losses.kl_divergence(z[i], z[2], temperature=3.0)
        torch.testing.assert_close(losses_[f"e{i}"], expected.detach())
    losses_["loss"].backward()
    assert moved(student.exits[0]) and moved(student.exits[1])
    assert moved(student.exits[2]) is not detach


def test_a_tap_that_only_the_teacher_names_is_recorded() -> None:
    distiller = branches(kd.SelfTeacher(), [kd.Match("t", losses.mse, "exits.0", "exits.2")])
    distiller.prepare(batch())
    assert distiller(**batch())["t"] > 0
    with pytest.raises(TapError, match=r"the student has no module 'exit.2'"):
        branches(kd.SelfTeacher(), [kd.Match("t", losses.mse, "exits.0", "exit.2")])


# ---- computed targets


@pytest.mark.parametrize("case", ["bake-b1", "bake-b2_w.9_T1"])
def test_bake_as_its_authors_compute_it(case: str) -> None:
    arrays = {k: torch.from_numpy(v) for k, v in np.load(CASES / f"{case}.npz").items()}
    params = json.loads((CASES / f"{case}.json").read_text())["params"]
    names = {k.removeprefix("in_"): v for k, v in arrays.items() if k.startswith("in_")}
    features, logits = (names[next(n for n in names if n.startswith(s))] for s in ("feat", ("logit", "student", "z")))
    options = {"omega": params["omega"], "temperature": params["T"]}

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits.clone())

        def forward(self, features: Tensor) -> dict[str, Tensor]:
            return {"logits": 1.0 * self.logits}

    distiller = kd.Distiller(
        Given(),
        kd.Targets(targets.batch_ensemble, "out.logits", "batch.features", **options),
        [kd.Match("bake", losses.kl_divergence, "out.logits", "out", temperature=params["T"])],
        task_weight=0,
    )
    distiller.train()
    found = distiller(features=features)
    assert found["loss"].dtype == torch.float64
    torch.testing.assert_close(found["loss"].detach(), arrays["out_loss"].reshape(()), rtol=1e-7, atol=1e-12)
    found["loss"].backward()
    gradient = next(v for k, v in arrays.items() if k.startswith("grad_") and v.shape == logits.shape)
    torch.testing.assert_close(distiller.student.logits.grad, gradient, rtol=1e-6, atol=1e-12)


def test_parts_of_a_target() -> None:
    both = kd.Targets(lambda a, b: (a + b, a * b), "out[0]", "out[1]")
    terms = [kd.Match("sum", losses.mse, "out[2]", "out[0]"), kd.Match("product", losses.mse, "out[2]", "out[1]")]
    distiller = branches(both, terms)
    found = distiller(**batch())
    a, b, c = distiller.student(batch()["x"])
    torch.testing.assert_close(found["sum"], losses.mse(c, a + b).detach())
    torch.testing.assert_close(found["product"], losses.mse(c, a * b).detach())
    found["loss"].backward()
    assert [moved(e) for e in distiller.student.exits] == [False, False, True]


def test_one_teaches_by_its_gated_ensemble() -> None:
    gate = torch.softmax(torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), 1)

    def ensemble(a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        return targets.gated_ensemble([a, b], gate)

    supplier = kd.Targets(ensemble, "out[0]", "out[1]", "batch.gate")
    distiller = branches(supplier, [kd.Match("one", losses.kl_divergence, "out[0]", "out", temperature=3.0)])
    found = distiller(**batch(), gate=gate)["one"]
    a, b, _ = distiller.student(batch()["x"])
    mixed = gate[:, :1] * a + gate[:, 1:] * b
    torch.testing.assert_close(found, losses.kl_divergence(a, mixed, temperature=3.0).detach())
    assert "gate" in distiller.columns()


def test_a_trained_function_is_part_of_the_distiller() -> None:
    mix = nn.Linear(3, 3)
    distiller = branches(kd.Targets(mix, "out[0]", detach=False), [kd.Match("t", losses.mse, "out[1]", "out")])
    assert {f"supplier.{n}" for n, _ in mix.named_parameters()} <= set(distiller.state_dict())
    distiller(**batch())["loss"].backward()
    assert mix.weight.grad.abs().max() > 0
    frozen = nn.Linear(3, 3).requires_grad_(False)
    assert kd.Targets(frozen, "out[0]").module is None


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (
            lambda: kd.Targets(targets.batch_ensemble, "out", "pool", omeg=0.5),
            TaskkdError,
            "got an unexpected keyword argument 'omeg' (did you mean 'omega'?)",
        ),
        (lambda: kd.Targets(targets.batch_ensemble, "out"), TaskkdError, "`batch_ensemble` with 1 taps"),
        (
            lambda: kd.Targets(nn.Linear(1, 1), "out"),
            TaskkdError,
            "nothing would train the parameters of `Linear`; use detach=False",
        ),
        (
            lambda: branches(kd.Targets(torch.neg, "out[0]"), [kd.Match("t", losses.mse, "out[0]", "exits.1")]),
            TapError,
            "computed targets are 'out' or a part of it",
        ),
        (
            lambda: branches(
                kd.Targets(targets.batch_ensemble, "out[0]", "batch.bad"), [kd.Match("t", losses.mse, "out[0]", "out")]
            )(**batch(), bad=torch.ones(3, 2)),
            ShapeError,
            "targets of out[0], batch.bad: `batch_ensemble` needs logits",
        ),
    ],
)
def test_errors_are_sentences(make: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert sentence in str(caught.value)


def test_a_plain_teacher_costs_no_second_recording() -> None:
    distiller = kd.Distiller(small.ConvNet(4), small.ConvNet(4), [kd.Match("t", losses.mse, "head")])
    assert distiller._supplier is None
    assert sum(len(m._forward_hooks) for m in distiller.student.modules()) == 1
