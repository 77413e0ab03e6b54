"""Methods on centres and triplets on two ranks (torchrun, gloo): as one process with their faces together."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import distance, rank_results
from tests.face import centres_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rank_results(tmp_path_factory.mktemp("ranks"), 2, centres_job.__file__)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = rank_results(tmp_path_factory.mktemp("ranks"), 1, centres_job.__file__)
    return found


@pytest.mark.parametrize("name", centres_job.CHECKS)
class TestTwoRanks:
    def test_are_alike_and_the_same_in_every_run(self, ranks: list[dict[str, Any]], name: str) -> None:
        """Acceptance A12: centres too, which no rank sends to the other, with identities that both have."""
        runs = [run for rank in ranks for run in rank[name]]
        assert any("centres" in n for n in runs[0]) == (name in ("ada_distill", "margin_distillation"))
        assert all(distance(runs[0], run) == 0.0 for run in runs[1:])

    def test_are_one_process_with_the_faces_of_both(
        self, ranks: list[dict[str, Any]], single: dict[str, Any], name: str
    ) -> None:
        assert distance(ranks[0][name][0], single[name][0]) < 1e-9
