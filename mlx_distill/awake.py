"""A machine that stays awake while this program works.

Decided here: a Mac that nobody touches falls asleep, and a run with it. `caffeinate` holds that off
until the work ends, or this process does, however it ends. A closed lid still sleeps.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_awake() -> Iterator[None]:
    """While open, a Mac does not fall asleep by itself."""
    holding = _caffeinate() if sys.platform == "darwin" else None
    try:
        yield
    finally:
        if holding:
            holding.terminate()
            holding.wait()


def _caffeinate() -> subprocess.Popen | None:
    """The system's own command; None where it cannot be started, which costs nothing but sleep."""
    command = ["caffeinate", "-i", "-w", str(os.getpid())]
    null = subprocess.DEVNULL
    try:
        return subprocess.Popen(
            command, stdin=null, stdout=null, stderr=null, start_new_session=True
        )
    except OSError:
        return None
