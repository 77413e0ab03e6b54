"""Whole runs of face recipes, on a folder of drawn people: what users start, and what they get."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import taskkd as kd
from taskkd import plans, recipes, reports, runs
from taskkd.__main__ import main
from taskkd.errors import DataError, RecipeError
from taskkd.face import FaceModel, models
from taskkd.face.readers import read_folder
from taskkd.face.records import image_of
from taskkd.face.task import TASK, class_means
from tests.face import people
from tests.face.files import folder_of, labelled, rec_of

#: every forward pass: whose network (a teacher is wider), and whether it was in training mode
Passes = list[tuple[FaceModel, bool]]


def is_teacher(model: FaceModel) -> bool:
    return model.backbone.conv1.out_channels == people.LARGE["width"]


def recorded(monkeypatch: pytest.MonkeyPatch) -> Passes:
    passes: Passes = []
    forward = FaceModel.forward

    def record(self: FaceModel, images: torch.Tensor) -> Any:
        passes.append((self, self.training))
        return forward(self, images)

    monkeypatch.setattr(FaceModel, "forward", record)
    return passes


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """What is there before is not searched for garbage at the end of every training, which takes half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten people to train on, six to validate and six to test on, unknown ones, and lists of pairs."""
    root = tmp_path_factory.mktemp("faces")
    people.folder(root / "train", 10, 8)
    people.folder(root / "validation", 6, 5, first=20)
    people.folder(root / "test", 6, 5, first=30)
    people.folder(root / "unknown", 4, 3, first=40, flat=True)
    people.bin_file(root / "sets" / "lfw.bin", first=50)
    people.lfw_list(root / "pairs.txt", root / "test")
    return root


@pytest.fixture(scope="module")
def recipe(data: Path) -> Path:
    path = data / "my.yaml"
    path.write_text(f"""schema: 1
task: face
data:
  folder: {{train: {data}/train, validation: {data}/validation, test: {data}/test}}
  folds: 5
  far: [0.1]
  hold: true
teacher: {json.dumps({**people.LARGE, "finetune": {"epochs": 6, "batch_size": 16}})}
student: {json.dumps(people.NET)}
head: {{s: 16, m: 0.2}}
method: {{name: embedding_mimic}}
training: {{epochs: 1, batch_size: 16}}
baseline: {{learning_rates: [0.1]}}
""")
    return path


def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and timings are left out: one run has them."""
    monkeypatch.setattr("taskkd.face.task.FaceTask.draw", lambda *_: None)
    monkeypatch.setattr("taskkd.face.task.FaceTask.latency_batches", lambda *_: [])
    monkeypatch.setattr("taskkd.reports.curves", lambda *_: None)


@pytest.fixture(scope="module")
def whole(recipe: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[runs.Result, Passes]]:
    """The run that most tests look at: everything that is reported beside the test is asked for."""
    overrides = [
        f"data.tests={{test: {{pairs: {data}/pairs.txt, folder: {data}/test}}, lfw: {{bin: {data}/sets/lfw.bin}}}}",
        "data.folder.test=null",
        "data.low_resolution=8",
        "data.asymmetric=true",
        f"data.unlabelled={data}/unknown",
    ]
    with pytest.MonkeyPatch.context() as patched:
        passes = recorded(patched)
        loaded = recipes.load_recipe(recipe, overrides)
        yield runs.run_recipe(loaded, tmp_path_factory.mktemp("whole") / "run", say=lambda _: None), passes


