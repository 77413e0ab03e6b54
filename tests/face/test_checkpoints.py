"""Weights as their authors save them. Their files cannot be fetched here: each is made up with its documented keys."""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from taskkd.errors import CheckpointError, DataError, RecipeError
from taskkd.face import FaceModel, build, load_checkpoint, save
from tests.face.test_backbones import TOYS

State = dict[str, Tensor]


def made(name: str) -> FaceModel:
    """A toy whose statistics are not those of the start."""
    model = build(TOYS[name], seed=5)
    model(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def prefixed(prefix: str, state: State) -> State:
    return OrderedDict((prefix + key, value) for key, value in state.items())


CENTRES = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
HEAD = {"head.kernel": CENTRES.T.contiguous(), "head.t": torch.zeros(1), "head.batch_mean": torch.full((1,), 20.0)}

# source -> (backbone, what its file holds, order of channels, whether it has a classifier)
SOURCES: dict[str, tuple[str, Callable[[State], Any], str, bool]] = {
    "insightface": ("iresnet", dict, "rgb", False),
    "insightface, wrapped": ("mbf", lambda s: prefixed("module.", s), "rgb", False),
    "insightface, checkpoint_gpu_0.pt": (
        "iresnet",
        lambda s: {
            "epoch": 3,
            "global_step": 10,
            "state_dict_backbone": prefixed("module.", s),
            "state_dict_softmax_fc": {"weight": CENTRES},
            "state_optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        },
        "rgb",
        True,
    ),
    "AdaFace": (
        "ir",
        lambda s: {"epoch": 3, "pytorch-lightning_version": "1.4.4", "state_dict": prefixed("model.", s) | HEAD},
        "bgr",
        True,
    ),
    "CVLface, model.pt": ("ir", lambda s: prefixed("net.", s), "rgb", False),
    "CVLface, hub": ("ir", lambda s: prefixed("model.net.", s), "rgb", False),
    "CVLface, iresnet_insightface": ("iresnet", lambda s: prefixed("model.net.", s), "rgb", False),
    "TFace": ("ir", dict, "rgb", False),
    "AdaDistill": ("gdc", dict, "rgb", False),
    "AdaDistill, wrapped": ("gdc", lambda s: prefixed("module.", s), "rgb", False),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_known_by_its_tensors(source: str, tmp_path: Path) -> None:
    name, content, channels, classifier = SOURCES[source]
    model = made(name)
    path = tmp_path / ("model.ckpt" if source == "AdaFace" else "backbone.pth")
    torch.save(content(model.backbone.state_dict()), path)
    found = load_checkpoint(path)
    assert not found.training and found.channels == channels
    state = model.backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.backbone.state_dict().items())
    assert (found.centres is not None) == classifier
    if found.centres is not None:
        assert torch.equal(found.centres, CENTRES)
    config, asked = found.built, TOYS[name]
    assert config is not None and config.family == model.built.family  # type: ignore[union-attr]
    assert (config.layers, config.width, config.size, config.embedding_size) == ([1] * 4, asked["width"], 32, 16)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(found.embed(images if channels == "rgb" else images.flip(1)), model.embed(images))


def test_a_folder_of_the_hub_and_our_own(tmp_path: Path) -> None:
    model = made("ir")
    state = prefixed("model.net.", model.backbone.state_dict())
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_checkpoint(tmp_path).embed(images), model.embed(images))
    ours = made("mbf")
    ours.channels = "bgr"
    save(ours, tmp_path)
    assert load_checkpoint(tmp_path).channels == "bgr"


def test_weights_say_what_a_recipe_does_not(tmp_path: Path) -> None:
    model, path = made("gdc"), tmp_path / "student.pth"
    torch.save(model.backbone.state_dict(), path)
    again = build({"architecture": "mobilefacenet", "weights": str(path), "projector": 24, "layers": [1] * 4})
    assert again.training and again.embedding_size == 24
    assert again.built is not None and (again.built.layout, again.built.width) == ("gdc", 8)
    save(again, tmp_path / "model")
    path.unlink()  # a saved model needs no file of weights
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_checkpoint(tmp_path / "model").embed(images), again.embed(images))


