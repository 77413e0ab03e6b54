"""The classifier of face recognition in training: a margin softmax over identities, trained or of given centres."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.augmentation import generator_for
from taskkd.errors import DataError, ShapeError, TaskkdError
from taskkd.face import margins
from taskkd.face.margins import Kind, Variant
from taskkd.losses.primitives import l2_normalise, masked_mean
from taskkd.ranks import gather_ranks

__all__ = ["Margin", "MarginHead", "initial_weight", "sample_classes"]

#: m where none is given
MARGINS = {"arcface": 0.5, "cosface": 0.4, "adaface": 0.4, "curricularface": 0.5}
#: how many rows of a large weight are made or converted at a time
ROWS = 2048


class Margin(nn.Module):
    """A margin with its options and running statistics: `margin(cosines, labels, norms) -> logits`.

    Args:
        kind, variant: see `taskkd.face.margins`.
        m, s, easy_margin, monotone, filter_above, h: see there. `m=None`: 0.5; 0.4 of CosFace and AdaFace.
        ema: what the present batch counts in AdaFace's running mean and deviation of norms (they start at 20 and 100)
            and in CurricularFace's t (0). Default 0.01, as CVLface and CurricularFace; TFace's t has 0.1, AdaFace's
            first code 1.0.
        gather: those statistics are of the samples of all ranks. Default False: of this rank's, as the authors'.

    Raises:
        TaskkdError: an unknown kind or variant, or a number out of range.
    """

    def __init__(
        self,
        kind: Kind = "arcface",
        *,
        s: float = 64.0,
        m: float | None = None,
        variant: Variant = "exact",
        easy_margin: bool = False,
        filter_above: float | None = None,
        h: float = 0.333,
        ema: float = 0.01,
        gather: bool = False,
        monotone: bool = True,
    ) -> None:
        super().__init__()
        margins.check_variant(kind, variant)
        self.monotone = monotone
        self.kind, self.variant, self.easy_margin, self.filter_above = kind, variant, easy_margin, filter_above
        self.s, self.m, self.h, self.ema, self.gather = s, MARGINS[kind] if m is None else m, h, ema, gather
        for option, fits, wanted in (
            ("s", s > 0, "positive"),
            ("m", self.m >= 0, "at least 0"),
            ("h", h > 0, "positive"),
            ("ema", 0 < ema <= 1, "in (0, 1]"),
            ("monotone", monotone or (kind, variant) == ("arcface", "exact"), "True but for exact ArcFace"),
            ("easy_margin", not easy_margin or (kind, variant) == ("arcface", "exact"), "False but for exact ArcFace"),
            ("filter_above", filter_above is None or kind != "curricularface", "None for CurricularFace"),
        ):
            if not fits:
                raise TaskkdError(f"`{option}` must be {wanted}, got {getattr(self, option)}.")
        if kind == "adaface":
            self.norm_mean: Tensor
            self.norm_std: Tensor
            self.register_buffer("norm_mean", torch.tensor(20.0))
            self.register_buffer("norm_std", torch.tensor(100.0))
        elif kind == "curricularface":
            self.t: Tensor
            self.register_buffer("t", torch.tensor(0.0))

    def forward(
        self,
        cosines: Tensor,
        labels: Tensor,
        norms: Tensor,
        *,
        known: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits; in train mode the statistics take in this batch first.

        Args:
            cosines, labels: see `taskkd.face.margins`.
            norms: (N,) of the raw embeddings (AdaFace).
            known: (N,) booleans, which samples have an identity at all. Default: those with a label here.
            targets: see `curricularface`.
        """
        known = labels >= 0 if known is None else known
        if self.kind == "adaface":
            self._take_in(norms.detach().clamp(1e-3, 100.0), known)
            z = margins.image_quality(norms, self.norm_mean, self.norm_std, h=self.h)
            return margins.adaface(
                cosines, labels, z, m=self.m, s=self.s, variant=self.variant, filter_above=self.filter_above
            )
        if self.kind == "curricularface":
            own = margins.of_own_class(cosines, labels) if targets is None else targets
            self._take_in(own.detach(), known)
            return margins.curricularface(cosines, labels, self.t.clone(), m=self.m, s=self.s, targets=targets)
        if self.kind == "cosface":
            return margins.cosface(
                cosines, labels, m=self.m, s=self.s, variant=self.variant, filter_above=self.filter_above
            )
        return margins.arcface(
            cosines,
            labels,
            m=self.m,
            s=self.s,
            variant=self.variant,
            easy_margin=self.easy_margin,
            monotone=self.monotone,
            filter_above=self.filter_above,
        )

    @torch.no_grad()
    def _take_in(self, values: Tensor, known: Tensor) -> None:
        """Move the running statistics towards those of this batch; a deviation needs two samples."""
        if not self.training:
            return
        if self.gather:
            values, known = gather_ranks(values), gather_ranks(known)
        count, mean = known.sum(), masked_mean(values, known)
        if self.kind == "curricularface":
            self._move(self.t, mean, count > 0)
            return
        squares = torch.where(known, (values - mean).square(), torch.zeros_like(values)).sum()
        self._move(self.norm_mean, mean, count > 0)
        self._move(self.norm_std, (squares / (count - 1).clamp(min=1)).sqrt(), count > 1)

    def _move(self, buffer: Tensor, value: Tensor, where: Tensor) -> None:
        buffer.copy_(torch.where(where, self.ema * value + (1 - self.ema) * buffer, buffer))


