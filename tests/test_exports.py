"""Exports of a student of every task: what is written gives what the live model gives, with taskkd and without."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import taskkd as kd
from taskkd import exports, portable, runs
from taskkd.__main__ import main
from taskkd.checkpoints import verify
from taskkd.errors import CheckpointError, DataError, RecipeError, TaskkdError
from taskkd.segmentation import Segmenter
from taskkd.segmentation.portable import portable as segmenter_as
from tests import exported
from tests.detection import tiny_detr

WITHOUT = """
import json, os, sys
sys.modules["taskkd"] = None  # an import of it is an error
import torch
for folder, code, names, out in json.load(open(sys.argv[1])):
    os.chdir(folder)
    sys.modules.pop("network", None)
    sys.path_importer_cache.clear()  # it remembers what "." was
    path, space = list(sys.path), {}
    exec(code, space)
    sys.path[:] = path
    torch.save([space[name] for name in names], out)
assert not [name for name in sys.modules if name.startswith("taskkd.")]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {task: make(root) for task, make in exported.RUNS.items()}


def card(folder: Path) -> tuple[str, list[str]]:
    text = (folder / "README.md").read_text()
    return text, re.findall(r"```python\n(.*?)```", text, re.S)


# ---- formats


@pytest.mark.parametrize("task", exported.RUNS)
def test_weights_and_what_says_how_to_build_them(made: dict[str, Path], task: str, tmp_path: Path) -> None:
    done = exports.export(made[task], "safetensors", tmp_path / "out")
    assert done.difference == 0
    assert "of the run's test set" in done.inputs
    verify(done.folder)
    keys = set(load_file(done.folder / "model.safetensors"))
    assert keys == set(load_file(made[task] / "student" / "model.safetensors"))
    assert not [key for key in keys if "teacher" in key or "adapter" in key or "terms" in key]
    assert not (done.folder / "centres.safetensors").exists()
    text, (code,) = card(done.folder)
    space: dict[str, Any] = {}
    exec(code.replace('folder = "."', f"folder = {str(done.folder)!r}"), space)
    assert not space["model"].training
    assert "| distilled | 0.8125 |" in text


def test_without_taskkd_the_lines_of_the_card_give_the_same(made: dict[str, Path], tmp_path: Path) -> None:
    """R35: in a process in which taskkd cannot be imported."""
    names = {"nlp": ["output"], "detection": ["found"], "segmentation": ["logits", "mask"], "face": ["embedding"]}
    jobs = []
    for task, run in made.items():
        done = exports.export(run, "hf", tmp_path / task)
        assert done.difference == 0
        _, blocks = card(done.folder)
        size = 16 if task == "face" else 72
        pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(done.folder / "image.png")
        code = "\n".join(blocks).replace("    output = model(**batch)", "    output = model(**batch).logits")
        jobs.append([str(done.folder), code, names[task], str(tmp_path / f"{task}.pt")])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, str(tmp_path / "jobs.json")]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    image = torch.from_numpy(pixels_of(tmp_path / "segmentation" / "image.png")).permute(2, 0, 1)
    found = {task: torch.load(tmp_path / f"{task}.pt") for task in made}
    with torch.no_grad():
        _, _, model, tokenizer = runs.trained(made["nlp"])
        batch = tokenizer(["a warm and funny film", "a dull one"], padding=True, return_tensors="pt")
        assert torch.equal(model(**batch).logits, found["nlp"][0])
        (live,) = runs.trained(made["detection"])[2]([image.float() / 255])
        for key, value in found["detection"][0].items():
            assert torch.equal(live[key], value)
        assert len(live["boxes"]) > 0
        logits = runs.trained(made["segmentation"])[2](image[None].float() / 255)["logits"]
        logits = nn.functional.interpolate(logits, size=(72, 72), mode="bilinear", align_corners=False)
        assert torch.equal(logits, found["segmentation"][0])
        assert torch.equal(logits[0].argmax(0), found["segmentation"][1])
    crop = torch.from_numpy(pixels_of(tmp_path / "face" / "image.png")).permute(2, 0, 1)
    assert torch.equal(runs.trained(made["face"])[2].embed(crop[None])[0], found["face"][0])


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_a_text_classifier_as_a_graph(made: dict[str, Path], tmp_path: Path) -> None:
    done = kd.export(made["nlp"], "onnx", tmp_path / "out")
    assert 0 < done.difference < 1e-5
    assert done.exporter == "torch.onnx.export(dynamo=True), free: batch, length"
    _, _, model, tokenizer = runs.trained(made["nlp"])
    batch = tokenizer(
        ["the film was great", "a dull plot and a weak actor", "music"], padding=True, return_tensors="pt"
    )
    inputs = {key: batch[key].numpy() for key in ("input_ids", "attention_mask")}
    _, (code,) = card(done.folder)
    space: dict[str, Any] = {"inputs": inputs}
    exec(code.replace('folder = "."', f"folder = {str(done.folder)!r}"), space)
    with torch.no_grad():
        np.testing.assert_allclose(space["outputs"][0], model(**batch).logits.numpy(), atol=1e-5)


