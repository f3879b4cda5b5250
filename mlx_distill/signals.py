"""How a person, a script or a scheduler stops this program: Ctrl-C, SIGTERM, a terminal that
closes.

Decided here: all three mean the same, and one that is ignored stays ignored. A script's `&` starts
its children with SIGINT ignored, `nohup` with SIGHUP: who wrote that meant it.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# what a child is asked to stop with: a script's `&` does not make it deaf to it
POLITE = signal.SIGTERM


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While open, a polite kill or a terminal that closes raises `KeyboardInterrupt`, as Ctrl-C
    does.
    """
    with _handled(signal.default_int_handler):
        yield


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """While open, the first signal sets the event, the second one raises `KeyboardInterrupt`."""
    asked = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            signal.default_int_handler(number, frame)
        asked.set()

    with _handled(note):
        yield asked


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals have handlers in the main thread alone."""
    here = threading.current_thread() is threading.main_thread()
    before = {which: signal.getsignal(which) for which in STOPS if here}
    ours = [which for which, old in before.items() if old != signal.SIG_IGN]
    for which in ours:
        signal.signal(which, handler)
    try:
        yield
    finally:
        for which in ours:
            signal.signal(which, before[which])
