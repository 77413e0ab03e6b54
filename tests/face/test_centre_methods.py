"""Methods on centres of identities and on triplets."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import taskkd as kd
from taskkd.errors import DataError, RecipeError, ShapeError, TaskkdError
from taskkd.face.methods import METHODS
from taskkd.face.methods.ada_distill import AdaDistill, adaptive_alpha, move_centres
from taskkd.face.methods.centre_term import margin_logits, margin_softmax
from taskkd.face.methods.grouped import grouped_divergence
from taskkd.face.methods.margin_distillation import teacher_margins
from taskkd.face.methods.triplet_distillation import batch_triplet_loss, batch_triplets, triplet_margin_loss
from taskkd.terms import Run
from tests.engine import StopAfter, arguments, changed, distance, weights
from tests.face.embedders import IDENTITIES, Embedder, batch, no_task, pair

CENTRES = ["ada_distill", "proxyless", "margin_distillation", "grouped"]
MINE = [*CENTRES, "triplet_distillation", "embedding_mimic", "angular_distillation", "relational"]


def distiller_of(name: str, sizes: tuple[int, int] = (8, 8), **options: Any) -> kd.Distiller:
    student, teacher = pair(*sizes)
    (stage,) = METHODS[name](student, teacher, **options).stages
    return kd.Distiller(student, teacher, stage.terms, task_loss=no_task, task_weight=stage.task_weight)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("name", MINE)
class TestEveryMethod:
    def test_hard_batches_are_finite_and_train_the_student_alone(self, name: str) -> None:
        for sizes in ((8, 8), (6, 10)):
            distiller = distiller_of(name, sizes)
            teacher = distiller.teacher.model  # type: ignore[union-attr]
            before = copy.deepcopy(teacher.state_dict())
            distiller.prepare(batch())
            distiller.train()
            for labels in (None, [-1] * 4, [2, 2, 2], [0], [5, 4, 3, 2, 1, 0]):
                distiller.zero_grad(set_to_none=True)
                found = distiller(**batch(labels))
                assert all(v.isfinite() for v in found.values()), (labels, found)
                found["loss"].backward()
                own = [p.grad for p in distiller.parameters() if p.grad is not None]
                assert own
                assert all(g.isfinite().all() for g in own), labels
            assert all(p.grad is None for p in teacher.parameters())
            assert all(torch.equal(before[n], v) for n, v in teacher.state_dict().items())

    def test_every_term_pulls_at_the_student(self, name: str) -> None:
        prepared = distiller_of(name).prepare(batch())
        pulls = {t.name: t.gradient_norm for t in prepared.terms}
        assert all(pull > 0 for pull in pulls.values()), pulls

    def test_half_precision_and_zero_embeddings_are_finite(self, name: str) -> None:
        (stage,) = METHODS[name](*pair()).stages
        labels = torch.tensor([0, 0, 1, 2])
        for student in (torch.zeros(4, 8), torch.randn(4, 8).bfloat16(), 1e4 * torch.ones(4, 8)):
            s = student.requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                run = Run({}, None, {"out.embeddings": s, "batch.labels": labels}, {"out.embeddings": 1 - s.detach()})
                value = torch.stack([term(run) for term in stage.terms]).sum()
            assert value.dtype == torch.float32
            assert value.isfinite()
            (gradient,) = torch.autograd.grad(value, s)
            assert gradient.isfinite().all()


class TestMarginSoftmax:
    def test_the_margin_is_on_the_true_identity_alone(self) -> None:
        s, w, labels = torch.randn(3, 4).double(), torch.randn(5, 4).double(), torch.tensor([1, 4, -1])
        cos = unit(s) @ unit(w).T
        for margin, m in (("arc", 0.5), ("cos", 0.35)):
            want = 64 * cos
            for i, y in ((0, 1), (1, 4)):
                want[i, y] = 64 * ((cos[i, y].acos() + m).cos() if margin == "arc" else cos[i, y] - m)
            found = margin_logits(s, w, labels=labels, margin=margin, m=m)  # type: ignore[arg-type]
            torch.testing.assert_close(found, want)
        loss = margin_softmax(s, w, labels=labels, margin="cos", m=0.35)
        torch.testing.assert_close(loss, F.cross_entropy(want[:2], labels[:2]))

    def test_beyond_the_last_angle_there_is_no_fallback(self) -> None:
        s, w = torch.tensor([[-1.0, 0.1]]).double(), torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
        angle = math.pi - math.atan(0.1)
        found = margin_logits(s, w, labels=torch.tensor([0]), m=0.5, s=1.0)
        assert found[0, 0].item() == pytest.approx(math.cos(angle + 0.5))

    def test_nobody_known_is_nothing(self) -> None:
        s = torch.randn(3, 4, requires_grad=True)
        value = margin_softmax(s, torch.randn(5, 4), labels=torch.full((3,), -1))
        value.backward()
        assert value == 0
        assert s.grad is not None
        assert not s.grad.any()

    def test_cosface_has_one_margin(self) -> None:
        with pytest.raises(TaskkdError, match="one margin for all samples"):
            margin_logits(
                torch.randn(2, 3), torch.randn(4, 3), labels=torch.zeros(2).long(), margin="cos", m=torch.ones(2)
            )


class TestAdaDistill:
    def test_distinct_labels_move_as_the_authors_say(self) -> None:
        s, t, w = (torch.randn(n, 4).double() for n in (3, 3, 5))
        labels = torch.tensor([4, 0, 2])
        alpha = adaptive_alpha(s, t, centres=w[labels])
        want = w.clone()
        for i, y in enumerate(labels):
            near = (unit(w[y]) * unit(t[i])).sum().clamp(1e-6, 1)
            assert alpha[i].item() == pytest.approx(((unit(s[i]) * unit(t[i])).sum() * near).clamp(1e-6, 1).item())
            want[y] = alpha[i] * w[y] + (1 - alpha[i]) * unit(t[i])
        move_centres(w, t, labels=labels, alpha=alpha)
        assert torch.equal(w, want)
        plain = adaptive_alpha(s, t)
        torch.testing.assert_close(plain, (unit(s) * unit(t)).sum(1).clamp(1e-6, 1))

    def test_samples_of_one_identity_move_it_to_their_mean(self) -> None:
        t, w, alpha = torch.randn(4, 3).double(), torch.randn(5, 3).double(), torch.rand(4).double()
        labels = torch.tensor([2, 1, 2, -1])
        alone = [
            move_centres(w.clone(), t[i : i + 1], labels=labels[i : i + 1], alpha=alpha[i : i + 1]) for i in (0, 2)
        ]
        found = move_centres(w.clone(), t, labels=labels, alpha=alpha)
        torch.testing.assert_close(found[2], (alone[0][2] + alone[1][2]) / 2)
        assert torch.equal(found[[0, 3, 4]], w[[0, 3, 4]])
        order = torch.tensor([3, 2, 1, 0])
        torch.testing.assert_close(found, move_centres(w.clone(), t[order], labels=labels[order], alpha=alpha[order]))
        twice = move_centres(w.clone(), t.repeat(2, 1), labels=labels.repeat(2), alpha=alpha.repeat(2))
        torch.testing.assert_close(found, twice)

    def test_what_is_not_finite_moves_nothing(self) -> None:
        t, w = torch.randn(3, 4), torch.randn(2, 4)
        t[0, 1], alpha = torch.nan, torch.tensor([0.5, torch.nan, 0.5])
        found = move_centres(w.clone(), t, labels=torch.tensor([0, 0, 1]), alpha=alpha)
        assert torch.equal(found[0], w[0])
        assert found.isfinite().all()

    def test_centres_move_in_training_forwards_alone(self) -> None:
        distiller = distiller_of("ada_distill")
        term: Any = distiller.terms["centres"]
        start = term.centres.clone()
        assert start.std().item() == pytest.approx(0.01, rel=0.4)
        distiller.prepare(batch())
        assert torch.equal(term.centres, start)
        distiller.eval()
        distiller(**batch())
        assert torch.equal(term.centres, start)
        distiller.train()
        distiller(**batch())
        moved = (term.centres != start).any(1)
        assert moved.tolist() == [True, True, False, True, False, True]
        assert "centres" not in dict(term.named_parameters())

    def test_a_saved_run_goes_on_bit_by_bit(self) -> None:
        def built() -> tuple[kd.Distiller, torch.optim.Optimizer]:
            distiller = distiller_of("ada_distill", (6, 8))
            torch.manual_seed(3)
            distiller.prepare(batch())
            return distiller, torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9)

        def train(distiller: kd.Distiller, optimizer: torch.optim.Optimizer, steps: range) -> None:
            for step in steps:
                optimizer.zero_grad()
                distiller(**batch(seed=step))["loss"].backward()
                optimizer.step()
                distiller.step()

        whole, first, second = built(), built(), built()
        train(*whole, range(4))
        train(*first, range(2))
        second[0].load_state_dict(first[0].state_dict())
        second[1].load_state_dict(first[1].state_dict())
        train(*second, range(2, 4))
        wanted, found = weights(whole[0]), weights(second[0])
        assert any("centres" in n for n in wanted)
        assert all(torch.equal(wanted[n], v) or v.isnan().any() for n, v in found.items())

    def test_options_reach_the_term(self) -> None:
        (term,) = METHODS["ada_distill"](*pair(), margin="cos", alpha="fixed", momentum=0.7).stages[0].terms
        assert isinstance(term, AdaDistill)
        assert (term.m, term.alpha, term.momentum) == (0.35, "fixed", 0.7)
        s = {"out.embeddings": torch.randn(1, 8), "batch.labels": torch.tensor([2])}
        t, before = torch.randn(1, 8), term.centres[2].clone()
        term(Run({}, None, s, {"out.embeddings": t}))
        torch.testing.assert_close(term.centres[2], 0.7 * before + 0.3 * unit(t)[0])

    def test_seeds(self) -> None:
        def centres(seed: int) -> Tensor:
            torch.manual_seed(seed + 40)
            return METHODS["ada_distill"](*pair(), seed=seed).stages[0].terms[0].centres

        assert torch.equal(centres(1), centres(1))
        assert not torch.equal(centres(1), centres(2))


class TestFrozenCentres:
    def test_the_teacher_never_runs_and_no_optimiser_knows_the_centres(self) -> None:
        distiller = distiller_of("proxyless")
        distiller.teacher.model.forward = None  # type: ignore[union-attr]
        distiller.prepare(batch())
        distiller(**batch())["loss"].backward()
        assert distiller.own_parameters() == []
        assert any(n.endswith("head.weight") for n in distiller.state_dict())

    def test_defaults_and_class_means_that_are_still_to_come(self) -> None:
        student, teacher = pair()
        method = METHODS["proxyless"](student, teacher)
        assert method.needs == ("labels", "centres")
        assert method.stages[0].task_weight == 0
        (term,) = method.stages[0].terms
        margin = term.head.margin
        assert (margin.kind, margin.m, margin.s, margin.monotone) == ("arcface", 0.5, 64.0, False)
        torch.testing.assert_close(term.head.weight, unit(teacher.centres))
        teacher.centres = None
        for name in ("proxyless", "margin_distillation", "grouped"):
            (term,) = METHODS[name](student, teacher).stages[0].terms
            centres = term.head.weight if name == "proxyless" else term.centres
            assert not centres.any()
            assert centres.shape == (IDENTITIES, 8)

    def test_centres_in_half_and_a_share_of_them(self) -> None:
        student, teacher = pair()
        s, labels = torch.randn(3, 8), torch.tensor([0, 2, 2])
        run = Run({}, None, {"out.embeddings": s, "batch.labels": labels})
        found = {}
        for name, options in {"all": {}, "half": {"storage": "float16"}, "some": {"sample_rate": 0.5}}.items():
            (term,) = METHODS["proxyless"](student, teacher, **options).stages[0].terms
            found[name] = term(run)
        assert found["half"].item() == pytest.approx(found["all"].item(), rel=1e-2)
        assert found["some"] < found["all"]

    def test_wrong_centres_and_labels_are_told(self) -> None:
        student, teacher = pair()
        teacher.centres = torch.randn(IDENTITIES + 1, 8)
        with pytest.raises(RecipeError, match=r"\(7, 8\), expected \(6, 8\)"):
            METHODS["proxyless"](student, teacher)
        student.identities = None  # type: ignore[assignment]
        assert METHODS["proxyless"](student, teacher).stages[0].terms[0].identities == 7
        with pytest.raises(RecipeError, match=r"set `student\.identities`"):
            METHODS["ada_distill"](student, teacher)
        distiller = distiller_of("ada_distill")
        with pytest.raises(DataError, match=r"sample 1 of the batch \(id 2\) has label 6"):
            distiller.prepare(batch([0, 6]))
        with pytest.raises(ShapeError, match=r"needs whole numbers `labels` \(2,\), got torch.float32"):
            distiller.prepare({**batch([0, 1]), "labels": torch.zeros(2)})
        other = Embedder(8, 1)
        other.embedding_size = 9
        (term,) = METHODS["proxyless"](other, pair()[1]).stages[0].terms
        run = Run({}, None, {"out.embeddings": torch.randn(2, 8), "batch.labels": torch.zeros(2).long()})
        with pytest.raises(ShapeError, match=r"\(batch, 9\)"):
            term(run)


class TestMarginDistillation:
    def test_margins(self) -> None:
        w = torch.eye(3).double().requires_grad_()
        t = torch.tensor([[1.0, 0, 0], [3.0, 4.0, 0], [0, -1.0, 0], [0, 0, 1.0]]).double()
        labels = torch.tensor([0, 1, 1, -1])
        torch.testing.assert_close(teacher_margins(w, t, labels=labels).tolist(), [0.5, 0.44, 0.2, 0.2])
        assert teacher_margins(w, t, labels=labels, clip=False)[2].item() == pytest.approx(-0.1)
        found = teacher_margins(w, t, labels=labels).sum()
        assert torch.autograd.grad(found, w)[0].abs().sum() > 0
        for clip in (True, False):
            flat = teacher_margins(w, -t, labels=torch.zeros(4).long(), clip=clip)
            assert flat.tolist() == [0.2] * 4  # nobody is near

    def test_the_centres_are_trained_and_the_teachers_are_not(self) -> None:
        student, teacher = pair()
        before = teacher.centres.clone()
        (stage,) = METHODS["margin_distillation"](student, teacher).stages
        distiller = kd.Distiller(student, teacher, stage.terms, task_weight=stage.task_weight)
        distiller.prepare(batch())
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        distiller(**batch())["loss"].backward()
        optimizer.step()
        assert torch.equal(teacher.centres, before)
        assert not torch.equal(distiller.terms["margins"].centres, before)


class TestTriplets:
    def test_every_pair_with_its_hardest_negative(self) -> None:
        t, labels = torch.randn(7, 4), torch.tensor([0, 1, 0, -1, 0, 2, 1])
        found = batch_triplets(t, labels)
        pairs = [(a, p) for a in range(7) for p in range(7) if a != p and labels[a] == labels[p] >= 0]
        assert list(zip(*found[:2].tolist(), strict=True)) == pairs
        for a, n in zip(*found[[0, 2]].tolist(), strict=True):
            others = [i for i in range(7) if labels[i] >= 0 and labels[i] != labels[a]]
            assert n == max(others, key=lambda i: (unit(t[i]) * unit(t[a])).sum().item())
        drawn = batch_triplets(t, labels, negatives="random")
        assert torch.equal(drawn[:2], found[:2])
        assert (labels[drawn[2]] != labels[drawn[0]]).all()
        assert (labels[drawn[2]] >= 0).all()

    def test_by_hand(self) -> None:
        s = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]]).double()
        t = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [-1.0, 0]]).double()
        triplets = torch.tensor([[0, 0], [1, 1], [2, 3]])
        # the teacher leads by 2 and 4 (squared distances), so the margins are 0.35 and 0.5
        want = {"l2": [2 - 4 + 0.35, 2 - 2 + 0.5], "cosine": [math.pi / 2 - math.pi + 0.35, 0.5]}
        for kind, values in want.items():
            found = triplet_margin_loss(s, t, triplets=triplets, kind=kind)  # type: ignore[arg-type]
            assert found.item() == pytest.approx(sum(max(0, v) for v in values) / 2, abs=1e-6)

    def test_no_triplet_and_none_in_order(self) -> None:
        s = torch.randn(4, 3, requires_grad=True)
        for labels in ([0, 1, 2, 3], [0, 0, 0, 0], [-1, -1, 1, 1]):
            value = batch_triplet_loss(s, s.detach(), labels=torch.tensor(labels))
            assert value == 0
            assert not torch.autograd.grad(value, s)[0].any()
        t = torch.tensor([[1.0, 0], [-1.0, 0], [1.0, 0]])
        value = triplet_margin_loss(t, t, triplets=torch.tensor([[0], [1], [2]]))  # the positive is the farther one
        assert value.item() == pytest.approx(4 + 0.2)
        with pytest.raises(ShapeError, match="one label for each of 4"):
            batch_triplet_loss(s, s.detach(), labels=torch.zeros(3).long())


class TestGrouped:
    def test_by_hand(self) -> None:
        p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double()
        q = torch.tensor([[0.4, 0.2, 0.1, 0.3]]).double()
        # the likeliest two add up to 0.8 < 0.9, so the third belongs to the group
        group = [q[0, i] / 0.7 * ((q[0, i] / 0.7) / (p[0, i] / 0.95)).log() for i in range(3)]
        rest = 0.7 * math.log(0.7 / 0.95) + 0.3 * math.log(0.3 / 0.05)
        found = grouped_divergence(p.log(), q.log(), tau=0.9, primary=8.0, binary=2.0)
        assert found.item() == pytest.approx(8 * sum(group).item() + 2 * rest)

    def test_ends(self) -> None:
        logits = torch.randn(3, 5, requires_grad=True)
        assert grouped_divergence(logits, logits.detach()).item() == pytest.approx(0, abs=1e-6)
        sure = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
        for student, teacher, tau in ((sure, -sure.detach(), 0.5), (logits[:, :1], torch.zeros(3, 1), 0.9)):
            value = grouped_divergence(student, teacher, tau=tau)
            assert value.isfinite()
            assert torch.autograd.grad(value, student)[0].isfinite().all()


class Faces(torch.utils.data.Dataset[Any]):
    """Twelve of six identities."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in batch([index % IDENTITIES], seed=index).items()} | {"id": 2 * index}


