"""Disks that are full or not to be written to, damaged files, a folder that is in use: a sentence and exit code 3."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from taskkd import runs, session, trainer
from taskkd.__main__ import main
from taskkd.checkpoints import seal, staged
from taskkd.errors import CheckpointError
from taskkd.files import write_whole, writing
from tests.engine import StopAfter, point_trainer
from tests.faults import worlds


@pytest.fixture
def taskkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line in this process: its exit code and what it said last on stderr."""
    import signal

    monkeypatch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["taskkd", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        code = stop.value.code
        return int(code or 0) if not isinstance(code, str) else 1, said.strip().splitlines()[-1] if said.strip() else ""

    return run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of faces: they have a cache, and are the quickest."""
    return worlds.write("face", tmp_path_factory.mktemp("face"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkd.face.task import FaceTask

    monkeypatch.setattr(FaceTask, "chance", lambda *_: -1.0)
    monkeypatch.setattr(FaceTask, "draw", lambda *_: None)
    monkeypatch.setattr(FaceTask, "latency_batches", lambda *_: [])
    monkeypatch.setattr("taskkd.reports.curves", lambda *_: None)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory of its own; skipped where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


# ---- full


#: who writes something of a training
WRITERS = [
    (trainer, "save_student"), (trainer, "save_state"), (trainer.Trainer, "_save_optimizer_and_scheduler"),
    (trainer.Trainer, "_save_rng_state"), (trainer, "seal"), (session, "save_state"),
]  # fmt: skip
#: what the libraries that they use raise where a disk is full
ERRORS = {
    "Python": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (trainer, "seal", "Python"),
        (trainer.Trainer, "_save_optimizer_and_scheduler", "torch"),
        (session, "save_state", "safetensors"),
        *(pytest.param(*writer, error, marks=pytest.mark.slow) for writer in WRITERS for error in ERRORS),
    ],
)
def test_a_full_disk_at_every_write(
    owner: Any, name: str, error: str, recipe: Path, tmp_path: Path, taskkd: Callable[..., tuple[int, str]]
) -> None:
    folder, command = tmp_path / "run", ("distill", str(recipe), "--output-dir", str(tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patched:

        def full(*_: Any, **__: Any) -> None:
            raise ERRORS[error]

        patched.setattr(owner, name, full)
        code, said = taskkd(*command, "baseline=null")
    assert code == 3
    assert said.startswith("taskkd: ")
    assert "space left" in said or "as on a full disk" in said
    assert list(folder.rglob("checkpoint-*.tmp")) == []  # the space is given back
    if (name, error) == ("seal", "Python"):
        assert taskkd(*command, "baseline=null")[0] == 0  # and it goes on


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Each library writes what does not fit: torch's archive, safetensors, Python."""
    large = {"a": torch.zeros(1 << 18)}
    with mounted(tmp_path / "disk", "size=64k") as disk:
        (disk / "kept").write_text("kept")
        for what, write in {
            "torch": lambda: torch.save(large, disk / "a.pt"),
            "safetensors": lambda: save_file(large, str(disk / "a.safetensors")),
            "python": lambda: (disk / "a.txt").write_text("x" * (1 << 20)),
        }.items():
            with pytest.raises(CheckpointError, match=f"{what} cannot be written: .*(space|full disk)"), writing(what):
                write()
            for left in disk.glob("a.*"):
                left.unlink()
        write_whole(disk / "b.txt", "old")
        with pytest.raises(OSError, match="space"):
            write_whole(disk / "b.txt", "x" * (1 << 20))
        assert (disk / "b.txt").read_text() == "old"
        with pytest.raises(CheckpointError, match="space"), staged(disk / "student") as folder:
            (folder / "a").write_text("x" * (1 << 20))
        assert not (disk / "student").exists()


def test_other_errors_are_not_taken_for_a_full_disk() -> None:
    with pytest.raises(RuntimeError, match="CUDA"), writing("a"):
        raise RuntimeError("CUDA error: an illegal memory access")


# ---- not to be written to


def test_a_folder_that_is_not_to_be_written_to(
    recipe: Path, tmp_path: Path, taskkd: Callable[..., tuple[int, str]]
) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        for folder in (disk, disk / "run"):
            code, said = taskkd("distill", str(recipe), "--output-dir", str(folder))
            assert code == 3
            what = "written to" if folder == disk else "made"
            assert said == f"taskkd: the run's folder {folder} cannot be {what}: Read-only file system."


def test_a_folder_without_permission(
    recipe: Path, tmp_path: Path, taskkd: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root may write everywhere, the system's answer is put in its place."""

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a")

    monkeypatch.setattr(Path, "mkdir", refused)
    code, said = taskkd("distill", str(recipe), "--output-dir", str(tmp_path / "run"))
    assert (code, said) == (3, f"taskkd: the run's folder {tmp_path / 'run'} cannot be made: Permission denied.")


def test_two_runs_in_one_folder(recipe: Path, tmp_path: Path, taskkd: Callable[..., tuple[int, str]]) -> None:
    with session.locked(tmp_path / "run"):
        code, said = taskkd("distill", str(recipe), "--output-dir", str(tmp_path / "run"))
    assert code == 2
    assert f"another run is at work in {tmp_path / 'run'} (process {os.getpid()} on " in said
    with session.locked(tmp_path / "run"):  # it is free again
        pass


# ---- other batches


def test_a_training_of_another_batch_size_does_not_go_on(tmp_path: Path) -> None:
    point_trainer(tmp_path, callbacks=[StopAfter(2)]).train()
    other = point_trainer(tmp_path, per_device_train_batch_size=8)
    with pytest.raises(CheckpointError, match="was saved with a batch size of 4, this training has 8"):
        other.train(resume_from_checkpoint=True)
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state_1.pth").write_bytes(b"")
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)
    with pytest.raises(CheckpointError, match="a number of processes of 2, this training has 1"):
        point_trainer(tmp_path).train(resume_from_checkpoint=True)


# ---- damaged


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after the distillation and before the rest, with the cache; and its checkpoint."""
    from taskkd import recipes
    from taskkd.face.task import FaceTask

    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FaceTask, "chance", lambda *_: -1.0)
        patched.setattr(FaceTask, "draw", lambda *_: None)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # checkpoints stay
        runs.run_recipe(recipes.load_recipe(recipe, ["baseline=null"]), folder, say=lambda _: None)
    record = json.loads((folder / "run.json").read_text())
    record["finished"] = {k: v for k, v in record["finished"].items() if k in ("inputs", "teacher", "teacher/test")}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


STAGE = "seed-0/distilled/stages/0-distil"


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGED = {
    "cache/*/index.json": "index.json|another|missing or damaged",
    "cache/*/shard-00000/ids.npy": "shard-00000/ids.npy is missing or damaged",
    "cache/*/shard-00000/tap-0.npy": "shard-00000/tap-0.npy is missing or damaged",
    "teacher/model/model.safetensors": "model.safetensors|teacher|weights",
    "teacher/model/face.json": "face.json|holds no",
    "run.json": "run.json is not readable|holds a run of another",
    # the checkpoint before is used
    f"{STAGE}/checkpoint-*/student/*.safetensors": "",
    f"{STAGE}/checkpoint-*/optimizer.pt": "",
    f"{STAGE}/checkpoint-*/manifest.json": "",
}
QUICK = {("cache/*/shard-00000/tap-0.npy", flipped), ("run.json", truncated), ("teacher/model/face.json", flipped)}


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        pytest.param(p, d, marks=() if (p, d) in QUICK else pytest.mark.slow)
        for p in DAMAGED
        for d in (truncated, flipped, Path.unlink)
    ],
)
def test_a_damaged_file_is_named(
    pattern: str, damage: Callable[[Path], None], finished: Path, recipe: Path, tmp_path: Path,
    taskkd: Callable[..., tuple[int, str]],
) -> None:  # fmt: skip
    folder, sentence = tmp_path / "run", DAMAGED[pattern]
    shutil.copytree(finished, folder)
    files = sorted(folder.glob(pattern))
    assert files, sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    damage(files[-1])
    code, said = taskkd("distill", str(recipe), "--output-dir", str(folder), "baseline=null")
    if code == 0:
        # the checkpoint before is used; what is worked out again; a bit of a number, of which there is no digest
        assert not sentence or damage in (Path.unlink, flipped), said
    else:
        assert code in (2, 3)
        assert said.startswith("taskkd: ")
        assert re.search(sentence, said), said
