"""Model cards: what a student is, where it comes from and what it can do, as the Hub shows it."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import platform
import re
from collections.abc import Mapping
from typing import Any

from taskkd.portable import Portable

__all__ = ["UNKNOWN", "card", "paper_of"]

UNKNOWN = "unknown: fill in"
PACKAGES = ("taskkd", "torch", "torchvision", "transformers", "timm", "segmentation-models-pytorch", "onnx")


def paper_of(method: Any) -> str:
    """Authors, year and, where it is given, the title of a method's paper, by its docstring."""
    doc = inspect.getdoc(method) or ""
    paragraph = " ".join(doc.partition("Source: ")[2].partition("\n\n")[0].split())
    found = re.match(r'[^"]*?\d{4}(, ".*?")?', paragraph)
    return found[0] if found else paragraph


def card(
    recipe: Any,
    own: Portable,
    exported: Any,
    report: Mapping[str, Any],
    *,
    license: str | None = None,  # noqa: A002
    paper: str = "",
    recipe_text: str = "",
) -> str:
    """The card, Markdown with the Hub's front matter.

    Args:
        recipe: of the run.
        own: the student.
        exported: an `Exported`.
        report: of the run.
        license: as the Hub names it; None: to be filled in.
        paper: of the method.
        recipe_text: the run's recipe, with every default.
    """
    parts = [
        _front(recipe, own, exported, report, license),
        f"# {recipe.name}",
        f"{own.title}, distilled from a larger teacher with taskkd.",
        _results(report),
        _loading(own, exported),
        _origin(recipe, own, report, paper),
        _licences(license),
        _use(own),
        _check(exported),
        _again(recipe, recipe_text),
        f"Versions: {_versions()}.",
    ]
    return "\n\n".join(parts) + "\n"