def test_a_face_model_as_a_graph(made: dict[str, Path], tmp_path: Path) -> None:
    done = exports.export(made["face"], "onnx", tmp_path / "out")
    assert done.exporter.endswith("free: batch")
    crops = torch.rand(3, 3, 16, 16)
    (found,) = portable.run_onnx(done.folder / "model.onnx", {"images": crops})
    live = runs.trained(made["face"])[2](crops)["embeddings"]
    torch.testing.assert_close(found, live, atol=1e-5, rtol=1e-4)
    assert json.loads((done.folder / "preprocessing.json").read_text())["channels"] == "rgb"


def test_a_whole_detector_as_a_graph(made: dict[str, Path], tmp_path: Path) -> None:
    """On images of other sizes, with other numbers of boxes, than it was traced with."""
    done = exports.export(made["detection"], "onnx", tmp_path / "out")
    assert done.exporter == "torch.onnx.export(dynamo=False), free: height, width"
    model = runs.trained(made["detection"])[2]
    model.roi_heads.score_thresh = 0.05
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    counts = set()
    for number, size in enumerate([(64, 64), (50, 90), (120, 70)]):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(number))
        boxes, scores, labels = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            (live,) = model([image])
        np.testing.assert_allclose(boxes, live["boxes"].numpy(), atol=1e-3)
        np.testing.assert_allclose(scores, live["scores"].numpy(), atol=1e-5)
        assert labels.tolist() == live["labels"].tolist()
        counts.add(len(labels))
    assert max(counts) > 0


