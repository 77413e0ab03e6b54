"""What a detector's folder says beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskkd.descriptions import read_description, write_description
from taskkd.detection.config import DetectorConfig

__all__ = ["DETECTOR", "Description"]

DETECTOR = "detector.json"


@dataclass(frozen=True)
class Description:
    """What a detector is.

    It has `save_pretrained`, so it can stand where a trainer saves a tokenizer beside a model (`processing_class`).

    Args:
        config: None: the model was not built here.
        names: of the classes, without the background; label i + 1 is `names[i]`.
        kind: the model's class.
    """

    config: DetectorConfig | None
    names: tuple[str, ...]
    kind: str

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write `detector.json`."""
        names = list(self.names)
        write_description(Path(folder) / DETECTOR, self.kind, self.config, names=names)

    @classmethod
    def read(cls, folder: str | Path) -> Description:
        """What `save_pretrained` wrote.

        Raises:
            DataError: it is not there, not readable, or of a newer version.
            RecipeError: the config in it was changed to what cannot be.
        """
        return read_description(Path(folder) / DETECTOR, "a detector", cls._made)

    @classmethod
    def _made(cls, data: Mapping[str, Any]) -> Description:
        config = None if data["config"] is None else DetectorConfig.of(data["config"])
        return cls(config, tuple(map(str, data["names"])), str(data["kind"]))
