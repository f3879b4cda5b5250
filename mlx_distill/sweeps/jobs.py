"""Child processes of this program, side by side: as many at once as asked for and as memory holds.

In: `Job`s, each a command line of `mlx-distill`. Out: their exit codes, one by one as they end, and
a log file of each. Decided here: what may start when, how many threads each gets, and what Ctrl-C
does: every child is asked to save and stop, and all are waited for. A child has a process of its
own so that one that fails, or that the system kills, takes no other with it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.machine import JOBS, THREADS
from mlx_distill.processes import program
from mlx_distill.signals import POLITE

PROGRAM = program()
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """`mlx-distill ARGUMENTS…`, its output in `log`. `peak_bytes` is what it is expected to need;
    `busy` says whether another process is at the same work, so that it has to wait.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    peak_bytes: float = 0.0
    busy: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Ended:
    """A job that ended: its exit code (negative: the signal that killed it) and how long it took;
    `stopped` if we asked it to.
    """

    job: Job
    code: int
    seconds: float
    stopped: bool = False

    @property
    def trouble(self) -> str:
        """Why it failed in one line, the last error of its log; "" where it did not, or was asked
        to stop.
        """
        if self.code == 0 or self.stopped:
            return ""
        lines = self.job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = [line for line in lines if line.startswith("error")]
        if said:
            return said[-1].removeprefix("error: ")
        if self.code < 0:
            return (
                f"killed by {signal.Signals(-self.code).name}; {self.job.log} says what it did last"
            )
        return (
            f"exit code {self.code}: {lines[-1] if lines else 'it said nothing'} (all of it: "
            f"{self.job.log})"
        )


def side_by_side(
    jobs: Sequence[Job],
    at_once: int = 1,
    memory_bytes: float = 0,
    say: Callable[[str], None] = lambda text: None,
    watch: Callable[[Job], None] = lambda job: None,
) -> Iterator[Ended]:
    """Run all jobs in their order, at most `at_once` together and no more than `memory_bytes` hold
    (0: not known), and yield each as it ends. One whose work another process is at waits until that
    is through. `watch` is called with each that runs, again and again.

    On Ctrl-C the children get it too; those that end then are still yielded, and
    `KeyboardInterrupt` follows.
    """
    waiting = list(jobs)
    running: dict[Job, tuple[subprocess.Popen, float]] = {}
    environment = _environment(at_once)
    try:
        while waiting or running:
            job = _next(waiting, list(running), at_once, memory_bytes, say)
            if job:
                waiting.remove(job)
                running[job] = _start(job, environment), time.monotonic()
            yield from _ended(running)
            for one in running:
                watch(one)
            if not job:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        for process, _ in running.values():
            process.send_signal(POLITE)
        while running:
            yield from _ended(running, stopped=True)
            time.sleep(POLL_SECONDS)
        raise
    finally:  # whoever reads us has stopped, for whatever reason: nothing is left behind
        for process, _ in running.values():
            process.send_signal(POLITE)
        for process, _ in running.values():
            process.wait()


def _next(
    waiting: list[Job],
    running: list[Job],
    at_once: int,
    memory_bytes: float,
    say: Callable[[str], None],
) -> Job | None:
    """The first job that may start now."""
    if not waiting or len(running) >= at_once:
        return None
    free = next((job for job in waiting if not job.busy()), None)
    if free is None:
        if not running:
            say(f"{waiting[0].name}: another process is at it; waiting")
            while all(job.busy() for job in waiting):
                time.sleep(POLL_SECONDS)
        return None
    needed = sum(job.peak_bytes for job in running) + free.peak_bytes
    return free if not running or not memory_bytes or needed <= memory_bytes else None


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen:
    """A session of its own, so that the terminal's Ctrl-C comes once, through us."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [*PROGRAM, *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _ended(
    running: dict[Job, tuple[subprocess.Popen, float]], stopped: bool = False
) -> Iterator[Ended]:
    for job, (process, started) in list(running.items()):
        if process.poll() is not None:
            del running[job]
            yield Ended(
                job,
                process.returncode,
                time.monotonic() - started,
                stopped and process.returncode != 0,
            )


def _environment(at_once: int) -> dict[str, str]:
    """Each child gets its share of the cores, unless the user has said how many threads."""
    share = str(max(1, (os.cpu_count() or 1) // at_once))
    return {
        **(dict.fromkeys(THREADS, share) | {JOBS: str(at_once)} if at_once > 1 else {}),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }
