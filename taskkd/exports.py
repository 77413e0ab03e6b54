"""Exports: a run's student alone, in a folder that is checked against the live model before it is there."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from taskkd import cards, inference, recipes, runs
from taskkd.checkpoints import load_student, seal, staged
from taskkd.errors import CheckpointError, DataError, RecipeError, TaskkdError, nearest
from taskkd.finished import read_run
from taskkd.portable import Portable, Sample, Signature, outputs_of, run_onnx, write_onnx
from taskkd.tasks import Task

__all__ = ["TOLERANCE", "Exported", "Format", "export"]

Format = Literal["safetensors", "hf", "onnx"]
#: of the largest magnitude of an output, or of 1 where that is smaller: a student of another format may differ so much
TOLERANCE = 1e-4
#: real inputs that it is checked on
SAMPLES = 8
ONNX = "model.onnx"
logger = logging.getLogger(__name__)


@dataclass
class Exported:
    """What an export gives.

    Args:
        folder: where it is.
        format: of it.
        differences: of each output, the largest absolute difference to the live model.
        magnitudes: of each output, the largest value of the live model.
        inputs: what it was compared on: "8 samples of the test set", or "3 synthetic inputs" and why.
        exporter: ONNX: which of torch's exporters wrote the graph, and which sizes are free.
    """

    folder: Path
    format: Format
    differences: dict[str, float] = field(default_factory=dict)
    magnitudes: dict[str, float] = field(default_factory=dict)
    inputs: str = ""
    exporter: str = ""

    @property
    def difference(self) -> float:
        """The largest of all."""
        return max(self.differences.values(), default=0.0)


def export(
    run: str | Path | runs.Result,
    format: Format = "safetensors",  # noqa: A002
    output: str | Path | None = None,
    *,
    student: nn.Module | None = None,
    example: Sample | Sequence[Sample] | None = None,
    license: str | None = None,  # noqa: A002
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a finished run's student alone into a folder, after it gave the same there as the live model.

    Args:
        run: the run's folder, or what `kd.distill` gave back, whose student is taken as it is held: the one way where
            it is a module of the caller's own, which no folder can build.
        format: "safetensors": weights and what says how to build them, for taskkd (and transformers); "hf": a folder
            for the Hub, which loads without taskkd; "onnx": a graph.
        output: the folder. Default: `<run>/export/<format>`.
        student: of the run, in place of the one in its folder. It is not changed.
        example: batches to compare on, the student's keyword arguments; ONNX: the first is what the graph is written
            with. Default: the run's test set, or synthetic inputs.
        license: of the student, as the Hub names it ("apache-2.0"), for the card. Default: to be filled in.
        overwrite: replace `output` if it is there.
        tolerance: the largest difference allowed, as a share of the largest magnitude of an output (of 1 where that is
            smaller).

    Raises:
        RecipeError: it is no finished run, or no such format.
        DataError: `output` is there already.
        CheckpointError: it cannot be written, or what was written does not give what the live model gives.
        TaskkdError: onnx is not installed, or the network cannot be had without taskkd.
    """
    if isinstance(run, runs.Result):
        student = run.student if student is None else student
    folder = run.output_dir if isinstance(run, runs.Result) else Path(run)
    if format not in get_args(Format):
        known = ", ".join(get_args(Format))
        raise RecipeError(f"no format {format!r}{nearest(str(format), get_args(Format))}; known: {known}.")
    recipe, task, held, processing = _held(folder, student)
    report = read_run(folder).report
    final = Path(output) if output is not None else folder / "export" / format
    _check_output(final, folder, overwrite)
    own = task.portable(recipe, held.eval(), processing)
    samples, shown = _samples(recipe, task, folder, own) if example is None else _given(example)
    exported = Exported(final, format, inputs=shown)
    with staged(final) as staging:
        try:
            _write(own, task, samples, staging, exported, tolerance)
            if any(exported.magnitudes[name] < least for name, least in own.signature.telling.items()):
                exported.inputs += "; the student found nothing in them, so that no values were compared"
                logger.warning("the export was checked on %s.", exported.inputs)
            text = cards.card(
                recipe, own, exported, report, license=license, paper=_paper(recipe, task),
                recipe_text=recipes.dump_recipe(recipe),
            )  # fmt: skip
            (staging / "README.md").write_text(text, encoding="utf-8")
            preprocessing = json.dumps(own.preprocessing, indent=1) + "\n"
            (staging / "preprocessing.json").write_text(preprocessing, encoding="utf-8")
            seal(staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return exported


def _held(folder: Path, student: nn.Module | None) -> tuple[Any, Task, nn.Module, Any]:
    """Recipe, task, student and tokenizer of a run; of a student that is held a copy, on the CPU.

    Raises:
        DataError: its folder cannot build the student.
    """
    if student is not None:
        recipe, task = inference.recipe_of(folder)
        return recipe, task, copy.deepcopy(student).cpu(), task.processing(folder / "student")
    try:
        return inference.trained(folder)
    except DataError as error:
        raise DataError(f"{error} Where you hold it in Python: kd.export(run, ..., student=...).") from None


def _check_output(final: Path, folder: Path, overwrite: bool) -> None:
    """Raises:
    DataError: the folder is there, or is one that an export must not replace.
    """
    if final.resolve() in (folder.resolve(), (folder / "student").resolve(), *folder.resolve().parents):
        raise DataError(f"{final} holds the run itself; give another folder (--output).")
    if final.exists() and (not overwrite or not final.is_dir()):
        hint = "give another folder (--output), or --overwrite" if final.is_dir() else "it is a file; give a folder"
        raise DataError(f"{final} exists; {hint}.")


def _samples(recipe: Any, task: Task, folder: Path, own: Portable) -> tuple[Sequence[Sample], str]:
    """Inputs to compare on: of the run's test set, or synthetic ones, and what they are."""
    try:
        if inference.has_given_data(folder):
            raise DataError("the run was given its data in memory")
        found = task.latency_batches(task.load(recipe, folder), SAMPLES)[:SAMPLES]
        if found:
            return found, f"{len(found)} samples of the run's test set"
        why = "the test set is empty"
    except (TaskkdError, OSError) as error:
        why = str(error).rstrip(".")
    logger.warning("the run's test set cannot be read (%s): the export is checked on synthetic inputs.", why)
    made = own.synthetic()
    return made, f"{len(made)} synthetic inputs, since the run's test set could not be read"


def _given(example: Sample | Sequence[Sample]) -> tuple[list[Sample], str]:
    """Raises:
    DataError: there is none.
    """
    found = [example] if isinstance(example, Mapping) else list(example)
    if not found or not all(isinstance(sample, Mapping) for sample in found):
        raise DataError("`example` is a batch, or several: the student's keyword arguments as a dict.")
    return found, f"{len(found)} given example{'s' if len(found) > 1 else ''}"


def _paper(recipe: Any, task: Task) -> str:
    return "" if recipe.method is None else cards.paper_of(task.methods[recipe.method.name])


# ---- writing and comparing


def _write(
    own: Portable, task: Task, samples: Sequence[Sample], folder: Path, exported: Exported, tolerance: float
) -> None:
    """Write the model and compare it; what was found is put into `exported`."""
    inputs = [own.signature.arrange(sample) for sample in samples]
    live = [outputs_of(own.student, own.signature, given) for given in inputs]
    _check_live(own, live)
    check = functools.partial(_compare, own, exported, tolerance)
    if exported.format == "onnx":
        _write_onnx(own, inputs, live, folder / ONNX, exported, check)
        return
    if exported.format == "hf":
        own.save(folder)
        other_model = own.reload(folder)
    else:
        own.save_own(folder)
        if own.buildable:
            other_model, _ = task.trained(folder)
        else:
            other_model = copy.deepcopy(own.student)
            load_student(other_model, folder)
    check(live, [outputs_of(other_model.eval(), own.signature, given) for given in inputs])


def _write_onnx(
    own: Portable,
    inputs: list[tuple[Tensor, ...]],
    live: list[tuple[Tensor, ...]],
    path: Path,
    exported: Exported,
    check: Callable[[Sequence[Sequence[Tensor]], Sequence[Sequence[Tensor]]], None],
) -> None:
    """Write the graph; what has other sizes than the samples shows that those which are said to be free are so."""
    signature, others = own.signature, _of_other_sizes(own, inputs)
    lived = live + [outputs_of(own.student, signature, given) for given in others]
    shown = exported.inputs

    def by_runtime(path: Path, axes: Mapping[str, Mapping[int, str]]) -> None:
        same = [i for i, given in enumerate(inputs + others) if _fits(given, inputs[0], signature, axes)]
        run = [run_onnx(path, dict(zip(signature.inputs, (inputs + others)[i], strict=True))) for i in same]
        check([lived[i] for i in same], run)
        of_samples = sum(i < len(inputs) for i in same)
        exported.inputs = shown
        if of_samples < len(inputs):
            exported.inputs = f"{of_samples} of {shown}, those of the graph's size"
        if len(same) > of_samples:
            exported.inputs += f", and the graph on {len(same) - of_samples} synthetic of other sizes"

    dynamo, axes = write_onnx(own.student, signature, inputs[0], path, by_runtime)
    free = sorted({name for n in signature.inputs for name in axes.get(n, {}).values()})
    sizes = f"free: {', '.join(free)}" if free else f"fixed sizes {_shapes(inputs[0])}"
    exported.exporter = f"torch.onnx.export(dynamo={dynamo}), {sizes}"
    if own.processing is not None:
        own.processing.save_pretrained(path.parent)


def _of_other_sizes(own: Portable, inputs: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """A batch of two, and where all samples have one size, synthetic ones of others."""
    found = []
    if all(own.signature.axes.get(name, {}).get(0) == "batch" for name in own.signature.inputs):
        found.append(tuple(torch.cat([value, value.flip(-1)]) for value in inputs[0]))
    if len({_shapes(given) for given in inputs}) == 1:
        found += [own.signature.arrange(sample) for sample in own.synthetic()]
    return found


def _fits(
    given: Sequence[Tensor], first: Sequence[Tensor], signature: Signature, axes: Mapping[str, Mapping[int, str]]
) -> bool:
    """Whether inputs have the sizes of the first where these are not free."""
    return all(
        side == known or dimension in axes.get(name, {})
        for name, value, one in zip(signature.inputs, given, first, strict=True)
        for dimension, (side, known) in enumerate(zip(value.shape, one.shape, strict=True))
    )


def _shapes(inputs: Sequence[Tensor]) -> str:
    return ", ".join("x".join(map(str, value.shape)) for value in inputs)


def _check_live(own: Portable, live: Sequence[Sequence[Tensor]]) -> None:
    """Raises:
    CheckpointError: the live student gives what is not finite.
    """
    for outputs in live:
        for name, value in zip(own.signature.outputs, outputs, strict=True):
            if not bool(torch.isfinite(value.double()).all()):
                raise CheckpointError(
                    f"the student itself gives values that are not finite ({name}): nothing to export."
                )


def _compare(
    own: Portable,
    exported: Exported,
    tolerance: float,
    live: Sequence[Sequence[Tensor]],
    other: Sequence[Sequence[Tensor]],
) -> None:
    """Put the largest differences into `exported`.

    Raises:
        CheckpointError: one is above the tolerance.
    """
    names = own.signature.outputs
    found, sizes = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for a, b in zip(live, other, strict=True):
        for name, value, difference in zip(names, a, own.signature.compare(a, b), strict=True):
            found[name] = max(found[name], difference)
            sizes[name] = max(sizes[name], float(value.abs().max()) if value.numel() else 0.0)
    exported.differences, exported.magnitudes = found, sizes
    for name in names:
        allowed = tolerance * max(1.0, sizes[name])
        if not found[name] <= allowed:
            what = "another number of values" if math.isinf(found[name]) else f"{found[name]:.3g}"
            raise CheckpointError(
                f"the exported student does not give what the live one gives: {name} differs by {what}, at most "
                f"{allowed:.3g} is allowed."
            )
