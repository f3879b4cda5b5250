"""The program's first lines: before anything is imported, Ctrl-C already ends it with one line.

Nothing is imported from the working folder, which `python -m` puts first on the path: any `yaml.py`
that happens to lie there would be run. This package is found already, wherever it lies.
"""

import os
import signal
import sys
from contextlib import suppress

with suppress(OSError):  # a working folder that is gone
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]


def main() -> None:
    """The `mlx-distill` command."""
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # it may be ignored, as in a script's background
        signal.signal(signal.SIGINT, _stop_at_once)
    from mlx_distill.cli import main as command_line

    command_line()


def _stop_at_once(*_: object) -> None:
    """While modules are imported nothing is under way that could be lost, and an exception might be
    swallowed by one of them.
    """
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
