"""The methods for segmentation networks, one file for each paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskkd.segmentation.methods.domain_adaptive import domain_adaptive
from taskkd.segmentation.methods.structured import structured
from taskkd.stages import Method

__all__ = [
    "METHODS",
    "domain_adaptive",
    "structured",
]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {
    "domain_adaptive": domain_adaptive,
    "structured": structured,
}
