"""`kd.distill` with face models and faces that the caller holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import taskkd as kd
from taskkd import runs
from taskkd.errors import DataError, RecipeError, TaskkdError
from taskkd.face import FaceModel, build, models, read_folder
from taskkd.face.given import GivenFace
from taskkd.face.pairs import make_pairs, read_bin
from taskkd.face.task import FaceTask
from tests.face import people
from tests.face.files import labelled, rec_of

TRAINING = {"max_steps": 2, "batch_size": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faces")
    people.folder(root / "train", 10, 6)
    people.folder(root / "test", 6, 5, first=30)
    people.folder(root / "unknown", 4, 3, first=40, flat=True)
    people.bin_file(root / "lfw.bin", first=50)
    return root


@pytest.fixture
def distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., runs.Result]:
    """Two steps, with a teacher that knows nothing; nothing is drawn or timed."""
    monkeypatch.setattr(FaceTask, "chance", lambda *_: -1.0)
    for name, value in (("draw", None), ("latency_batches", [])):
        monkeypatch.setattr(FaceTask, name, lambda *_, value=value: value)
    monkeypatch.setattr("taskkd.reports.curves", lambda *_: None)

    def run(*given: Any, folder: str = "run", **options: Any) -> runs.Result:
        return kd.distill(
            *given, **{"task": "face", "training": TRAINING, "output_dir": tmp_path / folder, "far": [0.1], **options}
        )

    return run


def pair() -> tuple[FaceModel, FaceModel]:
    return build(people.NET, seed=1), build(people.LARGE, seed=2)


class Raw(nn.Module):
    """Somebody's network: images as floats in -1..1, a bare tensor comes out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.out = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.conv(x).relu().mean((2, 3)))
        return out


def outcome(result: runs.Result) -> dict[str, Any]:
    found: dict[str, Any] = result.report["distilled"]["distilled"]["0"]
    return found


def test_models_and_a_folder(data: Path, distill: Callable[..., runs.Result]) -> None:
    student, teacher = pair()
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in (("s", student), ("t", teacher))}
    result = distill(student, teacher, data / "train", unlabelled=data / "unknown", baseline=True)
    for name, model in (("s", student), ("t", teacher)):
        assert all(torch.equal(v, before[name][k]) for k, v in model.state_dict().items()), name
    # A tenth, but two at least, and a fifth of the people are held out.
    assert result.report["data"].startswith("train 36 images of 6 identities (6 to 6 each, median 6); 12 unlabelled; ")
    assert result.report["alone"]["0"]["steps"] == 2
    assert result.report["recipe"] == "run"
    assert "embedding_mimic" in (result.output_dir / "recipe.yaml").read_text()  # the task's own method
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(models.load(result.output_dir / "student").embed(image), result.student.embed(image))
    again = distill(student, teacher, data / "train", unlabelled=data / "unknown", baseline=True)
    assert again.report["distilled"] == result.report["distilled"]
    with pytest.raises(RecipeError, match="given its data in memory; evaluate it on a file with --data"):
        runs.evaluate(result.output_dir)
    assert 0 <= runs.evaluate(result.output_dir, str(data / "lfw.bin"))["accuracy"] <= 1


def test_another_teacher_in_the_same_folder_is_noticed(data: Path, distill: Callable[..., runs.Result]) -> None:
    student, teacher = pair()
    distill(student, teacher, data / "train")
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        distill(student, build(people.LARGE, seed=3), data / "train")


def test_any_network_is_wrapped(data: Path, distill: Callable[..., runs.Result]) -> None:
    result = distill(Raw(4), Raw(8), data / "train", data / "test", size=16, method="ada_distill")
    assert isinstance(result.student, FaceModel)
    assert result.student.embedding_size == 8
    assert outcome(result)["steps"] == 2


@pytest.mark.parametrize("kind", ["faces", "pairs", "bin", "hub", "recordio", "list"])
def test_data_of_every_kind(kind: str, data: Path, tmp_path: Path, distill: Callable[..., runs.Result]) -> None:
    train: Any = data / "train"
    tested: Any = data / "test"
    count = 60
    if kind == "faces":
        train, tested = read_folder(train, size=16), read_folder(tested, size=16)
    elif kind == "pairs":
        tested = make_pairs(read_folder(tested, size=16), 40)
    elif kind == "bin":
        tested = str(data / "lfw.bin")
    elif kind == "hub":
        rows = [(Image.fromarray(p), who) for who, own in enumerate(people.images(4, 6)) for p in own]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"n{k}" for k in range(4)])}
        )
        columns = {"image": [p for p, _ in rows], "label": [who for _, who in rows]}
        train, count = datasets.Dataset.from_dict(columns, features=features), 24
    elif kind == "recordio":
        pictures = people.images(4, 6)
        images = [labelled([float(who), 0.0], people.encoded(p)) for who, own in enumerate(pictures) for p in own]
        ranges = [labelled([6.0 * who + 1, 6.0 * who + 7]) for who in range(4)]
        head = labelled([len(images) + 1.0, len(images) + 5.0])
        train, count = rec_of(tmp_path / "insight", [head, *images, *ranges]).parent, 24
    elif kind == "list":
        people.folder(tmp_path / "listed", 6, 5, first=30)
        tested = people.lfw_list(tmp_path / "pairs.txt", tmp_path / "listed")
        tested = tested.rename(tmp_path / "listed" / "pairs.txt")
    result = distill(*pair(), train, tested)
    assert result.report["data"].startswith(f"train {count} images of ")
    assert 0 <= outcome(result)["test"]["tar@1e-01"] <= 1
    if kind in ("bin", "list"):
        assert result.report["test_samples"] == 20