@pytest.fixture
def distilled(
    recipe: Path, whole: tuple[runs.Result, Passes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., runs.Result]:
    """A run of four steps under the teacher of the whole one."""
    undrawn(monkeypatch)
    teacher = f"teacher={{model: {whole[0].output_dir}/teacher/model}}"

    def run(*overrides: str, folder: str = "run", say: Any = lambda _: None) -> runs.Result:
        given = [teacher, "baseline=null", "training.max_steps=4", *overrides]
        return runs.run_recipe(recipes.load_recipe(recipe, given), tmp_path / folder, say=say)

    return run


def outcome(result: runs.Result) -> dict[str, Any]:
    found: dict[str, Any] = result.report["distilled"]["distilled"]["0"]
    return found


def losses(result: runs.Result, name: str) -> list[float]:
    return [log[name] for log in outcome(result)["history"] if name in log]


def test_a_recipe_from_start_to_report(whole: tuple[runs.Result, Passes]) -> None:
    folder = whole[0].output_dir
    report = json.loads((folder / "report.json").read_text())
    assert [row["model"] for row in report["table"]] == ["teacher", "student alone", "distilled"]
    assert report["data"].startswith("train 80 images of 10 identities (8 to 8 each, median 8); 12 unlabelled;")
    assert "test 20 pairs (10 of one person) of 12 images" in report["data"]
    assert report["test_samples"] == 20
    assert report["further_tests"] == ["lfw", "low_resolution", "asymmetric", "lfw_asymmetric"]
    test = report["distilled"]["distilled"]["0"]["test"]
    for prefix in ("", "lfw_", "low_resolution_", "asymmetric_", "lfw_asymmetric_"):
        assert {f"{prefix}{name}" for name in ("accuracy", "auc", "tar@1e-01", "threshold")} <= test.keys()
    assert len({test[f"{prefix}threshold"] for prefix in ("", "low_resolution_", "asymmetric_", "lfw_")}) == 4
    # The teacher among its own embeddings is the teacher.
    own = report["teacher"]["test"]
    assert own["asymmetric_auc"] == own["auc"] > 0.6
    assert report["teacher"]["validation"]["accuracy"] > 0.6
    with Image.open(folder / "examples.png") as picture:
        assert picture.size[0] > 900
    assert reports.table(report).row_count == 3


def test_the_student_is_saved_without_what_it_was_trained_with(whole: tuple[runs.Result, Passes]) -> None:
    result = whole[0]
    student = models.load(result.output_dir / "student").eval()
    assert student.embedding_size == 8 and student.centres is None
    image = torch.rand(3, 3, 16, 16)
    assert torch.equal(student.embed(image), result.student.embed(image))
    assert not any("head" in key or "terms" in key or "teacher" in key for key in student.state_dict())
    state = load_file(result.output_dir / "seed-0" / "distilled" / "stages" / "0-distil" / "adapters.safetensors")
    assert state["task_loss.weight"].shape == (10, 8)


def test_a_teacher_never_learns_and_with_a_cache_it_does_not_run_in_training(
    whole: tuple[runs.Result, Passes],
) -> None:
    """Acceptance A9: nothing that distils moves it, and a complete cache takes its place."""
    result, passes = whole
    own = [(n, training) for n, (model, training) in enumerate(passes) if is_teacher(model)]
    students = [n for n, (model, training) in enumerate(passes) if not is_teacher(model) and training]
    finetuned = max(n for n, training in own if training)
    assert finetuned < students[2]  # before it the student was only looked at, in `look`
    # The last passes of the student in training are those of distillation: 5 full batches of 92 images.
    steps = outcome(result)["steps"]
    assert steps == 92 // 16
    first, last = students[-steps], students[-1]
    assert not [n for n, _ in own if first <= n <= last]
    assert [n for n, _ in own if finetuned < n < first]  # the cache was built
    # What was distilled and tested with is to the bit what was saved before.
    (teacher,) = {id(model): model for model, _ in (passes[n] for n, _ in own if n > first)}.values()
    saved = load_file(result.output_dir / "teacher" / "model" / "model.safetensors")
    state = teacher.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in saved.items())


