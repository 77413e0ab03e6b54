"""Taps: a string names one tensor of a run of a model, a forward hook records it.

Grammar, read left to right::

    backbone.layer4          the output of a module
    backbone.layer4:in       its first input; `:in[1]` the second, `:in[mask]` a keyword
    backbone.fpn[0]          an item: a string key before an integer index before a position
    encoder.layer.3[:, 0]    a slice of the tensor (it has a colon, a comma or an ellipsis)
    head.conv@2              the third call of a module that runs several times in one forward
    out, out.logits, out[1]  the model's own output
    batch.attention_mask     an entry of the batch
    attention[3].scores      of a transformer's attention, counted by calls: query, key, value, scores, probabilities
    ./out                    a module that is really named `out`
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from taskkd.errors import TapError, nearest
from taskkd.recorder import KINDS, Recorder

__all__ = ["Tap", "Taps", "parse_tap"]

ROOTS = ("out", "batch", "attention")
Slice = tuple[Any, ...]

_TAP = re.compile(
    r"^(?P<module>\./)?(?P<head>[^\[\]:@]+)(?P<port>:in)?(?:@(?P<call>\d+))?(?P<rest>(?:\[[^\]]*\]|\.[^\[\].]+)*)$"
)
_SELECTOR = re.compile(r"\[([^\]]*)\]|\.([^\[\].]+)")


@dataclass(frozen=True)
class Tap:
    """A parsed tap. `root` is "module" or one of `ROOTS`; `selectors` are keys (str) and tensor slices (tuple).

    Of an attention tap `path` is the kind and `call` the index of the attention.
    """

    text: str
    root: str
    path: str
    port: str
    call: int | None
    selectors: tuple[str | Slice, ...]

    def select(self, value: Any) -> Any:
        """Follow the selectors into `value`.

        Raises:
            TapError: a key is not there; the message lists what is.
        """
        for selector in self.selectors:
            value = _slice(value, selector, self) if isinstance(selector, tuple) else _item(value, selector, self)
        return value


def parse_tap(text: str) -> Tap:
    """Parse a tap string.

    Raises:
        TapError: it is not in the grammar of this module.
    """
    match = _TAP.match(text.strip())
    if match is None:
        raise TapError(
            f"{text!r} is not a tap: expected a module path with optional ':in', '@call' and '[item]', "
            "as in 'backbone.layer4', 'backbone.fpn[0]', 'out.logits'."
        )
    head, rest = match["head"].strip(), match["rest"]
    selectors: list[str | Slice] = []
    for bracket, dotted in _SELECTOR.findall(rest):
        selectors.append(_parse_slice(bracket, text) if re.search(r"[:,]|\.\.\.", bracket) else (bracket or dotted))
    root, _, tail = head.partition(".")
    if match["module"] or root not in ROOTS:
        call = int(match["call"]) if match["call"] else None
        return Tap(text, "module", head, "in" if match["port"] else "out", call, tuple(selectors))
    if match["port"] or match["call"]:
        raise TapError(
            f"tap {text!r}: ':in' and '@call' are for modules, {root!r} is not one (a module so named is './{root}')."
        )
    if root == "attention":
        return _attention_tap(text, selectors)
    return Tap(text, root, "", "out", None, (*(p for p in tail.split(".") if p), *selectors))


def _attention_tap(text: str, selectors: Sequence[str | Slice]) -> Tap:
    if len(selectors) < 2 or not re.fullmatch(r"-?\d+", str(selectors[0])) or not isinstance(selectors[1], str):
        raise TapError(
            f"{text!r} is no attention tap: expected the number of the attention and one of {', '.join(KINDS)}, as in "
            "'attention[3].scores'."
        )
    if selectors[1] not in KINDS:
        raise TapError(
            f"tap {text!r}: no {selectors[1]!r}{nearest(selectors[1], KINDS)}; there are {', '.join(KINDS)}."
        )
    return Tap(text, "attention", selectors[1], "out", int(str(selectors[0])), tuple(selectors[2:]))


def _parse_slice(text: str, tap: str) -> Slice:
    parts: list[Any] = []
    for part in (p.strip() for p in text.split(",")):
        try:
            if part == "...":
                parts.append(Ellipsis)
            elif ":" in part:
                parts.append(slice(*(int(p) if p.strip() else None for p in part.split(":"))))
            elif part:
                parts.append(int(part))
        except ValueError:
            raise TapError(f"tap {tap!r}: [{text}] is not a slice; expected integers, ':' and '...'.") from None
    return tuple(parts)


def describe(value: Any) -> str:
    """One line that says what a value is: a tensor's shape, a mapping's keys, a sequence's length."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(repr(k) for k in value)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)} items"
    return f"a {type(value).__name__}"


