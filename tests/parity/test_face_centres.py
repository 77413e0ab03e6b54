"""The terms that the methods on face embeddings build give the values of the reference cases, too."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskkd.face.methods import METHODS
from taskkd.terms import Run, Term
from tests.parity.face.centres import blocks, gradients, margin_of
from tests.parity.test_parity import compare, load, tensors

CASES = Path(__file__).parent / "cases" / "face"
STEMS = sorted(p.stem for p in CASES.glob("*.json"))
RELATIONS = {"fr_rkd": "rkd", "fr_sp": "similarity", "fr_cc": "correlation", "fx_pkt": "pkt", "fr_darkrank": "darkrank"}


def case(stem: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    about, arrays = load(CASES / f"{stem}.json")
    return about["params"], tensors(arrays), arrays


def some(*starts: str) -> list[str]:
    return [s for s in STEMS if s.startswith(starts)]


def model(size: int, centres: Tensor | None, identities: int) -> nn.Module:
    found: Any = nn.Module()
    found.embedding_size, found.identities, found.centres = size, identities, centres
    found.views = SimpleNamespace(stages=())
    return found  # type: ignore[no-any-return]


def terms_of(name: str, given: dict[str, Tensor], centres: Tensor | None = None, **options: Any) -> list[Term]:
    sizes = given["in_s"].shape[1], given.get("in_t", given["in_s"]).shape[1]
    identities = 1 if centres is None else len(centres)
    pair = [model(size, None if centres is None else centres.detach(), identities) for size in sizes]
    return [term.double() for term in METHODS[name](*pair, **options).stages[0].terms]


def weighted(terms: list[Term], given: dict[str, Tensor]) -> Tensor:
    student = {"out.embeddings": given["in_s"]}
    if "in_y" in given:
        student["batch.labels"] = given["in_y"]
    run = Run({}, None, student, {"out.embeddings": given["in_t"]} if "in_t" in given else {})
    return torch.stack([term.schedule.value * term(run) for term in terms]).sum()


@pytest.mark.parametrize("stem", some("adadistill"))
def test_centres(stem: str) -> None:
    params, given, arrays = case(stem)
    centres, options = given["w_kernel"].T, margin_of(params)
    if "in_t" not in given:
        terms = terms_of("proxyless", given, centres, **options)
    else:
        alpha: dict[str, Any] = {"alpha": "fixed", "momentum": params["momentum"]} if "momentum" in params else {}
        terms = terms_of("ada_distill", given, centres, **options, **alpha)
        terms[0].centres.copy_(centres)  # type: ignore[operator, union-attr]
    compare(weighted(terms, given), arrays["out_loss"], 1e-7, stem)
    if "in_t" in given:
        compare(terms[0].centres.T, arrays["out_kernel"], 1e-7, "centres")  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("stem", some("md_"))
def test_of_margin_distillation(stem: str) -> None:
    params, given, arrays = case(stem)
    with pytest.MonkeyPatch.context() as patch:
        if "triplet" in stem:
            kind = "l2" if "L2" in stem else "cosine"
            terms = terms_of("triplet_distillation", given, kind=kind)
            module = sys.modules["taskkd.face.methods.triplet_distillation"]
            patch.setattr(module, "batch_triplets", lambda t, *_, **__: blocks(len(t)))
            compare(weighted(terms, given), arrays["out_loss"], 1e-5, stem)
            compare(gradients(weighted(terms, given), given)["grad_s"], arrays["grad_s"], 1e-4, stem)
        elif "margin_distillation" in stem:
            options = {"m_min": params["Mmin"], "m_max": params["Mmax"], "s": params["loss_s"], "clip": False}
            terms = terms_of("margin_distillation", given, given["w_student_weight"], **options)
            value = weighted(terms, given)
            compare(value, arrays["out_loss"], 1e-5, stem)
            value.backward()
            compare(terms[0].centres.grad, arrays["grad_student_weight"], 1e-4, "centres")  # type: ignore[union-attr, arg-type]
        else:
            compare(weighted(terms_of("angular_distillation", given), given), arrays["out_cos_loss"], 1e-5, stem)


@pytest.mark.parametrize("stem", some(*RELATIONS))
def test_relations(stem: str) -> None:
    params, given, arrays = case(stem)
    kind = RELATIONS[stem.partition("-")[0]]
    factor = {"similarity": 50.0, "pkt": float(len(given["in_s"]))}.get(kind, 1.0)  # see `relational`
    terms = terms_of("relational", given, kind=kind)
    if kind == "correlation":
        terms[0].options["order"] = params["p"] - 1  # type: ignore[index, operator, union-attr]
    compare(weighted(terms, given), factor * arrays["out_loss"], 1e-7, kind)


@pytest.mark.parametrize(("stem", "kind"), [("fr_cosine", "cosine"), ("fr_fitnet", "mse")])
def test_mimic(stem: str, kind: str) -> None:
    for found in some(stem):
        _, given, arrays = case(found)
        compare(
            weighted(terms_of("embedding_mimic", given, kind=kind, weight=1.0), given), arrays["out_loss"], 1e-7, kind
        )
