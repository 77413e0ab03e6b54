"""Teachers: whatever supplies teacher tensors for a batch.

`Frozen` runs a model, `Cached` (in `taskkd.caches`) reads what a frozen model gave from disk. A frozen teacher stays
outside the module tree: it has no parameters, no state, no place in DDP or an optimiser, and is never in train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from taskkd.errors import TapError, nearest
from taskkd.taps import StopForward, Taps, accepted_arguments

__all__ = ["Call", "Frozen", "Teacher", "first_tensor"]

#: how a task runs a teacher: `(model, batch, student_run) -> output`
Call = Callable[[nn.Module, Mapping[str, Any], Any], Any]
#: batch entries that are answers, which a teacher never gets
LABELS = frozenset(("labels", "start_positions", "end_positions"))


@runtime_checkable
class Teacher(Protocol):
    """What a distiller asks of a teacher."""

    def attach(self, taps: Iterable[str]) -> None:
        """Be ready to supply these taps."""

    def __call__(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The value of every attached tap for this batch, without gradient."""

    def prepare(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """One eager dry run: the same values, and whatever is to be learned about the execution."""

    def columns(self) -> set[str]:
        """The names of the batch entries that this teacher reads."""

    def close(self) -> None:
        """Remove hooks and let go of files."""


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nested batch, in order."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


class Frozen:
    """A frozen model as teacher: `eval()`, no gradient, buffers untouched, run only as far as the taps need.

    It moves to the device of the batch at its first use. `deepcopy` of whatever holds it shares it.

    Args:
        model: the teacher; its parameters are set to `requires_grad=False` and it is put in eval mode.
        call: how to run it, `(model, batch, student_run) -> output`. Default: with those entries of the batch that
            its `forward` names, but for labels; an entry `teacher_x` takes the place of `x` (another tokenizer).

    Example:
        >>> teacher = Frozen(nn.Linear(2, 3))
        >>> teacher.attach(["out"])
        >>> teacher({"input": torch.ones(4, 2)})["out"].shape
        torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module, *, call: Call | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`Frozen` takes a torch.nn.Module, got {type(model).__name__}.")
        self.model = model.eval().requires_grad_(False)
        self._call = call
        self._accepted = accepted_arguments(model.forward)
        self._taps: Taps | None = None
        self._device: torch.device | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self

    def attach(self, taps: Iterable[str]) -> None:
        """Set the hooks for these taps; taps of a former call are replaced.

        Raises:
            TapError: a name is not in the model.
        """
        self.close()
        self._taps = Taps(self.model, taps, "teacher")

    def columns(self) -> set[str]:
        """The names of the batch entries that the teacher's `forward` accepts, and their `teacher_` twins."""
        import inspect

        names = set(inspect.signature(self.model.forward).parameters) - LABELS
        return names | {f"teacher_{n}" for n in names}

    @property
    def needs_run(self) -> bool:
        """Whether it must run after the student, as it may read the student's run."""
        return self._call is not None

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of `batch` the teacher's `forward` gets."""
        own = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}
        return self._accepted({**{k: v for k, v in batch.items() if k not in LABELS}, **own})

    def _forward(self, batch: Mapping[str, Any], run: Any) -> Any:
        if self._call is not None:
            return self._call(self.model, batch, run)
        return self.model(**self.inputs(batch))

    def _ready(self, batch: Mapping[str, Any]) -> Taps:
        if self._taps is None:
            raise TapError("this teacher has no taps: it is used through a Distiller, or call `attach` first.")
        if not torch.compiler.is_compiling():
            tensor = first_tensor(batch)
            if tensor is not None and tensor.device != self._device:
                self._device = tensor.device
                self.model.to(self._device)
            if self.model.training:  # somebody holds the model and called train() on it
                self.model.eval()
        return self._taps

    def __call__(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The value of every tap for this batch.

        Args:
            batch: keyword arguments, as the student gets them.
            run: the student's run, for a `call` that needs it.

        Raises:
            TapError: a module did not run, or ran several times.
        """
        taps = self._ready(batch)
        try:
            with torch.no_grad(), taps.record():
                output = self._forward(batch, run)
        except StopForward:
            output = None
        return taps.read(output, batch)

    @torch.no_grad()
    def prepare(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """One eager dry run to the end: counts the calls, so that later runs stop after the last one that is needed,
        and finds tensors that a later in-place operation overwrites, which are copied from then on."""
        taps = self._ready(batch)
        taps.stop_after = None
        with taps.record():
            output = self._forward(batch, run)
        if taps.overwritten():
            with taps.record():
                output = self._forward(batch, run)
        # Every hook that fires counts; a tap `@k` may need fewer calls than there are, which costs only time.
        taps.stop_after = None if taps.needs_output or not taps.fired else taps.fired
        return taps.read(output, batch)

    def apply(self, path: str, x: Tensor) -> Any:
        """Run the frozen sub-module at `path` on `x`, with gradient to `x` (CrossKD's heads, inherited classifiers).

        Args:
            path: a module path; "" is the whole model.
            x: its input.

        Raises:
            TapError: no such module.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if path not in modules:
            raise TapError(f"the teacher has no module {path!r}{nearest(path, modules)}.")
        recording = self._taps is not None and self._taps.recording
        assert not recording, "apply() runs outside the teacher's own forward"
        if self.model.training:  # as in `_ready`
            self.model.eval()
        return modules[path](x)

    def close(self) -> None:
        """Remove the hooks."""
        if self._taps is not None:
            self._taps.close()
            self._taps = None
