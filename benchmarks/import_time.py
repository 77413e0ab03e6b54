"""What `import taskkd` adds to `import torch`: CPU seconds, median of several fresh processes; bar 0.3 s.

python -m benchmarks.import_time [--rounds N] [--json FILE]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from benchmarks.figures import ROOT, Figure, Options, Part, parser, quartiles, run

MEASURE = "import time, {before}; start = time.process_time(); import {what}; print(time.process_time() - start)"


def once(what: str, before: str) -> float:
    """CPU seconds of an import after another, in a fresh process."""
    code = MEASURE.format(what=what, before=before)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout)


def added(options: Options) -> list[Figure]:
    """What taskkd and its command line add, beside torch itself."""
    rounds = options.count(3)
    cases = {"import taskkd": ("taskkd", "torch"), "the command line": ("taskkd.cli", "torch")}
    found = {title: quartiles([once(*case) for _ in range(rounds)]) for title, case in cases.items()}
    return [
        Figure.of("`import taskkd` after `import torch`", found["import taskkd"], unit="s", at_most=0.3),
        Figure.of("`import taskkd.cli` after `import torch`", found["the command line"], unit="s"),
        Figure.of("`import torch`, to compare", quartiles([once("torch", "sys") for _ in range(rounds)]), unit="s"),
    ]


PARTS = {"import": Part("CPU time of imports in fresh processes", added)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if it is over the bar."""
    return run(PARTS, parser(__doc__, PARTS).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
