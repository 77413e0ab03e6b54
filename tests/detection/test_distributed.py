"""Detectors on two ranks (torchrun, gloo): the students stay equal, and a queue holds the regions of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.detection import ranks_job
from tests.detection.detectors import retinanet
from tests.engine import distance, rank_results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rank_results(tmp_path_factory.mktemp("ranks"), 2, ranks_job.__file__)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = rank_results(tmp_path_factory.mktemp("single"), 1, ranks_job.__file__)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks_job.ALIKE)
def test_terms_train_as_in_one_process(ranks: list[dict[str, Any]], single: dict[str, Any], name: str) -> None:
    """RetinaNet divides by the positives of an image, and CWD by its channels; the others are gathered."""
    one = single[name]["parameters"]
    first, second = (rank[name]["parameters"] for rank in ranks)
    assert {v.dtype for v in one.values()} == {torch.float64}
    assert distance(first, second) == 0.0
    assert distance(first, one) <= 1e-9
    assert len(ranks[0][name]["losses"]) == 3
    for here, there in zip(single[name]["losses"], ranks[0][name]["losses"], strict=True):
        assert here == pytest.approx(there, rel=1e-6)
    start = dict(retinanet(8).named_parameters())
    assert max((v - start[n[8:]]).abs().max().item() for n, v in one.items() if n.startswith("student.")) > 1e-3


@pytest.mark.slow
def test_what_is_not_gathered_is_of_a_rank(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    one, first = single["correlated"]["parameters"], ranks[0]["correlated by rank"]["parameters"]
    assert distance(first, one) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pearson_kd", "gdetkd"])
def test_students_of_two_ranks_are_equal(ranks: list[dict[str, Any]], method: str) -> None:
    first, second = (rank[method] for rank in ranks)
    assert first["step"] == second["step"] == 3
    assert first["untouched"]
    assert second["untouched"]
    assert distance(first["parameters"], second["parameters"]) == 0.0
    assert any(n.startswith("terms.") for n in first["parameters"])
    start = dict(retinanet(8).named_parameters())
    moved = {n: v for n, v in first["parameters"].items() if n.startswith("student.")}
    assert sum(not torch.equal(v, start[n.partition(".")[2]]) for n, v in moved.items()) > 0.9 * len(start)


@pytest.mark.slow
def test_a_queue_holds_the_regions_of_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["gdetkd"]["queue"] for rank in ranks)
    assert distance(first, second) == 0.0
    seen, rows = (next(v for n, v in first.items() if n.endswith(end)) for end in ("queue.seen", "queue.rows"))
    # three steps of two ranks with two images each, which have one to three boxes and the student's predictions
    assert int(seen) > 100
    assert int((rows.abs().sum(1) > 0).sum()) == int(seen)
