"""Charts of a report: as SVG that takes its colours from the page, and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "DASHES", "Chart", "Line", "Point", "front"]

#: of lines and points on white; the page has its own of them for a dark ground
COLOURS = ("#0b63ce", "#c2410c", "#15803d", "#7e22ce", "#b91c6b", "#0e7490", "#854d0e", "#475569")
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2")
#: what stands for the page's own colours in a drawn SVG
INK, FAINT = "#010203", "#010204"


@dataclass(frozen=True)
class Line:
    """A line: its name, points, place among the colours; a thin one has no place in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    thin: bool = False
    marker: bool = False


@dataclass(frozen=True)
class Point:
    """A point of a scatter: its name, place, standard error upwards, and place among the colours."""

    name: str
    x: float
    y: float
    error: float
    colour: int
    marker: str = "o"


@dataclass(frozen=True)
class Chart:
    """A chart that can be drawn in the page's colours or on white.

    Args:
        title: of the chart; stands in the page, and over a PNG.
        x, y: titles of the axes.
        lines, points: what is drawn; of points, the front (see `front`) is joined.
        level: a horizontal line, with its name.
        log_x, log_y: logarithmic axes.
        alt: what the chart shows, in words.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line] = ()
    points: Sequence[Point] = ()
    level: tuple[str, float] | None = None
    log_x: bool = False
    log_y: bool = False
    alt: str = ""
    legend: Sequence[tuple[str, int]] = field(default_factory=tuple)

    def svg(self, number: int) -> str:
        """For inside a page; `number` tells its charts apart."""
        import matplotlib as mpl

        palette = tuple(f"#0102{16 + i:02x}" for i in range(len(COLOURS)))
        options = {"svg.fonttype": "none", "svg.hashsalt": f"taskkd-{number}", "svg.id": f"chart-{number}"}
        buffer = io.StringIO()
        with mpl.rc_context({k: v for k, v in options.items() if k in mpl.rcParams}):
            figure = self._figure((4.6, 3.1), palette, INK, FAINT)
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        text = buffer.getvalue()
        text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.S)
        for i, colour in enumerate(palette):
            text = text.replace(colour, f"var(--c{i})")
        text = text.replace(INK, "currentColor").replace(FAINT, "var(--line)")
        text = re.sub(r'id="(?=\w)', f'id="g{number}-', text)
        text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>g{number}-", text)
        return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)

    def png(self, path: Path) -> None:
        """As a file, on white, with title and legend."""
        figure = self._figure((6.4, 4.2), COLOURS, "#1f2937", "#d1d5db", whole=True)
        figure.savefig(path, format="png", dpi=130)

    def _figure(
        self, size: tuple[float, float], palette: Sequence[str], ink: str, faint: str, *, whole: bool = False
    ) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size)
        axis = figure.add_subplot()
        for line in self.lines:
            dash = _dash(line.colour)
            axis.plot(
                *zip(*line.points, strict=True), color=palette[line.colour % len(palette)],
                linewidth=0.8 if line.thin else 1.9, alpha=0.45 if line.thin else 1, linestyle=dash,
                marker="o" if line.marker and not line.thin else None, markersize=3.5, label=line.name,
            )  # fmt: skip
        self._scatter(axis, palette, ink)
        if self.level is not None:
            axis.axhline(self.level[1], color=ink, linestyle=(0, (4, 3)), linewidth=1.1, label=self.level[0])
        axis.set_xscale("log" if self.log_x else "linear")
        axis.set_yscale("log" if self.log_y else "linear")
        self._dress(figure, axis, ink, faint)
        if whole:
            axis.set_title(self.title, fontsize=11, color=ink)
            shown = [line.name for line in self.lines if not line.thin] + [p.name for p in self.points]
            if self.lines and len(shown) > 1:
                handles, names = axis.get_legend_handles_labels()
                kept = dict(zip(names[::-1], handles[::-1], strict=True))
                axis.legend(kept.values(), kept.keys(), fontsize=7)
            for point in self.points:
                axis.annotate(point.name, (point.x, point.y), (5, 4), textcoords="offset points", fontsize=7, color=ink)
        return figure

    def _scatter(self, axis: Any, palette: Sequence[str], ink: str) -> None:
        best = front([(p.x, p.y) for p in self.points])
        if len(best) > 1:
            axis.step(*zip(*best, strict=True), where="post", color=ink, linewidth=1.0, alpha=0.6, zorder=1)
        for point in self.points:
            colour = palette[point.colour % len(palette)]
            if point.error > 0:
                axis.errorbar(point.x, point.y, point.error, color=colour, linewidth=1.0, capsize=2.5, zorder=2)
            on_front = (point.x, point.y) in best
            axis.plot(
                point.x, point.y, point.marker, color=colour, markersize=7, markeredgewidth=1.6,
                markerfacecolor=colour if on_front else "none", zorder=3,
            )  # fmt: skip

    def _dress(self, figure: Any, axis: Any, ink: str, faint: str) -> None:
        axis.set_xlabel(self.x, fontsize=9, color=ink)
        axis.set_ylabel(self.y, fontsize=9, color=ink)
        axis.tick_params(which="both", labelsize=8.5, color=ink, labelcolor=ink)
        axis.grid(color=faint, linewidth=0.7)
        axis.set_axisbelow(True)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ink)
        if self.log_x or self.log_y:
            _plain_ticks(axis, x=self.log_x, y=self.log_y)
        if not self.log_x and axis.get_xlim()[1] >= 10_000:
            axis.xaxis.set_major_formatter(lambda value, _: short(value))  # else 1.6 with a 1e7 in the corner
        figure.subplots_adjust(left=0.17, right=0.97, bottom=0.17, top=0.94 if size_of(figure) < 5 else 0.91)


def size_of(figure: Any) -> float:
    """Width in inches."""
    return float(figure.get_size_inches()[0])


def _dash(place: int) -> Any:
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return (0, tuple(map(float, dash.split()))) if dash else "solid"


def _plain_ticks(axis: Any, *, x: bool, y: bool) -> None:
    """Few ticks, written as numbers (0.05, 3k) rather than powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for wanted, one in ((x, axis.xaxis), (y, axis.yaxis)):
        if wanted:
            low, high = sorted(one.get_view_interval())
            subs = (1.0, 2.0, 5.0) if low > 0 and high / low < 100 else (1.0,)
            one.set_major_locator(LogLocator(subs=subs, numticks=8))
            one.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            one.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number in few characters: 1.5k, 22M, 0.05."""
    for step, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= step:
            return f"{value / step:.3g}{unit}"
    return f"{value:.3g}"


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats: none costs less and gives more (or as much); by rising cost.

    Args:
        points: (cost, quality).
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def mean_line(seeds: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean over seeds at the places that all have."""
    shared = set.intersection(*({x for x, _ in points} for points in seeds)) if seeds else set()
    values: Callable[[float], list[float]] = lambda x: [dict(points)[x] for points in seeds]  # noqa: E731
    return [(x, sum(values(x)) / len(seeds)) for x in sorted(shared)]


