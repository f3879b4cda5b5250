"""How many threads BLAS has on a Linux CPU, by the models that a process computes.

In: the width of each model when it is loaded. Decided here: one thread as long as all of them are
narrow. A product of theirs is over before a second thread has begun, and between products, while
MLX computes what is not one, it waits by spinning (benchmarks/bench_threads.py). Whoever sets one
of the libraries' variables decides instead.
"""

import os
import sys

from threadpoolctl import threadpool_limits

from mlx_distill.machine import THREADS

# hidden numbers a token; below it a second thread took a third more processor time at least, to
# save a sixth of the clock's at most
WIDE = 384


class Threads:
    """Of this process: limited to one until a wide model is loaded, then free for good."""

    def __init__(self) -> None:
        self._limit: threadpool_limits | None = None
        self._free = sys.platform != "linux" or any(os.environ.get(name) for name in THREADS)

    def suit(self, width: int) -> None:
        """A model of `width` is going to be computed here."""
        if self._free:
            return
        if width < WIDE:
            self._limit = self._limit or threadpool_limits(limits=1, user_api="blas")
            return
        self._free = True
        if self._limit:
            self._limit.restore_original_limits()


threads = Threads()