def _front(recipe: Any, own: Portable, exported: Any, report: Mapping[str, Any], license: str | None) -> str:  # noqa: A002
    from huggingface_hub import EvalResult, ModelCardData

    row, metric = _row(report, "distilled"), report["metric"]
    results = [
        EvalResult(
            task_type=own.pipeline,
            dataset_type="custom",
            dataset_name="test set of the run",
            metric_type=metric,
            metric_value=round(float(row[metric]), 4),
        )
    ]
    data = ModelCardData(
        license=license or "unknown",
        library_name="onnx" if exported.format == "onnx" else own.library,
        pipeline_tag=own.pipeline,
        tags=["knowledge-distillation", "taskkd", recipe.task],
        model_name=recipe.name,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---"


def _row(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The row of the table of a report; of "distilled", that of what was selected."""
    wanted = report.get("selected", name) if name == "distilled" else name
    wanted = report.get("alone_title", wanted) if wanted == "alone" else wanted
    rows = report["table"]
    found: Mapping[str, Any] = next((r for r in rows if r["model"] == wanted), rows[-1])
    return found


def _results(report: Mapping[str, Any]) -> str:
    metric = report["metric"]
    further = report.get("further_tests", [])
    names = ["", metric, "± s.e.", *(f"{metric}, {name}" for name in further), "parameters", "size", "CPU latency"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in report["table"]:
        error = row["standard_error"]
        shown = "" if error is None or math.isnan(error) else f"{error:.4f}"
        others = "".join(f"{row['further'][name]:.4f} | " for name in further)
        lines.append(
            f"| {row['model']} | {row[metric]:.4f} | {shown} | {others}{row['parameters'] / 1e6:.3g} M | "
            f"{row['bytes'] / 1e6:.3g} MB | {_milliseconds(row['latency_ms'])} |"
        )
    seeds = len(report["seeds"])
    over = f"mean over {seeds} seeds; this file is the seed that is best on validation" if seeds > 1 else "one seed"
    data = report["data"]
    of_error = "of the mean over seeds" if seeds > 1 else "of that many test samples, not over seeds"
    return (
        f"## Results\n\n{metric} on the {report['test_samples']} test samples of the run ({over}); s.e.: {of_error}; "
        "latency of one sample on the CPU of the machine it was trained on.\n\n"
        + "\n".join(lines)
        + f"\n\nData: {data}."
    )


def _milliseconds(latency: float | None) -> str:
    return "-" if latency is None else f"{latency:.1f} ms"


def _loading(own: Portable, exported: Any) -> str:
    if exported.format == "onnx":
        names = ", ".join(f"`{name}`" for name in own.signature.inputs)
        gives = ", ".join(f"`{name}`" for name in own.signature.outputs)
        return (
            "## Use\n\nInputs and outputs are told in `preprocessing.json`.\n\n```python\nimport onnxruntime\n\n"
            'folder = "."  # of these files\n'
            'session = onnxruntime.InferenceSession(f"{folder}/model.onnx")\n'
            "outputs = session.run(None, inputs)\n```"
            f"\n\n`inputs` holds numpy arrays by name: {names}; the outputs are {gives}. "
            f"Written by `{exported.exporter}`."
        )
    if exported.format == "safetensors":
        return f'## Use\n\n```python\nfolder = "."\n{own.own}\n```'
    note = (
        "`network.py` builds the network; it was written by taskkd, needs torch and the library of the network, and "
        "not taskkd. Read it before you run it, as any code.\n\n"
        if "network import" in own.load
        else ""
    )
    return f'## Use\n\n{note}```python\nfolder = "."  # of these files\n{own.load}\n```\n\n```python\n{own.use}\n```'


def _origin(recipe: Any, own: Portable, report: Mapping[str, Any], paper: str) -> str:
    teacher = recipe.teacher.model_dump(exclude_defaults=True)
    source = teacher.get("model") or "/".join(
        str(teacher[key]) for key in ("architecture", "backbone") if key in teacher
    )
    source = source or teacher.get("weights", "")
    tuned = ", fine-tuned on this data first" if recipe.teacher.finetune is not None else ""
    lines = ["## Where it comes from", "", f"- Teacher: `{source}`{tuned}", _data(recipe)]
    if recipe.method is not None and report.get("selected") != "alone":
        options = recipe.method.model_extra or {}
        shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
        lines.append(f"- Method: `{recipe.method.name}` ({shown}){f'; {paper}' if paper else ''}")
        if report.get("selected") not in (None, "distilled"):
            lines.append(f"- Of a sweep, best on validation: `{report['selected']}`")
    if recipe.terms:
        lines.append(f"- Terms of its own: {', '.join(term.name for term in recipe.terms)}")
    training = recipe.training
    lines.append(
        f"- Training: {training.epochs:g} epochs, learning rate {training.learning_rate:g}, batch "
        f"{training.batch_size}, seed {report.get('selected_seed', 0)}"
    )
    if own.classes:
        names = list(own.classes)
        lines.append(f"- Classes: {', '.join(names[:40])}{f', ... ({len(names)})' if len(names) > 40 else ''}")
    return "\n".join(lines)


def _data(recipe: Any) -> str:
    """What the recipe says of where its data come from: the sections in it, not the numbers."""
    given = recipe.data.model_dump(mode="json", exclude_unset=True)
    sections = [f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in given.items() if v and isinstance(v, dict)]
    return f"- Data: `{', '.join(sections)}`" if sections else "- Data: given to `kd.distill` by a program"


def _licences(license: str | None) -> str:  # noqa: A002
    return (
        "## Licences\n\n| of | licence |\n|---|---|\n"
        f"| this student | {license or UNKNOWN} |\n| its teacher | {UNKNOWN} |\n| the training data | {UNKNOWN} |\n\n"
        "A student may be bound by the licences of its teacher and of the data."
    )


def _use(own: Portable) -> str:
    faces = " Recognising people by their faces is restricted by law in many places." if "face" in own.title else ""
    return (
        "## Intended use and limits\n\n"
        f"{own.title[0].upper()}{own.title[1:]} on inputs like those of the test set above; on others its figures say "
        "nothing. It inherits its teacher's mistakes and biases, and was tested for no group of people, no attack and "
        f"no use in which a mistake does harm.{faces} Fill in: for whom and for what it is meant."
    )


def _check(exported: Any) -> str:
    rows = [
        f"| {name} | {difference:.3g} | {exported.magnitudes[name]:.3g} |"
        for name, difference in exported.differences.items()
    ]
    table = "\n".join(["| output | largest difference | largest value |", "|---|---|---|", *rows])
    return (
        f"## Checked\n\nFormat {exported.format}, against the model as it was trained, on {exported.inputs}:\n\n{table}"
        "\n\n`manifest.json` has the sha256 of every file."
    )


def _again(recipe: Any, text: str) -> str:
    return (
        f"## To train it again\n\nSave this as `{recipe.name}.yaml`; paths are those of the machine it was trained on."
        f"\n\n```\ntaskkd distill {recipe.name}.yaml\n```\n\n"
        f"<details><summary>The recipe, every default filled in</summary>\n\n```yaml\n{text.strip()}\n```\n\n</details>"
    )


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
