"""DDL and EKD on two ranks (torchrun, gloo): as one process with the samples of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine import run_job
from tests.face import ranks_pairs_job


@pytest.mark.slow
def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    for ranks in (1, 2):
        run_job(str(tmp_path), ranks=ranks, script=ranks_pairs_job.__file__)
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("0-1", "0-2", "1-2"))
    for name, expected in one.items():
        assert expected["head.weight"].abs().max() > 1e-6
        for found in two:
            for key, value in expected.items():
                torch.testing.assert_close(found[name][key], value, rtol=1e-6, atol=1e-9)
