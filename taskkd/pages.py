"""The page of a report: one HTML file that asks nothing of any other place, and PNGs beside it."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskkd import charts, comparisons
from taskkd._version import __version__
from taskkd.charts import Chart
from taskkd.errors import RecipeError
from taskkd.files import write_whole
from taskkd.finished import Finished, read_run

__all__ = ["headline", "page", "write_page"]

#: classes that are shown; with more of them the page says where they are
MOST_CLASSES = 40
GENERATOR = "taskkd report"


def write_page(folders: Sequence[Path], output: Path, *, pictures: bool = True) -> list[Path]:
    """Write the page of one run, or of several side by side.

    Args:
        folders: of finished runs.
        output: the HTML file; it may be a page that was written before, but no other file.
        pictures: also write the charts as PNG beside it, `<name of the page>-<chart>.png`.

    Returns:
        What was written, the page first.

    Raises:
        RecipeError: a folder is not that of a finished run, or the output is another file.
        DataError: a file of a run is damaged.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"{output}: a report is a page; give a name that ends in .html.")
    if output.is_file() and GENERATOR not in output.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise RecipeError(f"{output} is there already and is no report; give another name (--output).")
    runs = [read_run(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]
    text, drawn = page(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, text)
    written = [output]
    for name, chart in drawn.items() if pictures else ():
        written.append(output.with_name(f"{output.stem}-{name}.png"))
        chart.png(written[-1])
    return written


def page(runs: Sequence[Finished]) -> tuple[str, dict[str, Chart]]:
    """The page as text, and its charts by name."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    drawn: dict[str, Chart] = {}

    def chart(name: str, one: Chart) -> Markup:
        drawn[name] = one
        return Markup(one.svg(len(drawn)))  # noqa: S704  (matplotlib escapes the texts in it)

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "value": _value, "share": _share, "count": _count, "size": _size, "ms": _ms, "plus_minus": _plus_minus,
        "times": _times, "signed": _signed,
    }  # fmt: skip
    shared = {
        "style": Markup((folder / "report.css").read_text(encoding="utf-8")),  # noqa: S704
        "version": __version__,
        "generator": GENERATOR,
        "chart": chart,
        "dashes": charts.DASHES,
        "colours": len(charts.COLOURS),
    }
    if len(runs) == 1:
        text = environment.get_template("run.html").render(**shared, **_of_run(runs[0]))
    else:
        text = environment.get_template("runs.html").render(**shared, **comparisons.of_runs(runs))
    return text, drawn


def _of_run(run: Finished) -> dict[str, Any]:
    report, logs = run.report, run.stages()
    rows = run.rows()
    terms = {f"terms-{i}": charts.of_terms(*key, seeds) for i, (key, seeds) in enumerate(logs.items())}
    by_model: dict[str, dict[int, list[Any]]] = {}
    for (title, _), seeds in logs.items():
        for seed, log in seeds.items():
            by_model.setdefault(title, {}).setdefault(seed, []).append(log)
    by_model.pop("teacher", None)
    validation = charts.of_validation(run.metric, report["teacher"]["validation"][run.metric], by_model)
    return {
        "run": run,
        "report": {"date": None, "selected": None, **report},
        "title": report["recipe"],
        "metric": run.metric,
        "headline": headline(run),
        "tiles": _tiles(run),
        "rows": rows,
        "curves": {k: c for k, c in {"validation": validation, **terms}.items() if c is not None},
        "classes": _class_table(run),
        "most_classes": MOST_CLASSES,
        "tests": _all_metrics(run),
        "picture": _picture(run.folder / "examples.png"),
        "examples": report.get("examples"),
        "facts": _facts(run),
    }


# ---- in words


def selected(run: Finished) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """The rows of the student that was selected, of the student alone (None where there is none), of the teacher."""
    rows, alone_title = {row["model"]: row for row in run.rows()}, run.report.get("alone_title", "student alone")
    alone = rows.get(alone_title)
    chosen = rows.get(run.report.get("selected", "")) or next(
        (row for title, row in rows.items() if title not in ("teacher", alone_title)), alone
    )
    return chosen or rows["teacher"], alone, rows["teacher"]


def headline(run: Finished) -> list[str]:
    """What came out, in plain sentences: quality kept and cost, then the gain over the student alone."""
    row, alone, teacher = selected(run)
    metric = run.metric
    who = "The student trained alone" if row is alone else "The distilled student"
    first = f"{who} keeps {row['kept']:.1%} of its teacher's {metric} ({row[metric]:.3f} of {teacher[metric]:.3f})"
    sentences = [f"{first}, with {_less(row, teacher)}."]
    if row is not alone:
        sentences.append(_gain(row, alone, metric, run.report.get("alone_title", "student alone")))
    return sentences


def _less(row: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    """How much smaller and faster, in words."""
    share = row["parameters"] / teacher["parameters"]
    parts = [f"{_percent(share)} of the parameters"]
    if row["flops"] and teacher["flops"]:
        parts.append(f"{_percent(row['flops'] / teacher['flops'])} of the operations")
    speed = row["speed_up"]
    text = " and ".join(parts)
    if speed is None:
        return text
    faster = f"{speed:.1f} times as fast" if speed >= 1.05 else f"not faster ({speed:.1f} times as fast)"
    return f"{text}; one at a time on a CPU it is {faster}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{100 * share:.2g}%"


def _gain(row: Mapping[str, Any], alone: Mapping[str, Any] | None, metric: str, title: str) -> str:
    if alone is None:
        return "The run has no student trained alone to compare it with, so it does not show what distillation gained."
    gain, error = row["gain"], math.hypot(row["standard_error"], alone["standard_error"])
    other = "the same student trained alone" if title == "student alone" else "the student before distillation"
    told = f"{row[metric]:.3f} instead of {alone[metric]:.3f} for {other}"
    if round(abs(gain), 3) == 0:
        about = "" if math.isnan(error) else f" (± {error:.3f})"
        return f"Distillation neither gained nor lost {metric}: {told}{about}."
    if math.isnan(error):
        word = "gained" if gain >= 0 else "lost"
        return f"Distillation {word} {abs(gain):.3f} {metric}: {told}. This is one seed; others will differ."
    if abs(gain) < 2 * error:
        return (
            f"Whether distillation gained anything cannot be told: {told} (difference {gain:+.3f} ± {error:.3f}, less "
            "than two standard errors)."
        )
    return f"Distillation {'gained' if gain > 0 else 'lost'} {abs(gain):.3f} ± {error:.3f} {metric}: {told}."


def _tiles(run: Finished) -> list[tuple[str, str]]:
    """(number, what it is), the few that count."""
    row, alone, teacher = selected(run)
    tiles = [(f"{row['kept']:.1%}", f"of the teacher's {run.metric} kept")]
    if row["gain"] is not None and row is not alone:
        tiles.append((_signed(row["gain"], 3), f"{run.metric} over the student alone"))
    if row["speed_up"] is not None:
        tiles.append((f"{row['speed_up']:.1f}×", "as fast on a CPU"))
    tiles.append((_percent(row["parameters"] / teacher["parameters"]), "of the parameters"))
    if row["score"] is not None:
        tiles.append((f"{row['score']:.2f}", "score (0 to 1)"))
    return tiles


# ---- tables


def _class_table(run: Finished) -> dict[str, Any] | None:
    """Class by class, the mean over seeds: `metrics`, `models`, and `rows` of (class, values); None without classes."""
    found = run.by_class()
    if not found:
        return None
    names = list(dict.fromkeys(name for seeds in found.values() for seed in seeds for name in seed))
    metrics = list(dict.fromkeys(m for seeds in found.values() for seed in seeds for own in seed.values() for m in own))
    counts = [m for m in metrics if m in ("samples", "entities")]
    metrics = [m for m in metrics if m not in counts]

    def mean(title: str, name: str, metric: str) -> float | None:
        values = [seed[name][metric] for seed in found[title] if metric in seed.get(name, {})]
        return statistics.fmean(values) if values else None

    own = [
        (name, [mean("teacher", name, c) for c in counts], [mean(t, name, m) for m in metrics for t in found])
        for name in names
    ]
    return {"metrics": metrics, "models": list(found), "counts": counts, "rows": own}


def _all_metrics(run: Finished) -> dict[str, Any]:
    """Every metric on the test sets: `models`, and `rows` of (metric, values), without those of classes."""
    report = run.report
    entries = {"teacher": [report["teacher"]]}
    if report["alone"]:
        entries[report.get("alone_title", "student alone")] = list(report["alone"].values())
    entries |= {name: list(runs.values()) for name, runs in report["distilled"].items()}
    names = [n for n in dict.fromkeys(k for runs in entries.values() for r in runs for k in r["test"]) if "/" not in n]

    def mean(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values = [r["test"][name] for r in runs if name in r["test"]]
        return statistics.fmean(values) if values else None

    return {"models": list(entries), "rows": [(n, [mean(runs, n) for runs in entries.values()]) for n in names]}


def _facts(run: Finished) -> list[tuple[str, str]]:
    report = run.report
    facts = [
        ("Task", run.task),
        ("Method", run.method or "terms of the recipe"),
        ("Data", str(report["data"])),
        ("Seeds", ", ".join(map(str, report["seeds"]))),
        ("Finished", str(report.get("date", "not on record")).replace("T", " ")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()) or "not on record"),
        ("Machine", str(report.get("machine", "not on record"))),
        ("Folder", run.name),
    ]
    if report.get("chance") is not None:
        facts.insert(3, ("Chance", f"{report['chance']:.4f} {run.metric} without looking at the input"))
    if "selected" in report:
        facts.insert(
            2, ("Handed over", f"{report['selected']}, seed {report.get('selected_seed')} (best on validation)")
        )
    return facts


def _picture(path: Path) -> str | None:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else None


# ---- numbers

NOT_MEASURED = "n/m"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _value(number: Any, digits: int = 4) -> str:
    return "–" if _missing(number) else f"{number:.{digits}f}"


def _signed(number: Any, digits: int = 4) -> str:
    return "–" if _missing(number) else f"{number:+.{digits}f}".replace("-", "−")


def _plus_minus(number: Any) -> str:
    return "" if _missing(number) else f"± {number:.4f}"


def _share(number: Any) -> str:
    return "–" if _missing(number) else f"{number:.1%}"


def _count(number: Any) -> str:
    if _missing(number):
        return NOT_MEASURED
    for step, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= step:
            return f"{number / step:.3g} {unit}" if number / step < 1000 else f"{number / step:.0f} {unit}"
    return f"{number:.0f}"


def _size(number: Any) -> str:
    return NOT_MEASURED if _missing(number) else f"{number / 1e6:.1f} MB"


def _ms(number: Any) -> str:
    return NOT_MEASURED if _missing(number) else (f"{number:.1f}" if number < 100 else f"{number:.0f}")


def _times(number: Any) -> str:
    return "–" if _missing(number) else f"{number:.1f}×"
