"""What a model costs: parameters, bytes, floating point operations, and latency on the CPU."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from taskkd.taps import accepted_arguments
from taskkd.teachers import Frozen

__all__ = ["measure"]

logger = logging.getLogger(__name__)
Batch = Mapping[str, Any]
#: rounds over the batches, and seconds after which no other pass begins
ROUNDS, BUDGET = 3, 4.0
#: passes of each model that are timed whatever they take, and samples whose operations are counted
LEAST, COUNTED = 3, 4


def measure(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    larger: Sequence[Batch] = (),
    *,
    budget: float = BUDGET,
) -> dict[str, dict[str, float | None]]:
    """Parameters, bytes of the weights, operations and CPU latency of both.

    Teacher and student take turns on the same real samples, so that a busy machine slows both alike.

    Args:
        teacher, student: moved to the CPU.
        batches: of one sample each.
        larger: of several samples each (a run has 8).
        budget: seconds that the timing of each batch size takes at most, but for one pass to warm up and three that are
            timed whatever they take.

    Returns:
        By "teacher" and "student": `parameters`, `bytes`, `flops` of one sample (mean of up to four), `latency_ms` and
        `latency_p95_ms` of a batch of one (median and 95th percentile), `latency_8_ms` and `latency_8_p95_ms` of a
        larger batch (the whole batch), all in milliseconds. None: not measured.
    """  # fmt: skip
    models = {"teacher": teacher.cpu().eval(), "student": student.cpu().eval()}
    inputs = {"teacher": Frozen(teacher).inputs, "student": accepted_arguments(student.forward)}
    passes = {name: _pass(model, inputs[name]) for name, model in models.items()}
    with torch.no_grad():
        single, several = _times(passes, batches, budget), _times(passes, larger, budget)
        return {
            name: {
                "parameters": float(sum(p.numel() for p in model.parameters())),
                "bytes": _bytes(model),
                "flops": _flops(passes[name], batches[:COUNTED], name),
                **_percentiles("latency", single[name]),
                **_percentiles("latency_8", several[name]),
            }
            for name, model in models.items()
        }


def _pass(model: nn.Module, inputs: Callable[[Batch], dict[str, Any]]) -> Callable[[Batch], object]:
    return lambda batch: model(**inputs(batch))


def _times(
    passes: Mapping[str, Callable[[Batch], object]], batches: Sequence[Batch], budget: float
) -> dict[str, list[float]]:
    """Seconds of each model's passes, in turns."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    start = time.perf_counter()
    for batch in batches[:8]:  # warms up, on texts of several lengths
        for run in passes.values():
            run(batch)
        if time.perf_counter() - start > budget / 4:
            break
    start = time.perf_counter()
    for batch in [*batches] * ROUNDS:
        if len(next(iter(times.values()))) >= LEAST and time.perf_counter() - start > budget:
            break
        for name, run in passes.items():
            before = time.perf_counter()
            run(batch)
            times[name].append(time.perf_counter() - before)
    return times


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)
    return {
        f"{name}_ms": 1e3 * statistics.median(ordered) if ordered else None,
        f"{name}_p95_ms": 1e3 * ordered[int(0.95 * (len(ordered) - 1))] if ordered else None,
    }


def _bytes(model: nn.Module) -> float:
    """Of parameters and buffers; what two names share counts once."""
    return float(sum({p.data_ptr(): p.nbytes for p in [*model.parameters(), *model.buffers()]}.values()))


def _flops(run: Callable[[Batch], object], batches: Sequence[Batch], name: str) -> float | None:
    """Mean over the batches of what torch's counter sees: matrix products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    if not batches:
        return None
    try:
        with FlopCounterMode(display=False) as counter:
            for batch in batches:
                run(batch)
    except Exception as error:
        # A model that the counter cannot follow must not end a finished run.
        logger.warning("the operations of the %s cannot be counted: %s", name, error)
        return None
    return float(counter.get_total_flops()) / len(batches)
