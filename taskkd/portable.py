"""What leaves a run: a student, its inputs and outputs as plain tensors, and the folder that says what it is."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.checkpoints import save_student
from taskkd.errors import CheckpointError, TaskkdError

__all__ = [
    "Compare",
    "Portable",
    "Sample",
    "Signature",
    "differences",
    "is_library_class",
    "network_of",
    "of_own_class",
    "outputs_of",
    "own_network",
    "run_onnx",
    "write_network",
    "write_onnx",
]

#: a batch as keyword arguments of the model
Sample = Mapping[str, Any]
Compare = Callable[[Sequence[Tensor], Sequence[Tensor]], list[float]]
NETWORK = "network.py"
CONFIG = "config.json"


def differences(live: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """The largest absolute difference of each output; infinite where shapes differ or a value is not finite."""
    found = []
    for a, b in zip(live, other, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(b.double()).all()):
            found.append(float("inf"))
        else:
            found.append(float((a.double() - b.double()).abs().max()) if a.numel() else 0.0)
    return found


@dataclass(frozen=True)
class Signature:
    """Tensors in, tensors out: what becomes of a model in a graph.

    Args:
        graph: makes a module of a model that takes the inputs in order and gives a tuple of the outputs.
        inputs, outputs: names.
        axes: of inputs and outputs, the dimensions that may have any size: name -> {dimension: name}.
        arrange: a batch of the model -> the inputs.
        exporters: of `torch.onnx.export`, which are tried in turn, each with free sizes and then with fixed ones (a
            batch is left free as long as it works): True is the present one (dynamo), False that by tracing.
        compare: live outputs and others -> a difference for each output.
        telling: outputs that must reach a value somewhere, or a comparison has compared nothing: name -> value.
    """

    graph: Callable[[nn.Module], nn.Module]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    arrange: Callable[[Sample], tuple[Tensor, ...]]
    exporters: tuple[bool, ...] = (True, False)
    compare: Compare = differences
    telling: Mapping[str, float] = field(default_factory=dict)

    def attempts(self) -> Iterator[tuple[bool, dict[str, dict[int, str]]]]:
        """(exporter, free axes) in the order in which they are tried."""
        free = {name: dict(axes) for name, axes in self.axes.items()}
        batch = {name: {k: v for k, v in axes.items() if v == "batch"} for name, axes in free.items()}
        for dynamo in self.exporters:
            for axes in (free, batch, {}):
                if axes != free or axes is free:
                    yield dynamo, axes


@dataclass(frozen=True)
class Portable:
    """What an export has to know of a student, whatever its task.

    Args:
        student: in evaluation mode.
        title: what it is, in words: "Faster R-CNN for object detection".
        pipeline: its task as the Hub names it.
        library: whose `from_pretrained` or class it is, as the Hub names it.
        signature: as a graph.
        synthetic: inputs, for where there is no data.
        preprocessing: what is done with a text or an image before; plain data.
        use: lines of Python that run `model` of the folder, which `load` made, on an input of one's own.
        load: lines of Python that make `model` of the files in `folder`, without taskkd.
        own: lines of Python that make `model` by taskkd of a folder of weights.
        buildable: whether these lines can: not of a network of the caller's own.
        save: writes the folder of the Hub.
        reload: makes the model of it.
        processing: saved beside it: a tokenizer.
        classes: names.
    """

    student: nn.Module
    title: str
    pipeline: str
    library: str
    signature: Signature
    synthetic: Callable[[], list[Sample]]
    preprocessing: dict[str, Any]
    load: str
    use: str
    own: str
    save: Callable[[Path], None]
    reload: Callable[[Path], nn.Module]
    buildable: bool = True
    processing: Any = None
    classes: Sequence[str] = field(default_factory=tuple)

    def save_own(self, folder: Path) -> None:
        """Write weights and what says how to build the student, as a run does."""
        save_student(self.student, folder, self.processing)


def is_library_class(model: nn.Module) -> bool:
    """Whether the class itself is one of `transformers`, whose Auto classes build it, and not one derived from it."""
    return type(model).__module__.startswith("transformers.")


def of_own_class(model: nn.Module) -> str:
    """Why the format hf cannot be had of it."""
    return (
        f"format hf: {type(model).__name__} is a class of your own, which transformers does not load by itself: export "
        "the model as onnx, or as safetensors to load into it."
    )


def own_network(wrapper: str, task: str, arguments: str, what: str) -> str:
    """Lines that load weights into a network of the caller's own, in the wrapper of a task."""
    return f"""from safetensors.torch import load_model
from taskkd.{task} import {wrapper}

model = {wrapper}({arguments})  # {what}: your own module, made as it was for the run
load_model(model, f"{{folder}}/model.safetensors")
model.eval()"""


