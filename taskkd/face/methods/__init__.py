"""The methods for face recognition, one file for each paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskkd.stages import Method

__all__ = ["METHODS"]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {}
