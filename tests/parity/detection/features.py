"""Parity adapters of detection losses; see `tests/parity/adapters.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]

ADAPTERS: dict[str, Callable[[Arrays, Params], Mapping[str, Tensor]]] = {}
