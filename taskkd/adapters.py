"""Adapters: small trainable maps from student shapes to teacher shapes, and some for the teacher's side.

They are built by `distiller.prepare(batch)` from the tensors of one dry run, before any optimiser exists, are trained
and checkpointed with the student, and are no part of it. An adapter is any module `tensor -> tensor` (or what its loss
takes as student). Two attributes of its class say more: with `takes_target = True` its `forward` gets the tensor of the
other side too, to follow its height and width from batch to batch; with `all_levels = True` one adapter gets the
tensors of all taps of a term, as two tuples, and gives a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import ShapeError, TaskkdError, nearest

__all__ = [
    "ABF",
    "ADAPTERS",
    "AdapterSpec",
    "ChannelAssign",
    "Conv1x1",
    "ConvReg",
    "Embedding",
    "Linear",
    "Paraphraser",
    "Translator",
    "VarianceHead",
    "Variational",
    "build_adapter",
    "fit_paraphraser",
    "maps_all_levels",
]

AdapterSpec: TypeAlias = "str | nn.Module | Callable[[Tensor, Tensor], nn.Module]"


def _resized(x: Tensor, like: Tensor | None, mode: str = "bilinear") -> Tensor:
    """`x` at the height and width of `like`."""
    if like is None or x.shape[2:] == like.shape[2:]:
        return x
    corners = False if mode == "bilinear" else None
    return F.interpolate(x, size=(like.shape[2], like.shape[3]), mode=mode, align_corners=corners)


def _conv_norm(student: int, teacher: int, kernel: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(student, teacher, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(teacher))


class Linear(nn.Module):
    """`(..., student features) -> (..., teacher features)`, one affine map of the last dimension (FitNets, TinyBERT).

    Args:
        student, teacher: sizes of the last dimension.
        bias: default True.
    """

    def __init__(self, student: int, teacher: int, *, bias: bool = True) -> None:
        super().__init__()
        self.map = nn.Linear(student, teacher, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.map(x)
        return out


class Conv1x1(nn.Module):
    """`(batch, student channels, h, w) -> (batch, teacher channels, H, W)`: a 1x1 convolution.

    Where the teacher's height or width differs from the student's, the student's map is first resized (bilinearly) to
    that of the teacher in the same batch, so images may change their size.

    Args:
        student, teacher: numbers of channels.
        bn: batch norm after the convolution, which then has no bias.
        relu: a ReLU at the end.
    """

    takes_target = True

    def __init__(self, student: int, teacher: int, *, bn: bool = False, relu: bool = False) -> None:
        super().__init__()
        self.map = nn.Conv2d(student, teacher, kernel_size=1, bias=not bn)
        self.norm = nn.BatchNorm2d(teacher) if bn else nn.Identity()
        self.relu = relu

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        out: Tensor = self.norm(self.map(_resized(x, target)))
        return out.relu() if self.relu else out


class ConvReg(nn.Module):
    """The regressor of FitNets as CRD and DKD use it: a convolution whose kernel makes the teacher's size, BN, ReLU.

    Twice the teacher's size: 3x3, stride 2. Half of it: transposed 4x4, stride 2. Larger otherwise: no stride, a kernel
    of `1 + student size - teacher size`. For images of another size than those of the dry run, the result is resized
    (bilinearly) where the rule alone does not give the teacher's.

    Source: Romero et al. 2015; the rule is that of RepDistiller and mdistiller.

    Args:
        student, teacher: the shapes (channels, height, width).
        relu: default True.

    Raises:
        ShapeError: the student's map is smaller than the teacher's, and not half of it.
    """

    takes_target = True

    def __init__(self, student: Sequence[int], teacher: Sequence[int], *, relu: bool = True) -> None:
        super().__init__()
        (s, *own), (t, *other) = student, teacher
        self.map: nn.Conv2d | nn.ConvTranspose2d
        if own == [2 * n for n in other]:
            self.map = nn.Conv2d(s, t, kernel_size=3, stride=2, padding=1)
        elif [2 * n for n in own] == other:
            self.map = nn.ConvTranspose2d(s, t, kernel_size=4, stride=2, padding=1)
        elif all(a >= b for a, b in zip(own, other, strict=True)):
            self.map = nn.Conv2d(s, t, kernel_size=(1 + own[0] - other[0], 1 + own[1] - other[1]))
        else:
            raise ShapeError(
                f"adapter 'conv_regressor' takes maps of {own[0]}x{own[1]} to {other[0]}x{other[1]} of the teacher by "
                "no rule: expected half of it, or as large or larger; adapter='conv1x1' resizes."
            )
        self.norm = nn.BatchNorm2d(t)
        self.relu = relu

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        out: Tensor = self.norm(self.map(x))
        return _resized(out.relu() if self.relu else out, target)


class ABF(nn.Module):
    """Attention-based fusion of knowledge review, over all levels: deeper levels flow into shallower ones.

    From the deepest level up: a 1x1 convolution and BN to `mid` channels; then, but for the deepest, the fused map of
    the level below is brought to this size and both are weighed, pixel by pixel, by a sigmoid of a 1x1 convolution of
    both; a 3x3 convolution and BN give the teacher's channels. All resizing is to the nearest.

    Source: Chen P., Liu, Zhao, Jia 2021, "Distilling Knowledge via Knowledge Review"; the loss is `losses.pyramid`.

    Args:
        students, teachers: numbers of channels, from shallow to deep.
        mid: channels in between; the authors' default, the student's deepest up to 512, if left out.

    Raises:
        ShapeError: the numbers of levels differ.
    """

    all_levels = True

    def __init__(self, students: Sequence[int], teachers: Sequence[int], *, mid: int | None = None) -> None:
        super().__init__()
        if len(students) != len(teachers) or not students:
            raise ShapeError(f"adapter 'abf' needs as many levels of each, got {len(students)} and {len(teachers)}.")
        mid = min(512, students[-1]) if mid is None else mid
        self.reduce = nn.ModuleList(_conv_norm(s, mid) for s in students)
        self.attention = nn.ModuleList(nn.Conv2d(2 * mid, 2, kernel_size=1) for _ in students[:-1])
        self.expand = nn.ModuleList(_conv_norm(mid, t, kernel=3) for t in teachers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_uniform_(module.weight, a=1)  # as the authors

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        fused, results = students[-1], []
        for level in range(len(students) - 1, -1, -1):
            x = self.reduce[level](students[level])
            if level < len(students) - 1:
                below = _resized(fused, x, "nearest")
                share = self.attention[level](torch.cat([x, below], 1)).sigmoid()
                x = x * share[:, :1] + below * share[:, 1:]
            fused = _resized(x, teachers[level], "nearest")
            results.append(self.expand[level](fused))
        return tuple(reversed(results))


class Embedding(nn.Module):
    """`(batch, ...) -> (batch, size)`: flattened, one affine map, a unit vector.

    Source: the heads of Tian et al. 2020 (CRD), one for each side; `normalise=False` is RepDistiller's head for
    correlation congruence.

    Args:
        features: of one sample, all dimensions together.
        size: of the embedding.
        normalise: L2-normalise the result.
    """

    def __init__(self, features: int, size: int = 128, *, normalise: bool = True) -> None:
        super().__init__()
        self.map = nn.Linear(features, size)
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.map(x.flatten(1).to(self.map.weight.dtype))
        if not self.normalise:
            return out
        half = out.dtype in (torch.float16, torch.bfloat16)  # the eps of a norm is 0 in fp16
        return F.normalize(out.float() if half else out, dim=1)


def _factor_layers(channels: int, factor: int) -> nn.Sequential:
    widths = [(channels, channels), (channels, factor), (factor, factor)]
    layers = [layer for a, b in widths for layer in (nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.1))]
    return nn.Sequential(*layers)


class Translator(nn.Module):
    """`(batch, student channels, h, w) -> (batch, factor channels, h, w)`: three 3x3 convolutions with leaky ReLU.

    Source: Kim, Park, Kwak 2018 (factor transfer). Maps of another size than the teacher's factor are resized
    (bilinearly) before.

    Args:
        student: channels.
        factor: channels of the teacher's factor.
    """

    takes_target = True

    def __init__(self, student: int, factor: int) -> None:
        super().__init__()
        self.encode = _factor_layers(student, factor)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        out: Tensor = self.encode(_resized(x, target))
        return out


class Paraphraser(nn.Module):
    """The teacher's side of factor transfer: an autoencoder of its features, whose code is the factor.

    Three 3x3 convolutions with leaky ReLU, three transposed ones back. As `teacher_adapter` it gives the factor; it is
    trained beforehand by `fit_paraphraser` and frozen then. Source: Kim, Park, Kwak 2018, "Paraphrasing Complex
    Network" (rate 0.5 on CIFAR).

    Args:
        teacher: channels.
        rate: channels of the factor over those of the teacher.
    """

    def __init__(self, teacher: int, *, rate: float = 0.5) -> None:
        super().__init__()
        factor = max(round(teacher * rate), 1)
        self.encode = _factor_layers(teacher, factor)
        widths = [(factor, factor), (factor, teacher), (teacher, teacher)]
        layers = [layer for a, b in widths for layer in (nn.ConvTranspose2d(a, b, 3, padding=1), nn.LeakyReLU(0.1))]
        self.decode = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.encode(x)
        return out

    def reconstruct(self, x: Tensor) -> Tensor:
        """`x` through the code and back."""
        out: Tensor = self.decode(self.encode(x))
        return out


def fit_paraphraser(
    paraphraser: Paraphraser,
    teacher: nn.Module,
    tap: str,
    batches: Iterable[Mapping[str, Any]],
    *,
    epochs: int = 10,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
) -> list[float]:
    """Train a paraphraser to reconstruct a teacher's features (mean squared error, SGD), then freeze it.

    The first stage of factor transfer; no labels are needed. Source: Kim, Park, Kwak 2018.

    Args:
        paraphraser: it moves to the device of the teacher's features; afterwards it is in eval mode and its parameters
            do not require grad.
        teacher: the model; it is frozen, as by `Frozen`.
        tap: of the features.
        batches: keyword arguments of the teacher, as a distiller gets them; iterated once an epoch.
        epochs, learning_rate, momentum: of SGD.

    Returns:
        The mean reconstruction error of every epoch.

    Raises:
        TapError: the teacher has no such tap.
        TaskkdError: there are no batches, or the error is not finite.
    """
    from taskkd.teachers import Frozen

    source = Frozen(teacher)
    source.attach([tap])
    optimiser, history = torch.optim.SGD(paraphraser.parameters(), learning_rate, momentum), []
    try:
        with torch.enable_grad():
            for _ in range(epochs):
                errors = []
                for batch in batches:
                    x = source(batch)[tap]
                    paraphraser.to(x.device)
                    error = F.mse_loss(paraphraser.reconstruct(x), x)
                    optimiser.zero_grad()
                    error.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    errors.append(error.detach())
                if not errors:
                    raise TaskkdError("`fit_paraphraser` got no batches; a generator lasts for one epoch only.")
                history.append(torch.stack(errors).mean().item())
                if not math.isfinite(history[-1]):
                    raise TaskkdError(
                        f"the paraphraser's error is {history[-1]} in epoch {len(history)}; lower `learning_rate`, "
                        f"now {learning_rate:g}."
                    )
    finally:
        source.close()
    paraphraser.requires_grad_(False).eval()
    return history


class ChannelAssign(nn.Module):
    """Channels in the order of an assignment, groups of them reduced to one: the teacher's side of matching guidance.

    `(batch, channels, ...) -> (batch, size, ...)`: channel `indices[k]` goes to slot `k`; slots `i`, `i + size`,
    `i + 2 size`, ... become channel `i`. The indices are a buffer: checkpointed, and may be set anew by `assign`.

    Source: Yue, Deng, Zhou 2020, "Matching Guided Distillation", who reduce features by "absolute" and margins by
    "mean", and find the assignment by the Hungarian method.

    Args:
        indices: a permutation of the channels, or any choice of them.
        size: channels of the result, of which the number of indices is a multiple.
        reduce: "absolute" takes the entry of largest absolute value of a group, "max" the largest, "mean" the mean.

    Raises:
        ShapeError: the number of indices is no multiple of `size`.
        TaskkdError: no such `reduce`.
    """

    indices: Tensor

    def __init__(
        self, indices: Sequence[int] | Tensor, size: int, *, reduce: Literal["absolute", "max", "mean"] = "absolute"
    ) -> None:
        super().__init__()
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if chosen.ndim != 1 or len(chosen) == 0 or len(chosen) % size:
            raise ShapeError(f"{chosen.numel()} channel indices are no multiple of {size} channels.")
        if reduce not in ("absolute", "max", "mean"):
            raise TaskkdError(f"`reduce` must be 'absolute', 'max' or 'mean', got {reduce!r}.")
        self.size, self.how = size, reduce
        self.register_buffer("indices", chosen)

    def assign(self, indices: Sequence[int] | Tensor) -> None:
        """Another assignment, as long as the first.

        Raises:
            ShapeError: it is of another length.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if chosen.shape != self.indices.shape:
            raise ShapeError(f"expected {len(self.indices)} channel indices, got shape {tuple(chosen.shape)}.")
        self.indices.copy_(chosen)

    def forward(self, x: Tensor) -> Tensor:
        groups = x[:, self.indices].reshape(len(x), -1, self.size, *x.shape[2:])
        if self.how == "mean":
            out = groups.mean(1)
        elif self.how == "max":
            out = groups.amax(1)
        else:
            out = groups.gather(1, groups.abs().argmax(1, keepdim=True)).squeeze(1)
        return out


