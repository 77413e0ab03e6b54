"""Run all benchmarks of speed and memory and write `docs/benchmarks.md`: `python -m benchmarks` (or `make bench`).

    python -m benchmarks [--only SECTION] [--quick] [--page FILE]

Each section is a script, run in a process of its own, one after the other; it writes its figures to a file, and its
table takes the place of the one that stands in the page between its markers. What is between no markers is written by
people and stays. A section that is not run keeps its table, with its date and commit; one that breaks off says so
and keeps no other from running. Exits 1 if a bar is missed by more than the noise or a section failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import ROOT, Figure, read

PAGE = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Section:
    """Of the page.

    Args:
        heading: made where the page has no markers of it yet.
        command: what python is given.
        peers: packages whose versions matter, beside torch.
    """

    heading: str
    command: Sequence[str]
    peers: Sequence[str] = ()


SECTIONS = {
    "overhead": Section("Fixed overhead of a step", ("-m", "benchmarks.overhead"), ("torchdistill", "nvidia-modelopt")),
    "pieces": Section("Taps and caches", ("-m", "benchmarks.pieces"), ("torchvision", "transformers")),
    "import": Section("Import time", ("-m", "benchmarks.import_time")),
    "growth": Section("Growth with data, classes and layers", ("-m", "benchmarks.growth")),
    "nlp": Section("NLP", ("-m", "benchmarks.nlp"), ("transformers", "textbrewer")),
    "detection": Section("Detection", ("-m", "benchmarks.detection"), ("torchvision",)),
    "segmentation": Section("Segmentation", ("-m", "benchmarks.segmentation")),
    "face": Section("Face recognition", ("-m", "benchmarks.face")),
    "records": Section("Reading faces", ("-m", "benchmarks.face_records"), ("pillow", "numpy")),
}


# ---- running


@dataclass(frozen=True)
class Outcome:
    """Of a run of a section: figures by part, in words what went wrong (or ""), and where it was measured."""

    figures: Mapping[str, Sequence[Figure]]
    error: str
    about: str

    @property
    def good(self) -> bool:
        """No bar is missed, nothing failed."""
        verdicts = [figure.verdict for part in self.figures.values() for figure in part]
        return not self.error and not {"MISSED", "failed"} & set(verdicts)


def measure(section: Section, *, quick: bool) -> Outcome:
    """Run a script to its end, however it ends."""
    command = [*section.command, *(["--quick"] if quick else [])]
    load, start = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        done = subprocess.run([sys.executable, *command, "--json", str(file)], cwd=ROOT, check=False)
        figures = read(file) if file.exists() else {}
    error = ""
    if not figures or done.returncode not in (0, 1):
        error = f"broke off (exit status {done.returncode}){' after these parts' if figures else ''}"
    about = (
        f"`python {' '.join(command)}`, {today()}, {time.monotonic() - start:.0f} s; {machine()}, load {load:.1f} "
        f"before and {os.getloadavg()[0]:.1f} after; {versions(section.peers)}."
        f"{' Two rounds, which show that it runs, not how fast.' if quick else ''}"
    )
    return Outcome(figures, error, about)


def today() -> str:
    """The date and the commit."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d} on commit {commit()}"


def commit() -> str:
    """Of this checkout; with a plus where files but the page itself differ from it, "unknown" without git."""
    try:
        head, changed = (_git(words) for words in ("rev-parse --short HEAD", "diff --name-only HEAD"))
    except FileNotFoundError:
        return "unknown"
    plus = "+" if set(changed.splitlines()) - {PAGE.relative_to(ROOT).as_posix()} else ""
    return f"{head}{plus}" if head else "unknown"