def trainer(folder: Path, *callbacks: Any) -> kd.Trainer:
    """With all that has a state of its own, or draws."""
    student, teacher = pair(6, 8)
    methods: dict[str, dict[str, Any]] = {
        "ada_distill": {},
        "margin_distillation": {},
        "proxyless": {"sample_rate": 0.5, "storage": "float16"},
        "triplet_distillation": {"negatives": "random"},
    }
    terms = [t for name, given in methods.items() for t in METHODS[name](student, teacher, **given).stages[0].terms]
    for number, term in enumerate(terms):
        term.name = f"{number}-{term.name}"
    args = arguments(folder, per_device_train_batch_size=4, num_train_epochs=2)
    options: dict[str, Any] = {"train_dataset": Faces(), "task_loss": no_task, "callbacks": list(callbacks)}
    return kd.Trainer(student, teacher=teacher, terms=terms, args=args, **options)


def test_resuming_is_bit_exact(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "run", StopAfter(2))
    first.train()
    assert distance(weights(first.distiller), weights(whole.distiller)) > 1e-3
    again = trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    state = weights(again.distiller)
    assert {"terms.0-centres.centres", "terms.2-centres.head.weight"} <= state.keys()
    assert changed(weights(whole.distiller), state) == set()
    assert again.state.global_step == 6