class Variational(nn.Module):
    """`features -> (mean, scale)`, what `losses.variational_information` takes as student.

    The mean is three 1x1 convolutions without bias, ReLU between them, at the teacher's size (bilinear resizing
    before); the learned scale is one number for each teacher channel, `softplus(scale) + eps` the variance. For
    features that are no maps, `(..., features)`, the convolutions are linear maps.

    Source: Ahn, Hu, Damianou, Lawrence, Dai 2019; `mid` of the teacher's channels is RepDistiller's.

    Args:
        student, teacher: channels.
        mid: channels in between; the teacher's if left out.
        variance: at first; above `eps`.
        eps: as that of the loss.
        maps: whether the features are maps (batch, channels, height, width).

    Raises:
        TaskkdError: `variance` is not above `eps`.
    """

    takes_target = True

    def __init__(
        self,
        student: int,
        teacher: int,
        *,
        mid: int | None = None,
        variance: float = 5.0,
        eps: float = 1e-5,
        maps: bool = True,
    ) -> None:
        super().__init__()
        if not variance > eps:
            raise TaskkdError(f"`variance` must be above eps={eps:g}, got {variance}.")
        mid = mid or teacher
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate([(student, mid), (mid, mid), (mid, teacher)]):
            layers += [nn.ReLU()] if i else []
            layers.append(nn.Conv2d(a, b, 1, bias=False) if maps else nn.Linear(a, b, bias=False))
        self.mean = nn.Sequential(*layers)
        # the inverse of softplus: exp(variance - eps) would overflow
        start = (variance - eps) + math.log(-math.expm1(-(variance - eps)))
        self.scale = nn.Parameter(torch.full((teacher,), start))
        self.maps = maps

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.maps:
            return self.mean(x), self.scale.reshape(1, -1)  # so that the loss does not take them for channels
        return self.mean(_resized(x, target)), self.scale.reshape(-1, 1, 1)


