"""A network trained beside the student by an optimiser of its own: outside `parameters()`, inside checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch import distributed as dist

from taskkd.errors import CheckpointError, TaskkdError
from taskkd.schedules import Progress, Schedule

__all__ = ["Auxiliary", "MakeOptimizer"]

MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Auxiliary:
    """An auxiliary network and its optimiser; not a module, so that no module tree, DDP or optimiser finds it.

    Its parameters ask for a gradient during `step` only: a loss of the student's that goes through the network has its
    gradient on the student and leaves none here. It is always in train mode.

    Args:
        module: the network. Of its parameters those are trained that require a gradient now.
        optimizer: makes the optimiser from them.
        learning_rate: a number or a schedule, set before each step; None: as the optimiser was made.
        whose: the name of its term, for errors.

    Raises:
        TaskkdError: no parameter of the network requires a gradient.
    """

    def __init__(
        self, module: nn.Module, optimizer: MakeOptimizer, learning_rate: float | Schedule | None, whose: str
    ) -> None:
        self.module, self.whose = module.train(), whose
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise TaskkdError(f"term {whose!r}: no parameter of its {type(module).__name__} requires a gradient.")
        self._make, self.learning_rate = optimizer, learning_rate
        self.optimizer = optimizer(self.parameters)
        self._ask_for_gradients(False)
        self._shared = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Auxiliary:
        """An optimiser holds parameters by identity: the copy has one of its own, in the same state."""
        module = copy.deepcopy(self.module, memo)
        twins = dict(zip(self.module.parameters(), module.parameters(), strict=True))
        for parameter in self.parameters:
            twins[parameter].requires_grad_(True)
        twin = Auxiliary(module, self._make, self.learning_rate, self.whose)
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return twin

    def _ask_for_gradients(self, wanted: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(wanted)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that it computes in."""
        return self.parameters[0].dtype

    def to(self, device: torch.device) -> None:
        """Move network and optimiser; nothing happens where they are there already."""
        if self.parameters[0].device != device:
            self.module.to(device)
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # which puts every state beside its parameter

    @torch.no_grad()
    def share(self) -> None:
        """Make the network on every rank that of rank 0."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                dist.broadcast(tensor.data, 0)
            self._shared = True

    def step(self, loss: Callable[[], Tensor], progress: Progress) -> Tensor:
        """One step of the optimiser on the gradient of `loss()`, averaged over ranks; never compiled.

        Where the loss or a gradient is not finite, on any rank, the gradient counts as 0: nothing waits for the
        device, and the weights stay finite until somebody looks at the loss.

        Returns:
            The loss of this rank, detached.
        """
        # Not as a decorator: that would import the compiler (whole seconds) with this module.
        step: Callable[..., Tensor] = torch.compiler.disable(self._step)  # type: ignore[no-untyped-call]
        return step(loss, progress)

    def _step(self, loss: Callable[[], Tensor], progress: Progress) -> Tensor:
        if not self._shared:
            self.share()
        rate = self.learning_rate
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate(progress) if isinstance(rate, Schedule) else rate
        self._ask_for_gradients(True)
        try:
            with torch.enable_grad():
                value = loss()
                # Zeros for what the loss does not reach, so that all ranks send as much.
                gradients = torch.autograd.grad(value, self.parameters, materialize_grads=True)
        finally:
            self._ask_for_gradients(False)
        for parameter, gradient in zip(self.parameters, self._averaged(gradients), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()

    @torch.no_grad()
    def _averaged(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        flat = torch.where(flat.isfinite().all(), flat, torch.zeros_like(flat))
        parts = torch.split(flat, [g.numel() for g in gradients])
        return [part.view(g.shape).to(g.dtype) for part, g in zip(parts, gradients, strict=True)]

    # ---- checkpoints

    def state(self) -> Tensor:
        """Network and optimiser as one tensor of bytes (a safetensors file), which every checkpoint format can hold.

        Raises:
            CheckpointError: the optimiser keeps something that is neither tensor nor number.
        """
        from safetensors.torch import save

        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        saved = self.optimizer.state_dict()
        plain: dict[str, Any] = {"groups": [_numbers(group) for group in saved["param_groups"]], "slots": {}}
        for index, slots in saved["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
            plain["slots"][index] = {k: v for k, v in slots.items() if not isinstance(v, Tensor)}
        try:
            text = json.dumps(plain)
        except TypeError as error:
            raise CheckpointError(
                f"term {self.whose!r}: the state of {type(self.optimizer).__name__} cannot be saved: {error}."
            ) from None
        tensors["plain"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        written = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
        return torch.frombuffer(bytearray(written), dtype=torch.uint8)

    def load(self, state: Tensor) -> None:
        """Restore what `state` gave.

        Raises:
            CheckpointError: it is of another network or another optimiser, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(state.cpu().numpy().tobytes())
            plain = json.loads(tensors.pop("plain").numpy().tobytes())
            module = {k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")}
            slots: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in plain["slots"].items()}
            for key in tensors.keys() - {f"module.{k}" for k in module}:
                _, index, name = key.split(".", 2)
                slots[int(index)][name] = tensors[key]
            groups = self.optimizer.state_dict()["param_groups"]
            groups = [{**now, **then} for now, then in zip(groups, plain["groups"], strict=True)]
            self.module.load_state_dict(module)
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            words = " ".join(str(error).split())[:300]
            raise CheckpointError(f"term {self.whose!r}: this state is not of its auxiliary network: {words}") from None


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group: its options, and what some optimisers count there."""
    return {k: v for k, v in group.items() if isinstance(v, int | float) and not isinstance(v, bool)}
