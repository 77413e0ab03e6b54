"""The benchmarks' figures, and the page that is made of them. Nothing is said of times."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as page
from benchmarks import figures
from benchmarks.figures import Figure, MissingPeerError, Options, Part

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("figure", "verdict", "bar"),
    [
        (Figure("a", 1.0), "", ""),
        (Figure("a", 1.05, at_most=1.05), "met", "at most 1.05"),
        (Figure("a", 1.059, at_most=1.05), "missed, within the noise", "at most 1.05"),
        (Figure("a", 1.062, at_most=1.05), "MISSED", "at most 1.05"),
        (Figure("a", 9.95, at_least=10), "missed, within the noise", "at least 10"),
        (Figure("a", 9.8, at_least=10), "MISSED", "at least 10"),
        (Figure("a", 0.0, unit="MB", at_most=0), "met", "at most 0 MB"),
        (Figure("a", 5.0, at_least=1, at_most=4), "MISSED", "at least 1, at most 4"),
        (Figure("a", None, at_most=4), "not measured", "at most 4"),
        (Figure("a", None, failed=True), "failed", ""),
    ],
)
def test_a_bar_is_met_or_missed(figure: Figure, verdict: str, bar: str) -> None:
    assert figure.verdict == verdict
    assert figure.bar == bar


def test_a_ratio_is_of_rounds_and_shows_what_it_was_made_from() -> None:
    figure = Figure.over("a over b", [2.0, 4.0, 9.0], [1.0, 2.0, 3.0], at_least=2)
    assert (figure.value, figure.low, figure.high) == (2.0, 2.0, 2.5)
    assert str(figure) == "a over b: 2.000 (2.000 .. 2.500); 4 s over 2 s; bar at least 2; met"
    assert figures.duration(0.0123) == "12.3 ms"
    assert figures.duration(4.2e-6) == "4.2 µs"


def test_contenders_take_turns_in_changing_order() -> None:
    seen: list[str] = []
    works = {name: lambda name=name: seen.append(name) for name in "abc"}  # type: ignore[misc]
    taken = figures.take_turns(works, 4, warm_up=2)
    assert {name: len(times) for name, times in taken.items()} == dict.fromkeys("abc", 4)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert rounds[1::2] == [order[::-1] for order in rounds[::2]]


def broken(_: Options) -> list[Figure]:
    raise ValueError("the forms differ")


def unable(_: Options) -> list[Figure]:
    raise MissingPeerError("a peer is not installed here")


def test_a_script_prints_writes_and_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [Figure.of("fast", (1.0, 1.1, 1.2), at_most=2), Figure("plain", 3.0, unit="MB", detail="of 4 | 5")]
    parts = {
        "good": Part("good ones", lambda options: good if options.count(30) == 2 else []),
        "broken": Part("what breaks", broken),
        "unable": Part("what cannot be", unable),
    }
    file = tmp_path / "figures.json"
    command = figures.parser("Some.", parts)
    arguments = ["--quick", "--json", str(file)]
    assert figures.run(parts, command.parse_args([*arguments, "--only", "good", "--only", "unable"])) == 0
    assert figures.run(parts, command.parse_args(arguments)) == 1
    out = capsys.readouterr().out
    assert "fast: 1.100 (1.000 .. 1.200); bar at most 2; met" in out
    written = json.loads(file.read_text())
    assert [part["title"] for part in written] == ["good ones", "what breaks", "what cannot be"]
    assert written[0]["figures"][0] == {
        "title": "fast", "value": 1.1, "low": 1.0, "high": 1.2, "unit": "", "at_least": None, "at_most": 2,
        "detail": "", "failed": False, "bar": "at most 2", "verdict": "met",
    }  # fmt: skip
    assert [part["figures"][0]["verdict"] for part in written[1:]] == ["failed", "not measured"]
    assert written[1]["figures"][0]["detail"] == "ValueError: the forms differ"
    assert figures.read(file)["good ones"] == good


SCRIPT = """
import sys
from benchmarks.figures import Figure, Part, parser, run

parts = {"only": Part("a slow thing | of ours", lambda _: [Figure("ours over theirs", 2.5, 2.4, 2.6, at_most=1.5)])}
sys.exit(run(parts, parser("Slow.", parts).parse_args()))
"""


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, page.Section]:
    """A real script, one that misses its bar, and one that dies."""
    (tmp_path / "slow.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}")
    (tmp_path / "dies.py").write_text("raise SystemExit(7)\n")
    return {
        "real": page.Section("A real one", ("-m", "benchmarks.growth", "--only", "boxes"), ("no-such-package",)),
        "slow": page.Section("A slow one", (str(tmp_path / "slow.py"),)),
        "dies": page.Section("One that dies", (str(tmp_path / "dies.py"),)),
    }


def test_the_page_is_written(
    tmp_path: Path, sections: dict[str, page.Section], capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.md"
    begin, end = page.markers("slow")
    file.write_text(
        f"# Ours\n\nWritten by hand.\n\n## Slow\n\n{begin}\nold\n{end}\n\nStays.\n\n"
        "<!-- benchmarks: dies -->\nThe old table.\n<!-- end of benchmarks: dies -->\n"
    )
    assert page.main(["--quick", "--page", str(file)], sections) == 1
    text = file.read_text()
    assert text.startswith(
        "# Ours\n\nWritten by hand.\n\n## Slow\n\n<!-- benchmarks: slow -->\n0 of 1 bars met; **MISSED**"
    )
    assert "Stays." in text and "old\n" not in text.replace("The old", "")
    assert "| ours over theirs | 2.500 | 2.400 .. 2.600 | at most 1.5 | MISSED |" in text
    # a section without markers is put at the end, under its heading
    assert "## A real one\n\n<!-- benchmarks: real -->" in text
    real = page.standing(text, "real")
    assert "general instances (GID), classes: 20" in real
    about = r"`python -m benchmarks.growth --only boxes --quick`, \d{4}-\d\d-\d\d on commit \S+, \d+ s; .+, \d+ cores"
    assert re.search(about, real) and "no no-such-package" in real and "Two rounds" in real
    # one that dies keeps its table and says so
    dead = page.standing(text, "dies")
    assert dead.startswith("**The run broke off (exit status 7):**") and dead.endswith("The old table.")
    summary = page.standing(text, "summary")
    assert summary.count("\n") == 4 and "| A slow one | 0 of 1 bars met; **MISSED**: ours over theirs" in summary
    assert re.search(r"\| One that dies \| \*\*The run broke off \(exit status 7\)\*\*", summary)
    # what is not run stays as it is; what dies twice says so once
    assert page.main(["--only", "dies", "--page", str(file)], sections) == 1
    again = file.read_text()
    assert page.standing(again, "real") == real and again.count("The old table.") == 1
    assert page.standing(again, "dies").count("broke off") == 1
    assert "look at dies" in capfd.readouterr().out


def test_the_sections_are_scripts_and_have_a_place_in_the_page() -> None:
    text = page.PAGE.read_text()
    for name, section in page.SECTIONS.items():
        assert (ROOT / f"{section.command[1].replace('.', '/')}.py").exists()
        assert page.standing(text, name), name
        assert f"## {section.heading}\n" in text
    assert page.standing(page.put(text, "import", "", "new"), "import") == "new"


def test_ci_runs_no_benchmark() -> None:
    assert "bench" not in (ROOT / ".ci" / "run").read_text()
