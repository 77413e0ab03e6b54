"""What the benchmarks share: a figure with its bar, interleaved timing, the command line, and the file of figures.

A script has parts; each gives figures. `run` prints them, writes them with `--json` after every part, and returns 1 if
a bar is missed by more than the noise or a part failed; one that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "Figure",
    "MissingPeerError",
    "Options",
    "Part",
    "dump",
    "fresh_process",
    "parser",
    "quartiles",
    "ratio",
    "read",
]
__all__ += ["reset_peak", "resident", "run", "seconds", "take_turns"]

#: what two copies of the same work differ by on a quiet machine, as a share: a bar is missed beyond it
NOISE = 0.01

Work = Callable[[], Any]
Quartiles = tuple[float, float, float]  # low, median, high
Verdict = Literal["", "met", "missed, within the noise", "MISSED", "not measured", "failed"]


class MissingPeerError(Exception):
    """What a figure needs is not installed here."""


@dataclass(frozen=True)
class Figure:
    """One measured value and its bar.

    Args:
        title: what is measured; of a ratio, what is over what.
        value: the median; None: it could not be measured, and `detail` says why.
        low: lower quartile, where the value is one of several.
        high: upper quartile.
        unit: "" for a ratio.
        at_least: the bar; None: no such bar.
        at_most: the bar from above.
        detail: what the value was made from, as "212 ms over 209 ms".
        failed: an error kept it from being measured.
    """

    title: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    detail: str = ""
    failed: bool = False

    @classmethod
    def of(cls, title: str, found: Quartiles, **options: Any) -> Figure:
        """With quartiles."""
        low, middle, high = found
        return cls(title, middle, low, high, **options)

    @classmethod
    def over(cls, title: str, over: Sequence[float], under: Sequence[float], **options: Any) -> Figure:
        """The ratio of two times, round by round; the medians of both stand beside it."""
        both = f"{duration(statistics.median(over))} over {duration(statistics.median(under))}"
        return cls.of(title, ratio(over, under), detail=both, **options)

    @property
    def bar(self) -> str:
        """In words."""
        unit = f" {self.unit}" if self.unit else ""
        bars = [] if self.at_least is None else [f"at least {self.at_least:g}{unit}"]
        return ", ".join(bars + ([] if self.at_most is None else [f"at most {self.at_most:g}{unit}"]))

    @property
    def verdict(self) -> Verdict:
        """Whether the bar is met."""
        if self.value is None:
            return "failed" if self.failed else "not measured"
        if not self.bar:
            return ""
        if self._within(0):
            return "met"
        return "missed, within the noise" if self._within(NOISE) else "MISSED"

    def _within(self, noise: float) -> bool:
        assert self.value is not None
        low = -float("inf") if self.at_least is None else self.at_least * (1 - noise)
        high = float("inf") if self.at_most is None else self.at_most * (1 + noise)
        return low <= self.value <= high

    @property
    def shown(self) -> str:
        """The value with its unit."""
        return "" if self.value is None else f"{number(self.value)}{f' {self.unit}' if self.unit else ''}"

    @property
    def quartiles(self) -> str:
        """As "0.991 .. 1.028"."""
        return "" if self.low is None or self.high is None else f"{number(self.low)} .. {number(self.high)}"

    def __str__(self) -> str:
        """One line."""
        spread = f" ({self.quartiles})" if self.quartiles else ""
        rest = (f"{self.shown}{spread}", self.detail, self.bar and f"bar {self.bar}", self.verdict)
        return f"{self.title}: {'; '.join(part for part in rest if part)}"


def number(value: float) -> str:
    """Three decimals below 10, one below 100, none above."""
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"


def duration(value: float) -> str:
    """Seconds, as a person would say it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value / 1e-6:.3g} µs"


# ---- measuring


