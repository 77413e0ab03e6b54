"""The distiller: student + teacher + terms as one module whose forward returns named losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskkd.adversarial import Adversarial
from taskkd.errors import NonFiniteError, TapError, TaskkdError, nearest
from taskkd.perturbation import GradientPerturbation
from taskkd.preparation import Preparation, TermReport, advise, even_out, measure, of_the_teacher
from taskkd.schedules import Progress
from taskkd.suppliers import Supplier
from taskkd.taps import Taps, accepted_arguments, describe
from taskkd.teachers import Frozen, Teacher, first_tensor
from taskkd.terms import Run, Term

__all__ = ["Distiller"]

#: dtype and number of dimensions that losses mostly have
SCALAR = {(torch.float32, 0)}
TaskLoss = Callable[[Any, Mapping[str, Any]], Tensor]


class Distiller(nn.Module):
    """Student, teacher and terms; `forward(**batch)` returns `{"loss", "task", <term names>}` in train mode.

    In eval mode it returns the student's output alone. Only `loss` carries gradient; the others are for logging.

    Args:
        student: the model to train; a registered sub-module, so `parameters()` are its and the adapters'.
        teacher: a module (wrapped in `Frozen`) or a `Teacher`. None: no teacher, every term must do without.
        terms: the terms, with unique names.
        task_weight: factor of the task loss; 0: it is not computed and labels are not needed.
        task_loss: `(output, batch) -> scalar`. Default: `output.loss` / `output["loss"]`, or the sum of a dict of
            losses (torchvision detectors). A module with parameters (a classifier that only the training needs, as in
            face recognition) is trained and checkpointed beside the student, unless its weight is 0.
        on_nonfinite: "raise" stops at a NaN or infinite term with its name; "skip" lets the loop skip
            the step: `if distiller.check_finite(): optimizer.step()`.
        perturbation: train on the losses at a perturbed output of one of the student's modules.

    Raises:
        TapError: a tap is in neither model.
        TaskkdError: two terms share a name.
    """

    #: transformers.Trainer: losses are means over a batch, to be divided by the number of accumulation steps
    accepts_loss_kwargs = False

    student: nn.Module
    teacher: Teacher | None
    _numbers: list[float]

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None,
        terms: Iterable[Term] = (),
        *,
        task_weight: float = 1.0,
        task_loss: TaskLoss | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        perturbation: GradientPerturbation | None = None,
    ) -> None:
        super().__init__()
        if task_weight < 0:
            raise TaskkdError(f"`task_weight` must not be negative, got {task_weight}.")
        if on_nonfinite not in ("raise", "skip"):
            raise TaskkdError(f"`on_nonfinite` must be 'raise' or 'skip', got {on_nonfinite!r}.")
        self.student, self.perturbation = student, perturbation
        if perturbation is not None:
            perturbation.module(student)  # a wrong name is told now
        self.terms = nn.ModuleDict()
        for term in terms:
            if term.name in self.terms:
                raise TaskkdError(f"two terms are named {term.name!r}; names must be unique.")
            self.terms[term.name] = term
        # A frozen teacher must not be found by parameters(), state_dict(), train(), DDP or deepcopy.
        if isinstance(teacher, nn.Module) and not isinstance(teacher, Teacher):
            teacher = Frozen(teacher)
        object.__setattr__(self, "teacher", teacher)
        #: the teacher, where it learns, follows the student or reads its run
        self._supplier = teacher if isinstance(teacher, Supplier) else None
        if self._supplier is not None and (module := self._supplier.module) is not None:
            self.supplier = module
        self._learns = "supplier" in self._modules
        if task_weight == 0 and isinstance(task_loss, nn.Module):  # nothing would train it
            task_loss = None
        self.task_weight, self.task_loss, self.on_nonfinite = float(task_weight), task_loss, on_nonfinite
        #: whether `forward` itself looks for NaN; the trainer watches from outside and looks once per optimiser step
        self.check_in_forward = True
        #: a wish of this process to stop (a signal), and whether some rank has it: they agree in `check_finite`,
        #: whose one message and one synchronisation serve for both
        #: the number of a signal that this process, or any, was asked to stop by; 0: none
        self.stop_wish = self.stop_agreed = 0
        self.progress = Progress()
        self.prepared = False
        self._term_list: list[Term] = [self.terms[n] for n in self.terms]  # type: ignore[misc]
        self._scheduled_terms = [t.name for t in self._term_list if t.scheduled]
        self._adversaries = [t for t in self._term_list if isinstance(t, Adversarial)]
        for term in self._adversaries:
            if f"{term.name}_discriminator" in self.terms:
                raise TaskkdError(f"'{term.name}_discriminator' names a term and the discriminator of another.")
        #: what trains something outside `parameters()` on the last forward, by the name of that loss
        self._stepping: dict[str, Any] = {f"{t.name}_discriminator": t for t in self._adversaries}
        if hasattr(task_loss, "auxiliary_step"):
            self._stepping["task_auxiliary"] = task_loss
        self._accepted = accepted_arguments(student.forward)
        self._automatic: dict[str, float] = {}
        self._pending: list[tuple[Mapping[str, Tensor], Any]] = []
        #: what the teacher gave last, until the next look: whether NaN came from it
        self._taught: Mapping[str, Any] = {}
        #: losses of the last auxiliary step, for the next look
        self._auxiliary_losses: dict[str, Tensor] = {}
        student_taps = dict.fromkeys(t for term in self._term_list for t in term.student_taps)
        teacher_taps = dict.fromkeys(t for term in self._term_list for t in term.teacher_taps)
        if teacher_taps and teacher is None:
            raise TaskkdError("there are terms that compare with a teacher, but `teacher` is None.")
        #: taps of networks that learn with the student, which the supplier has
        self._claimed: set[str] = set() if self._supplier is None else self._supplier.claim(student_taps)
        self._uses_teacher = bool(teacher_taps or self._claimed)
        # Run before the student, a teacher's passing tensors lie in memory that the student's kept ones then take; run
        # after it they come on top (on a CPU: fresh pages in every step).
        needs_run = getattr(teacher, "needs_run", True) or any(t.needs_student_run for t in self._term_list)
        self._teacher_first = teacher is not None and not needs_run
        self._attach([t for t in student_taps if t not in self._claimed], list(teacher_taps))
        self._set_weights()

    def _attach(self, student_taps: list[str], teacher_taps: list[str]) -> None:
        """Set the hooks of the terms' taps, and of what the supplier reads of the student."""
        self._learning_taps = frozenset(student_taps)
        self._taps = Taps(self.student, student_taps, "student")
        if self.teacher is None:
            return
        try:
            self.teacher.attach(teacher_taps)
            if self._supplier is not None and self._supplier.student_taps:
                self._taps.close()
                both = dict.fromkeys([*student_taps, *self._supplier.student_taps])
                self._taps = Taps(self.student, both, "student")
        except BaseException:
            self.close()
            raise

    # ---- forward

    def forward(self, **batch: Any) -> Any:
        """Losses of a batch (train mode) or the student's output (eval mode).

        Args:
            **batch: the student's keyword arguments and whatever else teacher, terms and caches read (`id`).

        Returns:
            Train mode: `{"loss": weighted sum with gradient, "task": ..., <term>: unweighted and detached ...}`.

        Raises:
            NonFiniteError: a term is NaN or infinite (unless `on_nonfinite="skip"`).
            TapError: a tap gave nothing usable.
        """
        if not self.training:
            return self.student(**self._accepted(batch))
        if self.perturbation is None:
            names, values, _ = self._losses(batch)
        else:
            names, values = self._perturbed(self.perturbation, batch)
        stacked = torch.stack(values)
        # `dot`, as autocast would compute `stacked @ weights` in half precision.
        losses = {"loss": torch.dot(stacked, self._weights_like(stacked))}
        losses |= zip(names, stacked.detach().unbind(), strict=True)
        if self.check_in_forward and not torch.compiler.is_compiling():  # a compiled graph cannot stop
            self.watch(losses, batch)
            if self.on_nonfinite == "raise":  # else the loop asks `check_finite` whether to skip
                self.check_finite()
        return losses

    def _perturbed(
        self, perturbation: GradientPerturbation, batch: Mapping[str, Any]
    ) -> tuple[list[str], list[Tensor]]:
        with perturbation.watching(self.student):
            _, values, run = self._losses(batch)
            stacked = torch.stack(values)
            perturbation.move(torch.dot(stacked, self._weights_like(stacked)))
            return self._losses(batch, run.teacher)[:2]

    def _losses(
        self, batch: Mapping[str, Any], known: dict[str, Any] | None = None
    ) -> tuple[list[str], list[Tensor], Run]:
        """Names and unweighted values of what is active, the task loss first; and the run.

        Args:
            batch: as in `forward`.
            known: the teacher's values for it, where they have been computed before.
        """
        if not self.prepared and not self.built:
            missing = ", ".join(repr(t.name) for t in self._term_list if not t.built)
            raise TaskkdError(
                f"the adapter of {missing} does not exist yet: call `distiller.prepare(batch)` before the optimiser is "
                "made."
            )
        if self._lacks_total:
            raise TaskkdError(
                "a schedule is a fraction of the training: call `distiller.set_total(optimiser_steps)` before the "
                "first step (the trainer does it)."
            )
        run = self._run(batch, known=known)
        names, values = [], []
        if self.task_weight > 0:
            names.append("task")
            values.append(self._task_loss(run))
        for term in self._active:
            names.append(term.name)
            values.append(term.forward(run))  # not through nn.Module.__call__: terms have no hooks
        if not values:
            raise TaskkdError("nothing to train: the task weight is 0 and no term is active at this step.")
        if self._idle_parameters and torch.distributed.is_initialized():
            # DDP waits for the gradient of every parameter; those of an idle term's adapter are exactly 0.
            values[0] = values[0] + 0.0 * sum(p.sum() for p in self._idle_parameters)
        kinds = {(v.dtype, v.ndim) for v in values}
        if kinds != SCALAR:
            dtype = torch.float64 if any(d == torch.float64 for d, _ in kinds) else torch.float32
            values = [_scalar(n, v).to(dtype) for n, v in zip(names, values, strict=True)]
        return names, values, run

    def _student_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = self._accepted(batch)
        if self.task_weight == 0 and self.task_loss is None:
            inputs.pop("labels", None)
        return inputs

    def _run(self, batch: Mapping[str, Any], prepare: bool = False, known: dict[str, Any] | None = None) -> Run:
        teacher: Teacher | None = self.teacher if self._calls_teacher or (prepare and self._uses_teacher) else None
        early = known
        if known is not None:
            teacher = None
        if teacher is not None and self._teacher_first and self.prepared and not prepare:
            early, teacher = teacher(batch), None
        with self._taps.record():
            output = self.student(**self._student_inputs(batch))
        if prepare and self._taps.overwritten():
            with self._taps.record():
                output = self.student(**self._student_inputs(batch))
        run = Run(batch, output, self._taps.read(output, batch))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_gradient_paths(run)
        if early is not None:
            run.teacher = early
        elif teacher is not None:
            run.teacher = teacher.prepare(batch, run) if prepare else teacher(batch, run)
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_taught", run.teacher)
        return run

    def _check_gradient_paths(self, run: Run) -> None:
        for name, value in run.student.items():
            if (
                isinstance(value, Tensor)
                and not value.requires_grad
                and value.is_floating_point()
                and self._taps.taps[name].root != "batch"
                and name in self._learning_taps  # what only teaches needs none
                and any(p.requires_grad for p in self.student.parameters())
            ):
                raise TapError(
                    f"tap {name!r}: no gradient flows to the student from here. With gradient checkpointing use "
                    "`use_reentrant=False`; otherwise the tapped part is frozen or runs without gradient."
                )

    def _task_loss(self, run: Run) -> Tensor:
        """The student's task loss and those of networks that learn with it."""
        loss = self._task(run.output, run.batch)
        others = None if self._supplier is None or not self._uses_teacher else self._supplier.task(run, self._task)
        return loss if others is None else loss + others

    def _task(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        if self.task_loss is not None:
            try:
                return self.task_loss(output, batch)
            except KeyError as error:
                if error.args[0] in batch or not isinstance(error.args[0], str):
                    raise
                raise TaskkdError(
                    f"`task_loss` reads {error.args[0]!r}, which is neither in the batch ({', '.join(batch)}) nor in "
                    f"the output ({describe(output)}){nearest(error.args[0], batch)}; a column that no model takes is "
                    "kept by `remove_unused_columns=False` in the training arguments."
                ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if (
            loss is None
            and isinstance(output, Mapping)
            and output
            and all(isinstance(v, Tensor) and v.ndim == 0 for v in output.values())
        ):
            loss = torch.stack(list(output.values())).sum()
        if not isinstance(loss, Tensor):
            raise TaskkdError(
                f"the student's output ({describe(output)}) has no loss: give it labels, pass `task_loss=(output, "
                "batch) -> scalar`, or set `task_weight=0`."
            )
        return loss

    # ---- weights and progress

    def _set_weights(self) -> None:
        """Read the schedules at the present progress; which terms are active, and with which weight."""
        for term in self._term_list:
            term.advance(self.progress)
        weights = self.weights()
        active = [t for t in self._term_list if weights[t.name] > 0]
        self._lacks_total = self.progress.total is None and any(t.needs_total for t in self._term_list)
        numbers = [self.task_weight] if self.task_weight > 0 else []
        numbers += [weights[t.name] for t in active]
        self._active = active
        idle = [t for t in self._term_list if t not in active]
        self._idle_parameters = [p for t in idle for p in t.parameters()]
        if self._learns and any(t.teacher_taps for t in idle):
            self._idle_parameters += self.supplier.parameters()
        self._calls_teacher = self._uses_teacher and (self._learns or any(t.teacher_taps for t in active))
        current = getattr(self, "_weights", None)
        if current is None or len(current) != len(numbers):
            self._weights = torch.tensor(numbers)
        elif self._numbers != numbers:
            self._weights.copy_(torch.tensor(numbers, dtype=torch.float64))
        self._numbers = numbers

    def _scheduled(self, term: Term) -> float:
        if self._supplier is not None and not all(self._supplier.supplies(t) for t in term.teacher_taps):
            return 0.0
        if term.schedule.needs_total and self.progress.total is None:
            return term.schedule.value  # before `set_total`: the full weight, for reports; `forward` refuses
        return term.weight(self.progress)

    def _weights_like(self, values: Tensor) -> Tensor:
        if self._weights.device != values.device or self._weights.dtype != values.dtype:
            exact = values.dtype == torch.float64 and not torch.compiler.is_compiling()
            weights = torch.tensor(self._numbers, dtype=torch.float64) if exact else self._weights
            self._weights = weights.to(values.device, values.dtype)
        return self._weights

    def weights(self) -> dict[str, float]:
        """The weight of the task loss and of every term at the present step."""
        return {"task": self.task_weight} | {
            t.name: self._automatic.get(t.name, 1.0) * self._scheduled(t) for t in self._term_list
        }

    def set_total(self, total: int) -> None:
        """Say how many optimiser steps the training has; schedules that are a fraction of it need this."""
        self.progress = Progress(self.progress.step, int(total))
        self._set_weights()

    def step(self) -> None:
        """Advance the schedules; call it once after each optimiser step (the trainer does).

        Raises:
            NonFiniteError: a term was not finite and nobody has looked since (a compiled hand loop that does not call
                `check_finite` before its optimiser).
        """
        if self._pending:
            self.check_finite()
        if self._stepping and any(s.waiting for s in self._stepping.values()):
            raise TaskkdError(
                "an auxiliary network (a discriminator) has not been trained on the last forward: call "
                "`distiller.auxiliary_step()` after the backward pass and before `distiller.step()` (the trainer does)."
            )
        # past nn.Module.__setattr__, which looks for parameters, modules and buffers of that name in every step
        object.__setattr__(self, "progress", Progress(self.progress.step + 1, self.progress.total))
        changed = self._supplier is not None and self._supplier.step(self.progress)
        if self._scheduled_terms or changed:
            self._set_weights()

    def auxiliary_step(self) -> dict[str, Tensor]:
        """Train the auxiliary networks (discriminators, sampled classifiers), eagerly, after the last forward.

        Call it once for each optimiser step, after the (last) backward pass and before `step()`; before or after the
        optimiser's step is the same. With gradient accumulation the last micro-batch's tensors count. The trainer calls
        it right after the optimiser's step. Gradients are averaged over ranks, which must all call it. It returns at
        once where there is nothing to train.

        Returns:
            `{"<term>_discriminator": loss}`, detached. The next look at the losses (`check_finite`) includes them.
        """
        if not self._stepping:
            return {}
        found = {name: part.auxiliary_step(self.progress) for name, part in self._stepping.items()}
        losses = {name: value for name, value in found.items() if value is not None}
        self._auxiliary_losses |= losses
        return losses

    # ---- finiteness

    def watch(self, losses: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Put what `forward` returned under watch, for the next `check_finite`.

        `forward` does both itself unless it is compiled; a compiled hand loop calls this after `forward` and
        `check_finite` before its optimiser steps.
        """
        self._pending.append((losses, batch.get("id")))

    def check_finite(self) -> bool:
        """Look at all losses since the last look: one device synchronisation, on all ranks alike.

        Returns:
            True if all were finite; False if one was not and `on_nonfinite="skip"`.

        Raises:
            NonFiniteError: one was not; the message names term, weight, step and sample ids.
        """
        pending, taught = self._pending.copy(), self._taught
        self._pending.clear()
        object.__setattr__(self, "_taught", {})
        if self._auxiliary_losses:
            pending += [({"loss": v, n: v}, None) for n, v in self._auxiliary_losses.items()]
            self._auxiliary_losses = {}
        if not pending:
            return True
        # A NaN or infinite term makes the weighted sum non-finite, so one number stands for all of them.
        totals = [losses["loss"].detach() for losses, _ in pending]
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            flag = torch.stack(totals).isfinite().all()
            flags = torch.stack([flag.float(), torch.tensor(-float(self.stop_wish), device=flag.device)])
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN)
            lowest, stop = flags.tolist()
            finite, self.stop_agreed = lowest > 0, int(-stop)
        else:
            if self.stop_agreed != self.stop_wish:
                self.stop_agreed = self.stop_wish
            if len(totals) == 1:  # the usual case, without a kernel
                finite = math.isfinite(totals[0].item())
            else:
                finite = bool(torch.stack(totals).isfinite().all())
        if finite:
            return True
        for part in self._stepping.values():
            part.forget()
        if self.on_nonfinite == "skip":
            return False
        raise NonFiniteError(self._blame(pending) + of_the_teacher(taught))

    def _blame(self, pending: Sequence[tuple[Mapping[str, Tensor], Any]]) -> str:
        weights = self.weights()
        for losses, ids in pending:
            values = {n: v.item() for n, v in losses.items()}
            if all(math.isfinite(v) for v in values.values()):
                continue
            bad = [n for n, v in values.items() if n != "loss" and not math.isfinite(v)]
            known = {n: f"weight {w:g}" for n, w in weights.items()}
            who = ", ".join(f"{n!r} ({known.get(n, 'of the auxiliary step before')}) is {values[n]}" for n in bad)
            who = f"term {who}" if bad else f"every term is finite but their weighted sum is {values['loss']}"
            samples = f", sample ids {ids.tolist() if isinstance(ids, Tensor) else ids}" if ids is not None else ""
            return f"{who} at step {self.progress.step}{samples}; the optimiser has not stepped on it."
        return f"a term is not finite on another rank at step {self.progress.step}."

    # ---- preparation

    @property
    def built(self) -> bool:
        """Whether every adapter exists."""
        return all(t.built for t in self._term_list)

    def prepare(self, batch: Mapping[str, Any]) -> Preparation:
        """One eager look at a real batch, before any optimiser or compilation.

        Builds adapters, counts how far the teacher must run, finds tensors that in-place operations overwrite,
        measures value and gradient norm of every term, and sets `weight="auto"`. Student, buffers and random state
        are left as they were.

        Args:
            batch: one batch of the training data, on the student's device.

        Returns:
            Sizes, gradient norms, shapes, and advice where one term drowns the others.

        Raises:
            TapError, ShapeError: a tap or a pair of shapes does not work out.
            NonFiniteError: a term is not finite on this batch.
        """
        tensor = first_tensor(batch)
        devices = [tensor.device] if tensor is not None and tensor.device.type == "cuda" else []
        buffers = {n: b.clone() for n, b in self._all_buffers()}
        modes = [(module, module.training) for module in self.modules()]
        active, self._active = self._active, self._term_list
        try:
            with torch.random.fork_rng(devices), torch.enable_grad():
                self.train()
                run = self._run(batch, prepare=True)
                for term in self._term_list:
                    term.build(run)
                for name, buffer in self._all_buffers():  # those of adapters that were built just now
                    buffers.setdefault(name, buffer.clone())
                terms = self._measure(run, batch)
        finally:
            self.train(modes[0][1])  # what was built just now, too
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for name, buffer in self._all_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
            for part in self._stepping.values():
                part.forget()
            self._active = active
        self._pending, self._auxiliary_losses = [], {}
        object.__setattr__(self, "_taught", {})
        open_ = [t for t in self._term_list if t.name not in self._automatic]
        automatic = {t.name: t.automatic.share for t in open_ if t.automatic is not None}
        if automatic:
            self._automatic |= even_out(automatic, terms, self.weights())
        self.prepared = True
        self._set_weights()
        weights = self.weights()
        terms = [TermReport(**{**vars(t), "weight": weights[t.name]}) for t in terms]
        return Preparation(terms, advise(terms))

    def _all_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_buffers()
        for term in self._adversaries:
            if term.auxiliary is not None:
                yield from term.auxiliary.module.named_buffers(f"{term.name}/discriminator")

    def _measure(self, run: Run, batch: Mapping[str, Any]) -> list[TermReport]:
        losses: list[tuple[str, Tensor, Term | None]] = []
        if self.task_weight > 0:
            losses.append(("task", self._task_loss(run), None))
        losses += [(t.name, t(run), t) for t in self._term_list]
        learning = [self.student, *([self.supplier] if self._claimed else [])]  # a term may train a peer alone
        return measure(losses, [p for m in learning for p in m.parameters() if p.requires_grad], self.weights(), run)

    # ---- what checkpoints, copies and engines see

    def get_extra_state(self) -> Tensor:
        """Progress and automatic weights, as a tensor so that any checkpoint format can hold it."""
        automatic = [self._automatic.get(t.name, -1.0) for t in self._term_list]
        total = -1 if self.progress.total is None else self.progress.total
        return torch.tensor([self.progress.step, total, *automatic], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` gave."""
        step, total, *automatic = state.tolist()
        if len(automatic) != len(self._term_list):
            raise TaskkdError(f"this state has {len(automatic)} terms, the distiller {len(self._term_list)}.")
        self.progress = Progress(int(step), None if total < 0 else int(total))
        pairs = zip(self._term_list, automatic, strict=True)
        self._automatic = {t.name: w for t, w in pairs if w >= 0}
        self._set_weights()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._supplier is not None:  # averages and snapshots: outside the module tree, but of the run
            destination.update({f"{prefix}teacher.{k}": v for k, v in self._supplier.state().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._supplier is not None and (names := self._supplier.state()):
            start = f"{prefix}teacher."
            found = {k: state_dict.pop(start + k) for k in names if start + k in state_dict}
            missing = [start + k for k in names if k not in found]
            if missing:
                args[2].extend(missing)
            else:
                self._supplier.load(found)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Large buffers that every rank has alike by itself (`alike_on_ranks` of a module): DDP, which asks for this,
        would send them to all ranks before each forward."""
        return [
            f"{place}.{name}"
            for place, module in self.named_modules()
            for name in getattr(module, "alike_on_ranks", ())
        ]

    def own_parameters(self) -> list[nn.Parameter]:
        """What is trained beside the student: adapters, learned losses, gates, peers, the task loss's classifier."""
        head = [self.task_loss] if isinstance(self.task_loss, nn.Module) else []
        modules = [self.terms, *head, *([self.supplier] if self._learns else [])]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def close(self) -> None:
        """Remove every hook from student and teacher; `distiller.student` is then a plain model."""
        self._taps.close()
        if self.teacher is not None:
            self.teacher.close()

    @property
    def config(self) -> Any:
        """The student's config, for engines that look for one."""
        return self.student.config

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.student, "_no_split_modules", None)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Turn on gradient checkpointing in the student (not in the teacher, which has no backward)."""
        self.student.activation_checkpointing_enable(**options)  # type: ignore[operator]

    def columns(self) -> set[str]:
        """The names of all batch entries that student, teacher and terms read, and `id`."""
        import inspect

        names = {"id", *inspect.signature(self.student.forward).parameters}
        if self.teacher is not None:
            names |= self.teacher.columns()
        names.update(column for term in self.terms.values() for column in term.columns)  # type: ignore[union-attr]
        return names | {tap.selectors[0] for tap in self._taps.taps.values() if tap.root == "batch" and tap.selectors}  # type: ignore[misc]


def _scalar(name: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise TaskkdError(f"term {name!r} gave a tensor of shape {tuple(value.shape)}, expected a scalar loss.")
    return value.reshape(())
