"""What a run saves: whole folders that are complete or are not there, and a student in its own format.

`checkpoint-N/` holds `student/` (its own format), `taskkd_state.safetensors` (adapters, banks, progress: all else of
ours), the engine's optimiser, scheduler and random states, and `manifest.json` with the sha256 of every file, written
last. The folder is written beside and renamed.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from taskkd.distiller import Distiller
from taskkd.errors import CheckpointError
from taskkd.files import file_sha256, fsync, writing

__all__ = [
    "is_sharded",
    "load_state",
    "load_student",
    "newest_checkpoint",
    "save_state",
    "save_student",
    "seal",
    "staged",
    "verify",
]

MANIFEST = "manifest.json"
STATE = "taskkd_state.safetensors"
STUDENT = "student"
logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Write the manifest: the sha256 of every file in `folder`, each on disk before it is listed."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        fsync(path)
        digests[path.relative_to(folder).as_posix()] = file_sha256(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "sha256": digests}, indent=1))
    fsync(manifest)


def verify(folder: Path) -> None:
    """Check a folder against its manifest.

    Raises:
        CheckpointError: the manifest or a file is missing, or a file is not what was written; the message names it.
    """
    try:
        digests = dict(json.loads((folder / MANIFEST).read_text())["sha256"])
        if not digests:
            raise ValueError("nothing is listed")
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"checkpoint {folder} is incomplete: it has no readable {MANIFEST}, which is written last."
        ) from None
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing.")
        if file_sha256(path) != digest:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} is not what was saved (truncated or changed)."
            )


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` only when the block ends well.

    A process killed inside the block leaves `final` as it was.

    Raises:
        CheckpointError: the disk is full, or is not to be written to; `final` is as it was.
    """
    staging = final.with_name(final.name + ".tmp")
    with writing(str(final)):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        commit(staging, final)


def commit(staging: Path, final: Path) -> None:
    """Put a finished folder in its place; what was there before goes."""
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.replace(old)
        staging.replace(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.replace(final)
    fsync(final.parent)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete `checkpoint-N` in `run`; damaged ones are named in a warning and passed over.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    found = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    damaged = []
    for _, path in sorted(found, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("%s The one before it is used.", error)
            damaged.append(str(error))
        else:
            return path
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {run} can be used: {' '.join(damaged)} Delete them to start from the beginning."
        )
    return None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) has spread a module's parameters over the ranks."""
    return any(hasattr(p, "full_tensor") for p in module.parameters())


def _whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state whose spread tensors are put together, on rank 0; all ranks must come here, the others get nothing."""
    found = {}
    for name, value in state.items():
        one = value.full_tensor().cpu() if hasattr(value, "full_tensor") else value
        if torch.distributed.get_rank() == 0:
            found[name] = one
    return found


def save_student(student: nn.Module, folder: Path, processing_class: Any = None) -> None:
    """Save the student alone: `save_pretrained` where it has one, else `model.safetensors`.

    The tokenizer or image processor is saved beside it, and the student's `description` where it has one that can be
    saved (what a detector was built of). Of a student that FSDP2 has spread over ranks all must come here; rank 0 saves
    it whole.
    """
    whole = _whole(student.state_dict()) if is_sharded(student) else None
    if whole is not None and torch.distributed.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(student, "save_pretrained"):
        student.save_pretrained(folder, **({} if whole is None else {"state_dict": whole}))  # type: ignore[operator]
    elif whole is not None:
        save_file(whole, str(folder / "model.safetensors"))
    else:
        save_model(student, str(folder / "model.safetensors"))
    for beside in (processing_class, getattr(student, "description", None)):
        if beside is not None and hasattr(beside, "save_pretrained"):
            beside.save_pretrained(folder)


def load_student(student: nn.Module, folder: Path) -> None:
    """Load what `save_student` wrote into a student of the same architecture; every key must fit.

    Raises:
        CheckpointError: a file cannot be read, or keys or shapes differ.
    """
    try:
        if hasattr(student, "save_pretrained"):
            dtype = next(student.parameters()).dtype
            loaded, report = type(student).from_pretrained(folder, dtype=dtype, output_loading_info=True)  # type: ignore[attr-defined]
            wrong = {
                k: sorted(report[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(k)
            }
            if wrong:
                raise CheckpointError(f"checkpoint {folder} is not of this student: {wrong}.")
            _load(student, loaded.state_dict())
        elif is_sharded(student):
            _load(student, load_file(str(folder / "model.safetensors")))
        else:
            load_model(student, str(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        # torch names the class in its first line and what does not fit in the next.
        lines = [line.strip() for line in str(error).splitlines()[:2]] or [type(error).__name__]
        raise CheckpointError(
            f"checkpoint {folder} does not load into this student: {' '.join(lines)[:400]}"
        ) from error


def _load(module: nn.Module, state: dict[str, Any]) -> None:
    """Load whole tensors; where FSDP2 has spread the module's, each rank takes its part."""
    if is_sharded(module):
        from torch.distributed.tensor import DTensor, distribute_tensor

        present = module.state_dict()
        state = {
            k: distribute_tensor(v, own.device_mesh, own.placements)
            if isinstance(own := present.get(k), DTensor) and not isinstance(v, DTensor)
            else v
            for k, v in state.items()
        }
    module.load_state_dict(state)


