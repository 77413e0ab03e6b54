"""Backbones of face embeddings: the names, shapes and sizes of their authors' networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from taskkd.errors import RecipeError
from taskkd.face import FaceModel, build, load, save
from taskkd.face.iresnet import IR, Block, IRBlock, IResNet
from taskkd.face.mobilefacenet import MobileFaceNet

TOY: dict[str, Any] = {"layers": [1, 1, 1, 1], "size": 32, "embedding_size": 16}
TOYS = {
    "iresnet": {"architecture": "iresnet18", "width": 4, **TOY},
    "ir": {"architecture": "iresnet18", "layout": "ir", "width": 4, **TOY},
    "mbf": {"architecture": "mobilefacenet", "width": 8, **TOY},
    "gdc": {"architecture": "mobilefacenet", "layout": "gdc", "width": 8, **TOY},
}


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large networks without random numbers, which take longer than all else (torch's "meta" takes 10 s to import)."""
    for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"architecture": "iresnet18"}, 24_025_600),
        ({"architecture": "iresnet34"}, 34_139_328),
        ({"architecture": "iresnet50"}, 43_590_848),
        ({"architecture": "iresnet100"}, 65_156_160),
        ({"architecture": "mobilefacenet"}, 2_059_520),
        ({"architecture": "mobilefacenet", "width": 64}, 1_200_512),
        ({"architecture": "mobilefacenet", "layout": "gdc"}, 1_199_488),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else None,
)
def test_published_networks_have_as_many_parameters_as_their_authors(config: dict[str, Any], count: int) -> None:
    model = build(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.embedding_size == 512


def test_names_of_insightface() -> None:
    keys = {k: tuple(v.shape) for k, v in IResNet((1, 2), width=4, embedding_size=16, size=16).state_dict().items()}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    block = [
        *(f"bn1.{n}" for n in norm),
        "conv1.weight",
        *(f"bn2.{n}" for n in norm),
        "prelu.weight",
        "conv2.weight",
        *(f"bn3.{n}" for n in norm),
    ]
    down = ["downsample.0.weight", *(f"downsample.1.{n}" for n in norm)]
    assert list(keys) == [
        "conv1.weight",
        *(f"bn1.{n}" for n in norm),
        "prelu.weight",
        *(f"layer1.0.{n}" for n in [*block, *down]),
        *(f"layer2.0.{n}" for n in [*block, *down]),
        *(f"layer2.1.{n}" for n in block),
        *(f"bn2.{n}" for n in norm),
        "fc.weight",
        "fc.bias",
        *(f"features.{n}" for n in norm),
    ]
    assert keys["layer2.0.conv1.weight"] == (8, 4, 3, 3)
    assert keys["layer2.0.downsample.0.weight"] == (8, 4, 1, 1)
    assert keys["fc.weight"] == (16, 8 * 4 * 4)


@pytest.mark.usefixtures("blank")
def test_names_of_tface() -> None:
    keys = {k: tuple(v.shape) for k, v in IR((3, 4, 14, 3)).state_dict().items()}
    assert "body.0.shortcut_layer.0.weight" not in keys  # as many channels: every second pixel, no weights
    assert keys["body.3.shortcut_layer.0.weight"] == (128, 64, 1, 1)
    assert keys["body.3.res_layer.1.weight"] == (128, 64, 3, 3)
    assert keys["body.3.res_layer.3.weight"] == (128,)
    assert keys["output_layer.3.weight"] == (512, 25088)
    assert "output_layer.4.weight" not in keys and keys["output_layer.4.running_mean"] == (512,)
    assert {k.split(".")[1] for k in keys if k.startswith("body.")} == set(map(str, range(24)))


@pytest.mark.usefixtures("blank")
def test_names_of_both_mobilefacenets() -> None:
    ours = {k: tuple(v.shape) for k, v in MobileFaceNet().state_dict().items()}
    gdc = {k: tuple(v.shape) for k, v in MobileFaceNet("gdc", width=64).state_dict().items()}
    large = MobileFaceNet(layers=(2, 8, 12, 4), width=256).state_dict()
    assert ours["layers.0.layers.0.weight"] == (128, 3, 3, 3)
    assert ours["layers.1.layers.0.weight"] == (128, 2, 3, 3)  # 64 groups
    assert ours["layers.3.layers.3.layers.1.layers.2.weight"] == (128,)
    assert ours["layers.6.layers.0.layers.0.weight"] == (512, 256, 1, 1)
    assert ours["conv_sep.layers.0.weight"] == (512, 256, 1, 1)
    assert ours["features.layers.0.layers.0.weight"] == (512, 1, 7, 7)
    assert ours["features.layers.2.weight"] == (512, 512)
    assert "layers.1.layers.0.layers.1.layers.0.layers.0.weight" not in ours
    assert "layers.1.layers.1.layers.0.layers.0.weight" in large
    assert len(gdc) == 331
    assert gdc["conv2_dw.conv.weight"] == (64, 1, 3, 3)
    assert gdc["conv_23.conv_dw.prelu.weight"] == (128,)
    assert gdc["conv_4.model.5.project.bn.running_var"] == (128,)
    assert gdc["output_layer.conv_6_dw.conv.weight"] == (512, 1, 7, 7)
    assert gdc["output_layer.linear.weight"] == (512, 512)
    assert "output_layer.bn.weight" not in gdc and "output_layer.bn.running_mean" in gdc


@pytest.mark.parametrize("name", TOYS)
def test_stages_halve_the_map_and_the_embedding_is_normalised_over_the_batch(name: str) -> None:
    model = build(TOYS[name])
    assert sum(p.numel() for p in model.parameters()) < 25_000
    maps = []
    for stage in model.views.stages:
        model.get_submodule(stage).register_forward_hook(lambda _m, _a, value: maps.append(value.shape))
    out = model(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))["embeddings"]
    assert [shape[2] for shape in maps] == [16, 8, 4, 2]
    assert maps[1][1] == 2 * maps[0][1] or "mobile" in TOYS[name]["architecture"]
    torch.testing.assert_close(out.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    assert (out.var(0, unbiased=False) <= 1 + 1e-5).all()
    out.square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not still


def test_the_last_weight_of_an_iresnet_stays_one() -> None:
    weight = build(TOYS["iresnet"]).backbone.features.weight
    assert not weight.requires_grad and torch.equal(weight, torch.ones(16))  # type: ignore[operator, arg-type]


def test_both_layouts_of_mobilefacenet_are_one_function() -> None:
    models = [build(TOYS[name]).eval() for name in ("mbf", "gdc")]
    theirs, ours = (m.backbone.state_dict() for m in models)
    values = [v for k, v in theirs.items() if k not in ("features.layers.3.weight", "features.layers.3.bias")]
    models[1].backbone.load_state_dict(dict(zip(ours, values, strict=True)))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(models[0](images), models[1](images))


def test_the_shortcut_without_weights_takes_every_second_pixel() -> None:
    torch.manual_seed(0)
    ir, insight = IRBlock(4, 4, 2).eval(), Block(4, 4, 2).eval()
    names = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")
    for name, layer in zip(names, ir.res_layer, strict=True):
        insight.get_submodule(name).load_state_dict(layer.state_dict())
    assert isinstance(insight.downsample, nn.Sequential)
    nn.init.dirac_(insight.downsample[0].weight)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(ir(x), insight(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "mobilefacenet", "width": 96}, "up to 64 or a multiple of 64, got 96"),
        ({"architecture": "mobilefacenet", "layout": "gdc", "layers": [2, 4, 6, 2]}, "1 block in its first stage"),
    ],
)
def test_shapes_that_cannot_be_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(config)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_networks_of_timm(name: str) -> None:
    pytest.importorskip("timm")
    model = build({"architecture": f"timm:{name}", "size": 64, "embedding_size": 24, "dropout": 0.1})
    assert isinstance(model, FaceModel)
    out = model(torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8))["embeddings"]
    assert out.shape == (3, 24) and model.embedding_size == 24
    assert model.description.mean != (0.5, 0.5, 0.5)  # ImageNet's, as of all its networks
    if name == "test_vit":
        assert model.views.stages == ()
        return
    sides = []
    for stage in model.views.stages:
        model.get_submodule(stage).register_forward_hook(lambda _m, _a, value: sides.append(value.shape[2]))
    model(torch.rand(2, 3, 64, 64))
    assert sides[-1] == 4  # a sixteenth: the stem's stride is halved
    native = build({"architecture": f"timm:{name}", "size": 64, "native_stem": True})
    tail = native.get_submodule(native.views.stages[-1])
    tail.register_forward_hook(lambda _m, _a, value: sides.append(value.shape[2]))
    native(torch.rand(2, 3, 64, 64))
    assert sides[-1] == 2


def test_a_stem_of_several_branches_keeps_its_stride() -> None:
    pytest.importorskip("timm")
    model = build({"architecture": "timm:fastvit_t8", "size": 64, "embedding_size": 8}).eval()
    assert model(torch.rand(1, 3, 64, 64))["embeddings"].shape == (1, 8)
    assert model.views.stages


def test_weights_of_timm_are_loaded_by_its_names(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet")
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    config = {"architecture": "timm:test_resnet", "size": 64, "embedding_size": 8}
    model = build({**config, "weights": str(tmp_path / "a.pth")})
    own = model.backbone.get_submodule("net").state_dict()
    assert own and all(torch.equal(v, theirs.state_dict()[k]) for k, v in own.items())
    save(model, tmp_path / "model")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(load(tmp_path / "model").embed(images), model.embed(images))
    with pytest.raises(RecipeError, match="another architecture"):
        build({**config, "architecture": "timm:test_vit", "weights": str(tmp_path / "a.pth")})


def test_an_unknown_network_of_timm_is_named() -> None:
    pytest.importorskip("timm")
    with pytest.raises(RecipeError, match="resnet18"):
        build({"architecture": "timm:resnet_18"})
