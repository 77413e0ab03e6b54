"""A look inside a model: which modules run on an input, in which order, and what they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.taps import accepted_arguments

__all__ = ["Seen", "seen"]


@dataclass(frozen=True)
class Seen:
    """A module that ran.

    Args:
        name: as a tap.
        output: the shape of what it gave; of several tensors, each with what a tap adds to the name: "[0] (1, 8)".
        kind: its class.
        calls: how often it ran.
    """

    name: str
    output: str
    kind: str
    calls: int = 1


def seen(model: nn.Module, batch: Mapping[str, Any], depth: int = 3) -> list[Seen]:
    """The modules of a model that run on a batch, in the order in which they end; then its own output, `out`.

    Args:
        model: run once in evaluation mode, without gradient; its modes are put back.
        batch: of which it gets what its `forward` accepts.
        depth: of module names; numbers in them do not count.
    """
    found: dict[str, Seen] = {}

    def look(name: str, module: nn.Module, _args: Any, value: Any) -> None:
        before = found.get(name)
        found[name] = Seen(name, shapes(value), type(module).__name__, 1 if before is None else before.calls + 1)

    modules = [(n, m) for n, m in model.named_modules() if n and _depth(n) <= depth]
    handles = [module.register_forward_hook(partial(look, name)) for name, module in modules]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            output = model.eval()(**accepted_arguments(model.forward)(batch))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    listed = [
        s if s.calls == 1 else replace(s, output=f"{s.output}; @{s.calls - 1} of {s.calls} calls")
        for s in found.values()
    ]
    return [*listed, Seen("out", shapes(output, ".{}"), type(output).__name__)]


def _depth(name: str) -> int:
    return sum(not part.isdigit() for part in name.split("."))


def shapes(value: Any, key: str = "[{}]", most: int = 6) -> str:
    """Shapes of a value in a line; of several, each with the rest of the tap that reads it, its `key` written so."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        items = [(key.format(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"[{i}]", item) for i, item in enumerate(value)]
    else:
        return type(value).__name__
    shown = [f"{rest} {shapes(item)}" for rest, item in items[:most] if item is not None]
    return "; ".join([*shown, *(["..."] if len(items) > most else [])])
