"""Partial FC: a margin softmax over very many identities, in shards, of which a step sees and changes a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from taskkd.errors import CheckpointError, TaskkdError
from taskkd.face.heads import (
    Margin,
    check_centres,
    check_embeddings,
    check_labels,
    check_size,
    embeddings_of,
    full,
    initial_weight,
    labels_of,
    next_generator,
    sample_classes,
    within,
)
from taskkd.face.margins import Kind, Variant, of_own_class
from taskkd.losses.primitives import l2_normalise, masked_mean
from taskkd.ranks import gather_ranks, world_size
from taskkd.schedules import Progress, Schedule

__all__ = ["PartialFC"]

#: insightface takes the logarithm of a probability of at least this
FLOOR = 1e-30


class PartialFC(nn.Module):
    """`MarginHead` for very many identities: the same call, and a weight that only its sampled rows touch.

    Of `identities` classes a step sees those of its labels and a random share of the others; they alone get a gradient
    and are trained, by an SGD of the head's own (`auxiliary_step`), which changes rows of weight and momentum in place.
    The weight is outside `parameters()`: no dense gradient, no optimiser state, no averaging over ranks. In a loop by
    hand::

        head(student(images), batch).backward()
        optimizer.step(); optimizer.zero_grad()
        head.auxiliary_step(Progress(step))

    Where `torch.distributed` is initialised each rank has a contiguous shard of the classes (the first ranks one more,
    where they do not divide evenly), and embeddings and labels of all ranks are gathered: batches need not be equally
    large. Every rank gets the mean over all samples of all ranks, and a gradient on its embeddings such that the
    average over ranks that DDP takes is the gradient of that mean. All ranks must call it, also where they
    have no labels. In eval mode all classes are seen.

    Source: An et al. 2021 and 2022 (arXiv 2010.05222, 2203.15565). Their code keeps a dense gradient and needs
    `torch.distributed`; it bounds the logarithm at 1e-30 (`compat="official"`: the value's, not the gradient's).

    Args:
        identities, embedding_size, kind, s, m, variant, easy_margin, filter_above, h, ema: see `MarginHead`; the
            statistics of margins are of all ranks' samples.
        sample_rate: share of (a shard's) classes that a step sees. Default 0.1.
        learning_rate: a number or a schedule. None: follows the student's: `follows_trainer` is True, and who trains
            sets `learning_rate` before each step (the trainer does it).
        momentum: of the SGD, default 0.9; 0 saves the memory. Rows that are not sampled rest, their momentum too.
        weight_decay: default 5e-4.
        seed: of the initial weight, N(0, 0.01), which does not depend on the number of ranks; and of the sampling.
        centres: (identities, embedding_size) the initial weight.
        compat: see above.

    Raises:
        TaskkdError: an option is unknown or out of range; there are more ranks than identities.
        ShapeError: `centres` has another shape.
    """

    #: no part of evaluation, where identities are others
    training_only = True

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
        sample_rate: float = 0.1,
        learning_rate: float | Schedule | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
        centres: Tensor | None = None,
        compat: Literal["official"] | None = None,
    ) -> None:
        super().__init__()
        check_size(identities, embedding_size, sample_rate)
        for option, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise TaskkdError(f"`{option}` must not be negative, got {value}.")
        if compat not in (None, "official"):
            raise TaskkdError(f"`compat` must be None or 'official', got {compat!r}.")
        self.identities, self.embedding_size, self.sample_rate = identities, embedding_size, sample_rate
        self.seed, self.compat = seed, compat
        self.momentum, self.weight_decay = momentum, weight_decay
        #: whether who trains is to set `learning_rate` before each step
        self.follows_trainer = learning_rate is None
        self.learning_rate = learning_rate
        #: what a gradient scaler multiplied the loss by: who trains with one sets it before each step
        self.gradient_scale = 1.0
        self.margin = Margin(
            kind, s=s, m=m, variant=variant, easy_margin=easy_margin, filter_above=filter_above, h=h, ema=ema
        )
        #: how often classes were sampled, on which the next sample depends
        self.draws: Tensor
        self.register_buffer("draws", torch.tensor(0))
        self.rank, self.ranks = (dist.get_rank() if dist.is_initialized() else 0), world_size()
        self.first, count = shard(identities, self.rank, self.ranks)
        if centres is None:
            self.weight = initial_weight(identities, embedding_size, seed, self.first, count)
        else:
            check_centres(centres, identities, embedding_size)
            self.weight = full(centres.detach()[self.first : self.first + count]).clone()
        self.velocity = torch.zeros_like(self.weight) if momentum else None
        self._gradients: list[tuple[Tensor | None, Tensor]] = []
        self._collected: dict[str, Tensor] | None = None

    # ---- the student's loss

    def forward(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        """The loss of all ranks' batches; arguments and errors are those of `MarginHead`, on any device."""
        embeddings, labels = embeddings_of(output), labels_of(batch)
        check_labels(labels, self.identities, batch.get("id"))
        return self.loss(embeddings, labels)

    def loss(self, embeddings: Tensor, labels: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss of embeddings.

        Args:
            embeddings: (N, D) of this rank, raw.
            labels: (N,), -1: none.
            index: the classes to see, ascending, counted within this rank's shard; all ranks' labels in it must be
                among them. Default: a new sample, with `sample_rate=1` and in eval mode all.

        Raises:
            ShapeError: a shape does not fit.
            DataError: a label is not below the number of identities.
        """
        check_embeddings(embeddings, labels, self.embedding_size)
        check_labels(labels, self.identities)
        self._settle(embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            everyone, labels = everybody(full(embeddings), labels.long())
            return self._loss(everyone, labels, index)

    def _loss(self, embeddings: Tensor, labels: Tensor, index: Tensor | None) -> Tensor:
        known, local = labels >= 0, labels - self.first
        local = torch.where((local >= 0) & (local < len(self.weight)) & known, local, torch.full_like(local, -1))
        if index is None and self.sample_rate < 1 and self.training:
            generator = next_generator(self.seed, self.draws, self.rank)
            index = sample_classes(local, len(self.weight), self.sample_rate, generator)
        if index is not None:
            local = within(local, index)
        cosines = l2_normalise(embeddings) @ l2_normalise(self._rows(index).to(embeddings.dtype)).T
        targets = summed(torch.where(local >= 0, of_own_class(cosines.detach(), local), 0.0))
        logits = self.margin(cosines, local, embeddings.detach().norm(dim=1), known=known, targets=targets)
        values = cross_entropy(logits, local)
        if self.compat == "official":
            values = values - (values - values.clamp(max=-torch.tensor(FLOOR).log())).detach()
        return masked_mean(values.masked_fill(labels >= self.identities, torch.nan), known)  # not checked if compiled

    def _rows(self, index: Tensor | None) -> Tensor:
        """Rows of the weight as a leaf, whose gradient waits for the next step."""
        rows = self.weight.detach() if index is None else self.weight[index]
        if torch.is_grad_enabled() and self.training:
            rows.requires_grad_()
            rows.register_hook(lambda g: self._gradients.append((index, g.detach())))  # type: ignore[no-untyped-call]
        return rows

    def _settle(self, device: torch.device) -> None:
        """Be where the embeddings are; take a shard where `torch.distributed` was initialised after the head."""
        rank, ranks = (dist.get_rank() if dist.is_initialized() else 0), world_size()
        if self.ranks == 1 and ranks > 1:
            first, count = shard(self.identities, rank, ranks)
            self.first, self.rank, self.ranks = first, rank, ranks
            self.weight = self.weight[first : first + count].clone()
            if self.velocity is not None:
                self.velocity = self.velocity[first : first + count].clone()
        elif ranks != self.ranks:
            raise TaskkdError(
                f"this Partial FC is one of {self.ranks} shards, and there is no such group of processes any more: "
                "save its state before the group ends, and load it into a new head."
            )
        if self.weight.device != device:
            self.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> PartialFC:
        """Weight and momentum move with the module, and are never in half precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("weight", "velocity"):
            tensor = getattr(self, name)
            if tensor is not None:
                moved = fn(tensor)
                setattr(self, name, moved if moved.dtype == full(moved[:0]).dtype else tensor.to(moved.device))
        return self

    # ---- the weight's step

    @torch.no_grad()
    def auxiliary_step(self, progress: Progress) -> Tensor | None:
        """One step of SGD on the rows that had a gradient since the last; several backwards add up.

        Where a gradient is not finite nothing is changed (and nothing waits for the device).

        Returns:
            None: there is no loss of its own.

        Raises:
            TaskkdError: nobody set `learning_rate`.
        """
        found, self._gradients = self._gradients, []
        if not found:
            return None
        if self.learning_rate is None:
            raise TaskkdError("`learning_rate` of this Partial FC is None: give one, or set it before each step.")
        rate = self.learning_rate(progress) if isinstance(self.learning_rate, Schedule) else self.learning_rate
        index, gradient = together(found, len(self.weight))
        finite = gradient.isfinite().all()
        rows = self.weight if index is None else self.weight[index]
        step = torch.add(gradient.to(rows.dtype) / self.gradient_scale, rows, alpha=self.weight_decay)
        if self.velocity is not None:
            old = self.velocity if index is None else self.velocity[index]
            step += self.momentum * old
            put(self.velocity, index, torch.where(finite, step, old))
        put(self.weight, index, torch.where(finite, torch.add(rows, step, alpha=-rate), rows))
        return None

    @property
    def waiting(self) -> bool:
        """Whether there was a backward that the weight has not stepped on."""
        return bool(self._gradients)

    def forget(self) -> None:
        """Let go of the gradients since the last step."""
        self._gradients = []

    # ---- checkpoints: one full tensor, for any number of ranks

    def collect(self) -> None:
        """Bring the shards of all ranks together, in rank 0's main memory, for the next `state_dict()`.

        All ranks must call it; then rank 0 alone may ask for the state. Without it, `state_dict()` is what all ranks
        must call. Nothing happens in one process.
        """
        if world_size() > 1:
            found = self._full(keep=dist.get_rank() == 0)
            self._collected = found if dist.get_rank() == 0 else None

    def full_weight(self) -> Tensor:
        """The weight of all classes (identities, embedding_size); all ranks must call it, and all get it."""
        return self._full()["weight"]

    def _full(self, keep: bool = True) -> dict[str, Tensor]:
        self._settle(self.weight.device)
        tensors = {"weight": self.weight} | ({} if self.velocity is None else {"momentum": self.velocity})
        if self.ranks == 1:
            return {k: v.detach() for k, v in tensors.items()}
        return {k: joined(v, self.identities, keep) for k, v in tensors.items()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        found, self._collected = self._collected or self._full(), None
        destination.update({prefix + name: value for name, value in found.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._settle(self.weight.device)
        for name, own_rows in (("weight", self.weight), ("momentum", self.velocity)):
            if own_rows is None:
                continue
            given = state_dict.pop(prefix + name, None)
            if given is None:
                args[2].append(prefix + name)
            elif given.shape != (self.identities, self.embedding_size):
                raise CheckpointError(
                    f"`{prefix}{name}` is {tuple(given.shape)}, this Partial FC needs "
                    f"{(self.identities, self.embedding_size)}: it was saved with other identities or embeddings."
                )
            else:
                with torch.no_grad():
                    own_rows.copy_(given[self.first : self.first + len(own_rows)])
        self.forget()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sizes and share."""
        return f"identities={self.identities}, embedding_size={self.embedding_size}, sample_rate={self.sample_rate}"


def shard(classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """First class and number of classes of a rank: contiguous, the first ranks one more where they do not divide.

    Raises:
        TaskkdError: there are more ranks than classes.
    """
    if ranks > classes:
        raise TaskkdError(f"{classes} identities cannot be shared by {ranks} ranks: use `MarginHead`.")
    each, more = divmod(classes, ranks)
    return rank * each + min(rank, more), each + (rank < more)


def put(rows: Tensor, index: Tensor | None, values: Tensor) -> None:
    """Change rows in place."""
    if index is None:
        rows.copy_(values)
    else:
        rows.index_copy_(0, index, values)


def together(found: list[tuple[Tensor | None, Tensor]], rows: int) -> tuple[Tensor | None, Tensor]:
    """The sum of gradients of (different) rows, and of which rows it is; None: of all."""
    if len(found) == 1:
        return found[0]
    everything = torch.arange(rows, device=found[0][1].device)
    index, where = torch.unique(torch.cat([everything if i is None else i for i, _ in found]), return_inverse=True)
    gradient = found[0][1].new_zeros(len(index), found[0][1].shape[1])
    return index, gradient.index_add_(0, where, torch.cat([g for _, g in found]))


# ---- across ranks


def everybody(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (with gradient) and labels of all ranks, in order of rank."""
    if world_size() == 1:
        return embeddings, labels
    both = gather_ranks(torch.stack([labels, torch.full_like(labels, dist.get_rank())], 1))
    mine = both[:, 1] == dist.get_rank()
    return _Gathered.apply(embeddings, mine), both[:, 0].contiguous()


def summed(x: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def joined(rows: Tensor, classes: int, keep: bool) -> Tensor:
    """The shards of all ranks as one tensor in main memory; where it is not kept, an empty one."""
    whole = torch.empty((classes if keep else 0, rows.shape[1]), dtype=rows.dtype)
    for rank in range(world_size()):
        first, count = shard(classes, rank, world_size())
        part = rows.contiguous() if rank == dist.get_rank() else rows.new_empty(count, rows.shape[1])
        dist.broadcast(part, rank)
        if keep:
            whole[first : first + count] = part.cpu()
    return whole


class _Gathered(torch.autograd.Function):
    """The rows of all ranks. Each rank's loss is the same one of all rows, seen through its shard: the gradients of the
    shards add up, and the average over ranks that follows is made good."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mine: Tensor) -> Tensor:
        ctx.save_for_backward(mine)
        return gather_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mine,) = ctx.saved_tensors
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[mine] * world_size(), None


class _ShardedCrossEntropy(torch.autograd.Function):
    """(N,) cross-entropies of logits (N, C of this rank) under a softmax over the classes of all ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        peak = logits.amax(1)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        shares = (logits - peak[:, None]).exp()
        total = summed(shares.sum(1))
        target = summed(torch.where(labels >= 0, of_own_class(logits, labels) - peak, 0.0))
        ctx.save_for_backward(shares.div_(total[:, None]), labels)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shares, labels = ctx.saved_tensors
        here = (labels >= 0).to(shares.dtype)
        slope = shares.scatter_add(1, labels.clamp(min=0)[:, None], -here[:, None])
        return slope * grad[:, None], None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,): cross-entropies under a softmax over all ranks' classes; one of no class anywhere counts for nothing."""
    if world_size() == 1:
        return F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    return _ShardedCrossEntropy.apply(logits, labels)  # type: ignore[no-any-return]