class VarianceHead(nn.Module):
    """`features -> (features of the teacher's size, log-variance)`, what `losses.prediction_aware` takes as student.

    The log-variance is an affine map and BN of the student's features; those themselves are mapped only where the
    teacher has another number of them. Source: Zhang, Lan, Dai, Zhang, Ju, Wang 2020 (PAD), who train the student with
    the plain mean squared error first.

    Args:
        student, teacher: features (batch, features), or channels of maps (batch, channels, height, width).
        maps: whether they are maps, which are resized (bilinearly) to the teacher's size.
    """

    takes_target = True

    def __init__(self, student: int, teacher: int, *, maps: bool = False) -> None:
        super().__init__()

        def affine() -> nn.Module:
            return nn.Conv2d(student, teacher, 1) if maps else nn.Linear(student, teacher)

        self.map = nn.Identity() if student == teacher else affine()
        self.variance = nn.Sequential(affine(), nn.BatchNorm2d(teacher) if maps else nn.BatchNorm1d(teacher))
        self.maps = maps

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = _resized(x, target) if self.maps else x
        return self.map(x), self.variance(x)


# ---- kinds: what can be built from two shapes


def _check_maps(kind: str, student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 4 or teacher.ndim != 4:
        raise ShapeError(
            f"adapter {kind!r} needs (batch, channels, height, width), got student {tuple(student.shape)} and "
            f"teacher {tuple(teacher.shape)}; adapter='linear' maps (..., features)."
        )


def _linear(student: Tensor, teacher: Tensor) -> nn.Module:
    if student.ndim != teacher.ndim or student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"adapter 'linear' maps the last dimension only, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}."
        )
    return Linear(student.shape[-1], teacher.shape[-1])


