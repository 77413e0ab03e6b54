"""Texts that models answer differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.taps import accepted_arguments
from taskkd.teachers import Frozen

__all__ = ["disagreements"]

#: labelled test samples that are looked at, texts that are shown, characters of one
LOOKED_AT, SHOWN, LONGEST = 512, 12, 600


def disagreements(
    data: Any, models: Mapping[str, nn.Module], *, looked_at: int = LOOKED_AT, shown: int = SHOWN
) -> dict[str, Any]:
    """Test texts on which models give different answers, the same number of each pattern of who is right.

    The first labelled samples of the test set are looked at; of each pattern the first is taken, in the order of the
    test set, then of each the second, and so on.

    Args:
        data: of a run that classifies texts.
        models: title -> model, on the CPU; the first is the teacher.
        looked_at: samples.
        shown: texts at most.

    Returns:
        `looked_at`, `agreed` (samples on which all give the same answer), `patterns` (each with `right`, the titles of
        those that are right, and `count`), and `texts` (each with `text`, `label`, and by title `answers`: `label`,
        `probability`, `right`).
    """
    keep = {n for name in data.tokenizer.model_input_names for n in (name, f"teacher_{name}")}
    teacher = next(iter(models))
    rows = [row for row in (data.test[i] for i in range(min(len(data.test), looked_at))) if row["labels"] >= 0]
    samples = [{k: v for k, v in row.items() if k in keep} for row in rows]
    inputs = {t: Frozen(m).inputs if t == teacher else accepted_arguments(m.forward) for t, m in models.items()}
    answers = {title: _answers(model, inputs[title], samples, data) for title, model in models.items()}
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for i, row in enumerate(rows):
        given = [int(found[i].argmax()) for found in answers.values()]
        if len(set(given)) > 1:
            patterns.setdefault(tuple(answer == row["labels"] for answer in given), []).append(i)
    turns = [i for turn in zip_longest(*patterns.values()) for i in turn if i is not None]
    return {
        "looked_at": len(rows),
        "agreed": len(rows) - sum(map(len, patterns.values())),
        "patterns": [
            {"right": [title for title, right in zip(models, pattern, strict=True) if right], "count": len(those)}
            for pattern, those in sorted(patterns.items(), reverse=True)
        ],
        "texts": [_shown(rows[i], {title: found[i] for title, found in answers.items()}, data) for i in turns[:shown]],
    }


@torch.no_grad()
def _answers(
    model: nn.Module,
    inputs: Callable[[Mapping[str, Any]], dict[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    data: Any,
) -> Tensor:
    """(samples, classes) probabilities."""
    found = []
    for start in range(0, len(samples), 64):
        batch = inputs(dict(data.collator(samples[start : start + 64])))
        found.append(model.eval()(**batch)["logits"].float().softmax(-1))
    return torch.cat(found) if found else torch.zeros(0, len(data.labels))


def _shown(row: Mapping[str, Any], probabilities: Mapping[str, Tensor], data: Any) -> dict[str, Any]:
    answers = {}
    for title, row_of in probabilities.items():
        best = int(row_of.argmax())
        answers[title] = {
            "label": data.labels[best],
            "probability": float(row_of[best]),
            "right": best == row["labels"],
        }
    return {"text": _text(row["input_ids"], data.tokenizer), "label": data.labels[row["labels"]], "answers": answers}


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    """As the tokenizer gives it back (some write all in lower case); the two of a pair with a bar between."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.sep_token_id:
            parts.append([])
        else:
            parts[-1].append(token)
    texts = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts]
    whole = " | ".join(text for text in texts if text)
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}…"
