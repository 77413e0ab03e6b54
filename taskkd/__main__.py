"""`taskkd` and `python -m taskkd`: run the command line and end with the exit code of what went wrong.

0 well, 2 usage or recipe, 3 data or files, 4 non-finite loss, 75 time is up, 130 / 143 signals.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

__all__ = ["main"]


def _stop(number: int, _: Any) -> None:
    """End at once; a training, which saves a checkpoint first, has its own handler while it lasts."""
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line; an error that the user can act on is one sentence (`--debug` shows the traceback)."""
    from taskkd.cli import app
    from taskkd.errors import TaskkdError

    debug = "--debug" in sys.argv
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _stop)
    code = 0
    try:
        app(argv)
    except SystemExit as stop:
        if stop.code in (130, 143):
            print("taskkd: stopped; the same command goes on from here.", file=sys.stderr)
        elif stop.code == 75:
            print("taskkd: the time is up (wall_time or SIGUSR1); the same command goes on from here.", file=sys.stderr)
        raise
    except TaskkdError as error:
        if debug:
            raise
        print(f"taskkd: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("taskkd: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        code = 130
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"taskkd: {where}{error.strerror or error}.", file=sys.stderr)
        code = 3
    sys.exit(code)


if __name__ == "__main__":
    main()