def seconds(work: Work, device: str = "cpu") -> float:
    """How long it takes: CPU time of this process, on a GPU wall time, synchronised."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(
    works: Mapping[str, Work], rounds: int, *, warm_up: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each work in every round; the first rounds warm up and do not count.

    The order changes: random in one round, the reverse of it in the next.
    """
    draw, order = random.Random(0), list(works)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + warm_up):
        order = order[::-1] if turn % 2 else draw.sample(list(works), len(works))
        for name in order:
            took = seconds(works[name], device)
            if turn >= warm_up:
                taken[name].append(took)
        if sys.stderr.isatty():
            print(f"  round {turn + 1} of {rounds + warm_up}", end="\r", file=sys.stderr, flush=True)
    return taken


def quartiles(values: Sequence[float]) -> Quartiles:
    """Lower quartile, median, upper quartile; of a single value, itself."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(over: Sequence[float], under: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios of rounds."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)])


def resident(field: Literal["VmRSS", "VmHWM"]) -> float:
    """MB of this process: now, or at the worst moment since `reset_peak`."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def fresh_process(module: str, *arguments: str) -> list[float]:
    """The numbers that a script prints last, in a process of its own that gives large blocks back when they are freed.

    Raises:
        RuntimeError: it failed; with what it wrote.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def peak(work: Work, device: str = "cpu") -> float:
    """MB that torch has taken at the worst moment, above what it had before."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    taken = itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))
    return max(taken) / 2**20


# ---- the command line

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    """Of a run of a script.

    Args:
        rounds: of each part; None: its own number.
        quick: two rounds, and the smallest sizes where a part has several.
        device: "cpu" or "cuda".
    """

    rounds: int | None = None
    quick: bool = False
    device: str = "cpu"

    def count(self, usual: int) -> int:
        """Rounds of a part."""
        return self.rounds or (2 if self.quick else usual)


@dataclass(frozen=True)
class Part:
    """Figures that are measured together."""

    title: str
    measure: Callable[[Options], list[Figure]]


def parser(description: str | None, parts: Mapping[str, Part], *, device: bool = False) -> argparse.ArgumentParser:
    """What every script takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=list(parts), action="append", help="one part (may be repeated)")
    made.add_argument("--rounds", type=int, help="of every part (default: each has its own number)")
    made.add_argument("--quick", action="store_true", help="two rounds: whether it runs, not how fast")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    if device:
        made.add_argument("--device", default="cpu", help="cpu or cuda")
    return made


def run(parts: Mapping[str, Part], given: argparse.Namespace) -> int:
    """Measure and print; 1 if a bar is missed by more than the noise or a part failed."""
    steady()
    options = Options(given.rounds, given.quick, getattr(given, "device", "cpu"))
    found: dict[str, list[Figure]] = {}
    for key in given.only or parts:
        part = parts[key]
        print(f"\n{key}: {part.title}", flush=True)
        try:
            found[key] = part.measure(options)
        except MissingPeerError as missing:
            found[key] = [Figure(part.title, None, detail=str(missing))]
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            found[key] = [Figure(part.title, None, detail=_one_line(error), failed=True)]
        for figure in found[key]:
            print(f"  {figure}", flush=True)
        if given.json:
            dump(given.json, {parts[k].title: figures for k, figures in found.items()})
    return int(any(figure.verdict in ("MISSED", "failed") for figures in found.values() for figure in figures))


def steady() -> None:
    """One thread, no denormals, no lines of libraries between ours."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.set_flush_denormal(True)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}".strip(": ")


def dump(path: Path, parts: Mapping[str, Sequence[Figure]]) -> None:
    """Write figures: a list of parts, each with its title and figures."""
    made = [
        {"title": title, "figures": [{**asdict(f), "bar": f.bar, "verdict": f.verdict} for f in figures]}
        for title, figures in parts.items()
    ]
    path.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, list[Figure]]:
    """What `dump` wrote."""
    parts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    derived = ("bar", "verdict")
    return {
        part["title"]: [Figure(**{k: v for k, v in row.items() if k not in derived}) for row in part["figures"]]
        for part in parts
    }