def test_options_are_those_of_recipes() -> None:
    from taskkd.recipes import options_schema

    for name in MINE:
        parameters = inspect.signature(METHODS[name]).parameters.items()
        options_schema(METHODS[name])(**{n: p.default for n, p in parameters if p.kind is p.KEYWORD_ONLY})


def test_the_page_names_every_option() -> None:
    page = (Path(kd.__file__).parents[1] / "docs" / "methods" / "face-embeddings.md").read_text()
    for name in MINE:
        section = page.partition(f"\n## `{name}`")[2].partition("\n## ")[0]
        for option, parameter in inspect.signature(METHODS[name]).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert f"`{option}`" in section, f"{name}: {option}"


@pytest.mark.parametrize(("method", "names"), [("ada_distill", ["centres"]), ("proxyless", ["head.weight"])])
def test_centres_are_not_sent_to_all_ranks_in_every_step(method: str, names: list[str]) -> None:
    """Hundreds of megabytes, alike everywhere; DDP leaves out what the distiller names."""
    distiller = distiller_of(method)
    left_out = distiller._ddp_params_and_buffers_to_ignore
    assert left_out == [f"terms.centres.{name}" for name in names]
    assert set(left_out) <= {name for name, _ in distiller.named_buffers()}
    assert not set(left_out) & {name for name, _ in distiller.named_parameters()}
    distiller.close()
