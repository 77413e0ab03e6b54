"""Any network of embeddings behind one interface: crops of faces in, embeddings out, preprocessing its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import ShapeError, TapError, TaskkdError, nearest
from taskkd.face.config import FaceConfig
from taskkd.face.description import Description

__all__ = ["FaceModel", "Views"]


@dataclass(frozen=True)
class Views:
    """Where a face model's tensors are: taps on it, to be used in terms.

    Args:
        stages: (N, C, h, w) of each stage of the backbone, finest first; none where it has no maps.
    """

    stages: tuple[str, ...]


class FaceModel(nn.Module):
    """A backbone with the preprocessing that it was trained with.

    How pixels are shown to a network belongs to the network: a teacher in BGR and a student in RGB see the same batch.
    `state_dict` has the backbone's own keys under "backbone." and, where there is one, "projector.".

    Attributes:
        embedding_size: of the embeddings, after the projector.
        identities: how many identities the training data has; set by the task, else None.
        centres: (identities, embedding_size), the classifier that the model was trained with, or class means; neither a
            parameter nor in `state_dict`, and saved beside the weights. None: unknown.
        built: what it was built of, where `taskkd.face.models` did.

    Args:
        backbone: images (N, 3, size, size), normalised -> (N, D).
        size: side that images are resized to (bilinear) where they have another.
        channels: their order that the backbone wants; images come in RGB.
        mean, std: of the pixels in 0..1, as one number or as three in the backbone's order of channels.
        projector: (N, D) -> (N, E), a part of the model, where embeddings are to have another size.
        identities: see above.
        embedding_size: where the backbone does not say (`backbone.embedding_size`); default: found by a dry run.
        stages: names of the backbone's modules that end its stages. Default: `backbone.stages`, or none.

    Raises:
        TaskkdError: the settings cannot be, or the backbone does not run on such images.
        TapError: a stage is no module of the backbone.

    Example:
        >>> net = FaceModel(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(4 * 7 * 7, 8)), size=16)
        >>> net(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))["embeddings"].shape
        torch.Size([2, 8])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        size: int = 112,
        channels: Literal["rgb", "bgr"] = "rgb",
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        projector: nn.Module | None = None,
        identities: int | None = None,
        embedding_size: int | None = None,
        stages: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if channels not in ("rgb", "bgr"):
            raise TaskkdError(f"`channels` is 'rgb' or 'bgr', got {channels!r}.")
        if size < 1:
            raise TaskkdError(f"`size` must be positive, got {size}.")
        self.backbone = backbone
        self.projector = projector
        self.size, self.channels = int(size), channels
        self._normal = (_three(mean, "mean"), _three(std, "std"))
        if min(self._normal[1]) <= 0:
            raise TaskkdError(f"`std` must be positive, got {std}.")
        like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
        for name, value in zip(("mean", "std"), self._normal, strict=True):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1).to(like), persistent=False)
        self.identities = identities
        self.centres: Tensor | None = None
        self.built: FaceConfig | None = None
        self.views = Views(_stages(backbone, stages))
        self.embedding_size = embedding_size if embedding_size is not None else self._width()

    @property
    def kind(self) -> str:
        """The name of the backbone's class."""
        return type(self.backbone).__name__

    @property
    def description(self) -> Description:
        """What is saved beside the weights."""
        kind = f"{type(self.backbone).__module__}.{type(self.backbone).__qualname__}"
        return Description(
            self.built, kind, self.embedding_size, self.size, self.channels, *self._normal, centres=self.centres
        )

    @property
    def input_settings(self) -> dict[str, Any]:
        """How images are shown to the backbone: no weight tells it, and a cache of the embeddings depends on it."""
        mean, std = self._normal
        return {"size": self.size, "channels": self.channels, "mean": mean, "std": std}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Embeddings of aligned crops.

        Args:
            images: (N, 3, H, W) RGB; uint8, or floats in 0..1.

        Returns:
            `embeddings` (N, embedding_size), as the network gives them: not normalised.

        Raises:
            ShapeError: they are no such images; one image in training, of which no batch normalisation has statistics;
                or the backbone does not give one vector for each.
        """
        return {"embeddings": self._embeddings(images)}

    def _embeddings(self, images: Tensor) -> Tensor:
        embeddings = self.backbone(self._shown(images))
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or len(embeddings) != len(images):
            got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ShapeError(
                f"the {self.kind} gives {got} of {len(images)} images: expected a tensor of one embedding for each, "
                "(N, D)."
            )
        return embeddings if self.projector is None else self.projector(embeddings)

    def _shown(self, images: Tensor) -> Tensor:
        """Images as the backbone was trained to see them."""
        _check(images)
        if len(images) == 1 and any(isinstance(m, nn.BatchNorm1d) and m.training for m in self.modules()):
            raise ShapeError(
                "a batch of one image in training: the batch normalisation of embeddings needs two or more; drop the "
                "last batch, or call model.eval()."
            )
        x = images.to(torch.promote_types(self.mean.dtype, torch.float32))
        if images.dtype == torch.uint8:
            x = x / 255
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        if self.channels == "bgr":
            x = x.flip(1)
        return ((x - self.mean) / self.std).to(self.mean.dtype)

    @torch.no_grad()
    def embed(self, images: Tensor, flip: bool = True) -> Tensor:
        """Unit embeddings, in evaluation mode and without gradient; every module's mode is put back.

        Args:
            images: as in `forward`.
            flip: add those of the mirrored images before normalising, as evaluations do.

        Returns:
            (N, embedding_size) of length 1.

        Raises:
            ShapeError: they are no such images, or floats outside of 0..1.
        """
        _check(images)
        if images.is_floating_point() and images.numel():
            low, high = (float(v) for v in images.aminmax())
            if low < -1e-3 or high > 1 + 1e-3:
                raise ShapeError(
                    f"the images lie in {low:.3g}..{high:.3g}: expected uint8, or floats in 0..1; the model normalises "
                    "them itself."
                )
        with _evaluating(self):
            total = self._embeddings(images)
            if flip:
                total = total + self._embeddings(images.flip(3))
        return F.normalize(total if total.dtype == torch.float64 else total.float())

    def _width(self) -> int:
        """Size of the embeddings, by what the backbone says or by a dry run."""
        said = getattr(self.backbone, "embedding_size", None)
        if isinstance(said, int) and self.projector is None:
            return said
        images = torch.zeros(2, 3, self.size, self.size, dtype=self.mean.dtype, device=self.mean.device)
        try:
            with torch.no_grad(), _evaluating(self):
                return int(self._embeddings(images).shape[1])
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TaskkdError(
                f"the {self.kind} does not run on an image of {self.size} x {self.size}: {first}"
            ) from error


def _three(value: float | Sequence[float], name: str) -> tuple[float, float, float]:
    """One number for all channels, or three."""
    numbers = [float(value)] * 3 if isinstance(value, int | float) else [float(v) for v in value]
    if len(numbers) != 3:
        raise TaskkdError(f"`{name}` is one number or three, one for each channel, got {len(numbers)}.")
    return (numbers[0], numbers[1], numbers[2])


def _check(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        hint = " (channels come second)" if images.dim() == 4 and images.shape[3] == 3 else ""
        hint = hint or (" (add a dimension: images[None])" if images.dim() == 3 else "")
        raise ShapeError(f"images have the shape {tuple(images.shape)}: expected (N, 3, H, W){hint}.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ShapeError(f"images are {str(images.dtype).removeprefix('torch.')}: expected uint8, or floats in 0..1.")


def _stages(backbone: nn.Module, given: Sequence[str] | None) -> tuple[str, ...]:
    """Taps of the backbone's stages."""
    own = getattr(backbone, "stages", None)
    names = given if given is not None else own if isinstance(own, tuple) else ()
    known = dict(backbone.named_modules())
    for name in names:
        if name not in known:
            raise TapError(f"stage {name!r}: the backbone has no such module{nearest(name, known)}.")
    return tuple(f"backbone.{name}" for name in names)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
