"""Every loss equals its authors' code: value to 1e-7, gradient to 1e-6 (all in float32: 1e-5 / 1e-4)."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taskkd.nlp import METHODS
from taskkd.terms import Run
from tests.parity.adapters import ADAPTERS

HERE = Path(__file__).parent
CASES = sorted((HERE / "cases").rglob("*.json"))
DIFFERENCES = {
    (d["key"], d["case"]): d for d in tomllib.loads((HERE / "known_differences.toml").read_text())["difference"]
}
# The cases whose logits are those of a classifier, (batch, classes).
LOGITS = [p for p in CASES if p.stem.startswith("kd-") and np.load(p.with_suffix(".npz"))["in_student"].ndim == 2]
HALF = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    about = json.loads(path.read_text())
    about.setdefault("case", path.stem.partition("-")[2])
    return about, dict(np.load(path.with_suffix(".npz")))


def tensors(arrays: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    found = {}
    for name, array in arrays.items():
        if name.startswith(("in_", "w_")):
            value = torch.from_numpy(np.array(array))
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            found[name] = value.requires_grad_(bool({f"grad_{name.partition('_')[2]}", f"grad_{name}"} & set(arrays)))
    return found


def compare(got: Tensor, want: Any, tolerance: float, what: str) -> None:
    want = torch.as_tensor(np.array(want)).double().reshape(got.shape)
    assert got.isfinite().all(), f"{what} is not finite"
    finite = want.isfinite()  # a non-finite reference is a trap in the authors' code
    scale = want[finite].abs().max().clamp(min=1e-12) if finite.any() else torch.tensor(1.0)
    error = (got.detach().double() - want)[finite].abs().max() / scale if finite.any() else torch.tensor(0.0)
    assert error <= tolerance or (got.detach().double() - want)[finite].abs().max() <= 1e-12, (
        f"{what} differs by {error:.2e}"
    )


def test_there_are_cases_and_every_difference_names_one() -> None:
    names = {(about["key"], about["case"]) for about, _ in map(load, CASES)}
    assert len(names) >= 12
    assert set(DIFFERENCES) <= names
    assert {key for key, _ in names} == set(ADAPTERS)


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_equals_the_authors_code(path: Path) -> None:
    about, arrays = load(path)
    adapter, params = ADAPTERS[about["key"]], about["params"]
    half = HALF.get(params.get("dtype", about["case"]))  # some cases say it in their name only
    if half is not None:  # half arithmetic is no reference: ours equals the float64 value of the same inputs
        ours = adapter(tensors(arrays, half), params)["loss"]
        exact = adapter(tensors(arrays, torch.float64), params)["loss"]
        compare(ours, exact.detach().numpy(), 1e-3, "loss in half precision")
        return
    inputs = tensors(arrays)
    results = [a.dtype for n, a in arrays.items() if n.startswith(("out_", "grad_"))]
    single = any(v.dtype == torch.float32 for v in inputs.values()) or set(results) == {np.dtype("float32")}
    difference = DIFFERENCES.get((about["key"], about["case"]), {"params": {}})
    assert {"factor", "params"} & set(difference)
    result = adapter(inputs, {**params, **difference.get("params", {})})
    factor = 1.0
    if "factor" in difference:
        assert difference["factor"] == "classes"
        factor = float(inputs["in_student"].shape[1])
    known = [name for name in result if f"out_{name}" in arrays]
    assert known  # where their loss has parts, they give the parts
    for name, value in result.items():
        if name in known:
            compare(value, np.array(arrays[f"out_{name}"]) * factor, 1e-5 if single else 1e-7, name)
    for name in [n for n in arrays if n.startswith("grad_") and n in result]:  # of one of several losses, say
        compare(result[name], np.array(arrays[name]) * factor, 1e-4 if single else 1e-6, name)
    gradients = [n for n in arrays if n.startswith("grad_") and n not in result]
    if gradients:
        result["loss"].sum().backward()  # several steps have as many losses
    for name in gradients:
        of = name.partition("_")[2]
        source = next((inputs[n] for n in (f"in_{of}", f"w_{of}", of) if n in inputs), None)
        assert source is not None, name
        assert source.grad is not None, name
        compare(source.grad, np.array(arrays[name]) * factor, 1e-4 if single else 1e-6, name)


def classifier(labels: int, layers: int = 2, hidden: int = 8) -> Any:
    """What the NLP methods look at: a config and a list of layers."""
    model = torch.nn.Module()
    model.embeddings = torch.nn.Identity()
    model.encoder = torch.nn.ModuleList(torch.nn.Identity() for _ in range(layers))
    model.config = SimpleNamespace(
        num_labels=labels, num_hidden_layers=layers, hidden_size=hidden, problem_type=None, id2label={}
    )
    return model


def method_loss(name: str, options: dict[str, Any], layers: tuple[int, int], run_of: Any) -> Tensor:
    """The weighted sum of the terms that a METHODS entry builds, on given tapped values."""
    labels, *_ = run_of["shape"]
    method = METHODS[name](classifier(labels, layers[0]), classifier(labels, layers[1]), **options)
    total: Any = 0.0
    for term in method.stages[0].terms:
        run = Run({}, None, run_of["student"](term.student_taps), run_of["teacher"](term.teacher_taps))
        total = total + term.schedule.value * term(run)
    return total


@pytest.mark.parametrize("path", LOGITS, ids=lambda p: p.stem)
def test_soft_targets_builds_the_term_that_was_tested(path: Path) -> None:
    about, arrays = load(path)
    inputs, params = tensors(arrays), about["params"]
    s, t = inputs["in_student"], inputs["in_teacher"]
    run_of = {
        "shape": (s.shape[1],),
        "student": lambda taps: dict.fromkeys(taps, s),
        "teacher": lambda taps: dict.fromkeys(taps, t),
    }
    ours = method_loss("soft_targets", {"temperature": params["T"], "weight": 1.0}, (1, 1), run_of)
    compare(ours, ADAPTERS["core/kd"](inputs, params)["loss"].detach().numpy(), 1e-12, "soft_targets")


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith("pkd_distillation")], ids=lambda p: p.stem)
def test_patient_kd_weighs_its_soft_targets_as_published(path: Path) -> None:
    about, arrays = load(path)
    inputs, alpha = tensors(arrays), about["params"]["alpha"]
    s, t = inputs["in_student_logits"], inputs["in_teacher_logits"]
    method = METHODS["patient_kd"](
        classifier(s.shape[1], 2), classifier(s.shape[1], 4), temperature=about["params"]["T"], alpha=alpha, beta=0.0
    )
    stage = method.stages[0]
    term = next(t for t in stage.terms if t.name == "logits")
    run = Run({}, None, {"out.logits": s}, {"out.logits": t})
    soft = term.schedule.value * term(run)
    compare(soft, alpha * arrays["out_loss_kd"], 1e-7, "alpha * loss_kd")
    task = torch.nn.functional.cross_entropy(s, inputs["in_labels"])
    compare(soft + stage.task_weight * task, arrays["out_loss"], 1e-7, "the whole loss")


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith("pkd_patience")], ids=lambda p: p.stem)
def test_patient_kd_builds_the_patience_that_was_tested(path: Path) -> None:
    about, arrays = load(path)
    inputs = tensors(arrays)
    s, t = inputs["in_student_patience"], inputs["in_teacher_patience"]
    layers = s.shape[1] + 1
    method = METHODS["patient_kd"](
        classifier(2, layers), classifier(2, 2 * layers), beta=1.0, normalise=about["params"]["normalized_patience"]
    )
    term = next(t for t in method.stages[0].terms if t.name == "patience")
    # The taps carry [:, 0]; what arrives at the term is the [CLS] state of each layer.
    student = dict(zip(term.student_taps, s.unbind(1), strict=True))
    teacher = dict(zip(term.teacher_taps, t.unbind(1), strict=True))
    compare(term(Run({}, None, student, teacher)), arrays["out_loss"], 1e-7, "patience")
