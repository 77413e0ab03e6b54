"""Detectors of `transformers` with torchvision's interface."""

from __future__ import annotations

from torch import nn

__all__ = ["TransformersDetector"]


class TransformersDetector(nn.Module):
    """A detector of `transformers`; being written."""
