"""What the tests of the engine run in processes of their own: `python engine_job.py kill|signal FOLDER`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

import taskkd as kd
from taskkd import trainer as module
from tests.engine import Mlp, point_trainer

DEAD = 9


def killed_trainer(folder: Path, **options) -> kd.Trainer:
    defaults = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": 2}
    return point_trainer(folder, student=Mlp(8, dropout=0.3), **{**defaults, **options})


def die_in(owner: object, name: str, *, after: bool = False, call: int = 2) -> None:
    """Let the process die, as by `kill -9`, before or after the body of this call of a function."""
    function, calls = getattr(owner, name), iter(range(1, 100))

    def wrapped(*args, **kwargs):
        last = next(calls) == call
        if last and not after:
            os._exit(DEAD)
        result = function(*args, **kwargs)
        if last:
            os._exit(DEAD)
        return result

    setattr(owner, name, wrapped)


def half_an_optimizer() -> None:
    save, calls = kd.Trainer._save_optimizer_and_scheduler, iter(range(1, 100))

    def wrapped(self, folder: str) -> None:
        save(self, folder)
        if next(calls) == 2:
            path = Path(folder) / "optimizer.pt"
            path.write_bytes(path.read_bytes()[:100])
            os._exit(DEAD)

    kd.Trainer._save_optimizer_and_scheduler = wrapped


def half_a_manifest() -> None:
    seal, calls = module.seal, iter(range(1, 100))

    def wrapped(folder: Path) -> None:
        seal(folder)
        if next(calls) == 2:
            path = folder / "manifest.json"
            path.write_bytes(path.read_bytes()[:60])
            os._exit(DEAD)

    module.seal = wrapped


#: where the second save (at step 4) is cut off
KILLS: dict[str, Callable[[], None]] = {
    "student": lambda: die_in(module, "save_student"),
    "state": lambda: die_in(module, "save_state"),
    "state written": lambda: die_in(module, "save_state", after=True),
    "optimizer": lambda: die_in(kd.Trainer, "_save_optimizer_and_scheduler"),
    "half an optimizer": half_an_optimizer,
    "random state": lambda: die_in(kd.Trainer, "_save_rng_state"),
    "seal": lambda: die_in(module, "seal"),
    "half a manifest": half_a_manifest,
    "commit": lambda: die_in(module, "commit"),
    "rotate": lambda: die_in(module, "rotate_checkpoints"),
}


def in_a_child(work: Callable[[], None]) -> int:
    """The exit code of a forked process that does this. (This process has computed nothing, so forking is safe.)"""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(folder: Path) -> None:
    def work(name: str, prepare: Callable[[], None]) -> None:
        prepare()
        killed_trainer(folder / name).train()

    codes = {name: in_a_child(lambda n=name, p=prepare: work(n, p)) for name, prepare in KILLS.items()}
    codes["first"] = in_a_child(lambda: work("first", lambda: die_in(module, "seal", call=1)))
    (folder / "codes.json").write_text(json.dumps(codes))


def wait_for_a_signal(folder: Path) -> None:
    stop = module.SignalStop()

    class Announce(TrainerCallback):
        def on_step_begin(self, args, state, control, **_) -> None:
            if state.global_step == 2:
                print("in step 3", flush=True)
                until = time.monotonic() + 30
                while stop.received is None and time.monotonic() < until:
                    time.sleep(0.01)

    killed_trainer(folder, save_steps=100, callbacks=[stop, Announce()]).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, where = sys.argv[1], Path(sys.argv[2])
    {"kill": kill, "signal": wait_for_a_signal}[job](where)
