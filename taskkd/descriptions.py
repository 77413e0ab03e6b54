"""A model's own folder: its weights, and beside them a json file that says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from taskkd.errors import CheckpointError, DataError, RecipeError
from taskkd.schema import Model

__all__ = ["WEIGHTS", "load_weights", "read_description", "write_description"]

WEIGHTS = "model.safetensors"

FORMAT = 1
D = TypeVar("D")


def write_description(path: Path, kind: str, config: Model | None, **more: Any) -> None:
    """Write a description, and the folder it is in.

    Args:
        path: of the file.
        kind: the model's class.
        config: what it was built of; None: it was not built here.
        more: plain data; tuples are written as lists.
    """
    built = None if config is None else config.model_dump(exclude_defaults=True)
    data = {"format": FORMAT, "kind": kind, "config": built, **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_description(path: Path, title: str, make: Callable[[Mapping[str, Any]], D]) -> D:
    """What `write_description` wrote.

    Args:
        path: of the file.
        title: what is described, for errors: "a detector".
        make: the description of the plain data; what it raises of a missing key or a wrong type or value is an error.

    Raises:
        DataError: it is not there, not readable, or of a newer version.
        RecipeError: the config in it was changed to what cannot be.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (version := data["format"]) != FORMAT:
            raise DataError(f"{path} has format {version}, this version of taskkd reads {FORMAT}.")
        try:
            return make(data)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not {title}'s description: {type(error).__name__}: {error}.") from None


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load a folder's weights into a model that was built as its description says.

    Raises:
        CheckpointError: they are missing, unreadable, or of another model.
    """
    try:
        load_model(model, str(Path(folder) / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise CheckpointError(f"{folder}: {WEIGHTS} does not load: {lines[:300]}") from None
