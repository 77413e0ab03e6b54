"""What a segmenter's folder says beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskkd.errors import DataError
from taskkd.segmentation.config import SegmenterConfig

__all__ = ["SEGMENTER", "Description"]

SEGMENTER = "segmenter.json"
FORMAT = 1


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
        config = None if self.config is None else self.config.model_dump(exclude_defaults=True)
        data = {"format": FORMAT, "kind": self.kind, "names": list(self.names), "config": config}
        data |= {key: list(v) if isinstance(v, tuple) else v for key, v in self.preprocessing.items()}
        data |= {"call": True} if self.call else {}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / SEGMENTER).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Description:
        """What `save_pretrained` wrote.

        Raises:
            DataError: it is not there, not readable, or of a newer version.
            RecipeError: the config in it was changed to what cannot be.
        """
        path = Path(folder) / SEGMENTER
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version, names, kind, config = data["format"], data["names"], data["kind"], data["config"]
            mean, std = (tuple(map(float, data[key])) for key in ("mean", "std"))
            divisor, size = int(data["divisor"]), data["size"]
            shown = None if size is None else (int(size[0]), int(size[1]))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path} is not a segmenter's description: {type(error).__name__}: {error}.") from None
        if version != FORMAT:
            raise DataError(f"{path} has format {version}, this version of taskkd reads {FORMAT}.")
        built = None if config is None else SegmenterConfig.of(config)
        return cls(built, tuple(map(str, names)), str(kind), mean, std, divisor, shown, bool(data.get("call", False)))
