"""math-verify in a process of its own.

Neither a signal nor a thread stops `9**9**9` inside of CPython's integers, and signals are the main
thread's alone. So a child compares; the kernel ends it after `SECONDS` of processor time (not of
the clock: a busy machine changes no verdict), and what it could not say in that time is not equal.
The next question starts another child.

A question is a line of JSON, `[gold, answer]`; an answer is a line, "1" or "0". `[gold]` asks
whether it can be read.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

SECONDS = 2


class Child:
    """One process that is started when it is first asked, and again when it has ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.others: list[subprocess.Popen | None] = []

    def ask(self, *expressions: str) -> bool:
        """Whether the child says yes; no where it ran out of time. One that was killed by others is
        asked once more.
        """
        with self.lock:
            for _ in range(2):
                line = self._reply(json.dumps(expressions) + "\n")
                if line or self._end() == -signal.SIGPROF:
                    break
            return line == "1\n"

    def _reply(self, question: str) -> str:
        if self.process is None:
            self.process = _start()
        try:
            assert self.process.stdin and self.process.stdout  # `_start` asks for both
            self.process.stdin.write(question)
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except OSError:  # it ended before it was asked
            return ""

    def close(self) -> None:
        with self.lock:
            self._end()

    def forget(self) -> None:
        """In a forked process: the child is its parent's."""
        self.lock = threading.Lock()
        self.others.append(self.process)
        self.process = None

    def _end(self) -> int:
        """End the child; its exit code, or the signal that it ended of."""
        process, self.process = self.process, None
        if process is None:
            return 0
        assert process.stdin and process.stdout
        with suppress(OSError):  # what the child did not read
            process.stdin.close()
        process.stdout.close()
        try:
            return process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _start() -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", "mlx_distill.verify.sympy_child"]
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        encoding="utf-8",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


_child = Child()
atexit.register(_child.close)
os.register_at_fork(after_in_child=_child.forget)


@lru_cache(4096)
def same(gold: str, answer: str) -> bool:
    """Whether two LaTeX expressions are equal to math-verify."""
    return _child.ask(gold, answer)


@lru_cache(4096)
def readable(expression: str) -> bool:
    """Whether math-verify can read a LaTeX expression."""
    return _child.ask(expression)


def main() -> None:
    """Answer questions until their end."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing else may be printed
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's; the end of its questions ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    from math_verify import parse, verify

    def parsed(expression: str) -> list:
        return parse(rf"\boxed{{{expression}}}", fallback_mode="no_fallback", parsing_timeout=None)

    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        gold, *answers = (parsed(expression) for expression in json.loads(line))
        told = bool(gold)
        if answers:
            told = bool(answers[0]) and verify(
                gold, answers[0], allow_set_relation_comp=True, timeout_seconds=None
            )
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write("1\n" if told else "0\n")
        replies.flush()


if __name__ == "__main__":
    main()
