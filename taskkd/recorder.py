"""The recorder of attention: queries, keys, values and scores of a transformer, without touching it.

transformers looks the attention function of a model up by a name in its config. The recorder registers a function of
its own (and the mask that goes with it), which passes every call on to the one that was there before and keeps the
queries and keys that were asked for. Scores are multiplied out when a tap is read, outside the model's forward: inside
it they would break gradient checkpointing, which recomputes the forward and finds other tensors.

Calls are counted, not modules: ALBERT runs one module many times.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taskkd.errors import TapError, nearest

__all__ = ["Attention", "Recorder"]

KINDS = ("query", "key", "value", "scores", "probabilities")
_numbers = itertools.count()


@dataclass
class Attention:
    """One recorded call of an attention function.

    Args:
        query, key, value: (batch, heads, tokens, head features), after rotary embeddings; keys and values have fewer
            heads with grouped queries.
        mask: as the function got it: None, booleans (True: attended to) or numbers to be added to the scores.
        scaling: factor of `query @ key'`.
        bias: position bias that is added to the scores (T5), or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    bias: Tensor | None

    def scores(self) -> Tensor:
        """`query @ key' * scaling (+ bias)`, without the mask, (batch, heads, tokens, tokens)."""
        key = self.key
        if key.shape[1] != self.query.shape[1]:
            key = key.repeat_interleave(self.query.shape[1] // key.shape[1], dim=1)
        scores = self.query @ key.transpose(-1, -2) * self.scaling
        return scores if self.bias is None else scores + self.bias

    def probabilities(self) -> Tensor:
        """`softmax(scores + mask)`, before dropout, (batch, heads, tokens, tokens)."""
        scores = self.scores()
        if (mask := self.mask) is None:
            return scores.softmax(-1)
        mask = mask[:, None, None] if mask.ndim == 2 else mask  # padding alone, as flash attention takes it
        if mask.dtype.is_floating_point:
            return (scores + mask).softmax(-1)
        return scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min).softmax(-1)


class Recorder:
    """Records what `attention[i].<kind>` taps of one model ask for.

    Args:
        model: a transformers model, or a module that has some inside. Its attention function is exchanged until
            `close`; outputs stay bit-equal.
        wanted: (index of the call or None for all, kind) pairs.
        seen: called after each call that was kept (a teacher stops there if nothing further is needed).
        whose: "student" or "teacher", for errors.

    Raises:
        TapError: the model has no attention that can be recorded, or a kind is unknown.

    A model that computes its attention by itself (DeBERTa, MPNet, XLNet, ...) supplies probabilities only: it is asked
    for `output_attentions` while recording; in train mode those are after dropout.
    """

    def __init__(
        self, model: nn.Module, wanted: Iterable[tuple[int, str]], seen: Callable[[], None], whose: str = "student"
    ) -> None:
        self.whose, self.seen = whose, seen
        self.recording = False
        self.wanted: dict[int, set[str]] = {}
        for index, kind in wanted:
            if kind not in KINDS:
                raise TapError(f"attention has no {kind!r}{nearest(kind, KINDS)}; it has {', '.join(KINDS)}.")
            self.wanted.setdefault(index, set()).add(kind)
        self._from_the_end = any(index < 0 for index in self.wanted)
        self.count = 0
        self.calls: dict[int, Attention] = {}
        self.weights: Any = None
        self._configs: list[tuple[Any, Any]] = []
        self._handles: list[RemovableHandle] = []
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

        models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        if not models:
            raise TapError(
                f"attention taps record transformers models; the {self.whose} ({type(model).__name__}) is none and has "
                "none inside."
            )
        if not all(m._can_set_attn_implementation() for m in models):
            self._ask_for_weights(models[0])
            return
        functions, masks = AttentionInterface(), AttentionMaskInterface()
        names: dict[str, str] = {}
        for config in {id(m.config): m.config for m in models}.values():
            before = config._attn_implementation_internal
            if before not in names:
                # The mask goes with the function: a name without one would drop the padding mask silently. Neither is
                # ever taken out again: a copy of the model, made meanwhile, goes on with them.
                names[before] = f"taskkd-{next(_numbers)}"
                original = functions.get(before)  # None for "eager", which is each model's own
                AttentionInterface.register(names[before], functools.partial(self._attention, original))
                AttentionMaskInterface.register(names[before], masks[before if before in masks else "eager"])
            self._configs.append((config, before))
            config._attn_implementation_internal = names[before]

    def _ask_for_weights(self, model: nn.Module) -> None:
        """The way out for models with an attention of their own."""
        kinds = {kind for kinds in self.wanted.values() for kind in kinds}
        if kinds != {"probabilities"}:
            other = sorted(kinds - {"probabilities"})
            raise TapError(
                f"the {self.whose} ({type(model).__name__}) computes its attention by itself, not through the "
                f"attention interface of transformers: {', '.join(other)} cannot be recorded. Use "
                "`attention[i].probabilities`, or hidden states."
            )

        def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return (args, {**kwargs, "output_attentions": True}) if self.recording else None

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.recording:
                self.weights = getattr(output, "attentions", None)

        self._handles += [
            model.register_forward_pre_hook(ask, with_kwargs=True),
            model.register_forward_hook(keep),
        ]

    def _attention(
        self,
        original: Callable[..., Any] | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> Any:
        """The attention function: as the one before, and keeps what is wanted."""
        function = original or sys.modules[type(module).__module__].eager_attention_forward
        result = function(module, query, key, value, attention_mask, **options)
        if self.recording:
            index = self.count
            self.count = index + 1
            if index in self.wanted or self._from_the_end:
                scaling = options.get("scaling")
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                bias = options.get("position_bias")
                self.calls[index] = Attention(query, key, value, attention_mask, scaling, bias)
                self.seen()
        return result

    @property
    def needs_output(self) -> bool:
        """Whether what is wanted comes with the model's output, so that its forward must run to the end."""
        return bool(self._handles)

    def read(self, index: int, kind: str, tap: str) -> Tensor:
        """A kind of tensor of the call `index`, counted from the end if it is negative.

        Raises:
            TapError: there was no such call.
        """
        count = self.count if self.weights is None else len(self.weights)
        found = index + count if index < 0 else index
        if not 0 <= found < count:
            raise TapError(
                f"tap {tap!r}: the {self.whose} computed {count} attentions in this forward"
                + (f", expected an index from 0 to {count - 1}." if count else "; does it run under another name?")
            )
        if self.weights is not None:
            weights: Tensor = self.weights[found]
            return weights
        call = self.calls[found]
        value: Tensor = getattr(call, kind)() if kind in ("scores", "probabilities") else getattr(call, kind)
        return value

    def clear(self) -> None:
        """Let go of every recorded tensor."""
        self.count, self.weights = 0, None
        self.calls = {}

    def close(self) -> None:
        """Give the model its own attention function back."""
        for config, previous in self._configs:
            config._attn_implementation_internal = previous
        for handle in self._handles:
            handle.remove()
        self._configs, self._handles = [], []
        self.clear()
