"""What docs/faq.md says that taskkd prints is what it prints; `...` stands for anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import taskkd as kd
from taskkd import losses, recipes, runs
from taskkd.caches import Cached
from taskkd.checkpoints import newest_checkpoint
from taskkd.errors import TaskkdError
from tests import small, tiny

PAGE = (Path(__file__).parent.parent / "docs" / "faq.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^### ", PAGE, flags=re.M)[1:]}
SAID = {title: re.findall(r"```text\n(.*?)```", part, re.S) for title, part in SECTIONS.items()}


def loader() -> Iterator[dict[str, Tensor]]:
    for seed in range(3):
        yield small.conv_batch(seed=seed)


def not_finite(path: Path) -> None:
    student, teacher = small.ConvNet(4), small.ConvNet(6)
    terms = [kd.Match("logits", losses.kl_divergence, "out.logits", temperature=4.0, weight=0.9)]
    distiller = kd.Distiller(student, teacher, terms)
    distiller.prepare(small.conv_batch())
    with torch.no_grad():
        student.head.weight.fill_(float("inf"))
    distiller(**small.conv_batch())
    distiller.check_finite()


def advice(path: Path) -> str:
    student, teacher = small.ConvNet(4), small.ConvNet(6)
    terms = [
        kd.Match("logits", losses.kl_divergence, "out.logits", temperature=4.0),
        kd.Match("maps", losses.mse, "block", adapter="conv1x1", weight=1000.0),
    ]
    return "\n".join(kd.Distiller(student, teacher, terms).prepare(small.conv_batch()).advice)


def shapes(path: Path) -> None:
    terms = [kd.Match("maps", losses.mse, "block")]
    kd.Distiller(small.ConvNet(4), small.ConvNet(6), terms).prepare(small.conv_batch())


def classes(path: Path) -> None:
    from taskkd import segmentation

    def net(count: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.ReLU(), nn.Conv2d(4, count, 1))

    student = segmentation.Segmenter(net(2), ["person", "vehicle"])
    teacher = segmentation.Segmenter(net(3), ["person", "car", "bus"])
    segmentation.dist(student, teacher)


def heads(path: Path) -> None:
    from taskkd.nlp import tinybert

    student = small.bert(2, 16)
    for layer in student.bert.encoder.layer:
        layer.attention.self.num_attention_heads = 1
    student.config.num_attention_heads = 1
    tinybert(student, small.bert(4, 16))


def taps(path: Path) -> None:
    terms = [kd.Match("maps", losses.mse, "blok.conv")]
    kd.Distiller(small.ConvNet(4), small.ConvNet(6), terms)


def recipe(path: Path, **changes: Any) -> Any:
    tiny.save_teacher(path / "teacher")
    tiny.write_csv(path / "train.csv", tiny.sentences(60))
    content = {
        "schema": 1,
        "task": "nlp",
        "data": {"files": {"train": str(path / "train.csv")}},
        "teacher": {"model": str(path / "teacher")},
        "student": {"layers": [0]},
        "method": {"name": "soft_targets"},
        "training": {"max_steps": 1},
        "baseline": None,
    }
    (path / "my.yaml").write_text(yaml.safe_dump(content))
    return recipes.load_recipe(path / "my.yaml", [f"{k}={v}" for k, v in changes.items()])


def chance(path: Path) -> None:
    loaded = recipe(path)
    fresh = tiny.classifier(seed=3)  # its head was never trained
    nn.init.zeros_(fresh.classifier.weight)
    fresh.save_pretrained(path / "teacher")
    runs.run_recipe(loaded, path / "run", say=lambda _: None)


def unknown_key(path: Path) -> None:
    recipe(path, **{"training.epoch": 3})


def other_recipe(path: Path) -> None:
    (path / "runs").mkdir()
    folder = path / "runs" / "my"
    runs.run_recipe(recipe(path), folder, say=lambda _: None)
    runs.run_recipe(recipe(path, **{"training.learning_rate": 3e-4}), folder, say=lambda _: None)


def cached(path: Path) -> Cached:
    teacher = Cached(small.ConvNet(6), path / "cache")
    terms = [kd.Match("logits", losses.kl_divergence, "out.logits")]
    distiller = kd.Distiller(small.ConvNet(4), teacher, terms)
    teacher.build(loader(), total=12)
    distiller.prepare(small.conv_batch())
    return teacher


def stale_cache(path: Path) -> None:
    cached(path)
    torch.manual_seed(1)  # another teacher
    terms = [kd.Match("logits", losses.kl_divergence, "out.logits")]
    kd.Distiller(small.ConvNet(4), Cached(small.ConvNet(6), path / "cache"), terms).prepare(small.conv_batch())


def changed_input(path: Path) -> None:
    teacher = cached(path)
    batch = small.conv_batch()
    teacher({**batch, "image": batch["image"].flip(-1)})


def augmented(path: Path) -> None:
    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {k: v[index] for k, v in small.conv_batch().items()}

    from transformers import TrainingArguments

    data = kd.Augmented(Data(), lambda sample, generator: sample)
    teacher = Cached(small.ConvNet(6), path / "cache")
    args = TrainingArguments(output_dir=str(path), use_cpu=True, report_to=[], max_steps=1)
    terms = [kd.Match("logits", losses.kl_divergence, "out.logits")]
    kd.Trainer(small.ConvNet(4), teacher=teacher, terms=terms, args=args, train_dataset=data).train()


def no_labels(path: Path) -> None:
    batch = small.conv_batch()
    del batch["labels"]
    terms = [kd.Match("logits", losses.kl_divergence, "out.logits")]
    kd.Distiller(small.ConvNet(4), small.ConvNet(6), terms).prepare(batch)


def no_adapter(path: Path) -> None:
    terms = [kd.Match("maps", losses.mse, "block", adapter="conv1x1")]
    kd.Distiller(small.ConvNet(4), small.ConvNet(6), terms)(**small.conv_batch())


def checkpointing(path: Path) -> None:
    student = small.bert(2, 16)
    student.gradient_checkpointing_enable({"use_reentrant": True})
    terms = [kd.Match("states", losses.mse, "bert.encoder.layer.0")]
    kd.Distiller(student, small.bert(2, 16), terms).prepare(small.tokens([5, 7]))


def damaged(path: Path) -> None:
    (path / "checkpoint-4").mkdir()
    newest_checkpoint(path)


PROVOKED: dict[str, Callable[[Path], Any]] = {
    "Why is my loss NaN?": not_finite,
    "How do I weigh the terms?": advice,
    "The teacher is no better than chance": chance,
    "Student and teacher have features of different sizes": shapes,
    "The teacher has other classes": classes,
    "The numbers of attention heads differ": heads,
    "How do I find the name of a tap?": taps,
    "My data have no labels": no_labels,
    "An adapter does not exist yet": no_adapter,
    "Not enough memory": checkpointing,
    "The cache is stale": stale_cache,
    "The teacher's input is not the one that was cached": changed_input,
    "Can I cache the teacher with random augmentation?": augmented,
    "The run was killed": damaged,
    "I changed the recipe and started it again": other_recipe,
    "A key of my recipe is not known": unknown_key,
}


def provoked(title: str, path: Path) -> str:
    try:
        result = PROVOKED[title](path)
    except TaskkdError as error:
        return str(error)
    return str(result)


def test_every_sentence_of_the_page_is_provoked() -> None:
    assert {title for title, said in SAID.items() if said} == set(PROVOKED)
    assert len(SECTIONS) > 20


@pytest.mark.parametrize("title", PROVOKED)
def test_taskkd_says_what_the_page_says(title: str, tmp_path: Path) -> None:
    (said,) = SAID[title]
    pattern = ".*?".join(re.escape(" ".join(part.split())) for part in said.split("..."))
    found = provoked(title, tmp_path)
    assert re.search(pattern.replace(r"\ .*?", ".*?").replace(r".*?\ ", ".*?"), " ".join(found.split())), found