@torch.no_grad()
def outputs_of(model: nn.Module, signature: Signature, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a model as a graph has them."""
    found: tuple[Tensor, ...] = signature.graph(model).eval()(*inputs)
    return found


# ---- a folder that is loaded without this package


def write_network(folder: Path, code: str, student: nn.Module, config: Mapping[str, Any]) -> None:
    """Write `network.py`, `config.json` and `model.safetensors`."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    (folder / NETWORK).write_text(code, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_model(student, str(folder / "model.safetensors"))


def network_of(folder: Path) -> nn.Module:
    """The model of a folder that `write_network` has just written: its `network.py` is executed."""
    spec = importlib.util.spec_from_file_location("exported_network", folder / NETWORK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    written = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        spec.loader.exec_module(module)
        model: nn.Module = module.load(folder)
    finally:
        sys.dont_write_bytecode = written
        del sys.modules[spec.name]
    return model


# ---- ONNX


def _needs_onnx() -> None:
    """Raises:
    TaskkdError: a package is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise TaskkdError(f"format onnx needs {name}: pip install 'taskkd[onnx]'")


@contextmanager
def _silent() -> Iterator[None]:
    """The exporters' own warnings say nothing that the comparison afterwards does not."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._dynamo", "torch.fx")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def write_onnx(
    model: nn.Module,
    signature: Signature,
    inputs: Sequence[Tensor],
    path: Path,
    check: Callable[[Path, Mapping[str, Mapping[int, str]]], None],
) -> tuple[bool, dict[str, dict[int, str]]]:
    """Write a graph, by the first exporter and with the first free axes that give one which passes `check`.

    Args:
        model: the student.
        signature: of it.
        inputs: of one batch.
        path: of the file.
        check: is told the file and its free axes; raises a TaskkdError if it is wrong.

    Returns:
        The exporter (True: dynamo) and the axes that are free.

    Raises:
        TaskkdError: onnx is not installed.
        CheckpointError: no exporter gives a graph that computes the same.
    """
    _needs_onnx()
    graph, said = signature.graph(model).eval(), []
    for dynamo, axes in signature.attempts():
        try:
            with _silent():
                _export(graph, signature, inputs, path, dynamo, axes)
            check(path, axes)
        except Exception as error:  # the exporters raise anything
            first = (str(error).strip().splitlines() or [""])[0][:160]
            said.append(f"{'dynamo' if dynamo else 'tracing'}, {_sizes(axes)}: {type(error).__name__}: {first}")
        else:
            return dynamo, axes
    raise CheckpointError(f"the student cannot be written as ONNX: {'; '.join(said)}.")


def _sizes(axes: Mapping[str, Mapping[int, str]]) -> str:
    names = sorted({name for own in axes.values() for name in own.values()})
    return f"free {', '.join(names)}" if names else "fixed sizes"


def _export(
    graph: nn.Module,
    signature: Signature,
    inputs: Sequence[Tensor],
    path: Path,
    dynamo: bool,
    axes: Mapping[str, Mapping[int, str]],
) -> None:
    names: dict[str, Any] = {"input_names": list(signature.inputs), "output_names": list(signature.outputs)}
    if not dynamo:
        torch.onnx.export(
            graph, tuple(inputs), str(path), dynamo=False, opset_version=17, dynamic_axes=dict(axes), **names
        )
        return
    # a size of 1 would be taken to be always so
    example = tuple(
        torch.cat([value, value]) if axes.get(name, {}).get(0) == "batch" and len(value) == 1 else value
        for name, value in zip(signature.inputs, inputs, strict=True)
    )
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(axes.get(name, {}), dynamic) for name in signature.inputs)
    program: Any = torch.onnx.export(
        graph, example, dynamo=True, dynamic_shapes=_for(graph, shapes), verbose=False, **names
    )
    program.save(str(path))


def _for(graph: nn.Module, shapes: tuple[dict[int, Any], ...]) -> Any:
    """As the exporter wants them: of `forward(*inputs)` one tuple in another."""
    import inspect

    kinds = [p.kind for p in inspect.signature(graph.forward).parameters.values()]
    return (shapes,) if kinds == [inspect.Parameter.VAR_POSITIONAL] else shapes


def run_onnx(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a graph by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # an input that no output depends on is not in the graph
    known = {i.name for i in session.get_inputs()}
    return [torch.from_numpy(v) for v in session.run(None, {k: v.numpy() for k, v in inputs.items() if k in known})]
