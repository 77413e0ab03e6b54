"""Builds a detector from an exported folder; this and what it needs becomes the folder's `network.py`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_model
from torch import nn

from taskkd.detection.architectures import assemble

__all__ = ["load"]


class Settings(SimpleNamespace):
    """What the detector is built of, by name."""

    def model_copy(self, update: dict[str, Any]) -> Settings:
        """The same with other values."""
        return Settings(**{**vars(self), **update})


def load(folder: str | Path = ".") -> nn.Module:
    """The detector of a folder, one of torchvision's own class, in evaluation mode.

    Its classes are `classes` in the folder's config.json; label 1 is the first of them.
    """
    described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    settings: Any = Settings(**described["network"])
    model, _ = assemble(settings, len(described["classes"]), None, load=lambda *_: None)
    load_model(model, str(Path(folder) / "model.safetensors"))
    return model.eval()
