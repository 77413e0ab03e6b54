"""What a run prints, and the score."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskkd import costs, reports
from tests import reported


def test_the_score_is_the_documented_one() -> None:
    assert reports.score(1.0, 0.25, 0.25) == pytest.approx(0.75**0.25)
    assert reports.score(0.9, 0.5, 0.125) == pytest.approx(0.9**0.75 * 0.75**0.25)
    assert reports.score(1.2, 0.25, 0.25) == reports.score(1.0, 0.25, 0.25)
    assert reports.score(0.9, 1.0, 1.0) == 0
    assert reports.score(0.9, 2.0, 2.0) == 0
    assert reports.score(-0.1, 0.1, 0.1) == 0
    # losing half of the quality costs more than nothing saved gains
    assert reports.score(0.5, 0.01, 0.01) < reports.score(0.95, 0.5, 0.5)


def test_rows_have_the_score_and_older_reports_do_without() -> None:
    teacher, alone, distilled = reports.rows(reported.report())
    assert teacher["score"] == 0
    assert distilled["score"] == pytest.approx(((0.81 - 0.5) / 0.4) ** 0.75 * 0.75**0.25)
    assert alone["score"] < distilled["score"]
    assert distilled["speed_up"] == 2.5
    assert distilled["gain"] == pytest.approx(0.10)
    older = reported.report()
    del older["chance"]
    assert [row["score"] for row in reports.rows(older)] == [None] * 3
    bare = {k: {"parameters": 1.0, "bytes": 1.0, "latency_ms": None} for k in ("teacher", "student")}
    assert reports.rows(reported.report(models=bare))[2]["speed_up"] is None
    assert reports.table(reported.report(models=bare)).row_count == 3


def network(width: int) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, width), nn.Linear(width, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images).relu())

    return Net()


def test_costs_are_counted_and_timed() -> None:
    batches = [{"images": torch.randn(1, 8)} for _ in range(5)]
    found = costs.measure(network(16), network(4), batches, [{"images": torch.randn(8, 8)}])
    assert found["teacher"]["flops"] == 2 * (8 * 16 + 16 * 4)
    assert found["student"]["flops"] == 2 * (8 * 4 + 4 * 4)
    assert found["student"]["parameters"] == 8 * 4 + 4 + 4 * 4 + 4
    assert found["student"]["bytes"] == 4 * found["student"]["parameters"]
    for own in found.values():
        assert 0 < own["latency_ms"] <= own["latency_p95_ms"]  # type: ignore[operator]
        assert 0 < own["latency_8_ms"] <= own["latency_8_p95_ms"]  # type: ignore[operator]
    nothing = costs.measure(network(16), network(4), [])
    assert nothing["student"]["flops"] is nothing["student"]["latency_8_ms"] is None


def test_slow_models_are_timed_within_the_budget() -> None:
    calls = {"count": 0}

    class Slow(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            calls["count"] += 1
            end = torch.tensor(0.0)
            for _ in range(200):
                end = end + (images @ images.T).sum()
            return end

    batches = [{"images": torch.randn(1, 8)} for _ in range(60)]
    costs.measure(Slow(), network(4), batches, budget=0.0)
    assert calls["count"] == 1 + costs.LEAST + costs.COUNTED


def test_a_model_that_cannot_be_counted_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def broken(batch: object) -> None:
        raise RuntimeError("no such kernel")

    assert costs._flops(broken, [{}], "student") is None
    assert "cannot be counted: no such kernel" in caplog.text
