"""Builds a segmentation network from an exported folder; this and what it needs becomes the folder's `network.py`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_model

from taskkd.segmentation.models import _assemble
from taskkd.segmentation.segmenter import Segmenter

__all__ = ["load"]


def load(folder: str | Path = ".") -> Segmenter:
    """The network of a folder, in evaluation mode, with its normalisation: (N, 3, H, W) in 0..1 -> logits.

    Its classes are `classes` in the folder's config.json; the network of its library's own class is `.model`.
    """
    described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    settings: Any = SimpleNamespace(**described["network"])
    network, _ = _assemble(settings, len(described["classes"]), None)
    segmenter = Segmenter(network, described["classes"], **described["preprocessing"])
    load_model(segmenter, str(Path(folder) / "model.safetensors"))
    return segmenter.eval()
