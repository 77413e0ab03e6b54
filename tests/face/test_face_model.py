"""A face model: preprocessing, embeddings, saving."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskkd import checkpoints
from taskkd.caches import Cached
from taskkd.errors import CacheError, CheckpointError, DataError, RecipeError, ShapeError, TapError, TaskkdError
from taskkd.face import FaceConfig, FaceModel, build, load, save, wrap
from taskkd.face.models import check_student, describe, existing
from tests.face.test_backbones import TOYS


class Seen(nn.Module):
    """Gives the mean of each channel that it is shown, and keeps what that was."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.mean((2, 3)) * self.scale


def images(count: int = 4, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_bytes_and_floats_are_the_same_image() -> None:
    model = build(TOYS["iresnet"]).eval()
    torch.testing.assert_close(model(images())["embeddings"], model(images() / 255)["embeddings"])
    exact = model(images())["embeddings"]
    assert model.double()(images())["embeddings"].dtype == torch.float64
    half = model.bfloat16()(images())["embeddings"]
    assert half.dtype == torch.bfloat16 and model.embed(images()).dtype == torch.float32
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_pixels_are_normalised_in_the_order_of_the_network() -> None:
    model = FaceModel(Seen(), size=32, channels="bgr", mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    model(images())
    blue = images()[:, 2] / 255
    torch.testing.assert_close(model.backbone.seen[:, 0], (blue - 0.1) / 1.0)
    red = images()[:, 0] / 255
    torch.testing.assert_close(model.backbone.seen[:, 2], (red - 0.3) / 4.0)
    plain = FaceModel(Seen(), size=32)
    plain(torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]))
    assert plain.backbone.seen.amin() == -1 and plain.backbone.seen.amax() == 1  # type: ignore[union-attr, operator]


def test_it_compiles_as_one_graph() -> None:
    model = build(TOYS["iresnet"]).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images())["embeddings"], model(images())["embeddings"])


def test_images_of_another_size_are_resized() -> None:
    model = FaceModel(Seen(), size=16)
    small = model(images(size=64) * 0 + 51)["embeddings"]
    torch.testing.assert_close(small, torch.full((4, 3), 0.2 * 2 - 1))
    assert model.backbone.seen.shape == (4, 3, 16, 16)
    model(torch.rand(2, 3, 20, 12))
    assert model.backbone.seen.shape == (2, 3, 16, 16)


def test_embeddings_are_unit_sums_of_both_views() -> None:
    model = build(TOYS["mbf"])
    model.backbone.conv_sep.eval()  # type: ignore[union-attr, operator]
    modes = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    unit = model.embed(images())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert not unit.requires_grad
    model.eval()
    one, other = model(images())["embeddings"], model(images().flip(3))["embeddings"]
    torch.testing.assert_close(unit, nn.functional.normalize(one + other))
    torch.testing.assert_close(model.embed(images(), flip=False), nn.functional.normalize(one))
    torch.testing.assert_close(model.embed(images().flip(3)), unit)
    assert model.embed(images(1)).shape == (1, 16)


def test_a_projector_is_part_of_the_model() -> None:
    model = build({**TOYS["iresnet"], "projector": 24})
    assert model.embedding_size == 24
    assert model(images())["embeddings"].shape == (4, 24)
    assert {"projector.weight", "projector.bias"} <= set(model.state_dict())
    assert FaceModel(Seen(), size=8, projector=nn.Linear(3, 5)).embedding_size == 5


def test_what_is_known_beside_the_weights_is_no_weight() -> None:
    model = build(TOYS["iresnet"])
    keys = set(model.state_dict())
    assert model.identities is None and model.centres is None
    model.identities, model.centres = 7, torch.randn(7, 16)
    assert set(model.state_dict()) == keys and all(k.startswith("backbone.") for k in keys)
    twin = copy.deepcopy(model)
    assert twin.identities == 7 and torch.equal(twin.centres, model.centres)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\): expected \(N, 3, H, W\).*images\[None\]"),
        (torch.zeros(2, 32, 32, 3), r"channels come second"),
        (torch.zeros(2, 1, 32, 32), r"expected \(N, 3, H, W\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "images are int64: expected uint8"),
        (torch.zeros(1, 3, 32, 32), "one image in training"),
    ],
)
def test_images_that_are_none_are_refused(given: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        build(TOYS["iresnet"])(given)


@pytest.mark.parametrize("scale", [255.0, -1.0])
def test_floats_outside_of_the_range_are_refused(scale: float) -> None:
    with pytest.raises(ShapeError, match=r"floats in 0\.\.1"):
        build(TOYS["iresnet"]).embed(torch.ones(2, 3, 32, 32) * scale)


def test_any_network_can_be_wrapped() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.LazyLinear(6))
    model = wrap(net, size=8, stages=["0"])
    assert model.embedding_size == 6 and model.views.stages == ("backbone.0",)
    assert wrap(model) is model
    with pytest.raises(RecipeError, match="has its own settings; leave out size"):
        wrap(model, size=8)
    with pytest.raises(TapError, match="no such module"):
        wrap(net, size=8, stages=["layer1"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FaceModel(nn.Conv2d(3, 4, 3), size=8), r"gives \(2, 4, 6, 6\) of 2 images"),
        (lambda: FaceModel(nn.Linear(7, 4), size=8), "does not run on an image of 8 x 8"),
        (lambda: FaceModel(Seen(), mean=[0.5, 0.5]), "one number or three"),
        (lambda: FaceModel(Seen(), std=0.0), "must be positive"),
        (lambda: FaceModel(Seen(), channels="gbr"), "'rgb' or 'bgr', got 'gbr'"),
        (lambda: FaceModel(Seen(), size=0), "must be positive"),
    ],
)
def test_what_is_no_backbone_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TaskkdError, match=message):
        make()