def save_state(distiller: Distiller, path: Path) -> None:
    """Save all that a distiller holds beside its student (adapters, learned losses, progress, automatic weights).

    Where FSDP2 has spread them over ranks all must come here, and rank 0 saves.
    """
    own = {k: v for k, v in distiller.state_dict().items() if not k.startswith("student.")}
    if is_sharded(distiller):
        own = _whole(own)
        if torch.distributed.get_rank() != 0:
            return
    # Copies: safetensors refuses tensors that share memory (an adapter that two terms have in common).
    state = {k: v.detach().clone().contiguous() for k, v in own.items()}
    save_file(state, str(path), {"terms": json.dumps(_terms(distiller))})


def _terms(distiller: nn.Module) -> list[str]:
    terms = distiller.get_submodule("terms")
    return [name for name, _ in terms.named_children()]


def load_state(distiller: Distiller, path: Path) -> None:
    """Load what `save_state` wrote.

    Raises:
        CheckpointError: the file cannot be read, or its keys are not those of this distiller (another method).
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        state = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    terms = json.loads(metadata.get("terms", "null"))
    if terms is not None and terms != _terms(distiller):
        raise CheckpointError(f"{path} belongs to other terms: it has {terms}, this training {_terms(distiller)}.")
    present = {k: v for k, v in distiller.state_dict().items() if not k.startswith("student.")}
    if set(present) != set(state):
        missing, extra = sorted(set(present) - set(state)), sorted(set(state) - set(present))
        raise CheckpointError(
            f"{path} belongs to other terms: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}."
        )
    for key, value in state.items():
        # The bytes of an auxiliary network: their number changes, and the term checks them itself.
        packed = key.startswith(("terms.", "task_loss.")) and key.endswith("_extra_state")
        if value.shape != present[key].shape and not packed:
            raise CheckpointError(
                f"{path} belongs to another architecture: {key} is {tuple(value.shape)} there, "
                f"{tuple(present[key].shape)} here."
            )
    with torch.no_grad():
        _load(distiller, {**state, **{f"student.{k}": v for k, v in distiller.student.state_dict().items()}})


def hand_on(distiller: Distiller, path: Path) -> None:
    """Load what a former stage trained beside the student (`save_state`) into what has the same name and shape.

    That is the adapters of terms, and the classifier of the task loss.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        state = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    with torch.no_grad():
        for name, value in distiller.terms.named_parameters("terms", remove_duplicate=False):
            if name in state and state[name].shape == value.shape:
                value.copy_(state[name])
    head = distiller.task_loss
    own = {k.removeprefix("task_loss."): v for k, v in state.items() if k.startswith("task_loss.")}
    if isinstance(head, nn.Module) and own:
        try:
            head.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit the task loss of this stage: {error}") from None
