"""Detectors on two ranks (torchrun, gloo): the students stay equal, and a queue holds the regions of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.detection import ranks_job
from tests.detection.detectors import retinanet
from tests.engine import distance, rank_results, run_job


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rank_results(tmp_path_factory.mktemp("ranks"), 2, ranks_job.__file__)


@pytest.mark.slow
def test_terms_of_each_image_train_as_in_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """RetinaNet divides by the positives of an image, and CWD by its channels: their means are those of the ranks."""
    run_job(str(tmp_path), script=ranks_job.__file__, timeout=240)
    one = torch.load(tmp_path / "0.pt", weights_only=True)["channel_wise"]["parameters"]
    first, second = (rank["channel_wise"]["parameters"] for rank in ranks)
    assert distance(first, second) == 0.0
    assert distance(first, one) <= 1e-6
    start = dict(retinanet(8).named_parameters())
    assert max((v - start[n[8:]]).abs().max().item() for n, v in one.items() if n.startswith("student.")) > 1e-3


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
