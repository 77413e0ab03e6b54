"""Shares of what is held out."""

from __future__ import annotations

import pytest

from taskkd.errors import DataError
from taskkd.splits import shares_of


def test_sizes_are_numbers_or_shares_and_leave_something() -> None:
    assert shares_of({"validation": 10, "test": 0.2}, 100) == pytest.approx([0.7, 0.1, 0.2])
    assert shares_of({}, 100) == [1]
    assert shares_of({"validation": 0.1, "test": 1}, 10, least=2) == pytest.approx([0.7, 0.2, 0.1])
    with pytest.raises(DataError, match=r"data.test_size is 50, there are 40 identities\."):
        shares_of({"test": 50}, 40, "identities")
    with pytest.raises(DataError, match=r"data.validation and data.test: nothing is left of 40 images to train on\."):
        shares_of({"validation": 20, "test": 0.5}, 40)
