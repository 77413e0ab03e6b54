"""Where a segmentation network has its maps: found by one dry run, so that no recipe names a module of a library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import TapError, nearest
from taskkd.taps import parse_tap

if TYPE_CHECKING:
    from taskkd.segmentation.segmenter import Segmenter

__all__ = ["Views", "probe"]

BACKBONES = ("backbone", "encoder")
STRIDES = (2, 4, 8, 16, 32, 64)
#: (height, width) of the dry run. Unequal sides tell maps from attention scores; some networks have one square size.
SIZES = ((64, 96), (64, 64), (128, 192), (224, 224), (256, 256), (384, 384), (512, 512))


@dataclass(frozen=True)
class Views:
    """Where the maps of a segmenter are: taps on it, to be used in terms.

    Args:
        logits: (N, K, h, w), as the last layer gives them, before they are made larger.
        feature: (N, C, h, w), what that layer is given; None: it has none of its own.
        aux: (N, K, h, w), logits of the auxiliary head, if there is one.
        stages: (N, C, h, w) of each stride of the backbone, finest first, the last map of each.
    """

    logits: str
    feature: str | None
    aux: str | None
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """A map that a module gave in the dry run.

    Args:
        name: of the module.
        module: itself.
        value: the map.
        entered: height of the map that it was given; 0: it was given none.
    """

    name: str
    module: nn.Module
    value: Tensor
    entered: int = 0

    def holds(self, other: Seen) -> bool:
        """Whether `other` is a module inside of this one."""
        return other.name.startswith(f"{self.name}.")

    @property
    def is_block(self) -> bool:
        """Whether it is one step of a network, and no part with several stages: it changes the stride at most once."""
        return 0 < self.entered <= 2 * int(self.value.shape[2])


def probe(
    model: Segmenter, *, logits: str | None = None, feature: str | None = None, stages: tuple[str, ...] | None = None
) -> Views:
    """Find the views of a segmenter by one dry run on a small image, in evaluation mode and without gradient.

    The native logits are those of the convolution with as many output channels as there are classes whose output,
    resized, is the network's; the feature is its input. Convolutions with "aux" in their name are auxiliary heads.
    torchvision's LRASPP adds two such convolutions: its logits are the head's, its feature `classifier.cbr`'s.
    The stages are, of each stride from 2 on, the last four-dimensional map that a module of the backbone gave, of those
    modules that ran once and are not inside of a block that ends at another stride. The backbone is the network's
    `backbone`, `encoder` or transformers' base model; where that has maps of fewer than two strides (plain vision
    transformers) or is not there, it is all that runs outside the child that holds the logits. Parameters, buffers,
    random state and modes are left as they were.

    Args:
        model: the segmenter.
        logits, feature, stages: taps, if they are known: of the segmenter ("model.head") or of its network ("head").

    Raises:
        TapError: a given tap is not in the model; several layers could be the one; the network does not have as many
            output channels as classes, or runs on none of the sizes that are tried.
    """
    given = [_within(model, t) for t in (logits, feature)]
    chosen = None if stages is None else tuple(_required(model, t) for t in stages)
    if model.universal:
        return Views(given[0] or "out.logits", given[1], None, chosen or ())
    output, images, seen = _dry_run(model)
    found, behind = (given[0], None) if given[0] else _logits(model, output, seen)
    if found != "out.logits" and behind is None:
        tap = parse_tap(found)
        behind = f"{tap.path}:in" if tap.root == "module" and tap.port == "out" else None
    aux = [s.name for s in seen if _classifies(s, len(model.classes)) and "aux" in s.name]
    if chosen is None:
        chosen = _stages(model, images, seen, parse_tap(found).path)
    return Views(found, given[1] or behind, aux[-1] if aux else None, chosen)


def _within(model: nn.Module, tap: str | None) -> str | None:
    return None if tap is None else _required(model, tap)


def _required(model: nn.Module, tap: str) -> str:
    """A tap on the segmenter, written as one on it or on its network."""
    parsed = parse_tap(tap)
    if parsed.root != "module":
        return tap
    modules = dict(model.named_modules(remove_duplicate=False))
    if f"model.{parsed.path}" in modules:
        return f"model.{tap}"
    if parsed.path in modules:
        return tap
    inner = [name.removeprefix("model.") for name in modules]
    raise TapError(f"tap {tap!r}: the network has no module {parsed.path!r}{nearest(parsed.path, inner)}.")


# ---- the dry run


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient, autocast or an effect on the random state; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    device = next(model.buffers()).device
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.no_grad(),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _dry_run(model: Segmenter) -> tuple[Tensor, Tensor, list[Seen]]:
    """Logits, images, and the map of every module that ran once, in the order in which they were finished."""
    problem: Exception | None = None
    for size in SIZES if model.size is None else [model.size]:
        height, width = (-(-side // model.divisor) * model.divisor for side in size)
        images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(model.mean)
        try:
            output, seen = _watched(model, images)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # the libraries' own checks
            problem = problem or error
            continue
        if output.shape[1] != len(model.classes):
            raise TapError(
                f"the {model.kind} gives {output.shape[1]} channels of logits, for {len(model.classes)} classes "
                f"({', '.join(model.classes[:8])}): expected as many."
            )
        return output, images, seen
    first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    size = model.size or SIZES[0]
    raise TapError(f"the {model.kind} does not run on an image of {size[0]} x {size[1]}: {first}") from problem


def _watched(model: Segmenter, images: Tensor) -> tuple[Tensor, list[Seen]]:
    seen: list[Seen] = []
    calls: Counter[str] = Counter()

    def see(name: str, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        calls[name] += 1
        if isinstance(value, Tensor) and value.dim() == 4:
            given = args[0] if args else None
            entered = int(given.shape[2]) if isinstance(given, Tensor) and given.dim() == 4 else 0
            # a copy: layers after it may work in place
            seen.append(Seen(name, module, value.detach().clone(), entered))

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(partial(see, name)) for name, module in named]
    try:
        with _evaluating(model):
            output: Tensor = model(images)["logits"]
    finally:
        for handle in handles:
            handle.remove()
    return output, [s for s in seen if calls[s.name] == 1]


# ---- logits


def _classifies(seen: Seen, classes: int) -> bool:
    return isinstance(seen.module, nn.Conv2d | nn.ConvTranspose2d) and seen.module.out_channels == classes


def _logits(model: Segmenter, output: Tensor, seen: list[Seen]) -> tuple[str, str | None]:
    """The taps of logits and, where it is not the input of that layer, of the feature."""
    from torchvision.models.segmentation.lraspp import LRASPPHead

    for entry in seen:
        if isinstance(entry.module, LRASPPHead) and entry.value.shape[1] == len(model.classes):
            return entry.name, f"{entry.name}.cbr"
    candidates = [s for s in seen if _classifies(s, len(model.classes)) and "aux" not in s.name]
    if fitting := [s for s in candidates if _is_resized(s.value, output)]:
        return fitting[-1].name, None
    if not candidates:
        return "out.logits", None
    names = ", ".join(repr(s.name.removeprefix("model.")) for s in candidates)
    raise TapError(
        f"which layer gives the logits of this {model.kind} is not clear: of {names}, convolutions with "
        f"{len(model.classes)} output channels, none is the network's output, resized. Name it, "
        f"as in Segmenter(model, classes, logits={candidates[-1].name.removeprefix('model.')!r}), and what terms on "
        "features are to see as `feature`; 'out.logits' are the network's own, at their size."
    )


def _is_resized(native: Tensor, output: Tensor) -> bool:
    """Whether `output` is `native` made as large."""
    size = (int(output.shape[2]), int(output.shape[3]))
    forms = [native] if native.shape == output.shape else []
    if not forms:
        forms = [F.interpolate(native, size, mode="bilinear", align_corners=corners) for corners in (False, True)]
        forms += [F.interpolate(native, size, mode="bicubic"), F.interpolate(native, size, mode="nearest")]
    tolerance = 1e-3 * float(output.abs().max())
    return any(torch.allclose(form, output, rtol=1e-3, atol=tolerance) for form in forms)


# ---- stages


def _stages(model: Segmenter, images: Tensor, seen: list[Seen], head: str) -> tuple[str, ...]:
    prefix = getattr(model.model, "base_model_prefix", "") or ""
    for name in (*BACKBONES, prefix):
        if name and isinstance(getattr(model.model, name, None), nn.Module):
            own = [s for s in seen if f"{s.name}.".startswith(f"model.{name}.")]
            if len(found := _last_of_each_stride(own, images)) > 1:
                return found
    # `model.<child>`, which holds the last layer; in a network of one child alone that tells nothing
    child = ".".join(head.split(".")[:2]) if head else ""
    names = [s.name for s in seen]
    before = seen[: names.index(head)] if head in names else seen
    outside = [s for s in before if not f"{s.name}.".startswith(f"{child}.") and "aux" not in s.name]
    neck = [s for s in outside if not prefix or not s.name.startswith(f"model.{prefix}.")]
    choices = [_last_of_each_stride(some, images) for some in (neck, outside, before)]
    return next((c for c in choices if len(c) > 1), choices[1] or choices[2])


def _last_of_each_stride(seen: list[Seen], images: Tensor) -> tuple[str, ...]:
    height, width = images.shape[2:]
    last: dict[int, str] = {}
    blocks = [s for s in seen if s.is_block]
    for entry in seen:
        if any(b.holds(entry) and b.value.shape[2:] != entry.value.shape[2:] for b in blocks):
            continue
        h, w = entry.value.shape[2:]
        stride = round(height / h)
        if stride in STRIDES and stride == round(width / w) and entry.name != "model":
            last[stride] = entry.name
    return tuple(last[stride] for stride in sorted(last))
