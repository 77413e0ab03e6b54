"""Stages and methods."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from taskkd.errors import TapError
from taskkd.stages import Method, Stage, training_only
from tests import small


def trained(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_only_these_parts_train() -> None:
    student = small.ConvNet()
    student.stem.requires_grad_(False)  # by the user
    with training_only(student, ["head", "block.conv"]):
        assert trained(student) == {"head", "block"}
        assert not any(p.requires_grad for p in student.block.norm.parameters())
    assert trained(student) == {"norm", "block", "head"}
    with training_only(student, None):
        assert trained(student) == {"norm", "block", "head"}


def test_an_unknown_part_changes_nothing_for_the_worse() -> None:
    student = small.ConvNet()
    with (
        pytest.raises(TapError, match=r"stage: the student has no module 'hed' \(did you mean 'head'"),
        training_only(student, ["stem", "hed"]),
    ):
        pass
    assert all(p.requires_grad for p in student.parameters())


def test_defaults() -> None:
    stage = Stage("only", [])
    assert (stage.task_weight, stage.trains, dict(stage.overrides)) == (1.0, None, {})
    assert Method("m", [stage]).needs == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage.task_weight = 0.0  # type: ignore[misc]