def _slice(value: Any, index: Slice, tap: Tap) -> Any:
    if not isinstance(value, Tensor):
        raise TapError(f"tap {tap.text!r}: a slice needs a tensor, found {describe(value)}.")
    try:
        return value[index]
    except IndexError as error:
        raise TapError(f"tap {tap.text!r}: {error} (the tensor has shape {tuple(value.shape)}).") from None


def _item(value: Any, key: str, tap: Tap) -> Any:
    number = int(key) if re.fullmatch(r"-?\d+", key) else None
    if isinstance(value, Tensor):
        raise TapError(
            f"tap {tap.text!r}: [{key}] on a tensor of shape {tuple(value.shape)} would pick a sample; "
            f"the tensor is the tap without it, a slice is written with a comma or a colon, as in '[{key}, :]'."
        )
    if isinstance(value, Mapping):
        if key in value:
            return _present(value[key], key, tap)
        if number is not None and number in value:
            return value[number]
        items: Sequence[Any] = list(value.values())
    elif isinstance(value, list | tuple):
        if number is None and hasattr(value, key):  # a named tuple
            return getattr(value, key)
        items = value
    elif hasattr(value, key):
        return _present(getattr(value, key), key, tap)
    else:
        items = ()
    if number is not None and -len(items) <= number < len(items):
        return items[number]
    known = [str(k) for k in value] if isinstance(value, Mapping) else []
    raise TapError(f"tap {tap.text!r}: no item {key!r} in {describe(value)}{nearest(key, known)}.")


def _present(value: Any, key: str, tap: Tap) -> Any:
    if value is None:
        raise TapError(
            f"tap {tap.text!r}: {key!r} is None in this run; the model must be asked for it (hidden states: "
            "`output_hidden_states=True` in its config), or tap the module that computes it."
        )
    return value


class _Slot:
    """What one hook records: the values of each call, and their versions when they were seen."""

    def __init__(self, clone: bool = False) -> None:
        self.clone = clone
        self.values: list[Any] = []
        self.versions: list[int] = []