# ---- folders


@pytest.mark.parametrize("name", TOYS)
def test_a_saved_model_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    model = build({**TOYS[name], "channels": "bgr", "mean": [0.4, 0.5, 0.6]}, seed=3)
    model(images())  # moves the running statistics
    model.centres = torch.randn(5, 16)
    save(model, tmp_path)
    again = load(tmp_path)
    assert not again.training
    assert again.description == model.description and again.channels == "bgr"
    assert torch.equal(again.embed(images()), model.embed(images()))
    assert torch.equal(again.centres, model.centres)  # type: ignore[arg-type]
    trained = build({"model": str(tmp_path)})
    assert trained.training and torch.equal(trained.embed(images()), model.embed(images()))


def test_the_trainer_saves_the_same_folder(tmp_path: Path) -> None:
    model = build({**TOYS["iresnet"], "projector": 24})
    checkpoints.save_student(model, tmp_path)
    assert torch.equal(load(tmp_path).embed(images()), model.embed(images()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["face.json", "model.safetensors"]


def test_centres_that_are_gone_leave_no_file(tmp_path: Path) -> None:
    model = build(TOYS["iresnet"])
    model.centres = torch.randn(5, 16)
    save(model, tmp_path)
    model.centres = None
    save(model, tmp_path)
    assert load(tmp_path).centres is None


def test_building_is_a_function_of_the_seed_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    one, same, other = (build({**TOYS["gdc"], "projector": 8}, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, same[k]) for k, v in one.items())
    assert not torch.equal(one["projector.weight"], other["projector.weight"])


def test_folders_that_hold_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        build({"model": str(tmp_path / "no")})
    with pytest.raises(DataError, match=r"expected face\.json"):
        build({"model": str(tmp_path)})
    save(build(TOYS["iresnet"]), tmp_path / "student")
    with pytest.raises(DataError, match="did you mean"):
        build({"model": str(tmp_path)})
    folder = tmp_path / "student"
    about = json.loads((folder / "face.json").read_text())
    (folder / "face.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        load(folder)
    (folder / "face.json").write_text(json.dumps(about | {"channels": "grey"}))
    with pytest.raises(DataError, match="not a face model's description"):
        load(folder)
    about["config"]["width"] = 8
    (folder / "face.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="does not load"):
        load(folder)


def test_damaged_centres_are_named(tmp_path: Path) -> None:
    model = build(TOYS["iresnet"])
    model.centres = torch.randn(5, 9)
    save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"\(5, 9\): expected \(identities, 16\)"):
        load(tmp_path)
    (tmp_path / "centres.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


def test_a_network_of_the_users_own_is_saved_but_not_built(tmp_path: Path) -> None:
    save(FaceModel(Seen(), size=8), tmp_path)
    with pytest.raises(DataError, match=r"tests\.face\.test_face_model\.Seen that was not built by"):
        load(tmp_path)
    with pytest.raises(RecipeError, match="is no face model: wrap it"):
        describe(nn.Linear(2, 2))


def test_a_frozen_student_is_refused() -> None:
    model = build(TOYS["iresnet"])
    check_student(model)
    with pytest.raises(RecipeError, match="no parameter that is trained"):
        check_student(model.requires_grad_(False))


def test_existing_says_of_what_it_was_built(tmp_path: Path) -> None:
    save(build(TOYS["ir"]), tmp_path)
    model = existing(FaceConfig(model=str(tmp_path)))
    assert model.built is not None and model.built.layout == "ir"


def test_a_cache_knows_how_images_are_shown(tmp_path: Path) -> None:
    """No weight tells the order of channels: the commonest mistake of all must not read another's embeddings."""

    def cached(**options: Any) -> Cached:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(4 * 7 * 7, 8))
        found = Cached(FaceModel(network, size=16, **options), tmp_path / "cache")
        found.attach(["out.embeddings"])
        return found

    batch = {"images": torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), "id": torch.tensor([0, 2])}
    first = cached()
    first.build([batch], total=2, announce=lambda _: None)
    first.close()
    assert cached()(batch)["out.embeddings"].shape == (2, 8)
    for options in ({"channels": "bgr"}, {"mean": 0.4}, {"std": [0.5, 0.5, 0.4]}):
        with pytest.raises(CacheError, match="it was built with another weights"):
            cached(**options)
