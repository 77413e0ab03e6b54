"""Runs that are killed again and again: `python -m tests.faults.killing RECIPE FOLDER SIGNAL SEED POINTS`.

This process imports everything and computes nothing, so that a child that it forks starts in no time. The child runs
the command line, and sends itself the signal at its n-th event: a file or folder of the run that is opened for
writing, renamed or removed, a training step, a batch of the teacher's. Counting events instead of seconds, a point is
the same on any machine. n is drawn over a whole run; a run that is finished before is followed by a fresh one.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import taskkd.__main__
from taskkd import recipes, reports, trainer
from taskkd.teachers import Frozen

FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
CHANCE = -1.0  # teachers pass that have seen three batches


def count_events(folder: Path, act: Callable[[int, str], None]) -> None:
    """Call `act` with the number and the name of every event of this process from now on."""
    made = iter(range(1, 10**9))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "taskkd.test":
            act(next(made), arguments[0])
        elif event in FILES:
            path, reading = str(arguments[0]), event == "open" and not _writes(arguments)
            inside = path.startswith(str(folder)) or (event in FILES[2:] and arguments[-1] != -1)  # rmtree: by handles
            if inside and not reading:
                act(next(made), f"{event} {Path(path).name}")

    for owner, name in ((trainer.Trainer, "training_step"), (Frozen, "__call__")):
        _announced(owner, name)
    sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))


def _announced(owner: Any, name: str) -> None:
    function = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        sys.audit("taskkd.test", name)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def in_a_child(work: Callable[[], None], log: Path) -> int:
    """What a forked process that does this ends with; its output is in `log`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(recipe: Path, folder: Path, act: Callable[[int, str], None]) -> None:
    """The command line, in this process."""
    task = recipes.task_named(recipes.load_recipe(recipe).task)
    type(task).chance = lambda *_: CHANCE
    type(task).draw = lambda *_: None  # pictures and timings take longer than all the rest
    type(task).latency_batches = lambda *_: []
    reports.curves = lambda *_: None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sys.argv = ["taskkd", "distill", str(recipe), "--output-dir", str(folder)]
    count_events(folder, act)
    taskkd.__main__.main()


def whole(recipe: Path, folder: Path) -> int:
    """One run that nothing stops; everything that it imported is imported here, and the number of its events."""
    events = folder.with_suffix(".events")
    modules = folder.with_suffix(".modules")

    def work() -> None:
        with events.open("w") as file:
            try:
                start(recipe, folder, lambda n, name: print(n, name, file=file, flush=True))
            finally:
                modules.write_text("\n".join(m for m in list(sys.modules) if not m.startswith("__")))

    log = folder.with_suffix(".log")
    if code := in_a_child(work, log):
        raise SystemExit(f"the whole run ended with {code}:\n{log.read_text()[-3000:]}")
    for name in modules.read_text().splitlines():
        try:
            importlib.import_module(name)
        except Exception:  # made by another module as it was imported
            continue
    return len(events.read_text().splitlines())


def interrupted(recipe: Path, folder: Path, number: int, at: int, log: Path) -> tuple[int, str]:
    """The exit code of a run that gets the signal at its event `at` (0: never), and where that was."""
    site = log.with_suffix(".site")

    def act(n: int, name: str) -> None:
        if n == at:
            site.write_text(name)
            os.kill(os.getpid(), number)

    code = in_a_child(lambda: start(recipe, folder, act), log)
    return code, site.read_text() if site.is_file() else ""


def main(recipe: Path, base: Path, number: int, seed: int, points: int) -> None:
    """Kill so many times; the report is `report.json` in the folder."""
    total = whole(recipe, base / "whole")
    draw = random.Random(seed)
    attempts: list[dict[str, Any]] = []
    run, left = 0, points
    while True:
        log = base / f"attempt-{len(attempts)}.log"
        at = draw.randint(1, total) if left else 0
        code, site = interrupted(recipe, base / f"run-{run}", number, at, log)
        attempts.append({"run": run, "at": at, "site": site, "code": code})
        if not site:
            if code:
                raise SystemExit(f"the run that went on ended with {code}:\n{attempts}\n{log.read_text()[-3000:]}")
            if not left:
                break
            run += 1
        else:
            left -= 1
    (base / "report.json").write_text(json.dumps({"events": total, "attempts": attempts, "runs": run + 1}))


if __name__ == "__main__":
    given, where, name, drawn, count = sys.argv[1:]
    main(Path(given), Path(where), getattr(signal, name), int(drawn), int(count))
