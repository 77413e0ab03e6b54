"""Detectors of transformers behind torchvision's interface give what transformers itself gives."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from taskkd.detection.given import _detector
from taskkd.detection.shared import inside_images
from taskkd.detection.transformers_models import TransformersDetector, labels_of
from taskkd.errors import DataError, TaskkdError
from tests.detection.tiny_detr import NAMES, batch, detector


@pytest.mark.parametrize("name", NAMES)
def test_losses_sum_to_the_models_own_and_reach_every_parameter(name: str) -> None:
    model, (images, targets) = detector(name).train(), batch()
    torch.manual_seed(1)
    losses = model(images, targets)
    assert all(v.ndim == 0 for v in losses.values())
    total = torch.stack(list(losses.values())).sum()
    torch.manual_seed(1)
    shown, found = model.transform(images, targets)
    own = model.run(shown, found)
    torch.testing.assert_close(total, own.loss.reshape(()), rtol=1e-5, atol=1e-6)
    total.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if name in ("rt_detr", "rt_detr_v2", "d_fine"):
        assert own.logits.shape[1] == 9 + 10 // 2 * 2 * 2  # 5 groups of two boxes, positive and negative


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_boxes_is_finite_with_a_gradient(name: str) -> None:
    model, (images, targets) = detector(name).train(), batch(boxes=False)
    total = torch.stack(list(model(images, targets).values())).sum()
    total.backward()
    assert math.isfinite(total.item())
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is None or g.isfinite().all() for g in grads)
    embedding = getattr(model.model.model, "denoising_class_embed", None)
    assert embedding is None or embedding.weight.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_detections_are_those_of_transformers_post_processing(name: str) -> None:
    model, (images, _) = detector(name).eval(), batch()
    image = images[0]
    with torch.no_grad():
        (found,) = model([image])
        shown, _ = model.transform([image])
        output = model.run(shown)
        (theirs,) = model.processor.post_process_object_detection(
            output, threshold=0.0, target_sizes=torch.tensor([image.shape[1:]])
        )
    torch.testing.assert_close(found["scores"], theirs["scores"])
    torch.testing.assert_close(found["boxes"], theirs["boxes"])
    assert torch.equal(found["labels"], theirs["labels"] + 1)
    assert 1 <= int(found["labels"].min()) <= int(found["labels"].max()) <= 3


@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_preprocessing_is_that_of_the_image_processor(name: str) -> None:
    model, (images, _) = detector(name).eval(), batch()
    theirs = model.processor(images=images, do_rescale=False, return_tensors="pt")
    shown, _ = model.transform(images)
    torch.testing.assert_close(shown.tensors, theirs["pixel_values"], atol=1e-5, rtol=1e-5)
    if name == "detr":
        assert torch.equal(inside_images(shown.tensors, shown.image_sizes).long(), theirs["pixel_mask"])
    else:
        assert tuple(shown.tensors.shape[2:]) == (64, 64)
        assert 0 <= shown.tensors.min() <= shown.tensors.max() <= 1  # no normalisation


def test_boxes_are_relative_to_the_image_where_padding_is_masked() -> None:
    images, targets = batch()
    model = detector("detr")
    shown, found = model.transform(images, targets)
    assert shown.tensors.shape[2] > shown.image_sizes[0][0]  # the first image is padded
    labels = labels_of(model, found, shown)
    x1, y1, x2, y2 = targets[0]["boxes"][0].tolist()
    want = torch.tensor([(x1 + x2) / 2 / 72, (y1 + y2) / 2 / 48, (x2 - x1) / 72, (y2 - y1) / 48])
    torch.testing.assert_close(labels[0]["boxes"][0], want)
    assert labels[0]["class_labels"].tolist() == [0, 2]
    assert labels[1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr"])
def test_labels_and_detections_are_inverse_to_each_other_in_a_padded_batch(name: str) -> None:
    images, targets = batch()
    model = detector(name, size=64).eval()  # RT-DETR, too, in batches of several shapes
    shown, found = model.transform(images, targets)
    labels = labels_of(model, found, shown)
    logits = torch.full((2, 2, 4 if name == "detr" else 3), -9.0)
    logits[0, [0, 1], labels[0]["class_labels"]] = 9.0
    boxes = torch.stack([labels[0]["boxes"], torch.zeros(2, 4)])
    output = SimpleNamespace(logits=logits, pred_boxes=boxes)
    first = model._detections(output, shown, [(48, 72), (60, 40)])[0]
    best = first["scores"].topk(2).indices
    best = best[first["labels"][best].argsort()]
    torch.testing.assert_close(first["boxes"][best], targets[0]["boxes"], atol=1e-3, rtol=1e-4)
    assert first["labels"][best].tolist() == [1, 3]


@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_what_is_saved_is_read_by_us_and_by_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = detector(name).eval()
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    again, info = TransformersDetector.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(_detector(tmp_path), TransformersDetector)  # what `kd.distill` takes for a student or teacher
    assert isinstance(_detector(model.model), TransformersDetector)
    plain = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert plain.state_dict().keys() == model.model.state_dict().keys()
    assert AutoImageProcessor.from_pretrained(tmp_path).size == model.processor.size
    images, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images)[1], model(images)[1])
        shown, _ = model.transform(images[:1])
        torch.testing.assert_close(plain(shown.tensors).logits, model.run(shown).logits)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_another_number_of_classes_starts_the_classifier_anew(tmp_path: Path) -> None:
    detector("detr").save_pretrained(tmp_path)
    model = TransformersDetector.from_pretrained(tmp_path, classes=["tree", "bush"], size=48)
    assert model.config.num_labels == 2
    assert model.config.id2label[1] == "bush"
    assert model.model.class_labels_classifier.out_features == 3
    assert model.transform.min_size == [48]


def test_copies_pickles_and_state_hold_the_model_alone() -> None:
    model = detector("conditional_detr")
    twin = copy.deepcopy(model)
    assert twin.live(twin.model) is twin.model
    assert {k.partition(".")[0] for k in model.state_dict()} == {"model"}
    assert pickle.loads(pickle.dumps(model)).config.num_labels == 3


def test_gradient_checkpointing_is_the_models() -> None:
    model, (images, targets) = detector("deformable_detr").train(), batch()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    torch.stack(list(model(images, targets).values())).sum().backward()


def test_scales_are_drawn_in_training_only() -> None:
    model = detector("detr")
    scaled = TransformersDetector(model.model, scales=[32, 48, 64])
    assert scaled.transform.min_size == [32, 48, 64]
    assert scaled.processor.size["shortest_edge"] == 64
    assert TransformersDetector(model.model, longest=900).transform.max_size == 900
    images, targets = batch()
    shapes = {tuple(scaled.train().transform(images, targets)[0].tensors.shape) for _ in range(12)}
    assert len(shapes) > 1
    assert len({tuple(scaled.eval().transform(images)[0].tensors.shape) for _ in range(4)}) == 1


@pytest.mark.parametrize(
    ("act", "message", "error"),
    [
        (lambda m, i, t: m.train()(i), "in train mode needs `targets`", DataError),
        (lambda m, i, t: m(i, [{**t[0], "labels": torch.tensor([1, 4])}, t[1]]), r"labels 1 to 4; .* has 3", DataError),
        (lambda m, i, t: m(i, [{**t[0], "labels": torch.tensor([0, 1])}, t[1]]), "0 is background", DataError),
        (lambda m, i, t: TransformersDetector(_named("detrr")), "'detrr' are not known .*'detr'", TaskkdError),
        (lambda m, i, t: TransformersDetector(m.model, size=(64, 64), scales=[32]), "resized to 64x64", TaskkdError),
    ],
)
def test_wrong_use_is_told(act: Any, message: str, error: type[Exception]) -> None:
    images, targets = batch()
    with pytest.raises(error, match=message):
        act(detector("detr").train(), images, targets)


def _named(kind: str) -> nn.Module:
    model = nn.Module()
    model.config = SimpleNamespace(model_type=kind)  # type: ignore[assignment]
    return model


def test_a_missing_scipy_is_told_by_its_name_on_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model, (images, targets) = detector("detr").train(), batch()
    with pytest.raises(TaskkdError, match="pip install scipy"):
        model(images, targets)