def test_a_detector_of_transformers_keeps_its_format(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    from taskkd.detection.portable import portable as detector_as

    student = tiny_detr.detector("detr").eval()
    own = detector_as(student)
    own.save(tmp_path / "hf")
    inputs = own.signature.arrange(own.synthetic()[0])
    live = portable.outputs_of(student, own.signature, inputs)
    again = portable.outputs_of(own.reload(tmp_path / "hf"), own.signature, inputs)
    assert portable.differences(live, again) == [0, 0]
    plain = AutoModelForObjectDetection.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(plain(*inputs).logits, live[0])
    assert AutoImageProcessor.from_pretrained(tmp_path / "hf").image_mean == student.processor.image_mean


# ---- the card


def test_the_card_says_what_the_hub_and_a_user_want(made: dict[str, Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    done = exports.export(made["nlp"], "hf", tmp_path / "out", license="apache-2.0")
    data = ModelCard.load(done.folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-classification")
    assert data.eval_results[0].metric_value == 0.8125
    text, _ = card(done.folder)
    for said in (
        "`soft_targets` (temperature=2.0",
        '- Data: `files: {"train": ',
        "Hinton",
        "| its teacher | unknown: fill in |",
        "taskkd distill texts",
    ):
        assert said in text, said
    other = exports.export(made["nlp"], "safetensors", tmp_path / "other")
    assert "| this student | unknown: fill in |" in card(other.folder)[0]


# ---- what can be wrong


def test_wrong_use_gets_a_sentence(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not the folder of a finished run"):
        exports.export(tmp_path)
    with pytest.raises(RecipeError, match=r"no format 'onxx' \(did you mean 'onnx'\?\); known: safetensors, hf, onnx"):
        exports.export(made["nlp"], "onxx")  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match=r"there exists; give another folder \(--output\), or --overwrite"):
        exports.export(made["nlp"], output=tmp_path / "there")
    exports.export(made["nlp"], output=tmp_path / "there", overwrite=True)
    assert (tmp_path / "there" / "manifest.json").is_file()
    for own in (made["nlp"], made["nlp"] / "student", made["nlp"].parent):
        with pytest.raises(DataError, match="holds the run itself"):
            exports.export(made["nlp"], output=own, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="it is a file"):
        exports.export(made["nlp"], output=tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match=r"file/inside cannot be written: Not a directory"):
        exports.export(made["nlp"], output=tmp_path / "file" / "inside")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        exports.export(made["nlp"], output=tmp_path / "locked" / "out")


def test_a_missing_extra_is_named(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    monkeypatch.setattr(
        sys, "argv", ["taskkd", "export", str(made["face"]), "--format", "onnx", "--output", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "format onnx needs onnxscript: pip install 'taskkd[onnx]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_student_that_differs_leaves_nothing(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(folder: Path) -> nn.Module:
        model = portable.network_of(folder)
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        return model

    monkeypatch.setattr("taskkd.face.portable.network_of", changed)
    before = exports.export(made["face"], "safetensors", tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"does not give what the live one gives: embeddings differs by .* at most"
    ):
        exports.export(made["face"], "hf", tmp_path / "out", overwrite=True)
    verify(before.folder)
    assert (before.folder / "face.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_graph_that_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    own = segmenter_as(Segmenter(nn.Conv2d(3, 2, 1), 2).eval())

    def refuse(path: Path, axes: Any) -> None:
        raise TaskkdError("it differs.")

    only = portable.Signature(**{**vars(own.signature), "exporters": (False,)})
    inputs = own.signature.arrange(own.synthetic()[0])
    with pytest.raises(CheckpointError, match=r"cannot be written as ONNX: tracing, free batch, height, width"):
        portable.write_onnx(own.student, only, inputs, tmp_path / "m.onnx", refuse)


def test_without_its_data_synthetic_inputs_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = exported.nlp(tmp_path)
    (tmp_path / "test.csv").unlink()
    done = exports.export(run, "hf")
    assert done.folder == run / "export" / "hf"
    assert done.inputs == "3 synthetic inputs, since the run's test set could not be read"
    assert "test.csv" in caplog.text


def test_a_network_of_ones_own_cannot_be_built_by_lines() -> None:
    own = segmenter_as(Segmenter(nn.Conv2d(3, 2, 1), 2).eval())
    with pytest.raises(
        TaskkdError, match="was not built by taskkd, which cannot say how to build it: export it as onnx"
    ):
        own.save(Path("nowhere"))


def test_unequal_outputs_are_infinitely_far() -> None:
    a, b = torch.zeros(2), torch.tensor([0.0, torch.nan])
    assert portable.differences([a, a, a], [a + 1, torch.zeros(3), b]) == [1.0, float("inf"), float("inf")]


def test_detections_are_compared_beside_their_nearest() -> None:
    from taskkd.detection.portable import _matched

    boxes, labels = torch.tensor([[0.0, 0, 4, 4], [5, 5, 9, 9]]), torch.tensor([1, 2])
    scores = torch.tensor([0.5, 0.5])
    assert _matched((boxes, scores, labels), (boxes.flip(0), scores, labels.flip(0))) == [0, 0, 0]
    assert _matched((boxes, scores, labels), (boxes[:1], scores[:1], labels[:1])) == [float("inf")] * 3
    low = torch.tensor([0.5, 0.01])
    assert _matched((boxes, low, labels), (boxes[:1], scores[:1], labels[:1])) == [0, 0, 0]
    assert _matched((boxes, scores, labels), (boxes, scores, labels.flip(0))) == [5, 0, 0]
