"""Builds a face model from an exported folder; this and what it needs becomes the folder's `network.py`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_model

from taskkd.face.model import FaceModel
from taskkd.face.models import _backbone, _sizes

__all__ = ["load"]


def load(folder: str | Path = ".") -> FaceModel:
    """The face model of a folder, in evaluation mode, with its normalisation: aligned crops in RGB -> embeddings."""
    described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    settings: Any = SimpleNamespace(**described["network"])
    model = FaceModel(_backbone(settings, None)[0], **described["preprocessing"], **_sizes(settings))
    load_model(model, str(Path(folder) / "model.safetensors"))
    return model.eval()
