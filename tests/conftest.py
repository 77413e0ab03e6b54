"""Fixtures that the tests of the core share."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from taskkd import costs
from tests import small

torch.set_num_threads(1)
costs.ROUNDS = 1  # the latency of every run is measured as its user has it, over fewer passes


def pytest_collection_finish() -> None:
    """What is there before the first test stays, so that no `gc.collect()` (of each training) looks at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """What a command or a benchmark does to logging ends with its test."""
    own, silenced = logging.getLogger("taskkd"), logging.root.manager.disable
    before = own.level, own.propagate, own.handlers
    yield
    logging.disable(silenced)
    own.setLevel(before[0])
    own.propagate, own.handlers = before[1:]


@pytest.fixture
def conv_pair() -> tuple[nn.Module, nn.Module]:
    """A student and a wider teacher with BatchNorm, ReLU in place and a residual `out += x`."""
    return small.ConvNet(4), small.ConvNet(6)


@pytest.fixture
def bert_pair() -> tuple[nn.Module, nn.Module]:
    """A small BERT student and a wider, deeper teacher."""
    return small.bert(1, 8, seed=1), small.bert(2, 16, seed=2)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of other tests forgotten, before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
