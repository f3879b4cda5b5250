"""Contenders as processes: started, asked for one repetition at a time over a pipe, stopped.

A worker answers every line it reads with one line of JSON. Whatever its libraries print goes to
stderr.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from mlx_distill.machine import THREADS

Numbers = dict[str, float]
Key = TypeVar("Key")


def start(
    script: str, words: list[str], threads: int = 0, hide_gpu: bool = False
) -> subprocess.Popen:
    """`python script worker words…`; threads 0 is the library's choice."""
    environment = {
        **os.environ,
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **(dict.fromkeys(THREADS, str(threads)) if threads else {}),
    }
    if hide_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, script, "worker", *words]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def ask(worker: subprocess.Popen) -> Numbers:
    """One repetition."""
    try:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended: the line below is empty
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"{' '.join(worker.args[2:])} ended with code {worker.wait()}")
    return json.loads(line)


def in_rounds(
    keys: Iterable[Key], rounds: int, attempt: Callable[[Key, list[Numbers]], bool]
) -> tuple[dict[Key, list[Numbers]], bool]:
    """What each key's attempts added to its list in all rounds, [] for one that failed (it returned
    False, and is not tried again); and whether Ctrl-C ended it: then of what was measured before.
    """
    found: dict[Key, list[Numbers]] = {key: [] for key in keys}
    failed: set[Key] = set()
    stopped = False
    try:
        for _ in range(rounds):
            for key, numbers in found.items():
                if key not in failed and not attempt(key, numbers):
                    failed.add(key)
    except KeyboardInterrupt:
        stopped = True
        found = {key: numbers for key, numbers in found.items() if numbers or key in failed}
    return {key: [] if key in failed else numbers for key, numbers in found.items()}, stopped


def stop(worker: subprocess.Popen) -> None:
    worker.terminate()
    worker.wait()


def serve(make: Callable[[], Callable[[], Numbers]]) -> None:
    """In the worker: `make` the repetition (imports, inputs), then repeat it for every line read."""
    asked = requests()
    repetition = make()
    for answer in asked:
        answer(repetition())


def requests() -> Iterator[Callable[[Numbers], None]]:
    """In the worker: for every line read, the function that answers it."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(numbers: Numbers) -> None:
        print(json.dumps(numbers), file=answers, flush=True)

    return (answer for _ in sys.stdin)


def summary(repetitions: list[Numbers]) -> dict[str, object]:
    """What a row keeps of its repetitions; empty cells for a contender that was skipped."""
    if not repetitions:
        names = (
            "repetitions",
            "seconds_min",
            "seconds_median",
            "cpu_seconds_min",
            "peak_bytes",
            "loss",
        )
        return dict.fromkeys(names, "")
    seconds = [r["seconds"] for r in repetitions]
    return {
        "repetitions": len(repetitions),
        "seconds_min": round(min(seconds), 4),
        "seconds_median": round(statistics.median(seconds), 4),
        "cpu_seconds_min": round(min(r["cpu_seconds"] for r in repetitions), 4),
        "peak_bytes": int(max(r["peak_bytes"] for r in repetitions)),
        "loss": round(repetitions[0]["loss"], 6),
    }
