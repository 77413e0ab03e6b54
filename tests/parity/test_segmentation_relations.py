"""The terms that the methods on relations build give the values of the reference cases, too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskkd.segmentation.methods import METHODS
from taskkd.terms import Run, Term
from tests.parity.segmentation.relations import labels_of
from tests.parity.test_parity import compare, load, tensors

CASES = Path(__file__).parent / "cases" / "segmentation"


def case(stem: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    about, arrays = load(CASES / f"{stem}.json")
    return about["params"], tensors(arrays), arrays


def network(classes: int) -> nn.Module:
    model = nn.Module()
    model.classes = tuple(map(str, range(classes)))  # type: ignore[assignment]
    model.views = SimpleNamespace(logits="logits", feature="feature", stages=("stage",))  # type: ignore[assignment]
    return model


def term_of(method: str, name: str, classes: int = 4, **options: Any) -> Term:
    terms = METHODS[method](network(classes), network(classes), **options).stages[0].terms
    return next(t for t in terms if t.name == name)


def weighted(term: Term, student: dict[str, Tensor], teacher: dict[str, Tensor], **batch: Tensor) -> Tensor:
    own = {**student, **{f"batch.{n}": v for n, v in batch.items()}}
    run = Run(batch, None, own, teacher)
    term.build(run)
    return term.schedule.value * term(run)


def feature(given: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{"feature": given["in_s"]}, {"feature": given["in_t"]}]


@pytest.mark.parametrize("stem", ["ifvd-0", "ifvd-2"])
def test_ifvd(stem: str) -> None:
    params, given, arrays = case(stem)
    term = term_of("ifvd", "variation", params["num_classes"], ignore="none", weight=200.0)
    value = weighted(term, *feature(given), **labels_of(given, params["ignore"]))
    compare(value, 200 * arrays["out_loss"], 1e-7, "variation")


@pytest.mark.parametrize("stem", ["cirkd_minibatch-1", "cirkd_minibatch-2"])
def test_cirkd(stem: str) -> None:
    params, given, arrays = case(stem)
    options = {"temperature": params["temperature"], "pool": 2 if params["pooling"] else 1}
    compare(weighted(term_of("cirkd", "minibatch", **options), *feature(given)), arrays["out_loss"], 1e-7, "minibatch")


def test_attention_transfer() -> None:
    _, given, arrays = case("at_seg-0")
    value = weighted(term_of("attention_transfer", "attention"), *feature(given))
    compare(value, 10000 * arrays["out_loss"], 1e-7, "attention")


def test_dsd() -> None:
    _, given, arrays = case("dsd_csd-1")
    logits = {"logits": given["in_s"]}, {"logits": given["in_t"][:, : given["in_s"].shape[1]]}
    compare(weighted(term_of("dsd", "categories"), *logits), 10 * arrays["out_loss"], 1e-7, "categories")
    _, given, arrays = case("dsd_psd-1")
    names = dict(zip(("stage", "feature", "logits"), ("", "2", "3"), strict=True))
    layers = [{ours: given[f"in_{side}{n}"] for ours, n in names.items()} for side in "st"]
    compare(weighted(term_of("dsd", "attention"), *layers), 1000 * arrays["out_loss"], 1e-7, "attention")


@pytest.mark.parametrize("method", ["masked_generative", "af_dcd"])
def test_generation(method: str) -> None:
    params, given, arrays = case({"masked_generative": "mgd_seg-0", "af_dcd": "afdcd-1"}[method])
    theirs = {"align": "w_align.", "generator": "w_generation." if method == "masked_generative" else "w_projetor."}
    maps = [{"stage": given[f"in_{side}"].double()} for side in "st"]
    if method == "masked_generative":
        term: Any = term_of(method, "generation", masked=params["mask_ratio"])
        want = arrays["out_loss"]
        draw = given["in_rand"]
    else:
        term = term_of(method, "contrast", mask="middle", groups=params["M"], mimic=2e-6, contrast=0.005)
        want = 2e-6 * arrays["out_fd"] + 0.005 * arrays["out_ctr"]
        draw = torch.empty(0)
    term.build(Run({}, None, *maps))
    for ours, prefix in theirs.items():
        state = {n.removeprefix(prefix): v for n, v in given.items() if n.startswith(prefix)}
        term.layers[ours].double().load_state_dict(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: draw)
        compare(weighted(term, *maps), want, 1e-6, method)
