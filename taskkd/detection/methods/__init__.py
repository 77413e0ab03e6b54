"""The methods for detectors, one file for each paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskkd.detection.methods.bckd import bckd
from taskkd.detection.methods.crosskd import crosskd
from taskkd.detection.methods.localization import localization
from taskkd.stages import Method

__all__ = ["METHODS"]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {
    "bckd": bckd,
    "crosskd": crosskd,
    "localization": localization,
}