def of_terms(title: str, stage: str, logs: Mapping[int, Sequence[Mapping[str, Any]]]) -> Chart | None:
    """The value of every term of a stage against its steps, the mean over seeds; None without any.

    A stage of the task's loss alone shows that loss.
    """
    names = list(dict.fromkeys(k for log in logs.values() for entry in log for k in entry if k.startswith("loss_")))
    names = names or ["loss"]
    lines = []
    for place, name in enumerate(names):
        seeds = [[(float(e["step"]), e[name]) for e in log if _positive(e.get(name))] for log in logs.values()]
        mean = mean_line(seeds) or next((points for points in seeds if points), [])
        if mean:
            lines.append(Line(name.removeprefix("loss_"), mean, place))
    if not lines:
        return None
    over = f"mean over {len(logs)} seeds" if len(logs) > 1 else "1 seed"
    ends = "; ".join(f"{line.name} from {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in lines)
    return Chart(
        f"{title}: {stage}", "step", "value of the term", lines, log_y=True,
        alt=f"Every term of {title}, {stage}, against steps ({over}): {ends}.",
        legend=[(line.name, line.colour) for line in lines],
    )  # fmt: skip


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and 0 < value < float("inf")  # noqa: PLR0124


def of_validation(
    metric: str, teacher: float, logs: Mapping[str, Mapping[int, Sequence[Sequence[Mapping[str, Any]]]]]
) -> Chart | None:
    """The metric on validation against the share of the training; thin: each seed, thick: their mean.

    Args:
        metric: its name.
        teacher: its own.
        logs: title -> seed -> the log of each stage.
    """
    lines, legend = [], []
    for place, (title, seeds) in enumerate(logs.items()):
        curves = [_scores(stages, metric) for stages in seeds.values()]
        curves = [c for c in curves if c]
        if not curves:
            continue
        if len(curves) > 1:
            lines += [Line(title, c, place, thin=True) for c in curves]
        lines.append(Line(title, mean_line(curves) or curves[0], place, marker=True))
        legend.append((title, place))
    if not lines:
        return None
    ends = "; ".join(f"{line.name} ends at {line.points[-1][1]:.4f}" for line in lines if not line.thin)
    return Chart(
        f"{metric} on validation", "share of the training", metric, lines, level=("teacher", teacher),
        alt=f"{metric} on validation against the share of the training: {ends}; teacher {teacher:.4f}.", legend=legend,
    )  # fmt: skip


def _scores(stages: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> list[tuple[float, float]]:
    """(share of the steps of all stages, metric)."""
    points, before = [], 0.0
    for log in stages:
        points += [(before + e["step"], e[f"eval_{metric}"]) for e in log if f"eval_{metric}" in e]
        before += max((float(e.get("step", 0)) for e in log), default=0.0)
    return [(round(step / max(before, 1.0), 6), value) for step, value in points]
