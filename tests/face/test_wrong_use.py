"""What users get wrong, through `taskkd check`: each is a sentence, with the file where there is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from taskkd import plans, recipes, runs
from taskkd.errors import TaskkdError
from taskkd.face import models
from tests.face import people

RECIPE = f"""schema: 1
task: face
data:
  folder: {{train: crops, validation: others, test: others}}
  folds: 5
teacher: {json.dumps({**people.LARGE, "finetune": {"epochs": 1}})}
student: {json.dumps(people.NET)}
method: {{name: embedding_mimic}}
training: {{batch_size: 8}}
baseline: null
"""


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faces")
    people.folder(root / "crops", 5, 4)
    people.folder(root / "others", 4, 4, first=10)
    (root / "my.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def check(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What `taskkd check my.yaml KEY=VALUE` does, in a folder with faces."""
    shutil.copytree(faces, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: plans.check(recipes.load_recipe("my.yaml", overrides))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.foldr=x", r"my\.yaml: unknown key 'data\.foldr' \(did you mean 'folder'"),
        ("data.folder.trian=x", r"unknown key 'data\.folder\.trian' \(did you mean 'train'"),
        ("method.wieght=2", r"unknown key 'method\.wieght' \(did you mean 'weight'"),
        ("method.name=adadistill", r"no method 'adadistill' \(did you mean 'ada_distill'"),
        ("method.kind=cosin", r"method\.kind.*'cosine'.*got 'cosin'"),
        ("head={kind: cosface, variant: cvlface}", r"`variant` of .cosface. must be one of .exact."),
        ("head.kind=arcfase", r"head\.kind: .*'arcface'.*got 'arcfase'"),
        ("head.sample_rate=0", r"head\.sample_rate: .*greater than 0.*got 0"),
        ("student.architecture=iresnet51", r"no architecture 'iresnet51' \(did you mean 'iresnet50'"),
        ("teacher={weights: lost.pth}", r"'lost\.pth'.*no such file"),
        ("teacher={model: lost}", r"face model 'lost': no such folder"),
        ("data.folder.train=nowhere", r"nowhere: no such folder"),
        ("data.unlabelled=nowhere", r"nowhere: no such folder"),
        ("data.folder=null", r"exactly one of folder, recordio, hub and sample"),
        ("data.sample={name: orl}", r"exactly one of folder, recordio, hub and sample"),
        ("data.metric=acuracy", r"metric: expected one of accuracy, auc, tar@1e-01.*got 'acuracy'"),
        ("data.metric=tar@1e-05", r"metric: expected one of accuracy, auc, tar@1e-01.*got 'tar@1e-05'"),
        ("data.pairs=13", r"pairs: expected a multiple of 10.*got 13"),
        ("data.pairs=4000", r"4000 pairs in 5 balanced folds are wanted, there can be"),
        ("data.augment=[{name: RandomGrayscale}]", r"teacher\.cache: embeddings cannot follow data\.augment"),
        ("data.batches={kind: balancd}", r"data\.batches.*balanc"),
        (
            "data.batches={kind: balanced, general: 8, identities: 9}",
            r"9 identities with 4 images or more, but there are 5",
        ),
        ("data.batches={kind: easy_hard, identity: 2, pairs: 1}", r"nothing tells which images are hard"),
        ("data.batches={kind: easy_hard, hard: lost.txt}", r"data\.batches\.hard: lost\.txt cannot be read"),
        ("data.batches={kind: easy_hard, below: 8}", r"0 of 20 images are hard: expected some of either kind"),
        ("data.validation={pairs: pairs.txt}", r"expected `bin`, or `pairs` and the `folder`"),
        ("data.validation={bin: lost.bin}", r"lost\.bin: no such file"),
        ("data.tests={lfw: {bin: my.yaml}}", r"my\.yaml"),
    ],
)
def test_recipes(check: Any, override: str, sentence: str) -> None:
    with pytest.raises(TaskkdError, match=sentence):
        check(override)


