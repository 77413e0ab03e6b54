"""Gradient perturbation: each step is taken on the loss at inputs moved along its own gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskkd.errors import TapError, nearest
from taskkd.losses.primitives import safe_divide

__all__ = ["GradientPerturbation"]


class GradientPerturbation:
    """Add the loss's gradient to the output of a module of the student, and train on the loss that comes of it.

    Source: Fu et al. 2021 (LRC-BERT), who perturb the embedding output in their second stage "to increase robustness";
    their paper leaves scale and norm open, so both are options here. With `norm="l2"` it is the adversarial training of
    Miyato, Dai, Goodfellow 2017. A step costs two forwards and two backwards of the student, one of the teacher.

    Args:
        path: the module, its output a tensor (batch, ...): the embeddings.
        size: factor of the gradient.
        norm: "l2": each sample's gradient is brought to length 1 first; "none": it is taken as it is.

    Raises:
        ValueError: `size` is not positive, or `norm` is neither.
    """

    def __init__(self, path: str, *, size: float = 1.0, norm: Literal["l2", "none"] = "l2") -> None:
        if not size > 0:
            raise ValueError(f"`size` of a perturbation must be positive, got {size}.")
        if norm not in ("l2", "none"):
            raise ValueError(f"`norm` of a perturbation must be 'l2' or 'none', got {norm!r}.")
        self.path, self.size, self.norm = path, size, norm
        self._seen: Tensor | None = None
        self._change: Tensor | None = None

    def module(self, student: nn.Module) -> nn.Module:
        """The module whose output is perturbed.

        Raises:
            TapError: the student has none of this name.
        """
        modules = dict(student.named_modules())
        if self.path not in modules:
            raise TapError(f"perturbation: the student has no module {self.path!r}{nearest(self.path, modules)}.")
        found: nn.Module = modules[self.path]
        return found

    @contextmanager
    def watching(self, student: nn.Module) -> Iterator[None]:
        """During this block the module's output is seen, and moved once `move` has said how far."""
        handle = self.module(student).register_forward_hook(self._hook)
        try:
            yield
        finally:
            handle.remove()
            self._seen = self._change = None

    def _hook(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if self._change is not None:
            return output + self._change
        if not isinstance(output, Tensor) or not output.requires_grad:
            raise TapError(f"perturbation: {self.path!r} gives no tensor that gradient flows through.")
        self._seen = output
        return None

    def move(self, loss: Tensor) -> None:
        """Perturb the forwards that follow in this block along the gradient of this loss."""
        assert self._seen is not None
        (gradient,) = torch.autograd.grad(loss, self._seen)
        if self.norm == "l2":
            length = torch.linalg.vector_norm(gradient.float().flatten(1), dim=1)
            gradient = safe_divide(gradient, length.reshape(-1, *(1,) * (gradient.ndim - 1))).to(gradient.dtype)
        self._change = self.size * gradient
