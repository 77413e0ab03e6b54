"""Weights over time."""

from __future__ import annotations

import pytest

from taskkd.schedules import Progress, Schedule, constant, warmup


def test_constant() -> None:
    schedule = constant(0.3)
    assert [schedule(Progress(step, total)) for step, total in ((0, None), (7, 10), (100, 10))] == [0.3] * 3
    assert not schedule.needs_total


def test_warmup_by_steps() -> None:
    schedule = warmup(2.0, steps=4)
    assert not schedule.needs_total
    assert [schedule(Progress(step)) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warmup_by_fraction() -> None:
    schedule = warmup(2.0, fraction=0.5)
    assert schedule.needs_total
    assert [schedule(Progress(step, 8)) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warmup_of_review_kd_counts_epochs_from_one() -> None:
    schedule = warmup(1.0, steps=20)
    assert [schedule(Progress(epoch - 1)) for epoch in (1, 10, 20, 240)] == [1 / 20, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("options", [{"steps": 0}, {"fraction": 0.0}])
def test_a_warmup_of_no_length_is_the_full_weight(options: dict[str, float]) -> None:
    assert warmup(3.0, **options)(Progress(0, 10)) == 3.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "`warmup` takes exactly one of `steps` and `fraction`."),
        ({"steps": 3, "fraction": 0.1}, "`warmup` takes exactly one of `steps` and `fraction`."),
        ({"steps": -1}, "`steps` must not be negative, got -1."),
        ({"fraction": 1.5}, "`fraction` must be in [0, 1], got 1.5."),
        ({"fraction": -0.1}, "`fraction` must be in [0, 1], got -0.1."),
    ],
)
def test_errors_are_sentences(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^`") as caught:
        warmup(1.0, **options)
    assert str(caught.value) == sentence


def test_a_fraction_needs_the_total() -> None:
    with pytest.raises(ValueError, match=r"call `distiller.set_total\(optimiser_steps\)` before the first step"):
        warmup(1.0, fraction=0.1)(Progress(0))


def test_a_shape_of_ones_own() -> None:
    drop = Schedule(5.0, lambda progress: float(progress.step < 3))
    assert [drop(Progress(step)) for step in (2, 3)] == [5.0, 0.0]
