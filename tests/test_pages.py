"""The page of a report: what it says, what it refuses, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from taskkd import charts, comparisons, finished, pages
from taskkd.__main__ import main
from taskkd.errors import DataError, RecipeError
from tests import reported

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DOCS = (Path(__file__).parents[1] / "docs" / "reports.md").read_text()


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def written(tmp_path: Path, **changes: Any) -> str:
    folder = reported.run(tmp_path / "run", reported.report(**changes), name="<script>alert(2)</script>")
    (output,) = pages.write_page([folder], tmp_path / "page.html", pictures=False)
    return output.read_text()


def test_the_page_says_what_came_out(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "keeps 90.0% of its teacher&#39;s accuracy (0.810 of 0.900)" in text
    assert "25% of the parameters and 25% of the operations" in text
    assert "2.5 times as fast" in text
    assert "gained 0.100 ± 0.014 accuracy: 0.810 instead of 0.710" in text
    for shown in ("2.5×", "250 M", "precision", "distilled: first", "distilled: second", "2026-01-02", "0.769"):
        assert shown in text, shown


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distilled": (0.70, 0.73)}, "cannot be told"),
        ({"distilled": (0.60, 0.62)}, "lost 0.100 ± 0.014"),
        ({"alone": ()}, "no student trained alone"),
        ({"alone": (0.7,), "distilled": (0.8,), "metric": "pearson"}, "This is one seed"),
        ({"alone": (0.7,), "distilled": (0.7,)}, "neither gained nor lost accuracy: 0.700 instead of 0.700"),
        ({"alone": (0.7, 0.7), "distilled": (0.7002, 0.7002)}, "neither gained nor lost accuracy"),
        ({"distilled": ()}, "The student trained alone keeps 78.9%"),
    ],
)  # fmt: skip
def test_the_headline_is_honest(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    content = reported.report(
        changes.pop("alone", (0.70, 0.72)), changes.pop("distilled", (0.80, 0.82)), **changes
    )  # fmt: skip
    run = finished.read_run(reported.run(tmp_path / "run", content))
    assert sentence in " ".join(pages.headline(run))


def test_nothing_is_executed_or_asked_of_elsewhere(tmp_path: Path) -> None:
    content = reported.report(recipe="<script>alert(3)</script>")
    content["distilled"] = {"<img src=x onerror=alert(4)>": content["distilled"]["distilled"]}
    content["selected"] = "<img src=x onerror=alert(4)>"
    folder = reported.run(tmp_path / "run", content, name="<script>alert(2)</script>")
    (folder / "examples.png").write_bytes(b"\x89PNG")
    tags = []
    for runs in ([folder], [folder, reported.run(tmp_path / "<u>other")]):
        text = pages.page([finished.read_run(r) for r in runs])[0]
        assert "alert(2)" in text
        tags += Tags(text).found
    assert {tag for tag, _ in tags}.isdisjoint({"script", "iframe", "object", "b", "i", "u"})
    addresses = [v or "" for _, own in tags for k, v in own.items() if k in ("src", "href", "xlink:href", "srcset")]
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not [own for _, own in tags if any(k.startswith("on") for k in own)]
    assert all("alt" in own for tag, own in tags if tag == "img")
    assert all("scope" in own for tag, own in tags if tag == "th")
    assert "default-src 'none'" in str(tags)


def test_runs_side_by_side(tmp_path: Path) -> None:
    alone = reported.run(tmp_path / "alone", reported.report(distilled=()))
    good = reported.run(tmp_path / "good", reported.report(alone=()), name="good")
    other = reported.run(tmp_path / "other", reported.report(metric="f1"))
    (one, two) = comparisons.of_runs([finished.read_run(f) for f in (alone, good, other)])["groups"]
    assert [(row["shown"], row["role"]) for row in one["rows"]] == [
        ("teacher", "teacher"), ("alone: student alone", "alone"), ("good", "distilled"),
    ]  # fmt: skip
    assert one["rows"][2]["gain"] == pytest.approx(0.10)  # over the only student alone there is
    assert one["rows"][2]["gain_of"] == "alone"
    assert ("method.name", []) not in one["settings"]
    assert two["metric"] == "f1"
    assert [len(own["pareto"]) for own in (one, two)] == [3, 3]
    drawn = pages.write_page([alone, good, other, good], tmp_path / "out" / "all.html")
    assert "3 runs side by side" in drawn[0].read_text()
    assert len(drawn) == 7
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn[1:])


def test_other_data_and_settings_are_told(tmp_path: Path) -> None:
    first, second = (reported.run(tmp_path / name) for name in ("first", "second"))
    (second / "recipe.yaml").write_text("schema: 1\nname: my\ntask: nlp\nmethod: {name: patient_kd, beta: 10}\n")
    steps = json.loads((second / "run.json").read_text())
    steps["finished"]["inputs"]["data"] = "changed"
    (second / "run.json").write_text(json.dumps(steps))
    (group,) = comparisons.of_runs([finished.read_run(f) for f in (first, second)])["groups"]
    assert dict(group["settings"]) == {"method.name": ["soft_targets", "patient_kd"], "method.beta": ["–", "10"]}
    assert "did not have the same data" in group["notes"][0]


def test_a_run_of_an_older_version_is_shown(tmp_path: Path) -> None:
    content = reported.report()
    for key in ("format", "task", "chance", "examples", "date", "versions", "machine", "method"):
        del content[key]
    content["models"] = {k: {n: v[n] for n in ("parameters", "bytes", "latency_ms", "latency_p95_ms")}
                         for k, v in content["models"].items()}  # fmt: skip
    for entry in (content["teacher"], *content["alone"].values(), *content["distilled"]["distilled"].values()):
        del entry["by_class"]
    folder = reported.run(tmp_path / "run", content)
    text = pages.page([finished.read_run(folder)])[0]
    assert "n/m" in text
    assert "not on record" in text
    assert 'id="classes"' not in text


def test_classes_of_segmentation_are_read_from_its_metrics(tmp_path: Path) -> None:
    content = reported.report()
    for entry in (content["teacher"], *content["alone"].values(), *content["distilled"]["distilled"].values()):
        del entry["by_class"]
        entry["test"] |= {"IoU/road": 0.5, "IoU/car": 0.25}
    run = finished.read_run(reported.run(tmp_path / "run", content))
    table = pages._class_table(run)
    assert table is not None
    assert table["rows"] == [("road", [], [0.5] * 3), ("car", [], [0.25] * 3)]
    assert [name for name, _ in pages._all_metrics(run)["rows"]] == ["accuracy", "mcc"]


def damage(folder: Path, name: str, text: str | None) -> None:
    (folder / name).unlink() if text is None else (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "error", "sentence"),
    [
        ("recipe.yaml", None, RecipeError, "is not the folder of a run: there is no recipe.yaml"),
        ("report.json", None, RecipeError, "is not finished: it has no report.json"),
        ("report.json", '{"metric": ', DataError, "report.json is damaged: Expecting value"),
        ("report.json", "[1]", DataError, "expected a mapping, it holds a list"),
        ("report.json", '{"metric": "f1"}', DataError, "damaged, or of another version of taskkd"),
        ("report.json", '{"format": 99}', RecipeError, "by another version of taskkd (format 99"),
        ("run.json", '{"finished": 3}', DataError, "run.json is damaged"),
        ("recipe.yaml", "a: [", DataError, "recipe.yaml is damaged: not YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_a_sentence(
    tmp_path: Path, file: str, text: str | None, error: type[Exception], sentence: str
) -> None:
    folder = reported.run(tmp_path / "run")
    damage(folder, file, text)
    with pytest.raises(error, match=re.escape(sentence)):
        finished.read_run(folder)


def test_no_other_file_is_written_over(tmp_path: Path) -> None:
    folder = reported.run(tmp_path / "run")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(RecipeError, match="is no report"):
        pages.write_page([folder], tmp_path / "mine.html")
    with pytest.raises(RecipeError, match=r"ends in \.html"):
        pages.write_page([folder], tmp_path / "mine.pdf")
    for _ in range(2):
        pages.write_page([folder], tmp_path / "page.html", pictures=False)


def test_the_front() -> None:
    points = [(1.0, 0.5), (2.0, 0.7), (2.0, 0.6), (3.0, 0.7), (4.0, 0.9), (0.5, 0.1)]
    assert charts.front(points) == [(0.5, 0.1), (1.0, 0.5), (2.0, 0.7), (4.0, 0.9)]
    assert charts.front([]) == []


def test_the_commands_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "alone", "tinybert", "patient_kd"):
        reported.run(tmp_path / "runs" / name)
    commands = [c for block in re.findall(r"```\n(taskkd.*?)```", DOCS, re.S) for c in block.splitlines()]
    assert len(commands) >= 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()


# ---- in a browser


def shown(page: Path, tmp_path: Path, *, width: int, dark: bool) -> tuple[dict[str, Any], str]:
    """What a browser makes of a page in a frame of this width, and what it complains of."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<!DOCTYPE html><meta charset=utf-8><style>:root{color-scheme:light dark}</style>"
        f'<iframe width={width} height=900 style="border:0" srcdoc="{html.escape(page.read_text())}"></iframe>'
        "<pre id=out></pre><script>document.querySelector('iframe').onload=e=>{const d=e.target.contentDocument,"
        "w=e.target.contentWindow;d.querySelectorAll('details').forEach(x=>x.open=true);"
        "document.getElementById('out').textContent=JSON.stringify({width:d.documentElement.scrollWidth,"
        "ground:w.getComputedStyle(d.body).backgroundColor,text:w.getComputedStyle(d.querySelector('h1')).color,"
        "charts:d.querySelectorAll('figure svg').length,"
        "asked:w.performance.getEntriesByType('resource').map(r=>r.name).filter(n=>!n.startsWith('data:'))})}</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
               "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--log-level=0",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--hide-scrollbars",
               f"--blink-settings=preferredColorScheme={0 if dark else 1}"]  # fmt: skip
    command = [str(CHROMIUM), *options, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    complaints = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(found[1])), complaints


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_on_a_phone_and_in_the_dark(tmp_path: Path) -> None:
    folder = reported.run(tmp_path / "run")
    other = reported.run(tmp_path / "a-run-with-quite-a-long-name-that-could-push-the-page-apart")
    one = pages.write_page([folder], tmp_path / "one.html", pictures=False)[0]
    two = pages.write_page([folder, other], tmp_path / "two.html", pictures=False)[0]
    light, complaints = shown(one, tmp_path, width=360, dark=False)
    assert (light["width"], light["ground"], light["asked"], complaints) == (360, "rgb(246, 247, 249)", [], "")
    assert light["charts"] >= 4
    dark, complaints = shown(two, tmp_path, width=360, dark=True)
    assert (dark["width"], dark["ground"], dark["asked"], complaints) == (360, "rgb(17, 22, 28)", [], "")
    assert dark["text"] == "rgb(231, 236, 242)"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_colours_have_contrast() -> None:
    css = (Path(pages.__file__).parent / "templates" / "report.css").read_text()
    light, dark = (dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block)) for block in css.split("@media")[:2])
    assert tuple(light[f"c{i}"] for i in range(len(charts.COLOURS))) == charts.COLOURS
    for scheme in (light, dark):
        for ground in ("page", "card", "mark"):
            for name in set(scheme) - {"page", "card", "mark", "line"}:
                bright, dim = sorted((luminance(scheme[name]), luminance(scheme[ground])), reverse=True)
                least = 3.0 if name.startswith("c") else 4.5  # WCAG AA: of lines, of text
                assert (bright + 0.05) / (dim + 0.05) >= least, (name, ground)
