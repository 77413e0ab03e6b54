"""Cohorts: teachers by name, among them networks that learn together with the student."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.ensembles import named_members, split_tap
from taskkd.errors import ShapeError, TapError
from taskkd.losses.targets import group_targets
from taskkd.schedules import Progress
from taskkd.suppliers import Supplier, Task, detached
from taskkd.taps import Taps, accepted_arguments
from taskkd.teachers import Teacher
from taskkd.terms import Match, Run, Weight

__all__ = ["Cohort", "PeerAttention", "mutual"]

STUDENT = "student"


class Cohort(Supplier):
    """The student and others that learn at the same time, each from the labels and from whom its terms name.

    A module is a network that is trained: it sees the student's batch (with labels), is in train mode, its parameters
    are the distiller's, and its task loss, computed as the student's, is added to `task`. The student remains the plain
    model that it is: it alone is evaluated, saved and exported. A teacher (`Frozen`, `EMA`, `Targets`, ...) is used as
    it is.

    Taps name the member: `peer1/out.logits`, and `student/out.logits` for the student's own. A teacher's tap without a
    name is the mean over the networks that are trained. A term whose student's tap names a member trains that member::

        cohort = Cohort(peer)                                                             # peer1
        Match("student", kl_divergence, "out.logits", "peer1/out.logits")                 # the student learns from it
        Match("peer", kl_divergence, "peer1/out.logits", "student/out.logits")            # and it from the student

    So deep mutual learning (Zhang Y. et al. 2018) is `mutual(...)`; a teacher that is trained with the student and
    kept near it (Shi W. X. et al. 2021, ProKT) is `Cohort(teacher=model)` with both terms; one trained from scratch
    beside an expert (Zhao et al. 2019, CTKD) is `Cohort(scratch=model, expert=Frozen(other))`.

    Args:
        *models: members called `peer1`, `peer2` and so on.
        detach: no gradient flows from what learns into the network or student that teaches it.
        **named: members with a name. A `Targets` may read taps of the members before it.

    Raises:
        TaskkdError: no members, or a reserved name.
    """

    def __init__(self, *models: nn.Module | Teacher, detach: bool = True, **named: nn.Module | Teacher) -> None:
        numbered = {f"peer{i}": m for i, m in enumerate(models, 1)}
        members = named_members(numbered, named, "Cohort")
        self.detach = detach
        self.teachers: dict[str, Teacher] = {n: m for n, m in members.items() if isinstance(m, Teacher)}
        self.networks: dict[str, nn.Module] = {n: m for n, m in members.items() if n not in self.teachers}
        self._names = list(members)
        self._everybody = [*self._names, STUDENT]
        self._accepted = {n: accepted_arguments(m.forward) for n, m in self.networks.items()}
        self._claimed: list[str] = []
        self._taps: dict[str, Taps] = {}

    @property
    def module(self) -> nn.Module | None:
        """The networks, and what members train of their own."""
        trained = dict(self.networks)
        for name, member in self._suppliers():
            if member.module is not None:
                trained[name] = member.module
        return nn.ModuleDict(trained) if trained else None

    def _suppliers(self) -> list[tuple[str, Supplier]]:
        return [(n, m) for n, m in self.teachers.items() if isinstance(m, Supplier)]

    # ---- taps

    def claim(self, taps: Iterable[str]) -> set[str]:
        """The student's taps that name a member."""
        self._claimed = [tap for tap in taps if split_tap(tap, self._everybody)[0] not in (None, STUDENT)]
        return set(self._claimed)

    def attach(self, taps: Iterable[str]) -> None:
        """Set the hooks for these taps and for those claimed.

        Raises:
            TapError: there is no such member, or a name is not in a model.
        """
        self.close()
        # What is read: `name/tap` of a member, `student/tap`, or a mean over the networks.
        self._reads = {tap: self._sources(tap) for tap in taps}
        wanted: dict[str, dict[str, None]] = {n: {} for n in self._everybody}
        for source in (*self._claimed, *(s for sources in self._reads.values() for s in sources)):
            self._want(source, wanted)
        for name in self.networks:
            wanted[name]["out"] = None  # for its task loss
        try:
            # From the last to the first: what a member reads of those before it must be known when they are attached.
            for name in reversed(self._names):
                if name in self.networks:
                    self._taps[name] = Taps(self.networks[name], wanted[name], f"network {name!r}")
                    continue
                member = self.teachers[name]
                member.attach(wanted[name])
                for source in getattr(member, "student_taps", ()):
                    self._want(source, wanted, before=name)
        except BaseException:
            self.close()
            raise
        self._wanted = {n: list(taps) for n, taps in wanted.items()}
        self.student_taps = tuple(wanted[STUDENT])

    def _sources(self, tap: str) -> list[str]:
        """The full names of what a teacher's tap reads."""
        if split_tap(tap, self._everybody)[0] is not None:
            return [tap]
        if not self.networks:
            raise TapError(
                f"tap {tap!r}: name the member, as '{self._names[0]}/{tap}'; a mean is over networks that are trained, "
                "of which there is none."
            )
        return [f"{n}/{tap}" for n in self.networks]

    def _want(self, source: str, wanted: dict[str, dict[str, None]], before: str | None = None) -> None:
        name, tap = split_tap(source, self._everybody)
        if before is not None and name in self._names and self._names.index(name) >= self._names.index(before):
            raise TapError(f"tap {source!r}: {before!r} can read members before it; name {name!r} first.")
        wanted[name or STUDENT][tap] = None

    def supplies(self, tap: str) -> bool:
        """Whether the members that it names have it at present."""
        for source in self._sources(tap):
            name, own = split_tap(source, self._everybody)
            member = self.teachers.get(name or STUDENT)
            if isinstance(member, Supplier) and not member.supplies(own):
                return False
        return True

    def columns(self) -> set[str]:
        """The names of the batch entries that any member reads."""
        names = {p for m in self.networks.values() for p in inspect.signature(m.forward).parameters}
        return names.union(*(m.columns() for m in self.teachers.values()))

    # ---- runs

    def __call__(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The value of every tap; those that were claimed, with gradient, go into `run.student`."""
        return self._supply(batch, run, dry=False)

    def prepare(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """One eager dry run of all members."""
        return self._supply(batch, run, dry=True)

    def _supply(self, batch: Mapping[str, Any], run: Run, dry: bool) -> dict[str, Any]:
        found = run.student
        for tap in self._wanted[STUDENT]:
            found[f"{STUDENT}/{tap}"] = found[tap]
        for name in self._names:
            if name in self.networks:
                values = self._train(name, batch, dry)
            else:
                member = self.teachers[name]
                values = member.prepare(batch, run) if dry else member(batch, run)
            for tap, value in values.items():
                found[f"{name}/{tap}"] = value
        return {tap: self._read(found, sources) for tap, sources in self._reads.items()}

    def _train(self, name: str, batch: Mapping[str, Any], dry: bool) -> dict[str, Any]:
        taps, network = self._taps[name], self.networks[name]
        with taps.record():
            output = network(**self._accepted[name](batch))
        if dry and taps.overwritten():
            with taps.record():
                output = network(**self._accepted[name](batch))
        return taps.read(output, batch)

    def _read(self, found: Mapping[str, Any], sources: Sequence[str]) -> Any:
        values = []
        for source in sources:
            name = split_tap(source, self._everybody)[0]
            learns = name == STUDENT or name in self.networks
            values.append(detached(found[source]) if learns and self.detach else found[source])
        if len(values) == 1:
            return values[0]
        if any(not isinstance(v, Tensor) or v.shape != values[0].shape for v in values):
            raise ShapeError(f"there is no mean over {', '.join(sources)}: they are not tensors of one shape.")
        return torch.stack(values).mean(0)

    def task(self, run: Run, loss: Task) -> Tensor | None:
        """The sum of the task losses of the networks."""
        losses = [loss(run.student[f"{n}/out"], run.batch) for n in self.networks]
        losses += [x for _, m in self._suppliers() if (x := m.task(run, loss)) is not None]
        return torch.stack(losses).sum() if losses else None

    # ---- what follows the student

    def step(self, progress: Progress) -> bool:
        """Let every member follow an optimiser step."""
        changed = [member.step(progress) for _, member in self._suppliers()]
        return any(changed)

    def state(self) -> dict[str, Tensor]:
        """The states of the members."""
        return {f"{n}.{key}": value for n, member in self._suppliers() for key, value in member.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for name, member in self._suppliers():
            start = f"{name}."
            member.load({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})

    def close(self) -> None:
        """Remove the hooks of all members."""
        for taps in self._taps.values():
            taps.close()
        self._taps = {}
        for member in self.teachers.values():
            member.close()


def mutual(
    names: Sequence[str], loss: Callable[..., Tensor], tap: str, *, weight: Weight | None = None, **options: Any
) -> list[Match]:
    """The terms by which each learns from each other: `a-from-b` for every pair.

    Source: Zhang Y., Xiang, Hospedales, Lu 2018, "Deep Mutual Learning": `kl_divergence` at temperature 1, the mean
    over the others (they step one network after the other; here all step at once, on the same predictions).

    Args:
        names: members of a `Cohort`, and `student`.
        loss: as for `Match`.
        tap: what is compared, `out.logits`.
        weight: of each term; None: `1 / (len(names) - 1)`, the mean over the others.
        **options: of the loss and of `Match`.
    """
    if weight is None:
        weight = 1 / max(len(names) - 1, 1)
    own = {name: tap if name == STUDENT else f"{name}/{tap}" for name in names}
    return [
        Match(f"{a}-from-{b}", loss, own[a], f"{b}/{tap}", weight=weight, **options)
        for a in names
        for b in names
        if a != b
    ]


class PeerAttention(nn.Module):
    """Each peer's own mixture of all peers' logits, by a learned attention between their features.

    Source: Chen D., Mei, Wang, Feng, Chen C. 2020, "Online Knowledge Distillation with Diverse Peers" (OKDDip). It is
    the function of a `Targets`, which is given the logits of all peers, then their features, in the same order::

        taps = [f"{p}/{t}" for t in ("out.logits", "pool") for p in ("peer1", "peer2", "peer3")]
        cohort = Cohort(*peers, group=Targets(PeerAttention(64, 8), *taps, detach=False))
        terms = [Match(f"peer{i + 1}", kl_divergence, f"peer{i + 1}/out.logits", f"group/out[:, {i}]", temperature=3.0)
                 for i in range(3)]
        terms += [Match("leader", kl_divergence, "out.logits", "out.logits", temperature=3.0)]   # mean of the peers

    The student is the group's leader, which learns from the mean of the peers. As with the authors, gradient flows into
    the peers that teach; the attention learns by it.

    Args:
        features: the size of the peers' features; they are (batch, features).
        projected: the size of queries and keys; the authors take an eighth of `features`.
    """

    def __init__(self, features: int, projected: int) -> None:
        super().__init__()
        self.query = nn.Linear(features, projected, bias=False)
        self.key = nn.Linear(features, projected, bias=False)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits (batch, classes) of every peer, then their features -> targets (batch, peers, classes).

        Raises:
            ShapeError: not as many features as logits, or of another size.
        """
        count = len(tensors) // 2
        features = tensors[count:]
        if len(tensors) != 2 * count or any(f.ndim != 2 or f.shape[1] != self.query.in_features for f in features):
            raise ShapeError(
                f"`PeerAttention` needs logits, then features (batch, {self.query.in_features}), of each peer, got "
                f"{[tuple(t.shape) for t in tensors]}."
            )
        stacked = torch.stack(features, 1).to(self.query.weight.dtype)
        return group_targets(tensors[:count], self.query(stacked), self.key(stacked))
