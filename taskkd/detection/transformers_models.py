"""Detectors of `transformers` with torchvision's interface."""

from __future__ import annotations

from torch import nn

__all__ = ["TransformersDetector", "is_transformers"]


class TransformersDetector(nn.Module):
    """A detector of `transformers`; being written."""


def is_transformers(model: nn.Module) -> bool:
    """Whether a module is a model of `transformers` itself."""
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)
