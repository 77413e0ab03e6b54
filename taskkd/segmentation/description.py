"""What a segmenter's folder says beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskkd.descriptions import read_description, write_description
from taskkd.segmentation.config import SegmenterConfig

__all__ = ["SEGMENTER", "Description"]

SEGMENTER = "segmenter.json"


@dataclass(frozen=True)
class Description:
    """What a segmenter is.

    It has `save_pretrained`, so it can stand where a trainer saves a tokenizer beside a model (`processing_class`).

    Args:
        config: what it was built of; None: it was not built here.
        names: of the classes, in the order of their labels.
        kind: the network's class.
        mean, std: of the images, in 0..1.
        divisor: images are padded to multiples of it.
        size: (height, width) that every image is resized to, or None.
        call: whether it is run by a function of the caller's, which is not saved.
    """

    config: SegmenterConfig | None
    names: tuple[str, ...]
    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    divisor: int = 1
    size: tuple[int, int] | None = None
    call: bool = False

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are shown to the network: arguments of `Segmenter`."""
        return {"mean": self.mean, "std": self.std, "divisor": self.divisor, "size": self.size}

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write `segmenter.json`."""
        call = {"call": True} if self.call else {}
        more = {"names": self.names, **self.preprocessing, **call}
        write_description(Path(folder) / SEGMENTER, self.kind, self.config, **more)

    @classmethod
    def read(cls, folder: str | Path) -> Description:
        """What `save_pretrained` wrote.

        Raises:
            DataError: it is not there, not readable, or of a newer version.
            RecipeError: the config in it was changed to what cannot be.
        """
        return read_description(Path(folder) / SEGMENTER, "a segmenter", cls._made)

    @classmethod
    def _made(cls, data: Mapping[str, Any]) -> Description:
        config = None if data["config"] is None else SegmenterConfig.of(data["config"])
        names, size = tuple(map(str, data["names"])), data["size"]
        mean, std = (tuple(map(float, data[key])) for key in ("mean", "std"))
        shown = None if size is None else (int(size[0]), int(size[1]))
        return cls(config, names, str(data["kind"]), mean, std, int(data["divisor"]), shown, bool(data.get("call")))
