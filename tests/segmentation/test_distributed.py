"""Segmentation networks on two ranks (torchrun, gloo): as one process with their images together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import distance, rank_results
from tests.segmentation import ranks_job, toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rank_results(tmp_path_factory.mktemp("ranks"), 2, ranks_job.__file__)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = rank_results(tmp_path_factory.mktemp("ranks"), 1, ranks_job.__file__)
    return found


@pytest.mark.parametrize("kind", ["means", "gathered", "shared"])
def test_students_and_memories_of_two_ranks_are_equal(ranks: list[dict[str, Any]], kind: str) -> None:
    first, second = (rank[kind] for rank in ranks)
    assert first["step"] == second["step"] == 3
    assert first["untouched"]
    assert second["untouched"]
    states = [rank[kind]["parameters"] for rank in ranks]
    if kind == "shared":  # where batch norm is of a rank's own images
        states = [{n: v for n, v in state.items() if "running" not in n} for state in states]
    assert distance(*states) == 0.0
    assert any("queue" in n for n in states[0]) == (kind == "shared")


@pytest.mark.parametrize("kind", ["means", "gathered"])
def test_training_is_that_of_one_process_with_the_images_of_both(
    ranks: list[dict[str, Any]], single: dict[str, Any], kind: str
) -> None:
    losses = ranks[0][kind]["losses"]
    found, single = ranks[0][kind]["parameters"], single[kind]
    assert single["step"] == len(losses) == 3
    for here, there in zip(single["losses"], losses, strict=True):
        assert here == pytest.approx(there, rel=1e-6)
    start = ranks_job.frozen(toy.network(2, seed=0)).state_dict()
    moved = {
        n: (v - start[n.removeprefix("student.")]).abs().max() for n, v in found.items() if n in single["parameters"]
    }
    assert max(moved.values()) > 1e-2
    assert {v.dtype for v in found.values()} == {torch.float64}
    assert distance(found, single["parameters"]) <= 1e-9


def test_all_ranks_measure_what_one_process_measures(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    first, second = (rank["means"]["measured"] for rank in ranks)
    assert {"eval_mIoU", "eval_pixel_accuracy", "eval_IoU/ground"} <= first.keys()
    assert first == second == single["means"]["measured"]
