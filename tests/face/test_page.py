"""The recipe, the commands and the scripts of docs/face.md run, on small networks and drawn faces."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from taskkd import face, recipes
from taskkd.__main__ import main
from taskkd.face import data, margins, schema
from taskkd.face.config import ARCHITECTURES
from taskkd.face.procedural import drawn_faces
from taskkd.face.task import FaceTask
from tests.face.networks import TinyFace

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "face.md").read_text()
RECIPE, SOURCES = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
CALL, LOOP, CROP, PARTIAL, VERIFY, IJB = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [c for block in re.findall(r"```\n(taskkd.*?)```", PAGE, re.S) for c in block.splitlines()]
NAMED = re.findall(r"^taskkd distill face .*$", PAGE, re.M)
STUDENT = {"layers": [1, 1, 1, 1], "width": 8, "embedding_size": 16, "size": 32}
HEADS = (DOCS / "methods" / "face-heads.md").read_text()


def people(root: Path, first: int, count: int, images: int = 5) -> None:
    """Drawn faces in folders, and a list of pairs of them."""
    pixels, labels = drawn_faces(count, images, first=first)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = root / f"p{label}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"p{label}_{number % images + 1:04d}.png"
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / name)
    images_of = [f"p{first + n}/p{first + n}_000" for n in range(count)]
    rows = [(f"{a}1", f"{a}2", 1) for a in images_of] + [(f"{a}1", f"{b}1", 0) for a, b in pairwise(images_of)]
    (root / "pairs.csv").write_text("".join(f"{a}.png,{b}.png,{same}\n" for a, b, same in rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page speaks of; the saved R50 is a small network, and any will do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FaceTask, "chance", lambda *_: -1.0)
    people(tmp_path / "data" / "faces", 0, 30)
    people(tmp_path / "data" / "others", 50, 6)
    shutil.copytree(tmp_path / "data" / "others" / "p50", tmp_path / "more")
    for name, number in (("one", 1), ("other", 2)):
        shutil.copy(tmp_path / "more" / f"p50_000{number}.png", f"{name}.jpg")
    small = {"architecture": "iresnet50", "layers": [1, 1, 1], "width": 4, "embedding_size": 16, "size": 32}
    (tmp_path / "models").mkdir()
    torch.save(face.build(small).backbone.state_dict(), tmp_path / "models" / "r50.pth")
    return tmp_path


def lines(text: str) -> int:
    return len([line for line in text.splitlines() if line.strip()])


def test_the_recipe_is_ten_lines_and_its_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines(RECIPE) <= 10
    (folder / "faces.yaml").write_text(RECIPE)
    small = [*(f"student.{key}={value}" for key, value in STUDENT.items()), "training.max_steps=2"]
    small += ["training.batch_size=16", "training.epochs=1"]
    assert [shlex.split(c)[1] for c in COMMANDS] == ["check", "distill", "evaluate", "predict"]
    said = {}
    for command in COMMANDS:
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [*words, *(small if words[1] in ("check", "distill") else [])])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
        said[words[1]] = capsys.readouterr().out
    assert "teacher: IResNet" in said["check"]
    assert "teacher's images and embeddings: 32x32 rgb" in said["check"]
    named = PAGE.partition("| `evaluate` |")[2].partition("|")[0]
    assert all(f"`{word}`" in named for word in said["evaluate"].split() if re.fullmatch(r"[a-z_]+", word))
    assert {"accuracy", "accuracy_std", "threshold", "auc", "tar@1e-01", "norm"} <= set(said["evaluate"].split())
    assert "one.jpg | other.jpg" in said["predict"]
    written = ("student/face.json", "student/model.safetensors", "report.json", "curves.png", "recipe.yaml")
    assert all((folder / "runs" / "faces" / name).exists() for name in (*written, "examples.png"))
    assert json.loads((folder / "runs/faces/student/face.json").read_text())["config"]["layout"] == "gdc"


def test_the_recipes_from_names_are_right(folder: Path) -> None:
    (command,) = NAMED
    assert command in (DOCS.parent / "README.md").read_text()
    loaded = recipes.load_recipe("face", shlex.split(command)[3:])
    assert (loaded.teacher.weights, loaded.student.architecture) == ("models/r50.pth", "mobilefacenet")
    assert loaded.method.name == FaceTask.default_method == "embedding_mimic"
    own = set(re.findall(r"^taskkd distill (face/\S+)$", PAGE, re.M))
    assert own <= set(recipes.packaged_recipes())
    section = PAGE.partition("## The papers' recipes")[2].partition("\n## ")[0]
    papers = {n for n in recipes.packaged_recipes() if n.startswith("face/")} - own
    assert papers == set(re.findall(r"`(face/[\w-]+)`", section))


def test_the_recipe_of_the_recipes_page_is_right(folder: Path) -> None:
    (block,) = re.findall(r"## Face recognition\n.*?```yaml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.S)
    (folder / "more.yaml").write_text(block)
    loaded = recipes.load_recipe("more.yaml")
    assert loaded.head.sample_rate < 1
    assert data.load(loaded.data, size=24).unlabelled is not None


def test_the_call_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = face.build
    monkeypatch.setattr(face, "build", lambda config: build({**config, **STUDENT}))
    assert lines(CALL) <= 10
    names: dict[str, Any] = {"images": torch.zeros(2, 3, 112, 112, dtype=torch.uint8)}
    short = CALL.replace('"epochs": 20, "batch_size": 128', '"max_steps": 2, "batch_size": 16')
    exec(compile(short, "face.md, the call", "exec"), names)
    assert names["similarity"].shape == (2, 2)
    assert (folder / "runs" / "call" / "student" / "face.json").is_file()


def test_the_loops_and_the_metric_run(folder: Path) -> None:
    nets = {"student_net": TinyFace(seed=1), "teacher_net": TinyFace(6, seed=2)}
    own = {
        name: torch.nn.Sequential(net.layer1, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        for name, net in nets.items()
    }
    names: dict[str, Any] = {"torch": torch, **own}
    before = own["student_net"][0].weight.clone()
    exec(compile(LOOP.replace("128, shuffle", "50, shuffle"), "face.md, the loop", "exec"), names)
    assert not torch.equal(before, own["student_net"][0].weight)
    assert not any(m._forward_hooks for m in names["student"].modules())
    section = PAGE.partition("A batch is a dict")[2].partition("\n\n")[0]
    assert all(f"`{key}`" in section for key in names["batch"])
    names["student"].train()
    exec(compile(PARTIAL, "face.md, Partial FC", "exec"), names)
    assert not names["head"].waiting
    exec(compile(VERIFY, "face.md, verification", "exec"), names)
    found = names["metric"].compute()
    said = VERIFY.partition("compute()  # ")[2].strip().split(", ")
    assert sorted(found) == sorted(said)


def test_the_functions_of_arrays_run() -> None:
    torch.manual_seed(0)
    templates = torch.arange(40) // 2
    names: dict[str, Any] = {
        "image": torch.zeros(3, 40, 50, dtype=torch.uint8),
        "points": [[10, 10], [30, 10], [20, 20], [12, 30], [28, 30]],
        "embeddings": torch.randn(40, 8).numpy(),
        "templates": templates.numpy(),
        "medias": templates.numpy(),
        "left": [0, 1, 2, 3],
        "right": [4, 5, 6, 7],
        "same": [True, False, True, False],
        "probes": torch.nn.functional.normalize(torch.randn(6, 8)).numpy(),
        "gallery": torch.nn.functional.normalize(torch.randn(4, 8)).numpy(),
        "mates": [0, 1, 2, 3, -1, -1],
    }
    exec(compile(CROP, "face.md, alignment", "exec"), names)
    assert names["crop"].shape == (3, 112, 112)
    exec(compile(IJB, "face.md, IJB", "exec"), names)
    assert len(names["scores"]) == 4


def test_the_data_sections_are_right(folder: Path) -> None:
    found = [schema.Data.model_validate(entry) for entry in yaml.safe_load(SOURCES)]
    kinds = ("folder", "recordio", "hub", "sample")
    assert {kind for entry in found for kind in kinds if getattr(entry, kind) is not None} == set(kinds)
    drawn = next(entry for entry in found if entry.sample is not None)
    assert len(data.load(drawn).train[0]) == 2 * 8 + 4 * 8
    nobody = next(entry for entry in found if all(getattr(entry, kind) is None for kind in kinds))
    assert "5 unlabelled" in data.load(nobody, size=24).summary()
    section = PAGE.partition("## Data")[2].partition("## Methods")[0]
    assert [name for name in schema.Data.model_fields if f"`{name}" not in section] == []
    for part in (schema.Balanced, schema.EasyHard):
        assert [n for n in part.model_fields if n != "label_pairs" and f"`{n}" not in section] == []


def test_every_key_and_name_is_on_the_page() -> None:
    models = PAGE.partition("## Models")[2].partition("## Data")[0]
    assert all(f"`{name}" in models for name in (*ARCHITECTURES, *schema.FaceConfig.model_fields))
    heads = PAGE.partition("## Heads")[2].partition("## Verification")[0]
    assert all(f"{name}" in heads for name in schema.Head.model_fields)
    for module, name in re.findall(r"`(?:face|kd\.face)\.((?:\w+\.)?)(\w+)\(", PAGE):
        owner = getattr(face, module[:-1]) if module else face
        assert hasattr(owner, name), (module, name)


def test_the_pages_links_lead_somewhere_and_methods_are_complete() -> None:
    linked = re.findall(r"\]\(([\w/.-]+\.md)(?:#[\w-]+)?\)", PAGE)
    assert {"methods/face-embeddings.md", "methods/face-pairs.md", "methods/face-heads.md"} <= set(linked)
    text = "".join((DOCS / link).read_text() for link in set(linked) if "methods/" in link)
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Methods")[2].partition("**Which one")[0], re.M)
    assert sorted(rows) == sorted(face.METHODS)
    for name, make in face.METHODS.items():
        section = text.partition(f"\n## `{name}`")[2].partition("\n## ")[0]
        assert section, name
        own = [o for o, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY]
        assert [o for o in own if f"`{o}`" not in section] == [], name
    for target, anchor in re.findall(r"\]\(([\w/.-]*)#([\w-]+)\)", PAGE):
        own_text = (DOCS / target).read_text() if target else PAGE
        headings = {
            re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", own_text, re.M)
        }
        assert anchor in headings, (target, anchor)


def test_parity_is_shown_of_documented_names() -> None:
    text = "".join(page.read_text() for page in (DOCS / "methods").glob("face-*.md"))
    for adapters in (Path(__file__).parents[1] / "parity" / "face").glob("*.py"):
        imports = [node for node in ast.walk(ast.parse(adapters.read_text())) if isinstance(node, ast.ImportFrom)]
        own = [a.name for node in imports if (node.module or "").startswith("taskkd.face.") for a in node.names]
        assert [name for name in own if f"`{name}`" not in text] == [], adapters.name


def test_the_page_of_heads_names_every_option() -> None:
    assert set(re.findall(r'^\| `"(\w+)"` \| [A-Z]', HEADS, re.M)) == set(margins.VARIANTS)
    assert {v for known in margins.VARIANTS.values() for v in known} <= set(re.findall(r'^\| `"(\w+)"`', HEADS, re.M))
    for head in (face.MarginHead, face.PartialFC):
        section = HEADS.partition(f"## `{head.__name__}`")[2].partition("\n## ")[0]
        own = [o for o, p in inspect.signature(head).parameters.items() if p.kind is p.KEYWORD_ONLY]
        assert [o for o in own if f"`{o}`" not in section] == []
