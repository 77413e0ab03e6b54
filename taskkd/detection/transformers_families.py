"""Families of the detectors of `transformers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskkd.detection.families import Family

__all__ = ["transformers_family"]


def transformers_family(model: Any) -> Family:
    """The family of a wrapped detector."""
    raise NotImplementedError