def test_started_again_nothing_is_trained_again(
    whole: tuple[runs.Result, Passes], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = whole[0]
    undrawn(monkeypatch)
    monkeypatch.setattr(kd.Trainer, "train", None)
    again = runs.run_recipe(
        recipes.load_recipe(result.output_dir / "recipe.yaml"), result.output_dir, say=lambda _: None
    )
    assert again.report["distilled"] == result.report["distilled"]


def test_a_student_is_evaluated_on_its_own_and_on_other_data(whole: tuple[runs.Result, Passes], data: Path) -> None:
    folder, test = whole[0].output_dir, outcome(whole[0])["test"]
    assert runs.evaluate(folder)["auc"] == pytest.approx(test["auc"])
    assert runs.evaluate(folder, str(data / "sets" / "lfw.bin"))["auc"] == pytest.approx(test["lfw_auc"])
    assert 0 <= runs.evaluate(folder, str(data / "validation"))["tar@1e-01"] <= 1
    shutil.copy(data / "pairs.txt", data / "test" / "pairs.txt")  # a list beside its images
    try:
        assert runs.evaluate(folder, str(data / "test" / "pairs.txt"))["auc"] == pytest.approx(test["auc"])
    finally:
        (data / "test" / "pairs.txt").unlink()
    with pytest.raises(DataError, match=r"nowhere\.bin: no such file"):
        runs.evaluate(folder, "nowhere.bin")
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        runs.evaluate(folder, "nowhere")
    with pytest.raises(DataError, match=r"x\.json: pairs are read from \.bin"):
        runs.evaluate(folder, "x.json")


def test_faces_are_compared(whole: tuple[runs.Result, Passes], data: Path) -> None:
    one, other = (str(data / "test" / "p030" / f"p030_000{n}.png") for n in (1, 2))
    found = list(runs.predict(whole[0].output_dir, [one, one, other]))
    assert [name for name, _, _ in found] == ["similarity"] * 2
    assert found[0][1] == pytest.approx(1, abs=1e-5)
    assert found[1] == ("similarity", pytest.approx(found[1][1]), f"{one} | {other}") and found[1][1] < 1
    for inputs, sentence in (
        ([one], "1 image to compare: expected two or more"),
        ([one, "lost.png"], r"lost\.png: no such file"),
        ([one, str(data)], r"is a folder; name its images"),
    ):
        with pytest.raises(DataError, match=sentence):
            list(runs.predict(whole[0].output_dir, inputs))


def test_changed_data_or_another_teacher_are_noticed(
    distilled: Callable[..., runs.Result], whole: tuple[runs.Result, Passes], data: Path, tmp_path: Path
) -> None:
    """Acceptance A9: what is cached of one teacher and set is not used for others."""
    shutil.copytree(data / "train", tmp_path / "train")
    shutil.copytree(whole[0].output_dir / "teacher" / "model", tmp_path / "teacher")
    own = (f"data.folder.train={tmp_path}/train", f"teacher={{model: {tmp_path}/teacher}}")
    first = distilled(*own)
    assert distilled(*own).report["distilled"] == first.report["distilled"]
    other = models.build(people.LARGE, seed=5)
    models.save(other, tmp_path / "teacher")
    with pytest.raises(RecipeError, match="was started with another teacher: what the recipe names has changed"):
        distilled(*own)
    (tmp_path / "train" / "p003" / "p003_0001.png").unlink()
    with pytest.raises(RecipeError, match="was started with another data"):
        distilled(*own)


METHODS: dict[str, list[str]] = {
    "ada_distill": [],
    "proxyless": [],
    "margin_distillation": [],
    "ekd": [],
    "relational": ["method.kind=rkd"],
    "ec_kd": [],
    "grouped": [],
    "triplet_distillation": ["data.batches={kind: balanced, general: 0, identities: 4, images: 4}"],
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_train(name: str, distilled: Callable[..., runs.Result]) -> None:
    said: list[str] = []
    own = ["data.batches={kind: balanced, general: 8, identities: 4, images: 3}"] if name == "ekd" else METHODS[name]
    result = distilled(f"method={{name: {name}}}", *own, say=said.append)
    assert outcome(result)["steps"] == 4
    assert all(torch.isfinite(torch.tensor(losses(result, "loss"))))
    centres = name in ("proxyless", "margin_distillation", "grouped")
    assert any("class centres: means of the teacher's embeddings of 80 images" in line for line in said) == centres
    start = models.build(people.NET)
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), result.student.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_the_classifier_that_a_teacher_was_trained_with_is_its_centres(
    distilled: Callable[..., runs.Result], tmp_path: Path
) -> None:
    said: list[str] = []
    finetuned = json.dumps({**people.LARGE, "finetune": {"epochs": 2, "batch_size": 16}})
    distilled(f"teacher={finetuned}", "method={name: proxyless}", say=said.append)
    assert "class centres: of the classifier that the teacher was trained with" in said
    head = load_file(tmp_path / "run" / "teacher" / "adapters.safetensors")["task_loss.weight"]
    stage = tmp_path / "run" / "seed-0" / "distilled" / "stages" / "0-distil"
    (centres,) = [v for v in load_file(stage / "adapters.safetensors").values() if v.shape == (10, 8)]
    torch.testing.assert_close(centres, torch.nn.functional.normalize(head))


def test_centres_in_a_teachers_file_are_used(
    distilled: Callable[..., runs.Result], whole: tuple[runs.Result, Passes], tmp_path: Path
) -> None:
    """And those of other people are left out."""
    teacher = models.load(whole[0].output_dir / "teacher" / "model")
    for count, means in ((10, False), (12, True)):
        teacher.centres = torch.randn(count, 8)
        models.save(teacher, tmp_path / f"teacher-{count}")
        said: list[str] = []
        distilled(
            f"teacher={{model: {tmp_path}/teacher-{count}}}",
            "method={name: proxyless}",
            folder=f"run-{count}",
            say=said.append,
        )
        assert any("class centres: means" in line for line in said) == means


def test_ekd_makes_balanced_batches_by_itself(recipe: Path, distilled: Callable[..., runs.Result], data: Path) -> None:
    loaded = recipes.load_recipe(recipe, ["method={name: ekd}"])
    own = loaded.data.batches
    assert (own.kind, own.general, own.identities, own.images) == ("balanced", 32, 8, 4)
    result = distilled("method={name: ekd}")  # 80 images: two batches of 64 in an epoch
    assert outcome(result)["steps"] == 2
    other = distilled("method={name: ekd}", f"data.unlabelled={data}/unknown", folder="unlabelled")
    assert outcome(other)["steps"] == 92 // 32


def test_ddl_takes_easy_and_hard_images(distilled: Callable[..., runs.Result], data: Path, tmp_path: Path) -> None:
    names = sorted(f"{p.parent.name}/{p.name}" for p in (data / "train").rglob("*_000[5-8].png"))
    (tmp_path / "hard.txt").write_text("\n".join(names) + "\n")
    batches = f"data.batches={{kind: easy_hard, identity: 4, pairs: 2, hard: {tmp_path}/hard.txt}}"
    result = distilled("method={name: ddl}", batches)
    assert outcome(result)["steps"] == 4
    assert len(losses(result, "loss_distributions")) >= 1
    with pytest.raises(RecipeError, match="nothing tells which images are hard; give `hard`"):
        distilled("method={name: ddl}", folder="other")


@pytest.mark.parametrize("unlabelled", [False, True])
def test_partial_fc_trains_a_share_of_the_identities(
    distilled: Callable[..., runs.Result], data: Path, unlabelled: bool
) -> None:
    more = [f"data.unlabelled={data}/unknown"] if unlabelled else []
    result = distilled("head.sample_rate=0.5", *more)
    assert outcome(result)["steps"] == 4
    stage = result.output_dir / "seed-0" / "distilled" / "stages" / "0-distil"
    assert any(v.shape == (10, 8) for v in load_file(stage / "adapters.safetensors").values())


def test_a_teacher_trained_with_partial_fc_gives_class_means(distilled: Callable[..., runs.Result]) -> None:
    said: list[str] = []
    finetuned = json.dumps({**people.LARGE, "finetune": {"epochs": 2, "batch_size": 16}})
    distilled(f"teacher={finetuned}", "head.sample_rate=0.5", "method={name: proxyless}", say=said.append)
    assert any("class centres" in line for line in said)


def test_cached_and_live_teachers_teach_the_same(distilled: Callable[..., runs.Result]) -> None:
    """Acceptance A9, through a whole run: half precision on disk."""
    live = distilled("teacher.cache=null", folder="live")
    half = distilled("teacher.cache={dtype: float16}", folder="half")
    for one, other in zip(losses(live, "loss_embedding"), losses(half, "loss_embedding"), strict=True):
        assert one == pytest.approx(other, abs=2e-3)


def test_augmented_images_have_a_live_teacher(distilled: Callable[..., runs.Result]) -> None:
    result = distilled("teacher.cache=null", "data.augment=[{name: RandomGrayscale, p: 0.3}]")
    assert outcome(result)["steps"] == 4


def test_a_projector_brings_a_small_student_into_the_teachers_space(
    distilled: Callable[..., runs.Result], whole: tuple[runs.Result, Passes]
) -> None:
    small = "student.embedding_size=4"
    with pytest.raises(RecipeError, match=r"have 4 numbers, the teacher's 8: give the student `projector: 8`"):
        distilled(small, "data.asymmetric=true")
    result = distilled(small, "student.projector=8", "data.asymmetric=true", folder="projected")
    assert result.student.embedding_size == 8
    assert 0 <= outcome(result)["test"]["asymmetric_auc"] <= 1


def test_check_says_what_would_be_done(recipe: Path) -> None:
    plan = plans.check(recipes.load_recipe(recipe))
    said = dict(plan.summary)
    assert said["teacher's images and embeddings"] == "16x16 rgb; 8 numbers"
    assert said["data"].startswith("train 80 images of 10 identities")
    assert said["distillation"] == "1 epochs at 0.1; 5 steps an epoch, batch 16"
    (task, term) = plan.stages["distil"].terms
    assert task.name == "task" and term.gradient_norm > 0
    plan = plans.check(recipes.load_recipe(recipe, ["method={name: proxyless}"]))
    assert plan.stages["distil"].terms
    assert any("no class centres yet" in note for note in plan.warnings)
    # The last, half empty batch of an epoch is dropped.
    plan = plans.check(recipes.load_recipe(recipe, ["training.batch_size=32"]))
    assert dict(plan.summary)["distillation"] == "1 epochs at 0.1; 2 steps an epoch, batch 32"


@pytest.fixture
def taskkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["taskkd", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    return call


def test_one_command_with_names_and_a_folder(
    taskkd: Any, whole: tuple[runs.Result, Passes], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole[0].output_dir
    undrawn(monkeypatch)
    code, out, err = taskkd(
        "distill", "face", f"teacher={run}/teacher/model", f"student={run}/student", f"data={data}", "baseline=null",
        "training.max_steps=2", "training.batch_size=16", "data.folds=5", "--output-dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert code == 0, err
    assert "distilled" in out
    code, out, err = taskkd("evaluate", str(tmp_path / "run"), "--data", str(data / "sets" / "lfw.bin"))
    assert code == 0 or "folds" in err, err
    one = str(data / "test" / "p030" / "p030_0001.png")
    code, out, err = taskkd("predict", str(tmp_path / "run"), one, one)
    assert (code, out) == (0, f"similarity\t1.0000\t{one} | {one}\n"), err
    code, out, err = taskkd("check", "face", "teacher=iresnet50", "student=mobilefacnet", f"data={data}")
    assert code != 0 and "did you mean 'mobilefacenet'" in err


def test_held_out_labels_of_a_rec_file_leave_the_others_their_rows(tmp_path: Path) -> None:
    """A classifier of all labels serves a part of them: people held out are no reason to leave it."""
    pictures = people.images(12, 4)
    images = [labelled([float(who), 0.0], people.encoded(p)) for who, own in enumerate(pictures) for p in own]
    ranges = [labelled([4.0 * who + 1, 4.0 * who + 5]) for who in range(12)]
    rec_of(tmp_path / "rec", [labelled([len(images) + 1.0, len(images) + 13.0]), *images, *ranges])
    teacher = models.build(people.LARGE)
    config: dict[str, Any] = {
        "task": "face", "schema": 1, "data": {"recordio": {"train": str(tmp_path / "rec")}, "folds": 2},
        "teacher": {"model": str(tmp_path / "t")}, "student": people.NET,
    }  # fmt: skip
    for count, kept in ((12, True), (40, False)):  # of these labels; of another data set's
        teacher.centres = torch.randn(count, 8)
        models.save(teacher, tmp_path / "t")
        recipe: Any = recipes.validate(config, "test")
        data = TASK.load(recipe)
        assert len(data.identities) < 12
        found = TASK.teacher(recipe, data).centres
        assert (found is not None) == kept
        if kept:
            torch.testing.assert_close(found, teacher.centres[[int(name) for name in data.identities]])


def test_class_means_are_worked_out_once(tmp_path: Path, distilled: Callable[..., runs.Result]) -> None:
    distilled("method={name: proxyless}")
    kept = tmp_path / "run" / "teacher" / "centres.safetensors"
    assert load_file(kept)["centres"].shape == (10, 8)
    faces = read_folder(folder_of(tmp_path / "few", {"a": 2, "b": 1, "c": 3}), size=16)
    teacher = models.build(people.LARGE)
    batch = torch.stack([image_of(faces, n) for n in range(6)])
    teacher.eval()
    both = (teacher(batch)["embeddings"] + teacher(batch.flip(-1))["embeddings"]).detach()
    wanted = torch.stack([both[:2].sum(0), both[2:3].sum(0), both[3:].sum(0)])
    found = class_means(teacher.train(), faces)
    torch.testing.assert_close(found, torch.nn.functional.normalize(wanted), atol=1e-5, rtol=1e-4)
    assert teacher.training
