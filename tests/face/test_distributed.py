"""Trainings on faces on two ranks (torchrun, gloo): as one process with their images together."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import distance, rank_results
from tests.face import ranks_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rank_results(tmp_path_factory.mktemp("ranks"), 2, ranks_job.__file__)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = rank_results(tmp_path_factory.mktemp("ranks"), 1, ranks_job.__file__)
    return found


@pytest.mark.parametrize("name", ranks_job.RUNS)
def test_two_ranks_train_and_measure_as_one_process(
    name: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    one, (first, second) = single[name], (rank[name] for rank in ranks)
    assert one["step"] == first["step"] == second["step"] == 6
    assert one["untouched"] and first["untouched"] and second["untouched"]
    states = [run["parameters"] for run in (one, first, second)]
    assert distance(states[1], states[2]) == 0.0
    start = ranks_job.network(4, seed=0).state_dict()
    assert max((states[0][f"student.{n}"] - v).abs().max().item() for n, v in start.items()) > 1e-2
    # what is read from a cache is in single precision
    assert distance(states[0], states[1]) <= (1e-6 if ranks_job.RUNS[name][1] else 1e-9)
    assert len(first["losses"]) == 6
    for here, there in zip(one["losses"], first["losses"], strict=True):
        assert here == pytest.approx(there, rel=1e-6)
    assert first["measured"] == second["measured"]
    assert first["measured"] == pytest.approx(one["measured"], abs=1e-5)
