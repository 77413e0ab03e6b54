"""What a face model's folder says beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taskkd.descriptions import read_description, write_description
from taskkd.errors import CheckpointError
from taskkd.face.config import FaceConfig

__all__ = ["CENTRES", "FACE", "Description"]

FACE = "face.json"
CENTRES = "centres.safetensors"


@dataclass(frozen=True)
class Description:
    """What a face model is.

    It has `save_pretrained`, so it can stand where a trainer saves a tokenizer beside a model (`processing_class`).

    Args:
        config: what it was built of; None: it was not built here.
        kind: the backbone's class.
        embedding_size: of the embeddings.
        size: side that images are resized to.
        channels: their order in the backbone.
        mean, std: of the pixels in 0..1, in that order.
        centres: (identities, embedding_size), in a file of their own; None: there are none.
    """

    config: FaceConfig | None
    kind: str
    embedding_size: int
    size: int
    channels: Literal["rgb", "bgr"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    centres: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are shown to the network: arguments of `FaceModel`."""
        return {"size": self.size, "channels": self.channels, "mean": self.mean, "std": self.std}

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write `face.json`, and `centres.safetensors` where there are any (one that is there goes where not)."""
        more = {"embedding_size": self.embedding_size, **self.preprocessing}
        write_description(Path(folder) / FACE, self.kind, self.config, **more)
        path = Path(folder) / CENTRES
        if self.centres is None:
            path.unlink(missing_ok=True)
        else:
            save_file({"centres": self.centres.detach().cpu().clone().contiguous()}, str(path))

    @classmethod
    def read(cls, folder: str | Path) -> Description:
        """What `save_pretrained` wrote.

        Raises:
            DataError: it is not there, not readable, or of a newer version.
            CheckpointError: the centres are not readable, or of another size than the embeddings.
            RecipeError: the config in it was changed to what cannot be.
        """
        found = read_description(Path(folder) / FACE, "a face model", cls._made)
        return replace(found, centres=_centres(Path(folder) / CENTRES, found.embedding_size))

    @classmethod
    def _made(cls, data: Mapping[str, Any]) -> Description:
        config = None if data["config"] is None else FaceConfig.of(data["config"])
        width, size, channels = int(data["embedding_size"]), int(data["size"]), data["channels"]
        mean, std = (tuple(map(float, data[key])) for key in ("mean", "std"))
        if channels not in ("rgb", "bgr") or len(mean) != 3 or len(std) != 3:
            raise ValueError("its channels are neither 'rgb' nor 'bgr', or its mean and std are not three numbers")
        return cls(config, str(data["kind"]), width, size, channels, mean, std)


def _centres(path: Path, width: int) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        centres: Tensor = load_file(str(path))["centres"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}.") from None
    if centres.dim() != 2 or centres.shape[1] != width:
        raise CheckpointError(f"{path} holds {tuple(centres.shape)}: expected (identities, {width}).")
    return centres
