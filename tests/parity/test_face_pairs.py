"""The terms that the methods on pairs of faces build give the values of the reference cases, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from taskkd.face.methods import METHODS
from taskkd.terms import Run, Term
from tests.parity.face.pairs import branches_of, ddl_options, embeddings
from tests.parity.test_parity import compare, load, tensors

CASES = Path(__file__).parent / "cases" / "face"


def term_of(method: str, **options: object) -> Term:
    (term,) = METHODS[method](nn.Module(), nn.Module(), **options).stages[0].terms
    return term.double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", sorted(CASES.glob("ddl-*.json")), ids=lambda p: p.stem)
def test_ddl(path: Path) -> None:
    about, arrays = load(path)
    given = tensors(arrays)
    identities, pairs = branches_of(given)
    rows = [*identities, *(torch.stack(pair, 1).flatten(0, 1) for pair in pairs)]
    branch = torch.cat([torch.full((len(x),), b) for b, x in enumerate(rows)])
    shuffled = torch.randperm(len(identities), generator=torch.Generator().manual_seed(0))
    options = ddl_options(about["params"])
    term = term_of("ddl", branches=len(identities), bins=given["w_t"].numel(), scale=10.0, compat="tface", **options)
    for order in (range(len(rows)), [int(i) + len(identities) for i in shuffled] + list(range(len(identities)))):
        x = torch.cat([rows[i] for i in order])
        run = Run({"branch": torch.cat([branch[branch == i] for i in order])}, None, {"out.embeddings": x})
        compare(term.schedule.value * term(run), 10 * arrays["out_loss"], 1e-7, "distributions")


@pytest.mark.parametrize("path", sorted(CASES.glob("ekd-*.json")), ids=lambda p: p.stem)
def test_ekd(path: Path) -> None:
    about, arrays = load(path)
    given, params = tensors(arrays), about["params"]
    options = {"topk": params["topk"], "temperature": params["t"], "momentum": params["momentum"]}
    weights = {"positive": params["w_pos"], "negative": params["w_neg"]}
    term = term_of("ekd", anchors=params["anchor"], **options, **weights)
    for step in range(sum(name.startswith("in_y") for name in given)):
        value = term(Run({"labels": given[f"in_y{step}"]}, None, *embeddings(given, step)))
        compare(term.schedule.value * value, arrays[f"out_loss{step}"], 1e-7, f"loss {step}")
    compare(term.student_thresholds, arrays[f"out_s_anchor{step}"], 1e-7, "thresholds")