def _version(value: Any) -> int:
    if isinstance(value, Tensor):
        try:
            return value._version
        except RuntimeError:  # tensors of inference mode have none
            return 0
    if isinstance(value, Mapping):
        return sum(_version(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_version(v) for v in value)
    return 0


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {k: _clone(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_clone(v) for v in value)
    return value


class StopForward(Exception):  # noqa: N818  (control flow, not an error)
    """Raised by the last hook that is needed, to leave the rest of a teacher's forward out."""


class _Hook:
    """A forward (pre-)hook that records into a slot while its `Taps` is recording, and returns None."""

    def __init__(self, taps: Taps, slot: _Slot) -> None:
        self.taps, self.slot = taps, slot

    def output(self, _module: nn.Module, _args: Any, value: Any) -> None:
        taps = self.taps
        if not taps.recording:
            return
        slot = self.slot
        if slot.clone:
            value = _clone(value)
        slot.values.append(value)
        # Dynamo traces in-place operations away, so the counter has no meaning there (and no graph node).
        if not taps.compiling:
            slot.versions.append(_version(value))
        taps.fired += 1
        if taps.fired == taps.stop_after:
            taps.stop()

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.taps.recording:
            self.output(module, args, {**dict(enumerate(args)), **kwargs})


class _Recording:
    """The block of `Taps.record`: entered twice in every step, where a generator costs several times a plain class."""

    def __init__(self, taps: Taps) -> None:
        self.taps = taps

    def __enter__(self) -> None:
        taps = self.taps
        if taps.fired:  # a former run was not read
            taps.clear()
        taps.compiling = is_compiling()
        taps.recording = True
        if taps.recorder is not None:
            taps.recorder.recording = True

    def __exit__(self, *_: object) -> None:
        taps = self.taps
        taps.recording = False
        if taps.recorder is not None:
            taps.recorder.recording = False


class Taps:
    """The hooks of one model: one for each tapped output (or input) of a module, whatever number of taps reads it.

    Args:
        model: the model to tap; it is not changed but for the hooks, which `close` removes.
        names: tap strings.
        whose: what to call the model in errors, "student" or "teacher".

    Raises:
        TapError: a name is not a tap, or its module is not in the model; the message lists the nearest names.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], whose: str = "student") -> None:
        self.whose = whose
        self.taps = {name: parse_tap(name) for name in names}
        self.recording = self.compiling = False
        self.fired = 0
        self.stop_after: int | None = None
        self._block = _Recording(self)
        self._slots: dict[tuple[str, str], _Slot] = {}
        self._handles: list[RemovableHandle] = []
        self.recorder: Recorder | None = None
        modules = dict(model.named_modules(remove_duplicate=False))
        for tap in self.taps.values():
            if tap.root != "module" or (tap.path, tap.port) in self._slots:
                continue
            if tap.path not in modules:
                self.close()
                raise TapError(
                    f"tap {tap.text!r}: the {whose} has no module {tap.path!r}{nearest(tap.path, modules)}; "
                    "`taskkd inspect` lists the names of a model."
                )
            slot = self._slots[tap.path, tap.port] = _Slot()
            hook = _Hook(self, slot)
            module = modules[tap.path]
            if tap.port == "in":
                self._handles.append(module.register_forward_pre_hook(hook.input, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(hook.output))
        attentions = [t for t in self.taps.values() if t.root == "attention"]
        if attentions:
            try:
                self.recorder = Recorder(model, [(t.call or 0, t.path) for t in attentions], self._saw, whose)
            except TapError as error:
                self.close()
                raise TapError(f"tap {attentions[0].text!r}: {error}") from None
        self._reads = [(name, tap, self._slots.get((tap.path, tap.port))) for name, tap in self.taps.items()]

    @property
    def needs_output(self) -> bool:
        """Whether some tap reads the model's own output, so that its forward must run to the end."""
        weights = self.recorder is not None and self.recorder.needs_output
        return weights or any(tap.root == "out" for tap in self.taps.values())

    def _saw(self) -> None:
        """Count what the recorder kept, as a hook that fired."""
        self.fired += 1
        if self.fired == self.stop_after:
            self.stop()

    def stop(self) -> None:
        """Leave the forward, unless it is being compiled: a graph cannot stop."""
        if not is_compiling():
            raise StopForward

    def record(self) -> AbstractContextManager[None]:
        """Record during this block only: what runs later (recomputation in backward, evaluation) is not seen."""
        return self._block

    def clear(self) -> None:
        """Let go of every recorded tensor."""
        self.fired = 0
        for slot in self._slots.values():
            slot.values, slot.versions = [], []
        if self.recorder is not None:
            self.recorder.clear()

    def read(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every tap of the run just recorded; recorded tensors are let go of.

        Raises:
            TapError: a module did not run, ran several times without `@call`, or its tensor was overwritten in place.
        """
        values: dict[str, Any] = {}
        for name, tap, slot in self._reads:
            value = output if tap.root == "out" else batch
            if slot is not None:
                value = self._recorded(tap, slot)
            elif tap.root == "attention" and self.recorder is not None:
                value = self.recorder.read(tap.call or 0, tap.path, tap.text)
            values[name] = tap.select(value) if tap.selectors else value
        self.clear()
        return values

    def _recorded(self, tap: Tap, slot: _Slot) -> Any:
        calls = len(slot.values)
        if calls == 0:
            raise TapError(f"tap {tap.text!r}: module {tap.path!r} of the {self.whose} did not run in this forward.")
        if calls > 1 and tap.call is None:
            raise TapError(
                f"tap {tap.text!r}: module {tap.path!r} of the {self.whose} ran {calls} times in this forward; "
                f"name the call: {', '.join(f'{tap.path}@{i}' for i in range(min(calls, 3)))}."
            )
        index = tap.call or 0
        if index >= calls:
            raise TapError(f"tap {tap.text!r}: module {tap.path!r} of the {self.whose} ran only {calls} times.")
        value = slot.values[index]
        if slot.versions and _version(value) != slot.versions[index]:
            raise TapError(
                f"tap {tap.text!r}: a later in-place operation of the {self.whose} overwrote this tensor; call "
                "`distiller.prepare(batch)` first, it finds such taps and copies them in time."
            )
        if tap.port != "in":
            return value
        if tap.selectors and isinstance(tap.selectors[0], str):  # `:in[1]`, `:in[mask]` name an argument
            return value
        return next(iter(value.values()))

    def overwritten(self) -> bool:
        """After a recorded run: mark the slots whose tensors were overwritten, so that the next run copies them."""
        found = False
        for slot in self._slots.values():
            if not slot.clone and [_version(v) for v in slot.values] != slot.versions:
                slot.clone = found = True
        return found

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()
        if self.recorder is not None:
            self.recorder.close()


def accepted_arguments(forward: Callable[..., Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that picks from a batch what `forward` accepts.

    Named parameters only; a forward that names none (`*args, **kwargs`) gets everything but `id` and `teacher_*`.
    """
    import inspect

    parameters = inspect.signature(forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return functools.partial(_pick, frozenset(named))


def _pick(named: frozenset[str], batch: Mapping[str, Any]) -> dict[str, Any]:
    if named:
        return {k: v for k, v in batch.items() if k in named}
    return {k: v for k, v in batch.items() if k != "id" and not k.startswith("teacher_")}