def test_validation_and_test_apart(data: Path, distill: Callable[..., runs.Result]) -> None:
    held = read_bin(data / "lfw.bin")
    result = distill(*pair(), data / "train", held, test=data / "test", asymmetric=True, metric="auc")
    assert result.report["metric"] == "auc"
    assert result.report["further_tests"] == ["asymmetric"]
    assert result.report["test_samples"] > 20


@pytest.mark.parametrize(
    ("method", "batches"),
    [
        ("ekd", {"kind": "balanced", "general": 8, "identities": 4, "images": 2}),
        ("ekd", None),
        ("proxyless", None),
        ("triplet_distillation", {"kind": "balanced", "general": 0, "identities": 4, "images": 2}),
    ],
)
def test_methods_with_batches_of_their_own(
    method: str, batches: dict[str, Any] | None, data: Path, distill: Callable[..., runs.Result]
) -> None:
    options = {} if batches is None else {"batches": batches}
    assert outcome(distill(*pair(), data / "train", data / "test", method=method, **options))["steps"] == 2


def test_ddl_fine_tunes_on_hard_images(data: Path, tmp_path: Path, distill: Callable[..., runs.Result]) -> None:
    (tmp_path / "hard.txt").write_text("\n".join(p.name for p in (data / "train").rglob("*_000[456].png")))
    batches = {"kind": "easy_hard", "identity": 4, "pairs": 2, "hard": str(tmp_path / "hard.txt")}
    student, _ = pair()
    result = distill(student, student, data / "train", data / "test", method="ddl", batches=batches)
    assert outcome(result)["steps"] == 2
    # It is the same network twice, and yet it learns.
    assert not torch.equal(result.student.backbone.conv1.weight, student.backbone.conv1.weight)
    assert student.backbone.conv1.weight.requires_grad
    with pytest.raises(RecipeError, match="nothing tells which images are hard"):
        distill(student, student, data / "train", data / "test", method="ddl", folder="other")


def test_saved_models_and_files_of_weights(data: Path, tmp_path: Path, distill: Callable[..., runs.Result]) -> None:
    models.save(pair()[0], tmp_path / "student")
    state = build({**people.LARGE, "layers": [1] * 4}, seed=2).backbone.state_dict()
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "r18.pth")
    result = distill(str(tmp_path / "student"), tmp_path / "r18.pth", data / "train", data / "test")
    assert outcome(result)["steps"] == 2


def test_a_teacher_with_centres_of_these_people_hands_them_on(
    data: Path, distill: Callable[..., runs.Result], caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = pair()
    teacher.centres = torch.randn(10, 8)
    caplog.set_level("INFO", "taskkd")
    distill(student, teacher, data / "train", data / "test", method="proxyless")
    assert "class centres" not in caplog.text
    teacher.centres = torch.randn(12, 8)
    distill(student, teacher, data / "train", data / "test", method="proxyless", folder="other")
    assert "class centres: means of the teacher's embeddings of 60 images" in caplog.text
    assert len(teacher.centres) == 12  # the caller's
    teacher.centres = None
    distill(student, teacher, data / "train", data / "test", method="proxyless", folder="means")
    assert teacher.centres is None  # those of a run are of its people: the caller's next data may be of as many others


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"train": [1, 2]}, DataError, "faces are a folder of aligned crops .* got a list"),
        ({"eval": {"a": 1}}, DataError, "got a dict"),
        ({"train": "nowhere"}, DataError, "nowhere: no such folder"),
        ({"eval": "nowhere.bin"}, DataError, r"nowhere\.bin"),
        ({"metric": "acc"}, RecipeError, "metric: expected one of accuracy, auc, .*got 'acc'"),
        ({"pairs": 2000}, DataError, "data.validation: .* 2000 pairs in 10 balanced folds are wanted"),
        ({"pairs": 7}, RecipeError, "pairs: expected a multiple of 20"),
        ({"batches": {"kind": "balanced", "imges": 2}}, RecipeError, "imges"),
        ({"flip": False, "batches": {"kind": "balanced"}}, RecipeError, "flipped by even chance"),
        ({"method": "adadistill"}, RecipeError, r"no method 'adadistill' \(did you mean 'ada_distill'"),
        ({"options": {"wieght": 2}}, RecipeError, "wieght.*did you mean 'weight'"),
        ({"unlabelled": 3}, DataError, "unlabelled faces are a folder of images or Faces; got a int"),
        ({"student": "nowhere"}, TaskkdError, "nowhere"),
        ({"augment": []}, TypeError, "augment"),
    ],
)
def test_wrong_use(
    given: dict[str, Any], error: type[Exception], sentence: str, data: Path, distill: Callable[..., runs.Result]
) -> None:
    student, teacher = pair()
    own = {"student": student, "teacher": teacher, "train": data / "train", "eval": data / "test", **given}
    with pytest.raises(error, match=sentence):
        distill(**own)


def test_models_that_cannot_be_taught(data: Path, distill: Callable[..., runs.Result]) -> None:
    student, teacher = pair()
    with pytest.raises(RecipeError, match="no parameter that is trained"):
        GivenFace(student.requires_grad_(False), teacher, data / "train")
    narrow = build({**people.NET, "embedding_size": 4})
    with pytest.raises(RecipeError, match=r"have 4 numbers, the teacher's 8: give the student `projector: 8`"):
        distill(narrow, teacher, data / "train", data / "test", asymmetric=True)