def test_folders_that_are_none(check: Any) -> None:
    Path("empty").mkdir()
    with pytest.raises(TaskkdError, match=r"empty: there are no images \(\.jpg.* in folders, of which one for each"):
        check("data.folder.train=empty")
    with pytest.raises(TaskkdError, match=r"empty: there are no images"):
        check("data.unlabelled=empty")
    shutil.copy("crops/p000/p000_0001.png", "crops/stray.png")
    with pytest.raises(TaskkdError, match=r"crops/stray\.png: the image is in no identity's folder"):
        check()
    assert "train 20 images" in dict(check("data.bad=skip").summary)["data"]


def test_too_few_people(check: Any) -> None:
    for name in ("p001", "p002", "p003", "p004"):
        shutil.rmtree(f"crops/{name}")
    with pytest.raises(TaskkdError, match=r"the training data has 1 identity: expected two or more, to tell"):
        check()
    with pytest.raises(TaskkdError, match=r"nothing is left of 1 identities to train on"):
        check("data.folder={train: crops}")
    # Without labels one person will do.
    check("method.task_weight=0", f"teacher={json.dumps(people.LARGE)}")


def test_people_who_are_trained_and_tested_on_are_noticed(check: Any, caplog: pytest.LogCaptureFixture) -> None:
    check("data.folder.test=crops")
    assert any("p000" in r.message and r.levelname == "WARNING" for r in caplog.records)


def test_damaged_images(check: Any) -> None:
    Path("crops/p001/p001_0002.png").write_bytes(b"no image")
    with pytest.raises(TaskkdError, match=r"crops/p001/p001_0002\.png .*the image cannot be read: it is no image"):
        check()
    assert "train 19 images" in dict(check("data.bad=skip").summary)["data"]


def test_images_of_several_sizes_are_made_square(check: Any) -> None:
    """As large as the student takes them; so a batch never has several."""
    for path in Path("crops/p002").iterdir():
        Image.open(path).resize((21, 30)).save(path)
    check()


def test_a_teacher_at_chance(check: Any, tmp_path: Path) -> None:
    for path in Path("others").rglob("*.png"):
        Image.new("RGB", (16, 16), (90, 90, 90)).save(path)
    teacher = f"teacher={json.dumps(people.LARGE)}"
    assert any("no better than chance (0.500)" in warning for warning in check(teacher).warnings)
    with pytest.raises(TaskkdError, match=r"the teacher's accuracy on validation is 0\.500, no better than chance"):
        runs.run_recipe(recipes.load_recipe("my.yaml", [teacher]), tmp_path / "run", say=lambda _: None)


def test_models_that_do_not_fit(check: Any) -> None:
    models.save(models.build(people.LARGE), "saved")
    with pytest.raises(TaskkdError, match=r"`model` has its own settings; leave out width"):
        check("student={model: saved, width: 4}")
    with pytest.raises(TaskkdError, match=r"expected `architecture` .* `weights` .* or `model`"):
        check("student={}")
    with pytest.raises(TaskkdError, match=r"weights 'saved/model\.safetensors'|embedding_size|saved"):
        check("student={weights: saved/model.safetensors, width: 4}")
    with pytest.raises(TaskkdError, match=r"lost: no such|no folder"):
        recipes.load_recipe("face", ["teacher=saved", "student=mobilefacenet", "data=lost"])


def test_losses_of_methods_that_cannot_be(check: Any) -> None:
    with pytest.raises(TaskkdError, match=r"`branch`"):
        check("method={name: ddl}", "data.batches={kind: balanced, general: 4, identities: 2, images: 2}")
    with pytest.raises(TaskkdError, match=r"`variant` of 'curricularface' must be one of 'exact', got 'adaface_repo'"):
        check("head={kind: curricularface, variant: adaface_repo}")


def test_predicting_on_what_is_no_image(check: Any) -> None:
    from taskkd.face.task import TASK

    student = models.build(people.NET).eval()
    with pytest.raises(TaskkdError, match=r"my\.yaml .*the image cannot be read: it is no image"):
        list(TASK.predict(recipes.load_recipe("my.yaml"), student, None, ["my.yaml", "my.yaml"]))
