"""Which student layer learns from which teacher layer."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import taskkd as kd
from taskkd import layer_maps, losses
from taskkd.errors import TapError, TaskkdError
from tests import small


@pytest.mark.parametrize(
    ("name", "student", "teacher", "pairs"),
    [
        ("uniform", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("uniform", 3, 8, [(0, 1), (1, 4), (2, 7)]),
        ("uniform", 1, 5, [(0, 4)]),
        ("skip", 3, 12, [(0, 3), (1, 7), (2, 11)]),
        ("last", 3, 12, [(0, 9), (1, 10), (2, 11)]),
        ("last", 2, 2, [(0, 0), (1, 1)]),
        ("all_pairs", 2, 3, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        ("all_pairs", 2, 1, [(0, 0), (1, 0)]),
        ("review", 3, 3, [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]),
    ],
)
def test_the_pairs(name: str, student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert getattr(layer_maps, name)(student, teacher) == pairs


@pytest.mark.parametrize("student", range(1, 8))
def test_every_uniform_map_rises_to_the_top(student: int) -> None:
    for teacher in range(student, 13):
        found = [j for _, j in layer_maps.uniform(student, teacher)]
        assert found == sorted(set(found))
        assert found[0] >= 0
        assert found[-1] == teacher - 1


@pytest.mark.parametrize(
    ("name", "student", "teacher", "sentence"),
    [
        ("uniform", 3, 2, "layer map 'uniform': the student has 3 layers, the teacher only 2; expected no more than"),
        ("last", 3, 2, "layer map 'last': the student has 3 layers"),
        ("review", 3, 2, "layer map 'review': the student has 3 layers"),
        ("skip", 3, 2, "layer map 'skip': the student has 3 layers"),
        ("skip", 5, 12, "12 teacher layers are no multiple of 5 student layers, layer map 'skip' takes every k-th"),
        ("all_pairs", 0, 2, "layer map 'all_pairs' needs at least one layer of each, got 0 of the student and 2 of"),
        ("uniform", 1, -1, "layer map 'uniform' needs at least one layer of each"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(name: str, student: int, teacher: int, sentence: str) -> None:
    with pytest.raises(TaskkdError) as caught:
        getattr(layer_maps, name)(student, teacher)
    assert sentence in str(caught.value)


def test_a_map_becomes_terms(bert_pair: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = small.bert(2, 8, seed=1), small.bert(4, 16, seed=2)
    terms = layer_maps.matches(
        "hidden", losses.mse, "bert.encoder.layer.{}", pairs=layer_maps.uniform(2, 4), adapter="linear", weight=0.5
    )
    assert [t.name for t in terms] == ["hidden-0-1", "hidden-1-3"]
    distiller = kd.Distiller(student, teacher, terms)
    batch = small.tokens([4, 6])
    distiller.prepare(batch)
    out = distiller(**batch)
    torch.testing.assert_close(out["loss"].detach(), out["task"] + 0.5 * out["hidden-0-1"] + 0.5 * out["hidden-1-3"])
    assert terms[0].adapters[0] is not terms[1].adapters[0]


def test_two_patterns() -> None:
    (term,) = layer_maps.matches("h", losses.mse, "blocks.{}[:, 0]", "layer{}", pairs=[(1, 7)])
    assert (term.student_taps, term.teacher_taps) == (("blocks.1[:, 0]",), ("layer7",))


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (
            lambda: layer_maps.matches("h", losses.mse, "layer.0", "x.{}", pairs=[(0, 0)]),
            TapError,
            "terms 'h': 'layer.0' is one tap; expected '{}' in place of the layer's number.",
        ),
        (
            lambda: layer_maps.matches("h", losses.mse, "layer.{}", "x", pairs=[(0, 0)]),
            TapError,
            "terms 'h': 'x' is one tap; expected '{}' in place of the layer's number.",
        ),
        (
            lambda: layer_maps.matches("h", losses.mse, "x{}", pairs=[]),
            TaskkdError,
            "terms 'h': there are no pairs of layers.",
        ),
        (
            lambda: layer_maps.matches("h", losses.mse, "x{}", pairs=[(0, 0), (1, 1)], adapter=nn.Linear(1, 1)),
            TaskkdError,
            "terms 'h': one adapter module for several terms; name a kind or give a function.",
        ),
    ],
)  # fmt: skip
def test_bad_patterns_are_sentences(make: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == sentence


def test_docstring_examples_run() -> None:
    result = doctest.testmod(layer_maps)
    assert result.attempted >= 2
    assert result.failed == 0