def _conv1x1(kind: str, **options: bool) -> Callable[[Tensor, Tensor], nn.Module]:
    def make(student: Tensor, teacher: Tensor) -> nn.Module:
        _check_maps(kind, student, teacher)
        return Conv1x1(student.shape[1], teacher.shape[1], **options)

    return make


def _conv_regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    _check_maps("conv_regressor", student, teacher)
    return ConvReg(student.shape[1:], teacher.shape[1:])


def _abf(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> nn.Module:
    for s, t in zip(students, teachers, strict=True):
        _check_maps("abf", s, t)
    return ABF([s.shape[1] for s in students], [t.shape[1] for t in teachers])


def _embedding(student: Tensor, _: Tensor) -> nn.Module:
    return Embedding(student[0].numel())


def _translator(student: Tensor, teacher: Tensor) -> nn.Module:
    _check_maps("translator", student, teacher)
    return Translator(student.shape[1], teacher.shape[1])


def _variational(student: Tensor, teacher: Tensor) -> nn.Module:
    if student.ndim == teacher.ndim == 4:
        return Variational(student.shape[1], teacher.shape[1])
    if student.ndim != teacher.ndim or student.shape[:-1] != teacher.shape[:-1]:
        _check_maps("variational", student, teacher)
    return Variational(student.shape[-1], teacher.shape[-1], maps=False)


def _variance(student: Tensor, teacher: Tensor) -> nn.Module:
    if not student.ndim == teacher.ndim == 2:
        _check_maps("variance", student, teacher)
    return VarianceHead(student.shape[1], teacher.shape[1], maps=student.ndim == 4)


ADAPTERS: dict[str, Callable[..., nn.Module]] = {
    "abf": _abf,
    "conv1x1": _conv1x1("conv1x1"),
    "conv1x1_bn": _conv1x1("conv1x1_bn", bn=True),
    "conv1x1_bn_relu": _conv1x1("conv1x1_bn_relu", bn=True, relu=True),
    "conv_regressor": _conv_regressor,
    "embedding": _embedding,
    "linear": _linear,
    "translator": _translator,
    "variance": _variance,
    "variational": _variational,
}


def maps_all_levels(spec: Any) -> bool:
    """Whether an adapter, or the kind that is named, maps the tensors of all taps of a term together."""
    return spec == "abf" if isinstance(spec, str) else bool(getattr(spec, "all_levels", False))


def build_adapter(spec: AdapterSpec, student: Any, teacher: Any) -> nn.Module:
    """The adapter that `spec` describes, for tensors of these shapes.

    Args:
        spec: a kind (a key of `ADAPTERS`), a module used as it is, or a function of both tensors.
        student: the tensor to be mapped; a tuple of all levels for a kind that maps them together.
        teacher: the tensor of the other side, likewise.

    Raises:
        ShapeError: the kind does not fit these shapes.
        TaskkdError: no such kind.
    """
    if isinstance(spec, nn.Module):
        return spec
    if isinstance(spec, str):
        if spec not in ADAPTERS:
            raise TaskkdError(f"no adapter {spec!r}{nearest(spec, ADAPTERS)}; known: {', '.join(ADAPTERS)}.")
        return ADAPTERS[spec](student, teacher)
    return spec(student, teacher)