def _git(words: str) -> str:
    """What git says of this checkout."""
    command = ["git", "-C", str(ROOT), *words.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """Processor and cores."""
    name = platform.processor() or platform.machine()
    file = Path("/proc/cpuinfo")
    if file.exists() and (found := re.search(r"model name\s*: (.*)", file.read_text())):
        name = found[1]
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def versions(peers: Sequence[str]) -> str:
    """Of python, torch and what else the section uses."""
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", *peers):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


# ---- the page


def verdict(figures: Sequence[Figure]) -> str:
    """One line: how many bars are met, and which are not."""
    judged = [f for f in figures if f.verdict in ("met", "missed, within the noise", "MISSED")]
    lines = [f"{sum(f.verdict == 'met' for f in judged)} of {len(judged)} bars met"]
    for word in ("MISSED", "missed, within the noise"):
        missed = [f"{f.title} ({f.shown}, bar {f.bar})" for f in judged if f.verdict == word]
        lines += [f"**{word}**: {', '.join(missed)}"] if missed else []
    for word in ("failed", "not measured"):
        missed = [f.title for f in figures if f.verdict == word]
        lines += [f"**{word}**: {', '.join(missed)}"] if missed else []
    return "; ".join(lines) + "."


def table(figures: Sequence[Figure]) -> list[str]:
    """In markdown; columns that nothing is in are left out."""
    rows = [[f.title, f.shown, f.quartiles, f.detail, f.bar, str(f.verdict)] for f in figures]
    titles = ["", "", "quartiles", "", "bar", ""]
    kept = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    lines = [
        [titles[i] for i in kept],
        ["---" for _ in kept],
        *([row[i].replace("|", "\\|") for i in kept] for row in rows),
    ]
    return ["| " + " | ".join(line) + " |" for line in lines]


def block(outcome: Outcome) -> str:
    """What is between the markers of a section."""
    every = [figure for part in outcome.figures.values() for figure in part]
    lines = [verdict(every)]
    for title, figures in outcome.figures.items():
        lines += ["", f"{title[0].upper()}{title[1:]}:", "", *table(figures)]
    lines += ["", f"**The run {outcome.error}.**"] if outcome.error else []
    return "\n".join([*lines, "", outcome.about])


def markers(name: str) -> tuple[str, str]:
    """Of a section."""
    return f"<!-- benchmarks: {name} -->", f"<!-- end of benchmarks: {name} -->"


def standing(page: str, name: str) -> str:
    """What the page has between the markers of a section; "" without them."""
    begin, end = markers(name)
    found = re.search(f"{re.escape(begin)}\n(.*?)\n?{re.escape(end)}", page, re.DOTALL)
    return found[1] if found else ""


def put(page: str, name: str, heading: str, text: str) -> str:
    """The page with a section's block in place of the one that stands there, or at its end under a heading."""
    begin, end = markers(name)
    new = f"{begin}\n{text}\n{end}"
    if begin in page:
        return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: new, page, flags=re.DOTALL)
    return f"{page.rstrip()}\n\n## {heading}\n\n{new}\n"


def with_outcome(page: str, name: str, section: Section, outcome: Outcome) -> str:
    """The page with a new table; of a run that gave nothing with a line above the old one."""
    text = block(outcome)
    if not outcome.figures:
        old = re.sub(r"\A\*\*The run.*?\n\n", "", standing(page, name))
        text = f"**The run {outcome.error}:** {outcome.about}"
        text += f" What follows is of the run before.\n\n{old}" if old else ""
    return put(page, name, section.heading, text)


def summary(page: str, sections: Mapping[str, Section]) -> str:
    """A table of all sections, from what the page says of each."""
    lines = ["| | | measured |", "|---|---|---|"]
    for name, section in sections.items():
        text = standing(page, name)
        when = re.search(r"(\d{4}-\d\d-\d\d on commit [\w+]+)", text)
        first = text.partition("\n")[0] or "not measured yet"
        first = re.sub(r"(\A\*\*The run .*?):\*\* .*", r"\1**", first)
        lines.append(f"| {section.heading} | {first} | {when[1] if when else ''} |")
    return "\n".join(lines)


def write(path: Path, page: str, sections: Mapping[str, Section]) -> None:
    """With the summary brought up to date."""
    path.write_text(put(page, "summary", "Summary", summary(page, sections)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None, sections: Mapping[str, Section] = SECTIONS) -> int:
    """Run the sections and write the page after each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(sections), action="append", help="one section (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="two rounds: whether everything runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    given = parser.parse_args(arguments)
    names, bad = given.only or list(sections), []
    for count, name in enumerate(names, 1):
        print(f"\n[{count} of {len(names)}] {name}: python {' '.join(sections[name].command)}", flush=True)
        outcome = measure(sections[name], quick=given.quick)
        page = given.page.read_text(encoding="utf-8") if given.page.exists() else "# Benchmarks\n"
        write(given.page, with_outcome(page, name, sections[name], outcome), sections)
        bad += [] if outcome.good else [name]
        print(f"\n{name}: {outcome.error or verdict([f for p in outcome.figures.values() for f in p])}", flush=True)
    print(f"\n{given.page} is written{f'; look at {chr(44).join(bad)}' if bad else ', all bars are met'}.")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