def test_published_layers_have_their_names(tmp_path: Path) -> None:
    toy = {"width": 2, "size": 16, "embedding_size": 4}
    for layout in ("insightface", "ir"):
        model = build({"architecture": "iresnet50", "layout": layout, **toy})
        torch.save(model.backbone.state_dict(), tmp_path / "r50.pth")
        found = load_checkpoint(tmp_path / "r50.pth", "iresnet50")
        assert found.built is not None and (found.built.architecture, found.built.layers) == ("iresnet50", None)
        with pytest.raises(RecipeError, match=r"are of iresnet50 in the layout .*, not of iresnet100\."):
            load_checkpoint(tmp_path / "r50.pth", "iresnet100")
    with pytest.raises(RecipeError, match="not of mobilefacenet"):
        load_checkpoint(tmp_path / "r50.pth", "mobilefacenet")
    model = build({"architecture": "mobilefacenet", "layers": [2, 3, 4, 1], "width": 4, "size": 16})
    torch.save(model.backbone.state_dict(), tmp_path / "large.pth")
    found = load_checkpoint(tmp_path / "large.pth")
    assert found.built is not None and found.built.layers == [2, 3, 4, 1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"embedding_size": 32}, "`embedding_size` is 16, got 32"),
        ({"width": 8}, "`width` is 4, got 8"),
        ({"size": 112}, "`size` is 32, got 112"),
        ({"architecture": "iresnet18", "layout": "ir", "layers": [1] * 4}, "`layout` is insightface, got ir"),
        ({"architecture": "iresnet18", "layers": [1, 1, 1]}, "not of iresnet18 .*layers"),
        ({"layers": [1, 1, 2, 1]}, r"not of a network \(layers \[1, 1, 2, 1\]\)"),
    ],
)
def test_weights_of_another_shape_than_asked_for_are_named(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(made("iresnet").backbone.state_dict(), tmp_path / "a.pt")
    with pytest.raises(RecipeError, match=message):
        build({"weights": str(tmp_path / "a.pt"), **asked})


def _without(state: State, *keys: str) -> State:
    return {k: v for k, v in state.items() if k not in keys}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("iresnet", lambda s: _without(s, "layer2.0.prelu.weight"), r"Missing: layer2\.0\.prelu\.weight\.$"),
        ("iresnet", lambda s: s | {"layer2.0.gate.weight": torch.ones(1)}, r"Unexpected: layer2\.0\.gate\.weight\.$"),
        (
            "iresnet",
            lambda s: s | {"layer2.0.conv1.weight": torch.ones(8, 8, 3, 3)},
            r"Of another shape: layer2\.0\.conv1\.weight \(8 x 8 x 3 x 3 there, 8 x 4 x 3 x 3 here\)",
        ),
        ("iresnet", lambda s: _without(s, "fc.weight"), r"layout 'insightface', but have no 'fc\.weight'"),
        ("gdc", lambda s: _without(s, "output_layer.linear.weight"), r"have no 'output_layer\.linear\.weight'"),
        ("ir", lambda s: s | {"body.0.res_layer.se_block.fc1.weight": torch.ones(1)}, "squeeze-and-excitation"),
        (
            "ir",
            lambda s: prefixed("student.", s) | prefixed("teacher.", s),
            "2 backbones, under 'student.', 'teacher.'",
        ),
        ("ir", lambda s: {"blocks.0.norm1.weight": torch.ones(3)}, "no backbone that is known.*vision transformer"),
        ("ir", lambda s: {"epoch": 3}, "expected tensors by name, got dict"),
        ("ir", lambda s: [1, 2], "expected tensors by name, got list"),
    ],
)
def test_what_does_not_fit_is_listed(name: str, change: Callable[[State], Any], message: str, tmp_path: Path) -> None:
    torch.save(change(made(name).backbone.state_dict()), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pt")


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    state = made("mbf").backbone.state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "a.pt")
    load_checkpoint(tmp_path / "a.pt")


# ---- files


class Runs:
    def __reduce__(self) -> Any:
        return (os.system, ("true",))


def test_a_file_that_executes_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": made("ir").backbone.state_dict(), "callbacks": Runs()}, tmp_path / "a.ckpt")
    with pytest.raises(DataError, match=r"refused, not plain tensors: it asks for posix\.system"):
        load_checkpoint(tmp_path / "a.ckpt")


def test_objects_of_lightning_are_read_as_shells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their classes are there where the file is written, and not where it is read."""
    lightning: Any = ModuleType("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    for name, base in {"Callback": object, "AttributeDict": dict}.items():
        setattr(lightning, name, type(name, (base,), {"__module__": "pytorch_lightning", "__init__": refuse}))
    told = dict.__new__(lightning.AttributeDict)
    told |= {"a": 1, "arguments": argparse.Namespace(b=2), "folder": PosixPath("a/b")}
    saved = object.__new__(lightning.Callback)
    saved.best = torch.ones(1)
    state = prefixed("model.", made("ir").backbone.state_dict())
    raw = {"state_dict": state, "hyper_parameters": told, "callbacks": {lightning.Callback: {"a": 1}, "b": saved}}
    torch.save(raw, tmp_path / "a.ckpt")
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    assert load_checkpoint(tmp_path / "a.ckpt").built.layout == "ir"  # type: ignore[union-attr]


def refuse(*_: Any) -> None:
    raise AssertionError("an object of the file was made")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.onnx", b"x", "an ONNX graph; expected the .pt or .pth"),
        ("a.pth", b"<html>sign in</html>", "cannot be read|refused"),
        ("a.safetensors", b"123", "cannot be read"),
        ("b.pt", None, "no such file"),
    ],
)
def test_unreadable_files_are_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_checkpoint(tmp_path / name)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    torch.save(made("mbf").backbone.state_dict(), tmp_path / "a.pt")
    with pytest.raises(DataError, match="was changed"):
        build({"weights": str(tmp_path / "a.pt"), "sha256": "0" * 64})


def test_a_classifier_in_files_of_its_own(tmp_path: Path) -> None:
    model = made("iresnet")
    torch.save(model.backbone.state_dict(), tmp_path / "backbone.pth")
    for rank, part in enumerate(CENTRES.split(4)):
        torch.save({"weight": part, "weight_mom": part * 0}, tmp_path / f"softmax_fc_gpu_{rank}.pt")
    weights = {"weights": str(tmp_path / "backbone.pth")}
    shards = [str(tmp_path / f"softmax_fc_gpu_{rank}.pt") for rank in range(2)]
    assert torch.equal(build({**weights, "centres": shards}).centres, CENTRES)  # type: ignore[arg-type]
    torch.save(CENTRES, tmp_path / "rank_0_softmax_weight.pt")
    torch.save({"kernel": CENTRES.T.clone()}, tmp_path / "header.pth")
    for name in ("rank_0_softmax_weight.pt", "header.pth"):
        assert torch.equal(build({**weights, "centres": str(tmp_path / name)}).centres, CENTRES)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"expected a `weight` \(identities, 24\).*got weight \(4 x 16\)"):
        build({**weights, "projector": 24, "centres": shards[0]})