class MarginHead(nn.Module):
    """A margin softmax over identities: the task loss of a run, `head(output, batch) -> scalar`.

    The mean of the cross-entropy over the samples with an identity (label 0 or more); exactly 0, with a gradient path,
    where there is none. Computed in fp32 (fp64 stays fp64) with autocast off. Its weight is trained with the student
    and never part of it. Under DDP each rank's loss is the mean over its own samples.

    Args:
        identities: the number of classes.
        embedding_size: D of the embeddings.
        kind, s, m, variant, easy_margin, filter_above, h, ema, gather: see `Margin`.
        seed: of the initial weight, N(0, 0.01), the same on all ranks; and of the sampling.
        centres: (identities, embedding_size) the initial weight, or with `trained=False` the weight: a teacher's
            classifier, or class means of its embeddings (ProxylessKD, Shi et al. 2020).
        trained: default True: the weight is a parameter. False: a buffer, normalised once, without gradient or
            optimiser state.
        sample_rate: of frozen centres: each step sees its own identities and a random share of the others. The draws
            depend on `seed` and a saved count alone. Default 1: all. For trained ones see `PartialFC`.
        storage: of frozen centres: "float16" takes half the memory; they are computed with in fp32 all the same.

    Raises:
        TaskkdError: an option is unknown, out of range or only for frozen centres.
        ShapeError: `centres` has another shape.
    """

    #: no part of evaluation, where identities are others
    training_only = True
    weight: Tensor

    def __init__(
        self,
        identities: int,
        embedding_size: int,
        *,
        kind: Kind = "arcface",
        s: float = 64.0,
        m: float | None = None,
        variant: Variant = "exact",
        easy_margin: bool = False,
        filter_above: float | None = None,
        h: float = 0.333,
        ema: float = 0.01,
        gather: bool = False,
        seed: int = 0,
        centres: Tensor | None = None,
        trained: bool = True,
        sample_rate: float = 1.0,
        storage: Literal["float32", "float16"] = "float32",
    ) -> None:
        super().__init__()
        check_size(identities, embedding_size, sample_rate)
        if storage not in ("float32", "float16"):
            raise TaskkdError(f"`storage` must be 'float32' or 'float16', got {storage!r}.")
        if trained and sample_rate < 1:
            raise TaskkdError(f"`sample_rate={sample_rate}` of a trained weight: use `PartialFC`.")
        if trained and storage == "float16":
            raise TaskkdError("`storage='float16'` is for frozen centres (`trained=False`).")
        self.identities, self.embedding_size, self.seed, self.sample_rate = (
            identities,
            embedding_size,
            seed,
            sample_rate,
        )
        self.margin = Margin(
            kind,
            s=s,
            m=m,
            variant=variant,
            easy_margin=easy_margin,
            filter_above=filter_above,
            h=h,
            ema=ema,
            gather=gather,
        )
        #: how often classes were sampled, on which the next sample depends
        self.draws: Tensor
        self.register_buffer("draws", torch.tensor(0))
        if trained:
            self.weight = nn.Parameter(start_weight(identities, embedding_size, seed, centres))
        else:
            self.register_buffer("weight", frozen_weight(identities, embedding_size, seed, centres, storage))
            #: what DDP need not send around in every step
            self.alike_on_ranks = ("weight",)

    def forward(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch.

        Args:
            output: what the student returned: its `embeddings` (N, D), raw, are read; or they themselves.
            batch: its `labels` (N,) are read; -1: no identity.

        Raises:
            TaskkdError: there are no embeddings or no labels.
            DataError: a label is not below `identities` (on a CPU; on an accelerator, which is not waited for, the loss
                is NaN then).
            ShapeError: see `loss`.
        """
        embeddings, labels = embeddings_of(output), labels_of(batch)
        if labels.device.type == "cpu":
            check_labels(labels, self.identities, batch.get("id"))
        return self.loss(embeddings, labels)

    def loss(
        self, embeddings: Tensor, labels: Tensor, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of embeddings, for terms.

        Args:
            embeddings: (N, D), raw.
            labels: (N,), -1: none.
            weight: (identities, D) class centres in place of the head's own.
            mask: (N,) which samples count, or how much.

        Raises:
            ShapeError: a shape does not fit.
            DataError: a label is not below the number of classes.
        """
        check_embeddings(embeddings, labels, self.embedding_size)
        if weight is not None and (weight.ndim != 2 or weight.shape[1] != self.embedding_size):
            raise ShapeError(f"`weight` must be (identities, {self.embedding_size}), got {tuple(weight.shape)}.")
        classes = self.identities if weight is None else len(weight)
        if labels.device.type == "cpu":
            check_labels(labels, classes)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self._loss(full(embeddings), labels.long(), weight, mask, classes)

    def _loss(
        self, embeddings: Tensor, labels: Tensor, weight: Tensor | None, mask: Tensor | None, classes: int
    ) -> Tensor:
        known, wrong = labels >= 0, labels >= classes
        labels = labels.clamp(-1, classes - 1)
        unit = l2_normalise(embeddings)
        if weight is not None:
            cosines = unit @ l2_normalise(weight.to(unit.dtype)).T
        elif isinstance(self.weight, nn.Parameter):
            cosines = unit @ l2_normalise(self.weight.to(unit.dtype)).T
        elif self.sample_rate < 1 and self.training:
            index = sample_classes(labels, classes, self.sample_rate, next_generator(self.seed, self.draws, 0))
            labels = within(labels, index)
            cosines = cosines_to(unit, self.weight[index])
        else:
            cosines = cosines_to(unit, self.weight)
        logits = self.margin(cosines, labels, embeddings.detach().norm(dim=1))
        values = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        values = values.masked_fill(wrong, torch.nan)
        return masked_mean(values, known if mask is None else known * mask)

    def extra_repr(self) -> str:
        """Sizes, and whether the weight is trained."""
        how = "trained" if isinstance(self.weight, nn.Parameter) else f"frozen, {self.weight.dtype}"
        return f"identities={self.identities}, embedding_size={self.embedding_size}, {how}"


# ---- the weight


def initial_weight(identities: int, embedding_size: int, seed: int, first: int = 0, count: int | None = None) -> Tensor:
    """Rows `first` to `first + count` of a weight N(0, 0.01), a function of seed and row alone, (count, D) fp32."""
    last = identities if count is None else first + count
    weight = torch.empty(last - first, embedding_size)
    for block in range(first // ROWS * ROWS, last, ROWS):
        rows = torch.randn(min(ROWS, identities - block), embedding_size, generator=generator_for(seed, 0, block))
        begin, end = max(first, block), min(last, block + len(rows))
        torch.mul(rows[begin - block : end - block], 0.01, out=weight[begin - first : end - first])
    return weight


def start_weight(identities: int, embedding_size: int, seed: int, centres: Tensor | None) -> Tensor:
    """The weight that training starts from: a copy of the centres, or random."""
    if centres is None:
        return initial_weight(identities, embedding_size, seed)
    check_centres(centres, identities, embedding_size)
    return full(centres.detach()).clone()


def frozen_weight(identities: int, embedding_size: int, seed: int, centres: Tensor | None, storage: str) -> Tensor:
    """Centres of length 1, made in parts, so that no second copy of them is in memory."""
    if centres is not None:
        check_centres(centres, identities, embedding_size)
    half = storage == "float16"
    kept = torch.float16 if half else torch.float32 if centres is None else full(centres[:0]).dtype
    weight = torch.empty(identities, embedding_size, dtype=kept, device=None if centres is None else centres.device)
    for first in range(0, identities, ROWS):
        count = min(ROWS, identities - first)
        if centres is None:
            rows = initial_weight(identities, embedding_size, seed, first, count)
        else:
            rows = full(centres.detach()[first : first + count])
        weight[first : first + count] = l2_normalise(rows)
    return weight


class _FrozenCosines(torch.autograd.Function):
    """Cosines to centres that are stored in another precision, which are converted in parts and never kept so."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, centres: Tensor) -> Tensor:
        ctx.save_for_backward(centres)
        return torch.cat([unit @ part.to(unit.dtype).T for part in torch.split(centres, ROWS)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (centres,) = ctx.saved_tensors
        parts = zip(torch.split(grad, ROWS, 1), torch.split(centres, ROWS), strict=True)
        return sum((g @ c.to(g.dtype) for g, c in parts), grad.new_zeros(len(grad), centres.shape[1])), None


def cosines_to(unit: Tensor, centres: Tensor) -> Tensor:
    """(N, C) cosines of unit vectors to frozen centres (C, D) of length 1, stored in any precision."""
    if centres.dtype == unit.dtype:
        return unit @ centres.T
    return _FrozenCosines.apply(unit, centres)  # type: ignore[no-any-return]


# ---- sampling


def sample_classes(labels: Tensor, classes: int, rate: float, generator: torch.Generator) -> Tensor:
    """The classes that a step sees, ascending: those of `labels` (-1: none), and random others up to a share `rate`.

    Where `labels` has more classes than that, they alone. Source: An et al. 2022 (Partial FC).
    """
    own: Tensor = torch.unique(labels[labels >= 0])
    count = max(1, int(rate * classes))
    if len(own) >= count:
        return own
    chance = torch.rand(classes, generator=generator, device=labels.device)
    chance[own] = 2.0
    index: Tensor = chance.topk(count).indices.sort().values
    return index


def within(labels: Tensor, index: Tensor) -> Tensor:
    """Labels as positions in the ascending `index`, which holds all of them; -1 stays."""
    return torch.where(labels >= 0, torch.searchsorted(index, labels), labels)


def next_generator(seed: int, draws: Tensor, rank: int) -> torch.Generator:
    """Count a draw; the generator for it, on the counter's device, is a function of these three numbers alone."""
    draws += 1
    return torch.Generator(draws.device).manual_seed(generator_for(seed, int(draws), rank).initial_seed())


# ---- what heads read, and refuse


def full(x: Tensor) -> Tensor:
    """fp64 as it is, all else as fp32."""
    return x if x.dtype == torch.float64 else x.float()


def embeddings_of(output: Any) -> Tensor:
    """A model's embeddings.

    Raises:
        TaskkdError: the output has none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("embeddings") if isinstance(output, Mapping) else getattr(output, "embeddings", None)
    if isinstance(found, Tensor):
        return found
    has = ", ".join(map(repr, output)) if isinstance(output, Mapping) else f"a {type(output).__name__}"
    raise TaskkdError(f"a margin head reads the model's `embeddings`, and its output has none: {has}.")


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """A batch's labels.

    Raises:
        TaskkdError: it has none.
    """
    if isinstance(labels := batch.get("labels"), Tensor):
        return labels
    raise TaskkdError(f"a margin head reads the batch's `labels`, and there are none: {', '.join(map(repr, batch))}.")


def check_labels(labels: Tensor, classes: int, ids: Any = None) -> None:
    """Refuse a label that is no class.

    Raises:
        DataError: it names the label, and the sample by its place in the batch and its id.
    """
    if torch.compiler.is_compiling() or not bool((labels >= classes).any()):
        return
    place = int((labels >= classes).int().argmax())
    who = f" (id {int(ids[place])})" if isinstance(ids, Tensor) and len(ids) == len(labels) else ""
    raise DataError(
        f"sample {place} of the batch{who} has label {int(labels[place])}, but the head has {classes} identities: "
        f"labels are 0 to {classes - 1}, or -1 for none."
    )


def check_embeddings(embeddings: Tensor, labels: Tensor, size: int) -> None:
    """Refuse embeddings of another size, and labels that are not theirs.

    Raises:
        ShapeError: see above.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != size:
        raise ShapeError(f"the head takes embeddings (N, {size}), got {tuple(embeddings.shape)}.")
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise ShapeError(
            f"the head takes integer labels ({len(embeddings)},), got {tuple(labels.shape)} {labels.dtype}."
        )


def check_centres(centres: Tensor, identities: int, size: int) -> None:
    """Refuse centres of another shape.

    Raises:
        ShapeError: see above.
    """
    if centres.shape != (identities, size):
        raise ShapeError(
            f"`centres` must be ({identities}, {size}): one row per identity, as long as the student's embeddings; got "
            f"{tuple(centres.shape)}."
        )


def check_size(identities: int, size: int, rate: float) -> None:
    """Refuse sizes below 1 and shares outside (0, 1].

    Raises:
        TaskkdError: see above.
    """
    for option, value in (("identities", identities), ("embedding_size", size)):
        if value < 1:
            raise TaskkdError(f"`{option}` must be at least 1, got {value}.")
    if not 0 < rate <= 1:
        raise TaskkdError(f"`sample_rate` must be in (0, 1], got {rate}.")
